"""Each workaround for Celery, kombu and billiard is still needed.

A test fails when a release of these libraries has fixed the fault; then remove the workaround."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import billiard.pool
import pytest
import redis
from celery import Celery
from celery.concurrency import asynpool, prefork
from kombu import Connection
from kombu.asynchronous import Hub
from kombu.transport.redis import QoS
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from rlm_tasks.testing import embedded
from rlm_tasks.worker.upstream import (
    leave_chords_to_the_root_merge,
    survive_reconnects_while_processes_are_recycled,
    survive_refusals_of_redis,
    survive_restarts_of_redis,
)
from tests.faults.refusals import Refusing
from tests.support import wait_until

STOCK = """
import time
from celery import Celery
app = Celery("stock", broker="{url}", set_as_current=False)
app.conf.update(
    task_acks_late=True, worker_prefetch_multiplier=1, broker_connection_retry_on_startup=True
)

@app.task(name="nap")
def nap(path):
    open(path, "w").close()
    time.sleep(6)
"""


def test_a_stock_worker_ends_when_redis_restarts_while_it_works(
    durable: embedded.Server, tmp_path: Path
) -> None:
    (tmp_path / "stock.py").write_text(STOCK.format(url=durable.url))
    sys.path.insert(0, str(tmp_path))
    try:
        from stock import app  # type: ignore[import-not-found]  # written above
    finally:
        sys.path.remove(str(tmp_path))
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "stock",
        "worker",
        "-c",
        "2",
        "--without-gossip",
        "--without-mingle",
    ]
    with (tmp_path / "stock.log").open("wb") as log:
        worker = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        app.send_task("nap", [str(tmp_path / "started")])
        wait_until((tmp_path / "started").exists)
        durable.stop(kill=True)
        wait_until(
            lambda: (
                "Connection to broker lost" in (tmp_path / "stock.log").read_text()
                or worker.poll() is not None
            )
        )
        durable.start()
        assert worker.wait(30) != 0
        assert (
            "'NoneType' object has no attribute 'hostname'" in (tmp_path / "stock.log").read_text()
        )
    finally:
        embedded.end(worker, signal.SIGKILL)
        app.close()


def test_a_closed_channel_raises_a_connection_error(durable: embedded.Server) -> None:
    survive_restarts_of_redis()
    connection = Connection(durable.url)
    channel = connection.channel()
    connection.close()
    channel.connection = None

    with pytest.raises(connection.connection_errors):
        channel._connparams()


def test_a_redis_that_refuses_costs_no_message_and_no_slot(
    durable: embedded.Server, tmp_path: Path
) -> None:
    refusing = Refusing(durable, tmp_path / "server")
    stock = {
        name: getattr(getattr(QoS, name), "__wrapped__", None) or getattr(QoS, name)
        for name in ("append", "ack", "restore_visible")
    }
    kept = {name: getattr(QoS, name) for name in stock}
    try:
        for name, function in stock.items():
            setattr(QoS, name, function)
        with pytest.raises(OutOfMemoryError), Connection(durable.url) as connection:
            _taken_while_full(connection, refusing)
        survive_refusals_of_redis()
        with Connection(durable.url) as connection:
            message = _taken_while_full(connection, refusing)
            qos = message.channel.qos
            with refusing.few_replicas():
                message.ack()
            assert len(qos._delivered) == len(qos._dirty), "its slot is free"
            connection.SimpleQueue("plain").put("two")
            connection.SimpleQueue("plain").get(timeout=5).ack()
            qos.restore_visible()
            assert refusing.admin.hlen("unacked") == 0
    finally:
        for name, function in kept.items():
            setattr(QoS, name, function)


def test_a_lost_connection_costs_no_acknowledgement(durable: embedded.Server) -> None:
    survive_refusals_of_redis()
    admin = redis.Redis.from_url(durable.url)
    with Connection(durable.url) as first, Connection(durable.url) as second:
        queue = first.SimpleQueue("plain")
        queue.put("one")
        message = queue.get(timeout=5)
        pause = admin.config_get("maxclients")["maxclients"]
        admin.config_set("maxclients", 1)
        admin.client_kill_filter(_type="normal", skipme=True)

        message.ack()

        assert admin.hlen("unacked") == 1
        admin.config_set("maxclients", pause)
        second.SimpleQueue("plain").channel.qos.restore_visible()
        assert admin.hlen("unacked") == 0, "another connection has repeated it"


@pytest.mark.parametrize("task", ["rlm.node", "tasks.own"])
def test_a_chord_that_redis_does_not_count_is_left_to_the_root_merge(task: str) -> None:
    app = Celery("chords", backend=f"redis://127.0.0.1:{embedded.free_port()}/0")
    request = SimpleNamespace(task=task, id="t", group="g", group_index=0, chord=None)
    leave_chords_to_the_root_merge()

    with nullcontext() if task == "rlm.node" else pytest.raises(RedisConnectionError):
        app.backend.on_chord_part_return(request, "SUCCESS", None)


def _taken_while_full(connection: Connection, refusing: Refusing) -> Any:
    queue = connection.SimpleQueue("plain")
    queue.put("one")
    with refusing.full():
        return queue.get(timeout=5)


def test_a_process_that_has_ended_is_not_watched_when_a_worker_reconnects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, hub = SimpleNamespace(_sentinel_poll=None), Hub()
    pool = SimpleNamespace(_event_process_exit=lambda *_: None)
    patched = asynpool.AsynPool._track_child_process
    stock = getattr(patched, "__wrapped__", patched)
    monkeypatch.setattr(asynpool.AsynPool, "_track_child_process", stock)
    with pytest.raises(ValueError, match="file descriptor is None"):
        asynpool.AsynPool._track_child_process(pool, ended, hub)

    survive_reconnects_while_processes_are_recycled()

    asynpool.AsynPool._track_child_process(pool, ended, hub)
    assert not hub.readers
    reading, writing = os.pipe()
    running = SimpleNamespace(_popen=SimpleNamespace(sentinel=reading))
    asynpool.AsynPool._track_child_process(pool, running, hub)
    assert list(hub.readers) == [running._sentinel_poll]
    hub.close()
    for each in (reading, writing, running._sentinel_poll):
        os.close(each)


def test_billiard_still_waits_for_receipts_and_sleeps_before_it_exits() -> None:
    code = "import billiard.pool; print(billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT)"
    stock = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert stock.stdout == "300\n"
    source = inspect.getsource(billiard.pool.Worker)
    assert "time.sleep(1)" in source
    assert "reset_signals(" in source, "billiard sets its SIGTERM handler after worker_process_init"


def test_the_main_process_still_waits_half_a_second_for_results() -> None:
    assert "sleep(0.5)" in inspect.getsource(asynpool.ResultHandler._flush_outqueue)
    assert "time.sleep(0.5)" in inspect.getsource(prefork.TaskPool.on_stop)
    assert inspect.getsource(prefork).count("time.") == 1, "prefork has no other use of time"
