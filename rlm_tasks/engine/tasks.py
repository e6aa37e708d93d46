"""The Celery tasks: doorbells that parse, call and return.

An item's error is data and a node's crash is the ledger's business, so nothing a node meets ever
enters a chord as an exception."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery, Task
from celery.exceptions import Reject

from resilience.errors import StoreUnavailable
from rlm_tasks.engine.node import run_node
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.errors import UnknownOperation
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.item_failures import failure_of
from rlm_tasks.ledger.partials import compact_split
from rlm_tasks.messaging.dispatch import MERGE_TASK, NODE_TASK, body_of, group_id
from rlm_tasks.operations import registry

logger = logging.getLogger(__name__)

PUT_BACK_S = 0.25
MONITOR_TASK = "rlm.monitor"

OURS = (NODE_TASK, MERGE_TASK)


class Doorbell(Task):  # type: ignore[misc]  # Celery ships no types
    """What nodes and merges are, whatever an app's owner has set for all of his tasks."""

    ignore_result = True
    acks_late = True
    acks_on_failure = True
    acks_on_timeout = True
    reject_on_worker_lost = True
    retry_on_worker_lost = False
    max_retries = 0
    rate_limit = 0  # none
    serializer = "json"
    priority = 0  # there is a queue for each priority: within it, first come, first served
    typing = False
    Request = "rlm_tasks.worker.supervisor:NodeRequest"


class Broadcast(Task):  # type: ignore[misc]  # Celery ships no types
    """What beat sends to have a look taken: a question to all workers, of whom the first looks.

    A message in a queue would wait behind the very overload that is to be seen; and one that nobody
    takes would pile up."""

    def apply_async(self, *_: Any, **__: Any) -> None:
        """Ask all workers."""
        self.app.control.broadcast("rlm_monitor")


def register(app: Celery, runtime: Callable[[], Runtime]) -> None:
    """Add the tasks to an app, and to no other of its process; `runtime` gives the parts of the
    process that runs them.
    """

    @app.task(name=NODE_TASK, base=Doorbell, bind=True, shared=False)  # type: ignore[untyped-decorator]  # Celery ships no types
    def node(self: Any, job: str, node: str) -> None:
        """Run one node of a job."""
        told = self.request.get("rlm") or {}
        if why := beyond_this_worker(told):
            _put_back(self, why)
        elif runtime().stands_aside((self.request.delivery_info or {}).get("routing_key", "")):
            raise Reject(requeue=True)
        elif not _guarded(
            runtime(), job, lambda: run_node(runtime(), job, node, told.get("message", 0))
        ):
            _leave_slot(self.request)

    @app.task(name=MONITOR_TASK, base=Broadcast, ignore_result=True, shared=False)  # type: ignore[untyped-decorator]  # Celery ships no types
    def monitor() -> None:
        """Have the cluster's level worked out; beat sends it every few seconds."""
        monitor.apply_async()

    @app.task(name=MERGE_TASK, base=Doorbell, bind=True, shared=False)  # type: ignore[untyped-decorator]  # Celery ships no types
    def merge(self: Any, job: str, split: str) -> None:
        """Compact the partials of one split, as the body of its chord."""
        _guarded(runtime(), job, lambda: _merge(runtime(), self.request, job, split))


def beyond_this_worker(told: Mapping[str, Any]) -> str:
    """Say why a message is not for this worker: its job was opened by a newer release of platform
    or operation.
    """
    schema, name, version = (
        told.get("schema", specs.SCHEMA),
        told.get("operation", ""),
        told.get("version", 1),
    )
    if schema > specs.SCHEMA:
        return f"jobs of schema {schema}; this worker reads {specs.SCHEMA}"
    if name in registry.names() and version > (mine := registry.get(name).version):
        return f"version {version} of operation {name!r}; this worker has {mine}"
    return ""


@functools.cache
def _say_once(why: str) -> None:
    logger.warning("Messages go back to their queue untouched: %s. Upgrade this worker", why)


def _put_back(task: Any, why: str) -> None:
    """Send a message to the end of its queue as it came, for a newer worker; slowly, should there
    be none.
    """
    _say_once(why)
    time.sleep(PUT_BACK_S)
    task.signature_from_request(headers={"rlm": task.request.rlm}).apply_async()
    _leave_slot(task.request)


def _leave_slot(request: Any) -> None:
    """Return without filling this message's slot in its chord: somebody else does, or will.

    Celery's ``Ignore`` says the same, but rebuilding its traceback cost a quarter of a small node's
    time and made a pool process grow by 100 MB over 500 tail calls (measured with Celery 5.7,
    billiard 4.3)."""
    request.update(chord=None, group=None)


def _guarded(runtime: Runtime, job: str, work: Callable[[], bool]) -> bool:
    try:
        return work()
    except StoreUnavailable as error:
        logger.warning("A node of job %s is given up, the sweep will redo it: %s", job, error)
    except Exception as error:
        logger.exception("A node of job %s failed outside of its items", job)
        runtime.ledger.stop(
            job, "failed", detail="a node failed outside of its items", error=failure_of(-1, error)
        )
    return False


def _merge(runtime: Runtime, request: Any, job: str, split_id: str) -> bool:
    split, spec = runtime.ledger.split(job, split_id), runtime.ledger.spec(job)
    if split is None or spec is None:
        return True
    again = (request.delivery_info or {}).get("redelivered")
    if split.sp and (outer := runtime.ledger.split(job, split.sp)):
        # The message does not carry what encloses its chord: see dispatch.
        request.update(
            group=group_id(job, split.sp),
            group_index=split.ix,
            chord=body_of(job, spec.queue, outer),
        )
    if again:
        # Its process may have died of it: what kills here is met, counted and named by the root
        # merge.
        return True
    try:
        compact_split(
            ledger=runtime.ledger,
            job=job,
            operation=registry.get(spec.operation),
            lo=split.lo,
            hi=split.hi,
        )
    except (StoreUnavailable, UnknownOperation) as error:
        logger.info("Split %s of job %s is left to the root merge: %s", split_id, job, error)
    except Exception as error:
        # The root merge meets the same error, and makes it the job's.
        logger.info(
            "The merge of split %s of job %s raised %s", split_id, job, type(error).__name__
        )
    return True
