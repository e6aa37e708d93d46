"""Operations that wait: for guards, for a gate that the test opens, or for a busy service.

Each run adds its index to the job's journal.  Other events go to the file `events`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resilience.breaker import CircuitBreaker
from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate, TokenBucket
from resilience.errors import RateLimited
from resilience.retry import RetryPolicy
from rlm_tasks import Context, operation
from tests.faults.ops import note

QUICK = RetryPolicy(max_attempts=4, initial_delay_s=0.05, max_delay_s=0.1)
WIDE = Rate(400, per_s=1, burst=20)


class Busy(Exception):
    """The answer of a busy service: HTTP 503 with a retry time."""

    status_code = 503

    def __init__(self, wait_s: float) -> None:
        self.headers = {"retry-after": str(wait_s)}
        super().__init__("busy")


def _listed(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def _folder(ctx: Context) -> Path:
    return Path(ctx.params["folder"])


def _ran(ctx: Context, event: str = "") -> None:
    note(f"{ctx.params['folder']}/journal.{ctx.job_id}", ctx.index)
    if event:
        _note_event(ctx, event)


def _flaky(index: int, ctx: Context) -> list[int]:
    _ran(ctx)
    time.sleep(ctx.params.get("ms", 0) / 1000)
    if index % 10 == 0 and ctx.tries < 2:
        raise ConnectionError(f"item {index}, try {ctx.tries}")
    return [index]


def _accepts(index: int) -> None:
    if index < 0:
        raise ValueError("negative")


operation("w_flaky", merge=_listed, service="w", rate_limit=WIDE, retry=QUICK, validate=_accepts)(
    _flaky
)


@operation(
    "w_flaky_batch",
    merge=_listed,
    batch=True,
    service="w-batch",
    rate_limit=WIDE,
    retry=QUICK,
    validate=lambda item: None,
)
def w_flaky_batch(items: list[int], ctx: Context) -> list[int]:
    """Fail a batch once for each item in it that is a multiple of ten."""
    _ran(ctx)
    for index in items:
        seen = _folder(ctx) / f"seen.{ctx.job_id}.{index}"
        if index % 10 == 0 and not seen.exists():
            seen.touch()
            raise ConnectionError(f"item {index}")
    return list(items)


@operation("w_gate", merge=_listed)
def w_gate(index: int, ctx: Context) -> list[int]:
    """Raise RateLimited while the gate is shut; the operation has no guards."""
    if (_folder(ctx) / "shut").exists():
        raise RateLimited("gate", ctx.params["wait_s"], "it is shut")
    _ran(ctx)
    return [index]


@operation("w_gate_guarded", merge=_listed, service="w-gate", rate_limit=WIDE, retry=QUICK)
def w_gate_guarded(index: int, ctx: Context) -> list[int]:
    """Do the same as `w_gate`, with guards."""
    return w_gate(index, ctx)  # type: ignore[no-any-return]  # calling an operation calls its function


@operation("w_narrow", merge=_listed, bulkhead=1)
def w_narrow(index: int, ctx: Context) -> list[int]:
    """Allow one call at a time; the very first call lasts while the file `hold` exists."""
    try:
        os.close(os.open(_folder(ctx) / "first", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        _ran(ctx)
        return [index]
    (_folder(ctx) / "pid").write_text(str(os.getpid()))
    while (_folder(ctx) / "hold").exists():
        time.sleep(0.01)  # it holds the permit
    _ran(ctx)
    return [index]


@operation("w_narrow_async", merge=_listed, bulkhead=3, concurrency=10)
async def w_narrow_async(index: int, ctx: Context) -> list[int]:
    """Allow three calls at a time; up to ten items are in flight."""
    _ran(ctx)
    await asyncio.sleep(0.02)
    return [index]


@operation(
    "w_sleepers",
    merge=_listed,
    service="w-sleepers",
    concurrency=10,
    retry=RetryPolicy(max_attempts=4),
)
async def w_sleepers(index: int, ctx: Context) -> list[int]:
    """Take 20 ms; item 5 must wait once, item 25 at every try."""
    _ran(ctx)
    if index in (5, 25) and (ctx.tries < 1 or index == 25):
        raise Busy(ctx.params["wait_s"])
    await asyncio.sleep(0.02)
    return [index]


@operation("w_narrow_flaky", merge=_listed, bulkhead=1, concurrency=4, retry=QUICK)
async def w_narrow_flaky(index: int, ctx: Context) -> list[int]:
    """Allow one call at a time, and fail the first call of each item."""
    _ran(ctx)
    await asyncio.sleep(0.01)
    if ctx.tries < 1:
        raise ConnectionError(f"item {index}")
    return [index]


@operation(
    "w_many",
    merge=_listed,
    service="w-many",
    concurrency=20,
    rate_limit=Rate(200, per_s=1, burst=20),
    retry=QUICK,
    breaker=BreakerConfig(failure_threshold=3, recovery_timeout_s=0.4, success_threshold=1),
)
async def w_many(index: int, ctx: Context) -> list[int]:
    """Note the begin and the end of each call; fail while the file `down` exists."""
    _ran(ctx, "begin")
    await asyncio.sleep(0.01)
    if (_folder(ctx) / "down").exists() or (index % 20 == 7 and ctx.tries < 1):
        _note_event(ctx, "failed")
        raise ConnectionError("the service is down")
    _note_event(ctx, "ok")
    return [index]


def _note_event(ctx: Context, event: str) -> None:
    note(f"{ctx.params['folder']}/events", f"{event} {ctx.index} {os.getpid()}")


@functools.cache
def own_guards() -> tuple[TokenBucket, CircuitBreaker]:
    """Return a user's own guards, as a user's library makes them: one set in each process."""
    return TokenBucket("own", requests=Rate(40, per_s=1, burst=5)), CircuitBreaker(
        "own", config=BreakerConfig(recovery_timeout_s=1)
    )


@operation("w_own_guards", merge=_listed)
def w_own_guards(index: int, ctx: Context) -> list[int]:
    """Call the user's own guards, and raise their errors."""
    bucket, breaker = own_guards()
    with breaker.calling():
        if not (grant := bucket.acquire()):
            raise RateLimited("own bucket", grant.wait_s, "empty")
        _ran(ctx)
        return [index]
