"""The platform's own Celery app, and its configuration.

``celery -A rlm_tasks worker`` finds `app` here.  A `Client` without an app uses it, unless the
platform is installed in an app of the user (`default_app`).  The module has every Celery setting of
an app that runs only jobs; for other apps, see `installation`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from celery import Celery
from kombu.entity import Queue

from resilience.keys import Keys
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.installation import AUTOSCALER, installed_apps, monitoring
from rlm_tasks.installation import install as install
from rlm_tasks.messaging import transports
from rlm_tasks.messaging.broker_kinds import broker
from rlm_tasks.messaging.queue_names import queue_name as queue_name
from rlm_tasks.messaging.queue_names import queue_names
from rlm_tasks.operations import registry
from rlm_tasks.requests import Priority
from rlm_tasks.settings.model import Settings


def configuration(settings: Settings) -> dict[str, Any]:
    """Return the Celery settings of the platform's own app."""
    return {
        **broker(settings),
        **transports.result_backend(settings),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_channel_error_retry": True,
        "broker_pool_acquire_timeout": 30,
        "task_publish_retry_policy": {
            "max_retries": 3,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 0.5,
        },
        "task_queues": [Queue(each, routing_key=each) for each in queue_names(settings)],  # type: ignore[no-untyped-call]  # kombu ships no types
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
    """Return the settings of beat.

    With celery-redbeat installed any number of beats may run; one of them is active.
    """
    every = monitoring(settings)
    if importlib.util.find_spec("redbeat") is None:
        # The default scheduler would keep a file, but each entry is due every few seconds anyway.
        return {"beat_schedule": every, "beat_scheduler": "celery.beat:Scheduler"}
    return {
        "beat_schedule": every,
        "beat_scheduler": "redbeat.RedBeatScheduler",
        # By default another beat takes over 25 minutes after one has died; with these two, after
        # 12 s, at the next tick.
        "beat_max_loop_interval": 3,
        "redbeat_lock_timeout": 9,
        "redbeat_key_prefix": Keys(settings.namespace).redbeat,
        **transports.redbeat(settings),
    }


app = install(Celery("rlm_tasks", set_as_current=False))
"""The app of ``celery -A rlm_tasks``, and of a program that installs the platform in none."""
app.config_from_object(configuration(app.rlm_settings))


def default_app() -> Celery:
    """Return the app of a `Client` that is given none, and of ``operation.submit``.

    It is the app that the program has called `install` on, else the platform's own.  Modules of
    operations are imported before, because they often import the app.  Raises InvalidRequest when
    there are several.
    """
    users = [each for each in installed_apps() if each is not app]
    if not users:
        registry.import_operations(app.rlm_settings.operations)
        users = [each for each in installed_apps() if each is not app]
    if len(users) > 1:
        names = [str(each.main) for each in users]
        raise InvalidRequest(
            "app",
            names,
            "the platform is installed in several apps of this process; name the one that sends, "
            "as in Client(app).submit(...), or close the others",
        )
    return users[0] if users else app
