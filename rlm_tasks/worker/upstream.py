"""Patches for faults of Celery, kombu and billiard.

`startup` applies them.  Each function names the fault and the version in which it was seen.  When a
fault is gone, tests/faults/test_upstream.py fails, and its patch can go.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import billiard.pool
import kombu.transport.redis
import kombu.transport.virtual.base
import kombu.utils.json
from celery.backends.redis import RedisBackend
from celery.concurrency import asynpool, prefork
from celery.worker import WorkController, state
from celery.worker.consumer.consumer import Consumer
from celery.worker.consumer.consumer import logger as consumer_logger
from kombu.transport import virtual
from kombu.transport.redis import Channel, QoS
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from resilience.connections import is_wrong
from rlm_tasks.messaging.dispatch import MERGE_TASK, NODE_TASK, is_id

logger = logging.getLogger(__name__)


def leave_promptly(draining: Callable[[], bool]) -> None:
    """Let a draining worker end as soon as its nodes have ended.

    - A message that a pool process has but has not accepted yet is dropped from billiard's cache.
      So its result is never counted, and the process waits 30 s for that count (billiard 4.3).
      The ledger does not need the count: unacknowledged messages return to their queue, and a claim
      answers `done`.
    - Meanwhile the main process polls the results of one process after the other, for half a second
      each.  It checks its timers as rarely (Celery 5.7).
    - Each process sleeps for a second before it exits (billiard 4.3).

    A process that is recycled by a limit sends its death to the main process, which answers with
    SIGTERM.  The signal ends its sleep, and the process exits with its own code.  With our handler
    of SIGTERM it would die of the signal, and Celery would log an error.
    """
    stock = billiard.pool.Worker._do_exit

    def exit_at_once(
        process: Any, pid: int, exitcode: int | None, error: Exception | None = None
    ) -> None:
        if not draining():
            signal.signal(signal.SIGTERM, _end_sleep)
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


def _end_sleep(*_: Any) -> None:
    raise SystemExit


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


class NoMessage(ValueError):
    """An entry of a queue that is no message; `args` has the reason."""


class CheckedMessage(kombu.transport.virtual.base.Message):
    """A message of a Redis broker; an entry that cannot be one raises NoMessage, no other error.

    kombu raises whatever the first wrong field causes, and that ends the worker (kombu 5.7).
    """

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        if isinstance(payload, _Unreadable):
            raise NoMessage("it is no JSON")
        try:
            super().__init__(payload, channel=channel, **options)  # type: ignore[no-untyped-call]  # kombu is partly typed
        except Exception as error:
            raise NoMessage(f"{type(error).__name__} at reading its fields") from None
        if wrong := [name for name, holds in self._checks().items() if not holds]:
            raise NoMessage(f"wrong or missing: {', '.join(wrong)}")

    def _checks(self) -> dict[str, bool]:
        info = self.delivery_info if isinstance(self.delivery_info, dict) else {}
        text = (str, type(None))
        return {
            "body": isinstance(self.body, (bytes, *text)),
            "headers": isinstance(self.headers, dict),
            "delivery_tag": isinstance(self.delivery_tag, str | int),
            "delivery_info": {*info} >= {"exchange", "routing_key"}
            and all(isinstance(info[each], text) for each in ("exchange", "routing_key")),
            "content-type": isinstance(self.content_type, text),
            "content-encoding": isinstance(self.content_encoding, text),
        }


_WRONG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""The errors by which Celery's code meets a field of another type than it expects."""


class _Unreadable(NamedTuple):
    """The text of an entry that is no JSON."""

    text: str


def keep_what_is_no_message(
    keep: Callable[[str, Any, str], None], is_ours: Callable[[str], bool]
) -> None:
    """Let a worker go on when it takes an entry from a queue that is no message.

    The function `keep` gets the queue, the entry and the reason.

    - An entry that kombu cannot read ends the worker (kombu 5.7).  So does a message that Celery
      cannot turn into a task (Celery 5.7).
    - Celery logs and drops other messages that it does not know.  In a queue of jobs, of which
      `is_ours` is true, they are kept as well; in other queues Celery goes on as before.
    """
    _read_unreadable_entries()
    _deliver_or(keep)
    _handle_or(keep, is_ours)
    _start_or(keep)
    for name in ("on_decode_error", "on_unknown_message", "on_unknown_task", "on_invalid_task"):
        _reject_or(name, keep, is_ours)


def _read_unreadable_entries() -> None:
    stock: Callable[[str], Any] = kombu.utils.json.loads

    def loads(text: str) -> Any:
        try:
            return stock(text)
        except Exception:
            return _Unreadable(text)

    vars(kombu.transport.redis)["loads"] = loads  # kombu imports it by name
    Channel.Message = CheckedMessage


def _deliver_or(keep: Callable[[str, Any, str], None]) -> None:
    stock = kombu.transport.virtual.base.Transport._deliver

    def deliver(transport: Any, entry: Any, queue: str) -> None:
        try:
            stock(transport, entry, queue)  # type: ignore[no-untyped-call]  # kombu is partly typed
        except NoMessage as error:
            keep(queue, entry.text if isinstance(entry, _Unreadable) else entry, str(error))

    kombu.transport.redis.Transport._deliver = deliver  # type: ignore[method-assign]  # the patch


def _odd_ids(headers: Any) -> list[str]:
    """Return the headers whose ids are too long for logs, or hold control characters."""
    return [
        name
        for name in ("id", "task", "root_id", "parent_id", "group")
        if not (headers.get(name) is None or is_id(headers[name]))
    ]


def _handle_or(keep: Callable[[str, Any, str], None], is_ours: Callable[[str], bool]) -> None:
    stock = getattr(Consumer.create_task_handler, "__wrapped__", Consumer.create_task_handler)

    @functools.wraps(stock)
    def create(consumer: Any, *args: Any, **options: Any) -> Callable[[Any], None]:
        handle = stock(consumer, *args, **options)

        def handle_or_keep(message: Any) -> None:
            task = (message.headers or {}).get("task")
            ours = is_ours(_queue_of(message)) or task in (NODE_TASK, MERGE_TASK)
            if ours and (wrong := _odd_ids(message.headers)):
                _reject(consumer, message, keep, f"wrong: {', '.join(wrong)}")
                return
            try:
                handle(message)
            except _WRONG as error:
                if message.acknowledged:
                    raise
                _reject(consumer, message, keep, f"{type(error).__name__} at reading its task")

        return handle_or_keep

    Consumer.create_task_handler = create


def _start_or(keep: Callable[[str, Any, str], None]) -> None:
    """Also free the slot that Celery has reserved for the task."""
    stock = getattr(WorkController._process_task, "__wrapped__", WorkController._process_task)

    @functools.wraps(stock)
    def process(worker: Any, request: Any) -> None:
        try:
            stock(worker, request)
        except _WRONG as error:
            state.task_ready(request)
            why = f"{type(error).__name__} at starting its task"
            _reject(worker.consumer, request.message, keep, why)
            getattr(worker, "_quick_release", int)()

    WorkController._process_task = process


def _reject_or(
    name: str, keep: Callable[[str, Any, str], None], is_ours: Callable[[str], bool]
) -> None:
    stock = getattr(getattr(Consumer, name), "__wrapped__", getattr(Consumer, name))

    @functools.wraps(stock)
    def report(consumer: Any, *args: Any) -> None:
        message = args[0] if name == "on_decode_error" else args[1]
        if is_ours(_queue_of(message)):
            _reject(consumer, message, keep, name.removeprefix("on_").replace("_", " "))
        else:
            stock(consumer, *args)

    setattr(Consumer, name, report)


def _reject(consumer: Any, message: Any, keep: Callable[[str, Any, str], None], why: str) -> None:
    keep(_queue_of(message), getattr(message, "_raw", message.body), why)
    message.reject_log_error(consumer_logger, consumer.connection_errors)


def _queue_of(message: Any) -> str:
    return str((message.delivery_info or {}).get("routing_key") or "")


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


def survive_refusals_of_redis() -> None:
    """Let a worker keep its messages and its slots while Redis refuses calls, or is away.

    kombu takes a message from its queue, and then notes it as unacknowledged.  A full Redis refuses
    the note, and the message is lost.  When Redis refuses an acknowledgement, the message counts as
    in flight for ever, and a worker without a free slot hangs (kombu 5.7).  With the patch the
    message runs, and its acknowledgement is repeated with the next one, or after ten seconds.  It
    may be repeated on another connection to the broker.
    """
    note, restore, late = QoS.append, QoS.restore_visible, set[str]()
    if hasattr(note, "__wrapped__"):
        return

    @functools.wraps(note)
    def append(qos: Any, message: Any, tag: str) -> None:
        try:
            note(qos, message, tag)  # type: ignore[no-untyped-call]  # kombu is partly typed
        except RedisError as error:
            if is_wrong(error):
                raise
            virtual.QoS.append(qos, message, tag)  # type: ignore[no-untyped-call]

    def settle(qos: Any, *tags: str) -> None:
        late.update(tags)
        if not (settling := list(late)):
            return
        try:
            with qos.pipe_or_acquire() as pipe:
                for tag in settling:
                    qos._remove_from_indices(tag, pipe)
                pipe.execute()
        except RedisError as error:
            if is_wrong(error):
                raise
            logger.info("%d messages are acknowledged later: %s", len(settling), error)
        else:
            late.difference_update(settling)

    def ack(qos: Any, tag: str) -> None:
        settle(qos, tag)
        virtual.QoS.ack(qos, tag)  # type: ignore[no-untyped-call]

    @functools.wraps(restore)
    def restore_visible(qos: Any, *args: Any, **options: Any) -> None:
        settle(qos)
        restore(qos, *args, **options)  # type: ignore[no-untyped-call]

    for name, patch in (("append", append), ("ack", ack), ("restore_visible", restore_visible)):
        setattr(QoS, name, patch)


def leave_chords_to_the_root_merge() -> None:
    """Let a node end as usual when Redis refuses to count it in its chord, or is away.

    Celery reports such a node as failed, with two tracebacks (Celery 5.7).  The ledger has its
    partial, and the root merge of the job reads it.  Tasks of the app are counted as before.
    """
    stock = RedisBackend.on_chord_part_return
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def count(backend: Any, request: Any, *args: Any, **options: Any) -> None:
        try:
            stock(backend, request, *args, **options)
        except (RedisError, OSError) as error:
            if request.task not in (NODE_TASK, MERGE_TASK):
                raise
            logger.info("A chord is left to the root merge of its job: %s", error)

    RedisBackend.on_chord_part_return = count
