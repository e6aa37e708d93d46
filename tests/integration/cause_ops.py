"""Operations that wait, fail and end in each way that the platform explains.

An item that is the path of a file takes as long as the file exists."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate
from resilience.retry import RetryPolicy
from rlm_tasks import NextRound, operation

LATER = RetryPolicy(max_attempts=3, initial_delay_s=60, max_delay_s=60)


@operation("cause.held")
def held(path: str) -> str:
    """Wait until a file is gone."""
    while Path(path).exists():
        time.sleep(0.02)
    return path


@operation("cause.newer", version=int(os.environ.get("CAUSE_VERSION", "2")))
def newer(item: int) -> int:
    """Return the item; a client has another version than a worker."""
    return item


@operation("cause.limited", rate_limit=Rate(1, per_s=3600))
def limited(item: int) -> int:
    """Call a provider that allows one call an hour."""
    return item


@operation(
    "cause.broken",
    service="sepa",
    breaker=BreakerConfig(failure_threshold=1, recovery_timeout_s=600),
    retry=RetryPolicy(max_attempts=3, initial_delay_s=0.01),
)
def broken(item: int) -> int:
    """Call a service that goes down after item 0."""
    if item:
        raise ConnectionError("the service is down")
    return item


@operation("cause.crowded", bulkhead=1)
def crowded(path: str) -> str:
    """Call a service that allows one call at a time."""
    return held(path)  # type: ignore[no-any-return]  # calling an operation calls its function


class TooMany(Exception):
    """An answer of 429 that asks for a pause of 5 minutes."""

    status_code = 429
    headers = {"Retry-After": "300"}


@operation("cause.paused", rate_limit=Rate(1000), retry=LATER)
def paused(item: int) -> int:
    """Call a provider that asks for a pause."""
    raise TooMany


@operation("cause.flaky", retry=LATER)
def flaky(item: int) -> int:
    """Fail at the first try."""
    raise TimeoutError("not in time")


def _next_round(outputs: Any, _round: Any) -> NextRound:
    return NextRound("cause.held", list(outputs), {})


@operation("cause.rounds", then=_next_round)
def in_rounds(path: str) -> str:
    """Begin a round that takes as long as a file exists."""
    return path


@operation("cause.fails")
def fails(item: str) -> str:
    """Raise an error that names the item."""
    raise ValueError(f"no date: {item}")


def _held_merge(paths: Iterable[str]) -> str:
    parts = list(paths)
    return held(parts[0]) if len(parts) > 1 else parts[0]


@operation("cause.merged", merge=_held_merge)
def merged(path: str) -> str:
    """Return the path to a merge of two parts, which takes as long as the file exists."""
    return path


@operation("cause.unmerged", merge=lambda parts: 1 / 0)
def unmerged(item: int) -> int:
    """Return the item to a merge that fails."""
    return item


@operation("cause.dies")
def dies(item: int) -> int:
    """End the process."""
    os._exit(9)


@operation("cause.large", allocation={"min_memory_mb": 10**9, "max_memory_mb": 10**9})
def large(item: int) -> int:
    """Need more memory than a host has."""
    return item
