"""The logs of real workers and of beat."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlm_tasks import Client, Job
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

APP = "tests.integration.logged_app"
OPERATIONS = f"tests.integration.ops,{APP}"


@contextmanager
def logging_worker(server: embedded.Server, log: Path, **environment: str) -> Iterator[Client]:
    # On a busy machine a short lease could end, and items would run and log twice.
    settings = environment_of(server.url, log.stem, RLM_LEDGER__LEASE_S="30")
    settings |= {"RLM_OPERATIONS": OPERATIONS, **environment}
    with client_of(settings) as client, embedded.worker(settings, log=log, app=APP, level="INFO"):
        yield client


def lines_of(log: Path) -> list[dict[str, Any]]:
    """Return all lines after the banner, which Celery prints to stdout."""
    first = (text := log.read_text()).index("\n{") + 1
    return [json.loads(line) for line in text[first:].splitlines()]


def finished(client: Client, operation: str, items: list[Any]) -> Job:
    job = client.submit(operation=operation, items=items, options={"continue_on_error": True})
    job.result(timeout=30)
    return job


def test_every_line_is_json_with_job_and_node(
    server: embedded.Server, logs: Path, tmp_path: Path
) -> None:
    log = logs / "logged-json.log"
    with logging_worker(server, log, RLM_LOG_FORMAT="json") as client:
        logged = finished(client, "log_item", [3, -1, 5])
        in_flight = [finished(client, "log_item_async", list(range(7))) for _ in range(3)]
        erred = finished(client, "log_error", ["nowhere"])
        finished(client, "die_once_at_marker", [str(tmp_path / "died")])
        wait_until(lambda: "exited with 'signal 9" in log.read_text())
        nodes = {node.id for node in logged.tree()}
        lines = lines_of(log)

    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert {"level", "logger", "message", "process", "worker"} <= set(line)
        assert "not_json" not in line
    of_operations = [line for line in lines if line["logger"] == APP]
    of_items = [line for line in of_operations if line["job"] == logged.id]
    # The order is not fixed: another process may have run some of the items.
    squares = [("item -1", 1), ("item 3", 9), ("item 5", 25)]
    assert sorted((line["message"], line["squared"]) for line in of_items) == squares
    assert {line["node"] for line in of_items} <= nodes
    assert {(line["operation"], line["task"], line["level"]) for line in of_items} == {
        ("log_item", "rlm.node", "INFO")
    }
    for job in in_flight:
        assert sorted(line["message"] for line in of_operations if line["job"] == job.id) == [
            f"item {n}" for n in range(7)
        ]
    [of_error] = [line for line in of_operations if line["job"] == erred.id]
    assert of_error["message"] == "not found"
    assert of_error["exception"].startswith("Traceback (most recent call last):\n")
    assert of_error["exception"].endswith("KeyError: 'nowhere'")
    [printed] = [line for line in lines if line["logger"] == "celery.redirected"]
    assert (printed["message"], printed["job"], printed["level"]) == (
        "printed\nin two lines",
        erred.id,
        "WARNING",
    )
    assert [line["level"] for line in lines if "exited with 'signal 9" in line["message"]] == [
        "ERROR"
    ]
    of_nodes = [
        line
        for line in lines
        if line["logger"] == "rlm_tasks.engine.node" and line["job"] == logged.id
    ]
    assert sum("1 failed" in line["message"] for line in of_nodes) == 1


def test_a_line_of_text_ends_with_job_and_node(server: embedded.Server, logs: Path) -> None:
    log = logs / "logged-text.log"
    with logging_worker(server, log) as client:
        job = finished(client, "log_item", [3])
        wait_until(lambda: "Job ended" in log.read_text())
        text = log.read_text()

    header = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}: INFO/ForkPoolWorker-\d\] "
    where = rf" \[job {job.id} root\]$"
    assert re.search(rf"^{header}item 3{where}", text, re.MULTILINE)
    assert re.search(
        rf"^{header}Items 0 to 0 of log_item done in \d\.\d\d s, 0 failed{where}",
        text,
        re.MULTILINE,
    )
    assert re.search(
        rf"^{header}Job ended as succeeded: 1 item of log_item{where}", text, re.MULTILINE
    )
    assert f"[{job.id}]" not in text, "Celery's line for each message has level DEBUG"
    assert re.search(r"^\[[^]]+INFO/MainProcess\] celery@\S+ ready\.$", text, re.MULTILINE)


def test_a_users_logging_configuration_stays_and_can_use_the_ids(
    server: embedded.Server, logs: Path
) -> None:
    log = logs / "logged-own.log"
    with logging_worker(server, log, RLM_LOG_FORMAT="json", OWN_LOGGING="1") as client:
        job = finished(client, "log_item", [3])
        lines = log.read_text().splitlines()

    assert f"own|{job.id}|root|item 3" in lines
    assert any(re.fullmatch(r"own\|\|\|celery@\S+ ready\.", line) for line in lines)
    assert not [line for line in lines if line.startswith("{")]


def test_the_log_of_beat_is_json_too(server: embedded.Server, tmp_path: Path) -> None:
    environment = environment_of(
        server.url, "logged-beat", RLM_LOG_FORMAT="json", RLM_PRESSURE__MONITOR_S="0.2"
    )
    command = [sys.executable, "-m", "celery", "-q", "-A", APP, "beat", "-l", "INFO", "--pidfile="]
    with (tmp_path / "beat.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        wait_until(lambda: "rlm.monitor" in (tmp_path / "beat.log").read_text())
        # Celery logs a signal that interrupts a tick as critical, so the end does not count.
        written, _, _ = (tmp_path / "beat.log").read_text().rpartition("\n")
    finally:
        embedded.end(process)

    lines = [json.loads(line) for line in written.splitlines()]
    assert "beat: Starting..." in [line["message"] for line in lines]
    assert {line["level"] for line in lines} == {"INFO"}
