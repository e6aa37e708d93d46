"""A worker's port for metrics and health."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from celery import Celery

from rlm_tasks.installation import install
from rlm_tasks.settings.model import Settings
from rlm_tasks.telemetry.worker_port import (
    LEDGER_AWAY_S,
    STUCK_S,
    ProbeInputs,
    not_alive,
    not_ready,
)

ROOT = Path(__file__).parents[3]


WELL = ProbeInputs(supervisor_s=0.5, loop_s=1.0, ledger_s=0.5, consuming=True, draining=False)


@pytest.mark.parametrize(
    ("probed", "alive", "ready"),
    [
        (WELL, "", ""),
        (replace(WELL, draining=True), "", "it drains"),
        (
            replace(WELL, consuming=False),
            "",
            "it is not connected to its broker, or does not consume yet",
        ),
        (replace(WELL, ledger_s=LEDGER_AWAY_S + 1), "", "the ledger has not answered for 6 s"),
        (
            replace(WELL, loop_s=STUCK_S + 1),
            "its event loop has been stuck for 121 s",
            "its event loop has been stuck for 121 s",
        ),
        (
            replace(WELL, supervisor_s=STUCK_S + 1),
            "its supervisor has been stuck for 121 s",
            "its supervisor has been stuck for 121 s",
        ),
        (
            replace(WELL, supervisor_s=float("inf")),
            "its supervisor has been stuck for inf s",
            "its supervisor has been stuck for inf s",
        ),
    ],
)
def test_a_worker_is_alive_while_its_threads_run_and_ready_while_it_consumes(
    probed: ProbeInputs, alive: str, ready: str
) -> None:
    assert (not_alive(probed), not_ready(probed)) == (alive, ready)


def test_workers_of_every_app_have_the_option() -> None:
    app = install(Celery("somebody-s", set_as_current=False), Settings())

    [option] = [each for each in app.user_options["worker"] if each.name == "metrics_port"]
    assert (option.default, Settings().metrics.address) == (8000, "127.0.0.1")


def test_clients_import_neither_an_http_server_nor_prometheus() -> None:
    code = (
        "import sys, rlm_tasks.client.client; print([each for each in ('prometheus_client', "
        "'wsgiref') if each in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"
