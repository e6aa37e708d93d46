"""Use a connection to the broker: open it, limit its waits, and reopen one that has died.

Dispatch, queue depths and the checks of a starting worker call `with_connection`.  Callers do not
wait for a broker that is away, because the sweep sends unsent messages later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from amqp.exceptions import AMQPError  # type: ignore[import-untyped]  # py-amqp ships no types
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from resilience.connections import Refused
from rlm_tasks.messaging.broker_kinds import kind_of_connection

_Answer = TypeVar("_Answer")

AWAY = (KombuError, AMQPError, RedisError, OSError)
"""The errors by which kombu reports a broker that is away or refuses; each transport has others."""


def with_connection(connection: Any, use: Callable[[Any], _Answer]) -> _Answer:
    """Return the answer of `use` on a connection, which is opened first if it is closed.

    A connection that has died is opened again once, and `use` is repeated.  This is for RabbitMQ's
    client, which notices a dead connection only when it uses it; redis-py notices by itself.  After
    a failover, it is for a Redis that is no longer the primary.  Raises the errors in AWAY.
    """
    was_open = connection.connected
    try:
        return use(_opened(connection))
    except (KombuError, AMQPError, Refused, OSError) as error:
        cause = error.__cause__ or error  # Celery wraps the errors of sending a task
        if not isinstance(cause, AMQPError | Refused | OSError):
            raise
        connection.collect()
        if not was_open or isinstance(cause, TimeoutError):
            raise
    return use(_opened(connection))


def _opened(connection: Any) -> Any:
    if not connection.connected:
        # Try each host twice at most, without a pause; kombu's default is to wait between tries.
        tries = max(1, len(connection.alt))
        connection.ensure_connection(
            max_retries=tries, interval_start=0, reraise_as_library_errors=False
        )
        if (timeout_s := kind_of_connection(connection).socket_timeout_s) is not None:
            connection.connection.sock.settimeout(timeout_s)
    return connection
