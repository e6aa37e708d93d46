"""A Redis with a clock of the test: stores of several processes on one fakeredis server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import fakeredis
import fakeredis.commands_mixins.server_mixin as server_clock
import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from resilience.store import Call, Store


class CountingStore(Store):
    """A store that counts its round trips and can lose its server."""

    round_trips = 0
    lost = False

    def _run(self, *calls: Call) -> list[Any]:
        self.round_trips += 1
        if self.lost:
            raise RedisConnectionError("cut off by the test")
        return super()._run(*calls)


class World:
    """Time that passes only by `sleep`, for the server and for every process."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self._server = fakeredis.FakeServer()

    def time(self) -> float:
        """Return the time; a World stands in place of the module `time` in fakeredis."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def client(self) -> redis.Redis:
        """Return a new connection."""
        return fakeredis.FakeRedis(server=self._server)

    def store(self) -> CountingStore:
        """Return the store of another process."""
        return CountingStore(
            "redis://fake",
            namespace="unit",
            client=self.client(),
            clock=lambda: self.now,
            random=Random(0),
        )

    @contextmanager
    def future(self, seconds: float) -> Iterator[None]:
        """Go forward in time; at the end restore the time and the data."""
        now, kept = self.now, {key: self.client().dump(key) for key in self.client().scan_iter()}
        self.now += seconds
        yield
        self.now = now
        client = self.client()
        client.flushall()
        for key, value in kept.items():
            client.restore(key, 3_600_000, value)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Give the server this clock."""
        patch.setattr(server_clock, "time", self)

    def dump(self) -> dict[bytes, Any]:
        """Return all stored data."""
        client = self.client()
        kinds = {
            b"hash": client.hgetall,
            b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
            b"string": client.get,
        }
        return {key: kinds[client.type(key)](key) for key in client.scan_iter()}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A new world."""
    own = World()
    own.install(monkeypatch)
    return own
