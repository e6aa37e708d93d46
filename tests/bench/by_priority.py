"""The baseline for urgent work, as a user would write it: plain Celery with priority queues.

Other work runs in chunks of 2 s.  A worker takes an urgent task next, so the task waits until a
chunk ends.  `preemption` starts it as ``celery -A tests.bench.by_priority worker``.  It imports
nothing of the platform."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, signals

URGENT, PATIENT = 0, 9  # on Redis the lowest is served first

_url = os.environ.get("RLM_REDIS_URL", "redis://localhost:6379/0")
app = Celery("by_priority", broker=_url, backend=_url, set_as_current=False)
app.conf.update(
    task_default_queue="by_priority",
    task_acks_late=True,
    worker_prefetch_multiplier=1,  # else an urgent task would wait behind prefetched tasks
    broker_transport_options={
        "queue_order_strategy": "priority",
        "priority_steps": [URGENT, PATIENT],
    },
    broker_connection_retry_on_startup=True,
)


@signals.worker_ready.connect(weak=False)
def _say_ready(**_: Any) -> None:
    if path := os.environ.get("RLM_READY_FILE"):
        Path(path).touch()


@app.task(ignore_result=True)
def chunk(items: int, item_s: float) -> None:
    """Do a chunk of the work that is not urgent."""
    for _ in range(items):
        time.sleep(item_s)


@app.task
def began() -> float:
    """Return the time at which the urgent task started, in seconds since the epoch."""
    return time.time()
