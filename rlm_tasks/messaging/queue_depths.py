"""How deep queues are, and how old their oldest messages: one question to the broker for all of
them.

Decides how each broker is asked.  Refuses to know what is done about the answer, and whether an
outage matters."""

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

from rlm_tasks.messaging.broker import spoken
from rlm_tasks.messaging.broker_kinds import kind_of_connection
from scheduler.queues import QueueReport

_NOT_FOUND = "404"


class _Told(msgspec.Struct, frozen=True):
    at: float | None = None


class _Headers(msgspec.Struct, frozen=True):
    rlm: _Told = _Told()


class _Message(msgspec.Struct, frozen=True):
    """What is read of a message: when it was sent, if it is one of ours."""

    headers: _Headers = _Headers()


_DECODER = msgspec.json.Decoder(_Message)


class QueueGauge:
    """The queues of one app's broker.

    Each process and each thread that reads has a connection of its own, kept between reads and
    opened again after an error."""

    def __init__(self, app: Celery, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` is compared with the wall clock of those who send."""
        self._app, self._clock = app, clock
        self._connections: dict[
            tuple[int, int], Any
        ] = {}  # after a fork, nobody finds those of the parent

    def read(self, names: Sequence[str]) -> dict[str, QueueReport]:
        """Return depth and age by queue; one that does not exist is empty.

        On Redis this is one round trip; other brokers know no ages.  Raises what is in
        `broker.AWAY`."""
        here = os.getpid(), threading.get_ident()
        connection = self._connections.get(here) or self._app.connection_for_read()
        self._connections[here] = connection
        try:
            read = self._of_redis if kind_of_connection(connection).knows_ages else _of_others
            return spoken(connection, lambda own: read(own, names))
        except BaseException:
            self._connections.pop(here).release()
            raise

    def close(self) -> None:
        """Give the connections of this process back; who reads again opens another."""
        for here in [each for each in self._connections if each[0] == os.getpid()]:
            self._connections.pop(here).release()

    def _of_redis(self, connection: Any, names: Sequence[str]) -> dict[str, QueueReport]:
        channel = connection.default_channel
        # kombu's own client puts its prefix before the key of LLEN and not of LINDEX.
        client = redis.Redis(connection_pool=channel.client.connection_pool)
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
    """Return how long ago a message was sent; None when it does not say, as those of other
    tasks.
    """
    try:
        at = _DECODER.decode(message or b"{}").headers.rlm.at
    except msgspec.DecodeError:
        return None
    return None if at is None else max(0.0, now - at)


def _of_others(connection: Any, names: Sequence[str]) -> dict[str, QueueReport]:
    return {name: QueueReport(_declared_depth(connection, name)) for name in names}


def _declared_depth(connection: Any, name: str) -> int:
    """Ask on a channel of its own: AMQP closes the channel that asked for a queue which does not
    exist.
    """
    with connection.channel() as channel:
        try:
            return int(channel.queue_declare(queue=name, passive=True).message_count)
        except ChannelError as error:
            if str(error.reply_code) != _NOT_FOUND:
                raise
            return 0
