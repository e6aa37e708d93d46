"""The Celery tasks of the platform: their names, their options, and their registration in an app.

`installation` registers them in clients and workers alike, so this module loads no other module of
the engine.  The tasks load `message_handlers` when they run; a worker loads it before its pool
forks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import Celery, Task

from rlm_tasks.messaging.dispatch import MERGE_TASK, NODE_TASK

if TYPE_CHECKING:
    from rlm_tasks.engine.runtime import Runtime

MONITOR_TASK = "rlm.monitor"

OURS = (NODE_TASK, MERGE_TASK)


class JobTask(Task):  # type: ignore[misc]  # Celery ships no types
    """The options of nodes and merges; settings of the app for all tasks do not change them."""

    ignore_result = True
    acks_late = True
    acks_on_failure = True
    acks_on_timeout = True
    reject_on_worker_lost = True
    retry_on_worker_lost = False
    max_retries = 0
    rate_limit = 0  # no limit
    serializer = "json"
    priority = 0  # each priority has its own queue; within a queue, first come, first served
    typing = False
    Request = "rlm_tasks.worker.node_request:NodeRequest"

    @classmethod
    def annotate(cls) -> None:
        """Apply the `task_annotations` that name this task.

        Those of all tasks ("*"), such as a rate limit, would stop jobs.
        """
        for each in cls.app.annotations:
            for option, value in (getattr(each, "annotate", lambda _: {})(cls) or {}).items():
                if option.startswith("@"):
                    cls.add_around(option[1:], value)
                else:
                    setattr(cls, option, value)


class Broadcast(Task):  # type: ignore[misc]  # Celery ships no types
    """Beat's monitor task: it is broadcast to all workers, and the first to answer measures.

    A message in a queue would wait behind the overload that it is to measure, and would pile up
    where no worker takes it.
    """

    def apply_async(self, *_: Any, **__: Any) -> None:
        """Ask all workers."""
        self.app.control.broadcast("rlm_monitor")


def register(app: Celery, runtime: Callable[[], Runtime]) -> None:
    """Add the tasks to one app; `runtime` returns the parts of the process that runs them."""

    @app.task(name=NODE_TASK, base=JobTask, bind=True, shared=False)  # type: ignore[untyped-decorator]  # Celery ships no types
    def node(self: Any, job: str, node: str) -> None:
        """Run one node of a job."""
        from rlm_tasks.engine.message_handlers import handle_node

        handle_node(runtime(), self, job, node)

    @app.task(name=MERGE_TASK, base=JobTask, bind=True, shared=False)  # type: ignore[untyped-decorator]  # Celery ships no types
    def merge(self: Any, job: str, split: str) -> None:
        """Compact the partials of one split, as the body of its chord."""
        from rlm_tasks.engine.message_handlers import handle_merge

        handle_merge(runtime(), self, job, split)

    @app.task(name=MONITOR_TASK, base=Broadcast, ignore_result=True, shared=False)  # type: ignore[untyped-decorator]  # Celery ships no types
    def monitor() -> None:
        """Ask for a measurement of the cluster's pressure; beat sends it every few seconds."""
        monitor.apply_async()
