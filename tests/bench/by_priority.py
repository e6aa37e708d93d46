"""What a user would write by hand for urgent work: plain Celery, chunks of 2 s, and kombu's queues
by priority.

An urgent task is the next that a worker takes, and waits until a chunk ends.  Run as ``celery -A
tests.bench.by_priority worker``; nothing of the platform is imported here."""

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
    worker_prefetch_multiplier=1,  # else an urgent task would wait behind those that were fetched before it
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
    """Do some of the patient work."""
    for _ in range(items):
        time.sleep(item_s)


@app.task
def began() -> float:
    """Say when urgent work has started."""
    return time.time()
