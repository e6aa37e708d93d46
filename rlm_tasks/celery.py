"""The platform's own Celery app, and its configuration.

Decides every Celery setting of an app that runs jobs and nothing else; refuses to know what the tasks do.
``celery -A rlm_tasks worker`` finds `app` here.
"""

from __future__ import annotations

import importlib.util
from typing import Any
from urllib.parse import unquote, urlsplit

from celery import Celery
from kombu.entity import Queue

from rlm_tasks.conflicts import QUEUE_ORDER
from rlm_tasks.installation import AUTOSCALER, monitoring, queue_names
from rlm_tasks.installation import install as install
from rlm_tasks.installation import queue_name as queue_name
from rlm_tasks.requests import Priority
from rlm_tasks.settings import Settings

VISIBILITY_TIMEOUT_S = 4 * 3600
"""Longer than any node runs: lost work is recovered by the ledger's sweep, not by redelivery."""


def configuration(settings: Settings) -> dict[str, Any]:
    """Return the Celery settings of the platform's own app."""
    prefix = f"{settings.namespace}:"
    connection = {"socket_timeout": 30, "socket_connect_timeout": 5, "socket_keepalive": True, "health_check_interval": 10}
    return {
        "broker_url": settings.broker_url,
        "result_backend": settings.result_backend,
        "broker_transport_options": {
            **connection,
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "queue_order_strategy": QUEUE_ORDER,
            "priority_steps": [0],
            "global_keyprefix": prefix,
        },
        "result_backend_transport_options": {"global_keyprefix": prefix},
        "redis_socket_timeout": 30,
        "redis_socket_connect_timeout": 5,
        "redis_socket_keepalive": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_pool_acquire_timeout": 30,
        "task_publish_retry_policy": {"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
        "task_queues": [Queue(each) for each in queue_names(settings)],  # type: ignore[no-untyped-call]  # kombu ships no types
        "task_default_queue": queue_name(settings.namespace, Priority.NORMAL),
        "task_create_missing_queues": False,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        "result_expires": 3600,
        "result_chord_expires": 2 * 86_400,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_retry_on_worker_lost": False,
        **({"worker_concurrency": settings.slots} if settings.slots else {}),
        "worker_autoscaler": AUTOSCALER,
        "worker_prefetch_multiplier": 1,
        "worker_disable_rate_limits": True,
        "worker_deduplicate_successful_tasks": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        **beat_configuration(settings),
    }


def beat_configuration(settings: Settings) -> dict[str, Any]:
    """Return the settings of beat; with celery-redbeat installed any number of beats may run, and one of them acts."""
    every = monitoring(settings)
    if importlib.util.find_spec("redbeat") is None:
        # Nothing here is worth a file: what is due is due every few seconds.
        return {"beat_schedule": every, "beat_scheduler": "celery.beat:Scheduler"}
    url, options = _password_apart(settings.redis_url)
    return {
        "beat_schedule": every,
        "beat_scheduler": "redbeat.RedBeatScheduler",
        # redbeat waits 25 minutes for a beat that has died, by default; this is 12 s, and the next tick.
        "beat_max_loop_interval": 3,
        "redbeat_lock_timeout": 9,
        "redbeat_redis_url": url,
        "redbeat_redis_options": options,
        "redbeat_key_prefix": f"{settings.namespace}:redbeat:",
    }


def _password_apart(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL without its password, and that as an option: ``celery inspect conf`` shows the one and hides the other."""
    parts = urlsplit(url)
    if not parts.password:
        return url, {}
    who, _, where = parts.netloc.rpartition("@")
    user = who.partition(":")[0]
    return parts._replace(netloc=f"{user}@{where}" if user else where).geturl(), {"password": unquote(parts.password)}


app = install(Celery("rlm_tasks", set_as_current=False))
app.config_from_object(configuration(app.rlm_settings))
