"""Pool processes that end by a limit of tasks or memory: they leave no error in the log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of

APP = "tests.integration.pools_app"
CODE = f"""
from {APP} import own
print(sum(each.get(timeout=60) for each in [own.delay(each) for each in range(8)]))
"""


@pytest.mark.parametrize("limit", ["--max-tasks-per-child=1", "--max-memory-per-child=1000"])
def test_a_recycled_process_is_not_logged_as_killed(
    server: embedded.Server, logs: Path, limit: str
) -> None:
    environment = environment_of(
        server.url, f"recycled{limit[6]}", POOLS_BROKER=server.url.removesuffix("/0") + "/11"
    )
    log = logs / f"recycled{limit[6]}.log"
    with (
        embedded.worker(environment, app=APP, log=log, slots=2, options=[limit], level="INFO"),
        client_of(environment) as client,
    ):
        client.app.conf.broker_url = environment["POOLS_BROKER"]
        client.app.conf.broker_transport_options = {}
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.stdout == "56\n", done.stderr
        assert client.execute(operation="sum", items=range(100), timeout=60).output == 4950

    written = log.read_text()
    assert len({*re.findall(r"ForkPoolWorker-\d+", written)}) > 4, "processes were recycled"
    assert "exited with" not in written
    assert "died of" not in written
