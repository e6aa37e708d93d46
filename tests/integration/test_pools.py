"""Pools: a worker of jobs starts only with one that can run them; other workers use any pool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery

from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of


@pytest.fixture(scope="module")
def environment(server: embedded.Server) -> dict[str, str]:
    """The environment of a worker of the app."""
    return environment_of(server.url, "pools", POOLS_BROKER=server.url.removesuffix("/0") + "/9")


def start(environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Start a worker that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", APP, "worker", "-c", "1", *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


APP = "tests.integration.pools_app"
THREADS, OWN = "worker_pool='threads'", "worker_pool='custom'"
SPAWN = "worker_pool_start_method='spawn'"


@pytest.mark.parametrize(
    ("options", "variables", "named"),
    [
        (["-P", "threads"], {}, THREADS),
        ([], {"POOLS_POOL": f"{APP}:OwnThreads"}, f"worker_pool='{APP}:OwnThreads'"),
        (["-P", "custom"], {"CELERY_CUSTOM_WORKER_POOL": f"{APP}:OwnThreads"}, OWN),
        (["-Q", "celery,pools.low"], {"POOLS_METHOD": "spawn"}, SPAWN),
    ],
)
def test_a_worker_of_jobs_is_refused_with_a_pool_that_cannot_run_them(
    environment: dict[str, str], options: list[str], variables: dict[str, str], named: str
) -> None:
    done = start({**environment, **variables}, *options)

    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"Error: {named}: jobs run in the pools prefork")
    assert "Traceback" not in done.stderr
    assert "-Q celery" in line
    assert "ready" not in done.stdout


@pytest.mark.parametrize(
    ("name", "options"),
    [("threads", ["-P", "threads"]), ("spawn", ["--pool-start-method", "spawn"])],
)
def test_a_worker_of_other_queues_starts_in_any_pool(
    environment: dict[str, str], logs: Path, name: str, options: list[str]
) -> None:
    log = logs / f"pools-{name}.log"
    control = Celery("asks", broker=environment["POOLS_BROKER"], set_as_current=False).control
    with embedded.worker(
        environment, app=APP, log=log, slots=1, options=["-Q", "celery", *options]
    ):
        assert _run_own_task(environment) == 42
        [answer] = control.add_consumer("pools.low", reply=True, timeout=5, limit=1)
        assert "cannot run jobs" in str(answer)
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (["-P", "solo"], {}),
        (["-P", "custom"], {"CELERY_CUSTOM_WORKER_POOL": f"{APP}:OwnProcesses"}),
    ],
)
def test_jobs_run_in_solo_and_in_every_pool_that_forks(
    environment: dict[str, str], logs: Path, options: list[str], variables: dict[str, str]
) -> None:
    environment = {**environment, **variables}
    with (
        embedded.worker(environment, app=APP, log=logs / "pools.log", slots=1, options=options),
        client_of(environment) as client,
    ):
        client.app.conf.broker_url = environment["POOLS_BROKER"]
        client.app.conf.broker_transport_options = {}
        assert client.execute(operation="sum", items=range(100), timeout=30).output == 4950


def _run_own_task(environment: dict[str, str]) -> int:
    code = f"from {APP} import own; print(own.delay(21).get(timeout=30))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)
