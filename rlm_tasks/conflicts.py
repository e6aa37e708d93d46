"""Settings of an app that make its jobs slow or late, each with advice for its owner.

A worker logs them at its start, and the doctor prints them.  They are never changed, and never stop
a process.  Begin with `conflicts`.
"""

from __future__ import annotations

from collections.abc import Iterator

from celery import Celery

from rlm_tasks.engine import tasks
from rlm_tasks.jobs.splitting import LONGEST_RUN
from rlm_tasks.messaging.broker_kinds import broker_kind
from rlm_tasks.messaging.transports import QUEUE_ORDER

_PROMISED = (
    "ignore_result",
    "acks_late",
    "reject_on_worker_lost",
    "retry_on_worker_lost",
    "rate_limit",
    "serializer",
)

_UNWANTED: tuple[tuple[str, bool, str], ...] = (
    (
        "task_always_eager",
        True,
        "jobs never run in the process that submits them; start a worker, or call the operation",
    ),
    (
        "worker_deduplicate_successful_tasks",
        True,
        "parts of a job share a task id, so a part that is delivered again waits for the sweep; "
        "set False",
    ),
    (
        "worker_enable_remote_control",
        False,
        "workers receive no monitor task, no cancel and no notice of urgent work; set True",
    ),
)


def conflicts(app: Celery) -> list[str]:
    """Return a sentence for each setting of an app that makes its jobs slow or late.

    The sentence has the name, the value, and what to do.  The setting stays in force.  Call
    `install` on the app before.  No connection is made.
    """
    unwanted_values = [
        f"{name}={value!r}: {advice}"
        for name, unwanted, advice in _UNWANTED
        if (value := app.conf.get(name)) is unwanted
    ]
    return [
        *unwanted_values,
        *_few_at_a_time(app),
        *_order(app),
        *_chords(app),
        *_limits(app),
        *_annotations(app),
    ]


def _few_at_a_time(app: Celery) -> Iterator[str]:
    value = app.conf.worker_prefetch_multiplier
    if app.conf.value_set_for("worker_prefetch_multiplier") and value != 1:
        yield (
            f"worker_prefetch_multiplier={value!r}: nodes wait in a busy worker while another has "
            "free slots; set 1, or start the workers of jobs with --prefetch-multiplier=1"
        )


def _order(app: Celery) -> Iterator[str]:
    order = (app.conf.broker_transport_options or {}).get("queue_order_strategy", QUEUE_ORDER)
    if broker_kind(app.conf.broker_url).orders_queues and order != QUEUE_ORDER:
        yield (
            f"broker_transport_options queue_order_strategy={order!r}: priorities of jobs have no "
            "weight; remove it"
        )


def _chords(app: Celery) -> Iterator[str]:
    if not broker_kind(app.conf.result_backend).counts_chords:
        yield (
            "result_backend is not Redis: partial answers are merged when a job ends, not while it "
            "runs; set a redis:// URL"
        )


def _limits(app: Celery) -> Iterator[str]:
    longest = LONGEST_RUN * app.rlm_settings.node.target_ms / 1000
    for name in ("task_soft_time_limit", "task_time_limit"):
        if (limit := app.conf.get(name)) and limit <= longest:
            yield (
                f"{name}={limit!r}: shorter than a node may run ({longest:g} s); raise it, set it "
                "for your own tasks only, or lower RLM_NODE__TARGET_MS"
            )


def _annotations(app: Celery) -> Iterator[str]:
    for name in tasks.OURS:
        task = app.tasks[name]
        for option in _PROMISED:
            if (value := getattr(task, option)) != getattr(tasks.JobTask, option):
                yield (
                    f"task_annotations {option}={value!r} for {name}: recovery needs the "
                    "platform's value; remove it"
                )
