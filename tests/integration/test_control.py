"""``celery inspect`` and ``celery control``: reports of a worker, and commands to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlm_tasks import Client
from rlm_tasks.testing import embedded
from tests.integration.conftest import ROOT, SLOTS, client_of, environment_of
from tests.support import wait_until


@pytest.fixture(scope="module")
def environment_here(server: embedded.Server) -> dict[str, str]:
    modules = "tests.integration.ops,tests.integration.guarded_ops"
    return environment_of(server.url, "controlled", pressed=True, RLM_OPERATIONS=modules)


@pytest.fixture(scope="module")
def controlled(environment_here: dict[str, str], logs: Path) -> Iterator[Client]:
    """A client of a worker for remote control."""
    with (
        embedded.worker(environment_here, log=logs / "controlled.log", slots=SLOTS),
        client_of(environment_here) as own,
    ):
        yield own


def ask(client: Client, command: str, **arguments: Any) -> Any:
    """Send a command to the worker; return its answer."""
    answers = client.app.control.broadcast(
        command, arguments=arguments, reply=True, timeout=10, limit=1
    )
    [[answer]] = [list(each.values()) for each in answers]
    return answer


def celery(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Celery's command line."""
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "rlm_tasks", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("group", "commands"),
    [
        ("inspect", ["breakers", "limits", "pressure", "slots"]),
        (
            "control",
            [
                "force_pressure <normal|elevated|high|critical|emergency>",
                "release_pressure",
                "reset_breaker <service>",
                "rlm_drain",
                "rlm_resume",
                "rlm_recall",
            ],
        ),
    ],
)
def test_the_commands_are_listed_with_their_arguments(
    environment_here: dict[str, str], group: str, commands: list[str]
) -> None:
    listed = celery(environment_here, group, "--list")

    assert listed.returncode == 0, listed.stderr
    for each in commands:
        assert f"\n  {each}" in listed.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["force_pressure", "hihg"],
            "level='hihg': is no pressure level; there are normal, elevated",
        ),
        (["force_pressure", "high", "soon"], "for_s='soon': give a number of seconds above 0"),
    ],
)
def test_the_command_line_refuses_a_wrong_argument(
    environment_here: dict[str, str], arguments: list[str], text: str
) -> None:
    done = celery(environment_here, "control", *arguments)

    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_reports_pressure_slots_and_limits(controlled: Client) -> None:
    pressure, slots = ask(controlled, "pressure"), ask(controlled, "slots")

    assert pressure["host"]["slots"] == SLOTS
    assert pressure["acts_on"] in ("normal", "elevated", "high", "critical", "emergency")
    assert (slots["total"], slots["draining"], slots["nodes"]) == (SLOTS, False, [])
    assert "controlled.normal" in slots["queues"]
    assert {each["service"] for each in ask(controlled, "limits")} >= {"metered", "narrow"}


def test_the_slots_command_lists_running_nodes_with_their_process(controlled: Client) -> None:
    job = controlled.submit(operation="nap", items=[200] * 50, type="sequential")
    wait_until(lambda: job.progress().done >= 1)

    [held] = ask(controlled, "slots")["nodes"]

    assert (held["job"], held["pid"] > 0) == (job.id, True)
    job.cancel()
    job.wait(timeout=10)


def test_a_breaker_is_closed_by_name(controlled: Client) -> None:
    controlled.create_circuit_breaker("by-name", failure_threshold=1).open()
    assert ask(controlled, "breakers")["by-name"]["state"] == "open"

    assert ask(controlled, "reset_breaker", name="by-name") == {"ok": "by-name is closed"}

    wait_until(lambda: controlled.breakers.status()["by-name"]["state"] == "closed")
    assert (
        "there is no breaker 'nobody'; there are:"
        in ask(controlled, "reset_breaker", name="nobody")["error"]
    )


def test_remote_control_starts_and_ends_a_drill(controlled: Client) -> None:
    assert ask(controlled, "force_pressure", level="high", for_s=60) == {
        "ok": "all workers act on high, for 60 s"
    }
    wait_until(lambda: ask(controlled, "pressure")["acts_on"] == "high")

    assert "ok" in ask(controlled, "release_pressure")

    assert controlled.status().forced == ""
    assert "no pressure level" in ask(controlled, "force_pressure")["error"]


def test_a_drained_worker_hands_over_its_nodes_until_it_resumes(
    controlled: Client,
) -> None:
    job = controlled.submit(operation="nap", items=[50] * 200, type="sequential")
    wait_until(lambda: job.progress().done >= 2)

    assert "no longer consumes controlled." in ask(controlled, "rlm_drain")["ok"]
    wait_until(lambda: ask(controlled, "slots")["nodes"] == [])
    slots = ask(controlled, "slots")
    assert (slots["draining"], slots["free"], slots["queues"]) == (True, 0, [])
    done = job.progress().done
    assert "ok" in ask(controlled, "rlm_drain"), "a second drain changes nothing"

    assert "controlled.normal" in ask(controlled, "rlm_resume")["ok"]
    wait_until(lambda: job.progress().done > done)
    assert ask(controlled, "rlm_resume") == {"ok": "it was not drained"}
    assert set(ask(controlled, "slots")["queues"]) == {
        f"controlled.{each}" for each in ("critical", "high", "normal", "low")
    }
    job.cancel()
    assert job.wait(timeout=10) == "cancelled"
