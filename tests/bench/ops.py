"""Operations of the benchmarks; the same functions run in the pool and in plain Celery."""

from __future__ import annotations

from rlm_tasks import operation
from rlm_tasks.handwritten import compute


@operation("bench_noop", merge=sum)
def bench_noop(_: int) -> int:
    """Do nothing, and count."""
    return 1


operation("bench_compute", merge=sum)(compute)
