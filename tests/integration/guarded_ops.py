"""Operations with guards, and the service that they call.

The service is a folder of files that a test shares with its worker."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate
from resilience.bulkhead import Elastic
from resilience.retry import RetryPolicy
from rlm_tasks import Context, operation

QUICK = RetryPolicy(max_attempts=4, initial_delay_s=0.2, max_delay_s=0.4)


def _listed(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def _journal(ctx: Context, event: str) -> None:
    """Add an event to the journal; a line this short is written at once."""
    with (Path(ctx.params["folder"]) / "journal").open("a", encoding="utf-8") as file:
        file.write(f"{event} {ctx.index} {ctx.tries} {time.time()} {os.getpid()}\n")


@operation("metered", merge=_listed, rate_limit=Rate(20, per_s=1, burst=5))
def metered(item: int, ctx: Context) -> list[int]:
    """Call a provider that allows 20 calls a second."""
    _journal(ctx, "call")
    return [item]


@operation(
    "fragile",
    merge=_listed,
    breaker=BreakerConfig(failure_threshold=3, recovery_timeout_s=0.5, success_threshold=1),
    retry=QUICK,
)
def fragile(item: int, ctx: Context) -> list[int]:
    """Call a service that is down while the file `down` exists."""
    _journal(ctx, "call")
    if (Path(ctx.params["folder"]) / "down").exists():
        raise ConnectionError("the service is down")
    return [item]


@operation(
    "stubborn",
    merge=_listed,
    service="reset-by-hand",
    breaker=BreakerConfig(failure_threshold=1, recovery_timeout_s=60),
    retry=QUICK,
)
def stubborn(item: int, ctx: Context) -> list[int]:
    """Do the same as `fragile`; its breaker recovers after a minute."""
    return fragile(item, ctx)  # type: ignore[no-any-return]  # calling an operation calls its function


class TooMany(Exception):
    """An answer of 429 that asks for a pause of a day."""

    status_code = 429
    headers = {"Retry-After": "86400"}


@operation("busy", merge=_listed, rate_limit=Rate(1000), retry=QUICK)
def busy(item: int, ctx: Context) -> list[int]:
    """Call a service that wants no calls while the file `busy` exists."""
    _journal(ctx, "call")
    if (Path(ctx.params["folder"]) / "busy").exists():
        raise TooMany
    return [item]


@operation("busy_async", merge=_listed, rate_limit=Rate(1000), retry=QUICK, concurrency=4)
async def busy_async(item: int, ctx: Context) -> list[int]:
    """Do the same as `busy`, with four items in flight."""
    return busy(item, ctx)  # type: ignore[no-any-return]  # calling an operation calls its function


@operation(
    "second_best",
    breaker=BreakerConfig(failure_threshold=2, recovery_timeout_s=60),
    fallback=lambda item: -item,
)
def second_best(item: int, ctx: Context) -> int:
    """Fail; the fallback answers, and once the breaker is open it answers alone."""
    raise ConnectionError("never there")


# Without a grant of the retry budget a node waits up to the longest delay.
TWICE = RetryPolicy(max_attempts=2, initial_delay_s=0.01, max_delay_s=0.5)


@operation("at_last", retry=TWICE, fallback=lambda item: -item)
def at_last(item: int, ctx: Context) -> int:
    """Fail at even numbers, at every try."""
    _journal(ctx, "call")
    if item % 2 == 0:
        raise TimeoutError("never in time")
    return item


@operation("at_last_async", retry=TWICE, fallback=lambda item: -item, concurrency=4)
async def at_last_async(item: int, ctx: Context) -> int:
    """Do the same as `at_last`, with four items in flight."""
    return at_last(item, ctx)  # type: ignore[no-any-return]  # calling an operation calls its function


@operation("third_time", merge=_listed, retry=QUICK)
def third_time(item: int, ctx: Context) -> list[int]:
    """Fail twice if the item is a multiple of ten, and at every try if it is 15."""
    _journal(ctx, "call")
    if item == 15 or (item % 10 == 0 and ctx.tries < 2):
        raise TimeoutError(f"item {item}, try {ctx.tries}")
    return [item]


@operation("third_time_async", merge=_listed, retry=QUICK, concurrency=10)
async def third_time_async(item: int, ctx: Context) -> list[int]:
    """Do the same as `third_time`, with ten items in flight."""
    _journal(ctx, "call")
    await asyncio.sleep(0.01)
    if item == 15 or (item % 10 == 0 and ctx.tries < 2):
        raise TimeoutError(f"item {item}, try {ctx.tries}")
    return [item]


@operation(
    "metered_async",
    merge=_listed,
    service="metered-async",
    rate_limit=Rate(50, per_s=1, burst=5),
    concurrency=20,
)
async def metered_async(item: int, ctx: Context) -> list[int]:
    """Call a provider that allows 50 calls a second, with 20 items in flight."""
    _journal(ctx, "call")
    await asyncio.sleep(0.05)
    return [item]


@operation("at_last_batch", batch=True, retry=TWICE, fallback=lambda items: [-i for i in items])
def at_last_batch(items: list[int], ctx: Context) -> list[int]:
    """Do the same as `at_last`, with many items in a call."""
    return [at_last(item, ctx) for item in items]


@operation("heavy", bulkhead=Elastic(500, 2048, 900), weight=lambda mb: mb, concurrency=20)
async def heavy(mb: int, ctx: Context) -> int:
    """Use some MB of a pool that all workers share, for 20 ms."""
    _journal(ctx, "begin")
    await asyncio.sleep(0.02)
    _journal(ctx, "end")
    return mb


@operation("narrow", merge=_listed, bulkhead=1)
def narrow(item: int, ctx: Context) -> list[int]:
    """Call a service that allows one call at a time."""
    _journal(ctx, "begin")
    time.sleep(0.01)
    _journal(ctx, "end")
    return [item]


@operation("sleepy", merge=_listed, timeout_s=0.5)
def sleepy(item: float) -> list[float]:
    """Take `item` seconds, in Python code."""
    until = time.monotonic() + item
    while time.monotonic() < until:
        time.sleep(0.001)
    return [item]


@operation("narrow_async", bulkhead=2, concurrency=10)
async def narrow_async(item: int, ctx: Context) -> int:
    """Hold one of two permits for a moment; two that begin together do not end together."""
    _journal(ctx, "begin")
    await asyncio.sleep(0.02 + 0.007 * (item % 3))
    _journal(ctx, "end")
    return item


@operation("sleepy_async", merge=_listed, timeout_s=0.5, concurrency=5)
async def sleepy_async(item: float) -> list[float]:
    """Wait `item` seconds, with five items in flight."""
    await asyncio.sleep(item)
    return [item]


@operation("deaf", merge=_listed, timeout_s=0.5)
def deaf(item: int) -> list[int]:
    """Stay in C code if the item is 13."""
    if item == 13:
        sum(range(10**15))  # one call of C that takes months; Python handles no signal meanwhile
    return [item]


@operation(
    "accounted",
    service="accounted",
    rate_limit={"requests": Rate(1000), "tokens": Rate(1000, per_s=1)},
    cost=lambda item: {"requests": 1, "tokens": 500},
)
def accounted(item: int, ctx: Context) -> int:
    """Reserve 500 tokens and use one."""
    ctx.settle(tokens=1)
    return item
