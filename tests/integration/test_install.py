"""A small app of somebody's, with the platform installed: docs/examples/existing_app, run as
docs/existing_apps.md says.
"""

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
    """What the tests know of the shop: how its processes are configured, what they write, and whom
    they hear.
    """

    environment: dict[str, str]
    folder: Path
    app: Celery

    def run(self, *command: str) -> str:
        """Run Python in a process of the shop's, and return what it prints."""
        done = run(self.environment, *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def asked(self, what: str) -> dict[str, Any]:
        """Ask the shop's workers, by the first part of their names."""
        answers = getattr(self.app.control.inspect(timeout=5, limit=2), what)()
        return {name.partition("@")[0]: answer for name, answer in answers.items()}


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with an environment."""
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
    """The shop, with a worker for all queues that is its beat, too, and one for its own."""
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
    told = re.fullmatch(r"(\d+) cents in (\d+) splits\n", shop.run("-m", "shop.web"))

    assert told is not None
    assert int(told[1]) == sum(100 + order % 7 for order in range(20_000))
    assert int(told[2]) > 0, "the job has split, although the shop has no result backend"
    wait_until(
        lambda: (
            (shop.folder / "receipt-1.txt").exists() and (shop.folder / "offer-ada.txt").exists()
        )
    )


def test_workers_consume_their_queues_and_ours_unless_told_otherwise(shop: Shop) -> None:
    queues = {
        name: [queue["name"] for queue in found]
        for name, found in shop.asked("active_queues").items()
    }

    assert queues == {"all": ["celery", *JOBS], "own": ["celery", "mail"]}
    prefetch = {name: found["prefetch_count"] for name, found in shop.asked("stats").items()}
    assert prefetch == {"all": SLOTS, "own": 4}, (
        "one message a slot where jobs run, and Celery's default elsewhere"
    )


def test_beat_sends_what_their_schedule_says_and_has_the_level_worked_out(shop: Shop) -> None:
    log = shop.folder / "all.log"
    wait_until(lambda: "Sending due task rlm.monitor" in log.read_text())
    schedule = shop.asked("conf")["all"]["beat_schedule"]

    assert {*schedule} == {"count-stock", "rlm.monitor"}


def test_a_worker_names_what_stands_in_the_way_of_jobs_if_it_runs_them(shop: Shop) -> None:
    said = "result_backend is no Redis: partial answers are merged when a job ends"

    assert said in (shop.folder / "all.log").read_text()
    assert said not in (shop.folder / "own.log").read_text()


def test_celery_commands_work_with_their_app(shop: Shop) -> None:
    assert "rlm.node" in shop.run("-m", "celery", "-A", "shop", "inspect", "registered")
    assert isinstance(
        json.loads(shop.run("-m", "celery", "-A", "shop", "rlm", "jobs", "--json")), list
    )


@pytest.mark.parametrize("app", ["shop", "rlm_tasks"])
def test_a_wrong_variable_ends_a_celery_command_with_a_sentence(app: str) -> None:
    environment = {"RLM_SLOTS": "many", "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLE)])}
    done = run(environment, "-m", "celery", "-A", app, "report")

    assert done.returncode == 2
    assert "RLM_SLOTS='many'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_wrong_variable_is_an_error_that_a_program_can_catch() -> None:
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
