"""The Celery app, and how the platform is installed into one.

Decides every Celery setting; refuses to know what the tasks do.  ``celery -A rlm_tasks worker`` finds `app` here.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from celery import Celery, signals
from kombu.entity import Queue

from rlm_tasks import control as control  # its commands register themselves
from rlm_tasks import operations, tasks
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.requests import Priority
from rlm_tasks.runtime import Runtime
from rlm_tasks.settings import Settings
from rlm_tasks.settings import settings as environment
from rlm_tasks.upstream import leave_promptly, survive_restarts_of_redis
from rlm_tasks.worker import GuardStep, drain_when_told_to_stop

VISIBILITY_TIMEOUT_S = 4 * 3600
"""Longer than any node runs: lost work is recovered by the ledger's sweep, not by redelivery."""


def queue_name(namespace: str, priority: str) -> str:
    """Return the queue of a priority."""
    return f"{namespace}.{priority}"


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
            "queue_order_strategy": "rlm_tasks.queue_order:QueueOrder",
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
        "task_queues": [Queue(queue_name(settings.namespace, each)) for each in Priority],  # type: ignore[no-untyped-call]  # kombu ships no types
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
        "worker_autoscaler": "rlm_tasks.autoscaler:PressureAutoscaler",
        "worker_prefetch_multiplier": 1,
        "worker_disable_rate_limits": True,
        "worker_deduplicate_successful_tasks": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        **beat_configuration(settings),
    }


def beat_configuration(settings: Settings) -> dict[str, Any]:
    """Return the settings of beat; with celery-redbeat installed any number of beats may run, and one of them acts."""
    every = {"rlm.monitor": {"task": tasks.MONITOR_TASK, "schedule": settings.pressure.monitor_s}}
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


def install(app: Celery, settings: Settings | None = None) -> Celery:
    """Add the platform's tasks, queues and worker steps to a Celery app, and return it.

    The app keeps its broker and its own settings; its workers must consume the platform's queues
    (``-Q celery,rlm.critical,rlm.high,rlm.normal,rlm.low``), with ``worker_prefetch_multiplier = 1``.
    """
    wanted = settings or environment()

    @functools.cache
    def runtime() -> Runtime:
        return Runtime.of(app, wanted, patience_s=wanted.ledger.lease_s)

    def prepare(sender: Any, **_: Any) -> None:
        # Before the pool forks: the page is shared, and operations are imported once.
        try:
            operations.import_operations(wanted.operations)
        except InvalidRequest as error:
            raise SystemExit(f"Error: {error}") from None
        runtime().worker = sender.hostname
        leave_promptly(lambda: runtime().page.draining)
        survive_restarts_of_redis()
        drain_when_told_to_stop(app)

    def say_ready(**_: Any) -> None:
        if wanted.ready_file:
            Path(wanted.ready_file).touch()

    app.rlm_runtime = runtime
    app.rlm_settings = wanted
    tasks.register(app, runtime)
    app.steps["worker"].add(GuardStep)
    signals.worker_init.connect(prepare, weak=False)
    signals.worker_ready.connect(say_ready, weak=False)
    return app


app = install(Celery("rlm_tasks", set_as_current=False))
app.config_from_object(configuration(environment()))
