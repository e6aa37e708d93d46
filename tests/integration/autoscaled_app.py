"""The platform's app whose pools grow and shrink in times that a test can wait."""

from __future__ import annotations

from typing import Any

import redis
from celery import signals

import scheduler.autoscale
from rlm_tasks.celery import app

scheduler.autoscale.GROW_EVERY_S = 0.5
scheduler.autoscale.SHRINK_EVERY_S = 0.2
scheduler.autoscale.IDLE_S = 2.0

client = redis.Redis.from_url(app.rlm_settings.redis_url)
queues = [f"{app.rlm_settings.namespace}:{queue.name}" for queue in app.conf.task_queues]

app.rlm_queued = lambda: sum(int(client.llen(queue)) for queue in queues)
app.conf.worker_autoscaler = "rlm_tasks.autoscaler:PressureAutoscaler"


@signals.worker_ready.connect  # type: ignore[untyped-decorator]  # Celery ships no types
def offer_what_may_be(sender: Any, **_: Any) -> None:
    app.rlm_guard._pool_size = lambda: sender.controller.autoscaler.reach
