"""How the broker is spoken to: for how long, and what is done about a connection that it has closed
meanwhile.

Decides that nobody waits for a broker that is away: what was not sent is sent by the sweep.
Refuses to know what is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from amqp.exceptions import AMQPError  # type: ignore[import-untyped]  # py-amqp ships no types
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from rlm_tasks.messaging.broker_kinds import kind_of_connection

_Answer = TypeVar("_Answer")

AWAY = (KombuError, AMQPError, RedisError, OSError)
"""What a broker that is away, or refuses, raises by way of kombu: each transport has errors of its
own.
"""


def spoken(connection: Any, say: Callable[[Any], _Answer]) -> _Answer:
    """Say something on a connection, opened first if need be; one that has died meanwhile is opened
    again, once.

    redis-py sees by itself that a connection has died, RabbitMQ's client only when it uses it.
    Raises what is in AWAY."""
    was_open = connection.connected
    try:
        return say(_opened(connection))
    except (KombuError, AMQPError, OSError) as error:
        cause = error.__cause__ or error  # Celery wraps what happens while it sends a task
        if not isinstance(cause, AMQPError | OSError):
            raise
        connection.collect()
        if not was_open or isinstance(cause, TimeoutError):
            raise
    return say(_opened(connection))


def _opened(connection: Any) -> Any:
    if not connection.connected:
        # Each host twice at most, at once: by itself kombu waits between tries.
        tries = max(1, len(connection.alt))
        connection.ensure_connection(
            max_retries=tries, interval_start=0, reraise_as_library_errors=False
        )
        if (timeout_s := kind_of_connection(connection).socket_timeout_s) is not None:
            connection.connection.sock.settimeout(timeout_s)
    return connection
