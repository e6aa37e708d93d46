"""The platform's app with our autoscaler, whose worker takes its level from a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import redis
from celery import signals

import scheduler.autoscale
from rlm_tasks.celery import app
from rlm_tasks.page import Page

LEVEL = Path(os.environ["LEVEL_FILE"])

scheduler.autoscale.IDLE_S = 2.0  # seconds that a test can wait
scheduler.autoscale.SHRINK_EVERY_S = 0.5
scheduler.autoscale.GROW_EVERY_S = 1.0

client = redis.Redis.from_url(app.rlm_settings.redis_url)
queues = [f"{app.rlm_settings.namespace}:{queue.name}" for queue in app.conf.task_queues]


def ready() -> int:
    return sum(int(client.llen(queue)) for queue in queues)


Page.level = property(lambda _: int(LEVEL.read_text()))  # type: ignore[attr-defined,assignment]
app.rlm_queued = ready
app.conf.worker_autoscaler = "rlm_tasks.autoscaler:PressureAutoscaler"


@signals.worker_ready.connect  # type: ignore[untyped-decorator]  # Celery ships no types
def offer_what_may_be(sender: Any, **_: Any) -> None:
    app.rlm_guard._pool_size = lambda: sender.controller.autoscaler.reach
