"""An app whose worker may have any pool, and a pool of its own."""

from __future__ import annotations

import os

from celery import Celery
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.thread import TaskPool as ThreadPool

from rlm_tasks import install

app = Celery("pools", broker=os.environ["POOLS_BROKER"], backend=os.environ["POOLS_BROKER"])
if pool := os.environ.get("POOLS_POOL"):
    app.conf.worker_pool = pool
if method := os.environ.get("POOLS_METHOD"):
    app.conf.worker_pool_start_method = method
install(app)


class OwnThreads(ThreadPool):  # type: ignore[misc]  # Celery ships no types
    """A pool of the user that cannot run jobs."""


class OwnProcesses(PreforkPool):  # type: ignore[misc]  # Celery ships no types
    """A pool of the user that forks processes."""


@app.task  # type: ignore[untyped-decorator]  # Celery ships no types
def own(number: int) -> int:
    """A task of the app."""
    return 2 * number
