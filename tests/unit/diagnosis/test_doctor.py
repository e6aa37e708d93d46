"""Whose packages are found, and whether versions fit: what the doctor says of the machine at
hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rlm_tasks import import_path
from rlm_tasks.diagnosis import doctor
from rlm_tasks.diagnosis.doctor import packages, versions
from rlm_tasks.version import __version__

LOOK = "from rlm_tasks import import_path as look; print(look.in_our_place(), look.behind_ours())"


def looked(*path: Path, first: str = "") -> str:
    """Return what a new process finds, with these folders in front of its path."""
    done = subprocess.run(
        [sys.executable, "-c", f"{first}{LOOK}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=path[0],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
    )
    return done.stdout.strip()


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder with a user's own package of our name, and with a folder that is no package."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "resilience").mkdir()
    return tmp_path


def test_a_package_in_place_of_ours_is_found_where_nothing_of_ours_can_be_imported(
    theirs: Path,
) -> None:
    said = looked(theirs, import_path.HOME)

    assert str({"scheduler": f"{theirs}/scheduler/__init__.py"}) in said
    assert "resilience" not in said, "a folder without modules takes no package's place"


def test_a_package_that_was_imported_in_place_of_ours_is_found_though_the_path_is_mended(
    theirs: Path,
) -> None:
    mended = f"import sys, scheduler; sys.path.remove({str(theirs)!r}); sys.path[:] = [each for each in sys.path if each]; "

    assert (
        looked(theirs, import_path.HOME, first=mended)
        == f"{ {'scheduler': f'{theirs}/scheduler/__init__.py'} } {{}}"
    )


def test_a_package_behind_ours_may_be_in_front_tomorrow(
    theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [each.state for each in packages()] == ["ok"]
    monkeypatch.setattr(sys, "path", [*sys.path, str(theirs)])

    [found] = packages()
    assert found.state == "warning"
    assert f"{theirs}/scheduler/__init__.py" in found.found
    assert "PYTHONPATH" in found.advice


def test_a_package_in_place_of_ours_is_a_fault_with_what_to_do(
    theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(theirs), *sys.path])

    [found] = packages()
    assert found.state == "fault", "this process has ours; the next one, with this path, has not"
    assert str(import_path.HOME) in found.advice


def test_versions_that_our_own_metadata_asks_for_are_here() -> None:
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
        (None, "warning", "is not installed, only on the import path", "pip install -e ."),
    ],
)
def test_versions_that_do_not_fit_are_named_with_what_to_type(
    asked: list[str] | None, state: str, found: str, advice: str
) -> None:
    [said] = versions(asked)

    assert said.state == state
    assert found in said.found
    assert advice in said.advice


def test_another_copy_of_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "__version__", "99.0")

    assert [each.state for each in versions([])] == ["warning"]
