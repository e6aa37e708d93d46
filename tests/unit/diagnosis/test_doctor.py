"""The doctor's checks of this machine: packages with our names, and versions."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from resilience.bucket import Rate, TokenBucket
from rlm_tasks import import_path
from rlm_tasks.diagnosis import doctor
from rlm_tasks.diagnosis.doctor import decided_alone, packages, versions
from rlm_tasks.version import __version__
from tests.unit.test_import_path import theirs
from tests.unit.world import World, world

__all__ = ["theirs", "world"]


def test_a_package_behind_ours_is_a_warning(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [each.state for each in packages()] == ["ok"]
    monkeypatch.setattr(sys, "path", [*sys.path, str(theirs)])

    [found] = packages()
    assert found.state == "warning"
    assert f"{theirs}/scheduler/__init__.py" in found.found
    assert "PYTHONPATH" in found.advice


def test_a_package_in_place_of_ours_is_a_fault_with_advice(
    theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(theirs), *sys.path])

    [found] = packages()
    assert found.state == "fault", (
        "this process has our package; the next one with this path does not"
    )
    assert str(import_path.HOME) in found.advice


def test_the_required_versions_are_installed() -> None:
    [found] = versions(doctor.requirements())

    assert found.state == "ok"
    assert f"RLM Tasks {__version__}, celery {metadata.version('celery')}, kombu" in found.found


@pytest.mark.parametrize(
    ("asked", "state", "found", "advice"),
    [
        (
            ["celery>=999"],
            "fault",
            f"celery {metadata.version('celery')}",
            "pip install 'celery>=999'",
        ),
        (
            ["celery<1,>=0.5", "no-such-distribution>=2"],
            "fault",
            "no-such-distribution is missing",
            "'no-such-distribution>=2'",
        ),
        (["no-such-distribution>=2; extra == 'plots'"], "ok", "celery", ""),
        (None, "warning", "is on the import path but not installed", "pip install -e ."),
    ],
)
def test_wrong_versions_are_reported_with_the_command_to_type(
    asked: list[str] | None, state: str, found: str, advice: str
) -> None:
    [said] = versions(asked)

    assert said.state == state
    assert found in said.found
    assert advice in said.advice


def test_another_copy_of_this_package_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "__version__", "99.0")

    assert [each.state for each in versions([])] == ["warning"]


def test_decisions_of_guards_without_redis_are_a_warning(world: World) -> None:
    store = world.store()
    bucket = TokenBucket("llm", store, calls=Rate(10))
    bucket.acquire()
    assert list(decided_alone(store)) == []
    store.lost = True
    bucket.acquire()
    store.lost = False
    world.sleep(2)
    bucket.acquire()
    world.sleep(600)

    [found] = decided_alone(store)
    assert (found.check, found.state) == ("guards", "warning")
    assert found.found == (
        "guards decided 1 times without Redis (bucket 1), the last time 10 minutes ago"
    )
