"""Calls that several processes ask for at once, on a real server: each is made once, also when its
holder is killed.
"""

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
    """A connection to the server, with none of our keys on it."""
    with redis.Redis.from_url(server.url) as own:
        own.delete(*own.scan_iter(f"{NAMESPACE}:*"), MADE)
        yield own


@contextmanager
def asking(url: str, count: int, lease_s: float, *keys: str) -> Iterator[list[Child]]:
    """Run processes that will ask for these keys."""
    with ExitStack() as stack:
        found = [
            stack.enter_context(closing(Child("tests.faults.flights", url, lease_s, *keys)))
            for _ in range(count)
        ]
        for each in found:
            each.hear("ready")
        yield found


def begun(callers: list[Child]) -> list[list[str]]:
    """Let all begin at once; return the keys that each of them is to make."""
    for each in callers:
        each.say("begin")
    return [each.hear("began") for each in callers]


def values(callers: list[Child]) -> list[dict[str, str]]:
    """Let all go on; return what each of them got."""
    for each in callers:
        each.say("go")
    return [json.loads(each.hear("done")[0]) for each in callers]


def made(client: redis.Redis) -> Counter[str]:
    """Return how often each call was made."""
    return Counter(key.decode() for key in client.lrange(MADE, 0, -1))


def test_eight_processes_make_each_of_twenty_calls_once(
    server: embedded.Server, client: redis.Redis
) -> None:
    with asking(server.url, 8, 60, *KEYS) as callers:
        theirs = begun(callers)
        got = values(callers)

    assert Counter(key for mine in theirs for key in mine) == Counter(KEYS), (
        "each is somebody's, and nobody else's"
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
