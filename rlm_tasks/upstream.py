"""What Celery, kombu and billiard do not do yet, mended in their place.

Each function names the fault and the version it was seen in; tests/faults/test_upstream.py fails when a fault is
gone, so that the mending can go, too.  Refuses to know anything of jobs.
"""

from __future__ import annotations

import billiard.pool
from kombu.transport.redis import Channel
from redis.exceptions import ConnectionError as RedisConnectionError


def leave_promptly() -> None:
    """Let a pool process leave without waiting 30 s for receipts that nobody will write.

    A message that was handed to a pool process but not yet accepted when the worker is told to stop is dropped
    from billiard's cache, so its result is never counted, and the process waits for that count (billiard 4.3).
    The ledger needs no receipt: unacknowledged messages return to their queue, and a claim answers `done`.
    """
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 5  # times 0.1 s


def survive_restarts_of_redis() -> None:
    """Let a worker reconnect when Redis goes away while late-acknowledged tasks run.

    A channel whose connection was closed looks for its connection's parameters and meets None; the
    AttributeError ends the worker (kombu 5.7, Celery 5.7).  A connection error is what its callers expect.
    """
    stock = Channel._connparams
    if getattr(stock, "mended", False):
        return

    def parameters(channel: Channel, asynchronous: bool = False) -> dict[str, object]:
        if channel.connection is None or channel.connection.client is None:
            raise RedisConnectionError("the channel's connection to the broker is closed")
        return stock(channel, asynchronous)  # type: ignore[no-any-return,no-untyped-call]  # kombu is partly typed

    parameters.mended = True  # type: ignore[attr-defined]  # marks it as done
    Channel._connparams = parameters  # type: ignore[method-assign]  # on purpose
