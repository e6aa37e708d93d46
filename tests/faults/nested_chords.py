"""The control of the soak test: nested chords in plain Celery, with its safest settings.

A task halves its range by `self.replace(chord(...))` down to a chunk.  Late acknowledgement,
requeueing on loss and a short visibility timeout are on.  `soak` starts it; begin with `work`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, chord, signals

_url = os.environ.get("RLM_REDIS_URL", "redis://localhost:6379/0")
app = Celery("nested_chords", broker=_url, backend=_url, set_as_current=False)
app.conf.update(
    task_default_queue="nested",
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        "visibility_timeout": 5,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    },
)


@signals.worker_ready.connect(weak=False)
def _say_ready(**_: Any) -> None:
    if path := os.environ.get("RLM_READY_FILE"):
        Path(path).touch()


@app.task(bind=True)
def work(self: Any, lo: int, hi: int, chunk: int, ms: float) -> list[int]:
    """Work through a range, or halve it."""
    if hi - lo <= chunk:
        time.sleep(ms * (hi - lo) / 1000)
        return list(range(lo, hi))
    middle = (lo + hi) // 2
    raise self.replace(
        chord([work.si(lo, middle, chunk, ms), work.si(middle, hi, chunk, ms)], merge.s())
    )


@app.task
def merge(parts: list[list[int]]) -> list[int]:
    """Join the results of two halves."""
    return [item for part in parts for item in part]
