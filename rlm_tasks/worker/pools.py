"""The pools that can run jobs: processes that are forked from the worker, or the worker's own one.

`startup` refuses a worker of jobs with another pool, `control` refuses to give it a queue of jobs.
"""

from __future__ import annotations

from typing import Any

from billiard import get_start_method
from celery.concurrency import ALIASES, get_implementation
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.solo import TaskPool as SoloPool

FORK = "fork"


def wrong_pool(worker: Any) -> str:
    """Return the setting by which a worker has a pool that cannot run jobs; '' if it can."""
    pool = get_implementation(worker.pool_cls)
    if issubclass(pool, SoloPool):
        return ""
    if not issubclass(pool, PreforkPool):
        path = f"{pool.__module__}:{pool.__qualname__}"
        return f"worker_pool={next((name for name in ALIASES if ALIASES[name] == path), path)!r}"
    method = worker.pool_start_method if worker.pool_start_method != FORK else get_start_method()
    return f"worker_pool_start_method={method!r}" if method != FORK else ""
