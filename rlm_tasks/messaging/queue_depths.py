"""Read the depths of queues and the ages of their oldest messages, all in one call to the broker.

The client's admission, `Client.queues` and the monitor hold a `QueueGauge`; they handle outages.
Begin with `QueueGauge.read`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import redis
from celery import Celery
from kombu.exceptions import ChannelError

from rlm_tasks.messaging.broker import with_connection
from rlm_tasks.messaging.broker_kinds import kind_of_connection
from scheduler.queues import QueueReport

_NOT_FOUND = "404"


class _NodeHeader(msgspec.Struct, frozen=True):
    at: float | None = None


class _Headers(msgspec.Struct, frozen=True):
    rlm: _NodeHeader = _NodeHeader()


class _Message(msgspec.Struct, frozen=True):
    """The part of a message that is read: the send time, which only a node's message has."""

    headers: _Headers = _Headers()


_DECODER = msgspec.json.Decoder(_Message)


class QueueGauge:
    """The queues of one app's broker.

    Each thread of each process has its own connection.  It is kept between reads, and opened again
    after an error.
    """

    def __init__(self, app: Celery, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` is the one by which senders stamp messages: `ServerClock` on a platform."""
        self._app, self._clock = app, clock
        # By process and thread: after a fork, a child does not use its parent's connections.
        self._connections: dict[tuple[int, int], Any] = {}

    def read(self, names: Sequence[str]) -> dict[str, QueueReport]:
        """Return depth and age by queue; a queue that does not exist is empty.

        On Redis this is one round trip; other brokers do not know ages.  Raises the errors in
        `broker.AWAY`.
        """
        owner = os.getpid(), threading.get_ident()
        connection = self._connections.get(owner) or self._app.connection_for_read()
        self._connections[owner] = connection
        try:
            knows_ages = kind_of_connection(connection).knows_ages
            read = self._depths_and_ages if knows_ages else _declared_depths
            return with_connection(connection, lambda own: read(own, names))
        except BaseException:
            self._connections.pop(owner).release()
            raise

    def close(self) -> None:
        """Release the connections of this process; the next read opens another."""
        for owner in [each for each in self._connections if each[0] == os.getpid()]:
            self._connections.pop(owner).release()

    def _depths_and_ages(self, connection: Any, names: Sequence[str]) -> dict[str, QueueReport]:
        channel = connection.default_channel
        # kombu's own client prefixes the key of LLEN, but not the key of LINDEX.
        client = redis.Redis(connection_pool=channel.pool)
        with client.pipeline() as pipe:
            for name in names:
                pipe.llen(key := channel.global_keyprefix + name)
                pipe.lindex(key, -1)  # BRPOP takes from this end
            answers = pipe.execute()
        now = self._clock()
        return {
            name: QueueReport(depth, _age_s(oldest, now))
            for name, depth, oldest in zip(names, answers[::2], answers[1::2], strict=True)
        }


def _age_s(message: bytes | None, now: float) -> float | None:
    """Return the age of a message in seconds, None for a task other than a node."""
    try:
        sent_at = _DECODER.decode(message or b"{}").headers.rlm.at
    except msgspec.DecodeError:
        return None
    return None if sent_at is None else max(0.0, now - sent_at)


def _declared_depths(connection: Any, names: Sequence[str]) -> dict[str, QueueReport]:
    return {name: QueueReport(_declared_depth(connection, name)) for name in names}


def _declared_depth(connection: Any, name: str) -> int:
    """Return the depth of a queue, by a passive declaration on a new channel.

    AMQP closes the channel when the queue does not exist.
    """
    with connection.channel() as channel:
        try:
            return int(channel.queue_declare(queue=name, passive=True).message_count)
        except ChannelError as error:
            if str(error.reply_code) != _NOT_FOUND:
                raise
            return 0
