"""Patches for faults of Celery, kombu and billiard.

`startup` applies them.  Each function names the fault and the version in which it was seen.  When a
fault is gone, tests/faults/test_upstream.py fails, and its patch can go.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import billiard.pool
from celery.concurrency import asynpool, prefork
from kombu.transport.redis import Channel
from redis.exceptions import ConnectionError as RedisConnectionError


def leave_promptly(draining: Callable[[], bool]) -> None:
    """Let a draining worker end as soon as its nodes have ended.

    - A message that a pool process has but has not accepted yet is dropped from billiard's cache.
      So its result is never counted, and the process waits 30 s for that count (billiard 4.3).
      The ledger does not need the count: unacknowledged messages return to their queue, and a claim
      answers `done`.
    - Meanwhile the main process polls the results of one process after the other, for half a second
      each.  It checks its timers as rarely (Celery 5.7).
    - Each process sleeps for a second before it exits (billiard 4.3).
    """
    stock = billiard.pool.Worker._do_exit

    def exit_at_once(
        process: Any, pid: int, exitcode: int | None, error: Exception | None = None
    ) -> None:
        if not draining():
            stock(process, pid, exitcode, error)
        if process.on_exit is not None:
            process.on_exit(pid, exitcode or 0)
        os._exit(exitcode or 0)

    billiard.pool.Worker._do_exit = exit_at_once
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 2  # times 0.1 s
    asynpool.sleep = _nap
    prefork.time = SimpleNamespace(sleep=_nap)


def leave_when_retiring(retiring: Callable[[], bool]) -> None:
    """Let a pool process end between two tasks, as `--max-tasks-per-child` does.

    billiard decides this only by settings of the whole pool (billiard 4.3).  But a process ends the
    same way when its wait for a task raises SystemExit, with the exit code given to `sys.exit`.
    """
    stock = getattr(
        billiard.pool.Worker._make_child_methods,
        "__wrapped__",
        billiard.pool.Worker._make_child_methods,
    )

    @functools.wraps(stock)
    def make(process: Any, *args: Any, **options: Any) -> None:
        stock(process, *args, **options)
        receive = process.wait_for_job

        def receive_or_leave(*args: Any, **options: Any) -> Any:
            if retiring():
                sys.exit(billiard.pool.EX_RECYCLE)
            return receive(*args, **options)

        process.wait_for_job = receive_or_leave

    billiard.pool.Worker._make_child_methods = make


def _nap(seconds: float) -> None:
    time.sleep(min(seconds, 0.02))


def handle_sigterm(handler: Callable[..., None]) -> None:
    """Give pool processes a handler of SIGTERM.

    billiard sets its own handler after `worker_process_init`.  That handler raises SystemExit
    anywhere, also in the middle of an item (billiard 4.3).
    """
    stock = billiard.pool.reset_signals

    def reset(*args: Any, **options: Any) -> None:
        stock(*args, **options)
        signal.signal(signal.SIGTERM, handler)

    billiard.pool.reset_signals = reset


def survive_restarts_of_redis() -> None:
    """Let a worker reconnect when Redis goes away while late-acknowledged tasks run.

    A channel whose connection was closed reads the parameters of that connection, which is None.
    The AttributeError ends the worker (kombu 5.7, Celery 5.7).  The patch raises a connection
    error, which the callers expect.
    """
    stock = Channel._connparams
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def parameters(channel: Channel, asynchronous: bool = False) -> dict[str, object]:
        if channel.connection is None or channel.connection.client is None:
            raise RedisConnectionError("the channel's connection to the broker is closed")
        return stock(channel, asynchronous)  # type: ignore[no-any-return,no-untyped-call]  # kombu is partly typed

    Channel._connparams = parameters  # type: ignore[method-assign]  # the patch


def survive_reconnects_while_processes_are_recycled() -> None:
    """Let a worker reconnect just after a pool process ended, for example by its task limit.

    On a reconnect the pool registers the sentinels of all its processes.  A process that ended and
    is not replaced yet has none, and the ValueError ends the worker (Celery 5.7).  The patch skips
    such a process; the pool replaces it a moment later.
    """
    stock = asynpool.AsynPool._track_child_process
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def track(pool: Any, process: Any, hub: Any) -> None:
        if getattr(process, "_sentinel_poll", process) is not None:
            stock(pool, process, hub)

    asynpool.AsynPool._track_child_process = track
