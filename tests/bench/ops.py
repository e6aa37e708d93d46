"""Operations of the benchmarks; the local pool and plain Celery run the same functions."""

from __future__ import annotations

import time

from pydantic import BaseModel

from rlm_tasks import operation
from rlm_tasks.testing.plain_celery import compute


class Entry(BaseModel):
    """The form of the answers of one planned request."""

    name: str
    topic: str
    lines: int
    is_public: bool = True


@operation("bench_noop", merge=sum)
def bench_noop(_: int) -> int:
    """Do nothing, and count."""
    return 1


@operation("bench_nap", merge=sum)
def bench_nap(seconds: float) -> int:
    """Sleep; use no processor time."""
    time.sleep(seconds)
    return 1


@operation("bench_began")
def bench_began(_: int) -> float:
    """Return the time at which the item began, in seconds since the epoch."""
    return time.time()


operation("bench_compute", merge=sum)(compute)
