"""The platform installed in a user's Celery app: docs/examples/existing_app.

It is run as docs/existing_apps.md says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from rlm_tasks.testing import embedded
from tests.integration.conftest import ROOT, SLOTS, environment_of
from tests.support import wait_until

EXAMPLE = ROOT / "docs/examples/existing_app"
JOBS = ["shop.critical", "shop.high", "shop.normal", "shop.low"]


@dataclass
class Shop:
    """The example shop: its environment and files, and an app without tasks to inspect workers."""

    environment: dict[str, str]
    folder: Path
    app: Celery

    def run(self, *command: str) -> str:
        """Run Python in a process of the shop, and return its output."""
        done = run(self.environment, *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def inspect(self, command: str) -> dict[str, Any]:
        """Return the answers of the shop's workers, by the first part of their names."""
        answers = getattr(self.app.control.inspect(timeout=5, limit=2), command)()
        return {name.partition("@")[0]: answer for name, answer in answers.items()}


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in this environment."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def shop(server: embedded.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The shop with two workers: one with beat for all queues, one for the shop's own queues."""
    folder, broker = tmp_path_factory.mktemp("shop"), server.url.removesuffix("/0") + "/5"
    environment = environment_of(
        server.url,
        "shop",
        RLM_OPERATIONS="shop.operations",
        RLM_PRESSURE__MONITOR_S="0.5",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(EXAMPLE)]),
        SHOP_BROKER_URL=broker,
        SHOP_FOLDER=str(folder),
    )
    app = Celery("asks", broker=broker, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": "shop:"}
    beat = ["-B", "-s", str(folder / "schedule")]
    with (
        embedded.worker(
            environment,
            app="shop",
            log=folder / "all.log",
            slots=SLOTS,
            options=[*beat, "-n", "all@%h"],
            level="INFO",
        ),
        embedded.worker(
            environment,
            app="shop",
            log=folder / "own.log",
            slots=1,
            options=["-Q", "celery,mail", "-n", "own@%h"],
        ),
    ):
        yield Shop(environment, folder, app)
    app.close()


def test_the_web_process_sends_tasks_and_submits_jobs_through_the_same_app(shop: Shop) -> None:
    printed = re.fullmatch(r"(\d+) cents in (\d+) splits\n", shop.run("-m", "shop.web"))

    assert printed is not None
    assert int(printed[1]) == sum(100 + order % 7 for order in range(20_000))
    assert int(printed[2]) > 0, "the job has split, although the shop has no result backend"
    wait_until(
        lambda: (
            (shop.folder / "receipt-1.txt").exists() and (shop.folder / "offer-ada.txt").exists()
        )
    )


def test_workers_consume_job_queues_unless_an_option_names_others(shop: Shop) -> None:
    queues = {
        name: [queue["name"] for queue in found]
        for name, found in shop.inspect("active_queues").items()
    }

    assert queues == {"all": ["celery", *JOBS], "own": ["celery", "mail"]}
    prefetch = {name: found["prefetch_count"] for name, found in shop.inspect("stats").items()}
    assert prefetch == {"all": SLOTS, "own": 4}, (
        "one message a slot with job queues, Celery's default without"
    )


def test_beat_keeps_the_apps_schedule_and_adds_the_monitor(shop: Shop) -> None:
    log = shop.folder / "all.log"
    wait_until(lambda: "Sending due task rlm.monitor" in log.read_text())
    schedule = shop.inspect("conf")["all"]["beat_schedule"]

    assert {*schedule} == {"count-stock", "rlm.monitor"}


def test_only_a_worker_that_runs_jobs_warns_about_its_settings(shop: Shop) -> None:
    warning = "result_backend is not Redis: partial answers are merged when a job ends"

    assert warning in (shop.folder / "all.log").read_text()
    assert warning not in (shop.folder / "own.log").read_text()


def test_celery_commands_work_with_the_users_app(shop: Shop) -> None:
    assert "rlm.node" in shop.run("-m", "celery", "-A", "shop", "inspect", "registered")
    assert isinstance(
        json.loads(shop.run("-m", "celery", "-A", "shop", "rlm", "jobs", "--json")), list
    )


@pytest.mark.parametrize("app", ["shop", "rlm_tasks"])
def test_a_wrong_variable_ends_a_celery_command_with_an_error(app: str) -> None:
    environment = {"RLM_SLOTS": "many", "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLE)])}
    done = run(environment, "-m", "celery", "-A", app, "report")

    assert done.returncode == 2
    assert "RLM_SLOTS='many'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_program_can_catch_the_error_of_a_wrong_variable() -> None:
    code = """
import click
from rlm_tasks import InvalidRequest

@click.command()
def serve():
    try:
        import rlm_tasks.celery
    except InvalidRequest as error:
        print("caught", error)

serve()
"""
    done = run({"RLM_SLOTS": "many", "PYTHONPATH": str(ROOT)}, "-c", code)

    assert done.stdout.startswith("caught"), done.stderr
