"""Calls that several processes share on a real server: each is made once, even after a kill."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest
import redis

from rlm_tasks.testing import embedded
from tests.faults.flights import MADE, NAMESPACE
from tests.faults.guards import Child

KEYS = [f"key-{number}" for number in range(20)]


@pytest.fixture
def client(server: embedded.Server) -> Iterator[redis.Redis]:
    """A connection to the server, without keys of earlier tests."""
    with redis.Redis.from_url(server.url) as own:
        own.delete(*own.scan_iter(f"{NAMESPACE}:*"), MADE)
        yield own


@contextmanager
def asking(url: str, count: int, lease_s: float, *keys: str) -> Iterator[list[Child]]:
    """Run processes that will share calls of these keys."""
    with ExitStack() as stack:
        found = [
            stack.enter_context(closing(Child("tests.faults.flights", url, lease_s, *keys)))
            for _ in range(count)
        ]
        for each in found:
            each.receive("ready")
        yield found


def begun(callers: list[Child]) -> list[list[str]]:
    """Let all processes begin at once; return the keys of the calls that each of them makes."""
    for each in callers:
        each.send("begin")
    return [each.receive("began") for each in callers]


def values(callers: list[Child]) -> list[dict[str, str]]:
    """Let all processes continue; return the values that each of them received."""
    for each in callers:
        each.send("go")
    return [json.loads(each.receive("done")[0]) for each in callers]


def made(client: redis.Redis) -> Counter[str]:
    """Return the number of times that each call was made."""
    return Counter(key.decode() for key in client.lrange(MADE, 0, -1))


def test_eight_processes_make_each_of_twenty_calls_once(
    server: embedded.Server, client: redis.Redis
) -> None:
    with asking(server.url, 8, 60, *KEYS) as callers:
        theirs = begun(callers)
        got = values(callers)

    assert Counter(key for mine in theirs for key in mine) == Counter(KEYS), (
        "each call belongs to exactly one process"
    )
    assert made(client) == Counter(KEYS)
    assert all(each == got[0] for each in got), "all have the same values"
    assert {key: value.partition("/")[0] for key, value in got[0].items()} == dict(
        zip(KEYS, KEYS, strict=True)
    )
    assert [key for key in client.scan_iter(f"{NAMESPACE}:{{*") if client.ttl(key) < 0] == [], (
        "all keys expire"
    )


def test_the_call_of_a_killed_process_is_made_by_exactly_one_other(
    server: embedded.Server, client: redis.Redis
) -> None:
    with asking(server.url, 3, 3.0, "key") as [holder, *others]:
        assert begun([holder]) == [["key"]]
        begun(others)
        holder.kill()
        got = values(others)

    assert made(client) == {"key": 1}
    assert len({each["key"] for each in got}) == 1
