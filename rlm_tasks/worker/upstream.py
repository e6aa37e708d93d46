"""What Celery, kombu and billiard do not do yet, mended in their place.

Each function names the fault and the version it was seen in; tests/faults/test_upstream.py fails
when a fault is gone, so that the mending can go, too.  Refuses to know anything of jobs."""

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
    """Let a worker that was told to stop be gone as soon as its nodes are.

    A message that was handed to a pool process but not yet accepted is dropped from billiard's
    cache, so its result is never counted, and the process waits 30 s for that count (billiard
    4.3).  The ledger needs no receipt: unacknowledged messages return to their queue, and a claim
    answers `done`.  The main process meanwhile looks at its processes' results one after the other,
    half a second each, and at its timers as seldom (Celery 5.7), and each process sleeps a second
    before it exits (billiard 4.3)."""
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
    """Let a pool process end between two tasks, as one ends that has run all it may
    (`--max-tasks-per-child`).

    billiard decides that by settings of the whole pool alone (billiard 4.3).  It ends a process
    that way also when waiting for a task raises SystemExit, and notes the code of a call of
    `sys.exit`."""
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

    billiard sets its own after `worker_process_init`, one that raises SystemExit wherever the
    process is, in the middle of an item, too (billiard 4.3)."""
    stock = billiard.pool.reset_signals

    def reset(*args: Any, **options: Any) -> None:
        stock(*args, **options)
        signal.signal(signal.SIGTERM, handler)

    billiard.pool.reset_signals = reset


def survive_restarts_of_redis() -> None:
    """Let a worker reconnect when Redis goes away while late-acknowledged tasks run.

    A channel whose connection was closed looks for its connection's parameters and meets None; the
    AttributeError ends the worker (kombu 5.7, Celery 5.7).  A connection error is what its callers
    expect."""
    stock = Channel._connparams
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def parameters(channel: Channel, asynchronous: bool = False) -> dict[str, object]:
        if channel.connection is None or channel.connection.client is None:
            raise RedisConnectionError("the channel's connection to the broker is closed")
        return stock(channel, asynchronous)  # type: ignore[no-any-return,no-untyped-call]  # kombu is partly typed

    Channel._connparams = parameters  # type: ignore[method-assign]  # on purpose


def survive_reconnects_while_processes_are_recycled() -> None:
    """Let a worker reconnect when one of its pool processes has just ended, by
    `--max-tasks-per-child` for one.

    The pool watches all its processes anew; of one that ended and is not replaced yet it has
    nothing to watch, and the ValueError ends the worker (Celery 5.7).  The pool is looked after a
    moment later anyway."""
    stock = asynpool.AsynPool._track_child_process
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def track(pool: Any, process: Any, hub: Any) -> None:
        if getattr(process, "_sentinel_poll", process) is not None:
            stock(pool, process, hub)

    asynpool.AsynPool._track_child_process = track
