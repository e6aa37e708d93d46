"""Operations of the benchmarks; the same functions run in the pool and in plain Celery."""

from __future__ import annotations

import time

from rlm_tasks import operation
from rlm_tasks.testing.plain_celery import compute


@operation("bench_noop", merge=sum)
def bench_noop(_: int) -> int:
    """Do nothing, and count."""
    return 1


@operation("bench_nap", merge=sum)
def bench_nap(seconds: float) -> int:
    """Take a while, and no processor."""
    time.sleep(seconds)
    return 1


@operation("bench_began")
def bench_began(_: int) -> float:
    """Say when the item began."""
    return time.time()


operation("bench_compute", merge=sum)(compute)
