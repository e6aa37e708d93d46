"""The kinds of server that Celery can use, one record for each; a new kind needs a new record.

Settings, dispatch, queue depths and checks read the record and never the URL.  Begin with
`broker_kind`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlm_tasks.messaging import transports
from rlm_tasks.settings.model import Settings


@dataclass(frozen=True, slots=True)
class BrokerKind:
    """The abilities of one kind of server as a broker or as a result backend."""

    name: str
    schemes: tuple[str, ...]  # its URLs begin with one of them
    drivers: tuple[str, ...]  # kombu's names of its client
    backends: tuple[str, ...]  # Celery's classes of it as a result backend
    orders_queues: bool  # a worker receives messages of urgent queues first, by `QueueOrder`
    counts_chords: bool  # as a result backend it counts the parts of a chord
    knows_ages: bool  # the depth of a queue comes with the age of its oldest message
    redelivers: bool  # an unacknowledged message comes again after its visibility timeout
    socket_timeout_s: float | None
    """The timeout for a client that else waits for ever; None: its client has its own."""
    settings: Callable[[Settings], dict[str, Any]]  # Celery's settings of such a broker


REDIS = BrokerKind(
    name="redis",
    schemes=("redis", "valkey", "sentinel", "unix"),
    drivers=("redis",),
    backends=("RedisBackend",),
    orders_queues=True,
    counts_chords=True,
    knows_ages=True,
    redelivers=True,
    socket_timeout_s=None,
    settings=transports.redis_broker,
)
RABBITMQ = BrokerKind(
    name="rabbitmq",
    schemes=("amqp", "pyamqp"),
    drivers=("amqp", "py-amqp"),
    backends=(),
    orders_queues=False,
    counts_chords=False,
    knows_ages=False,
    redelivers=False,
    socket_timeout_s=5.0,
    settings=transports.amqp_broker,
)
OTHER = BrokerKind(
    name="other",
    schemes=(),
    drivers=(),
    backends=(),
    orders_queues=False,
    counts_chords=False,
    knows_ages=False,
    redelivers=False,
    socket_timeout_s=None,
    settings=transports.amqp_broker,
)
KINDS = (REDIS, RABBITMQ)


def broker_kind(url: Any) -> BrokerKind:
    """Return the kind of a ``broker_url`` (the first, if several)."""
    first = str(url[0] if isinstance(url, list | tuple) and url else url)
    return next((kind for kind in KINDS if first.startswith(kind.schemes)), OTHER)


def kind_of_connection(connection: Any) -> BrokerKind:
    """Return the kind of server at the other end of a kombu connection."""
    driver = connection.transport.driver_type
    return next((kind for kind in KINDS if driver in kind.drivers), OTHER)


def kind_of_backend(backend: Any) -> BrokerKind:
    """Return the kind of a Celery result backend, which may be of a user's subclass."""
    classes = {each.__name__ for each in type(backend).__mro__}
    return next((kind for kind in KINDS if classes.intersection(kind.backends)), OTHER)


def broker(settings: Settings) -> dict[str, Any]:
    """Return Celery's settings of the broker."""
    return broker_kind(settings.broker_url).settings(settings)
