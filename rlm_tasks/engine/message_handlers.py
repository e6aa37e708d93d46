"""What a pool process does with the message of a node or a merge.

The tasks in `tasks` call it; nothing that a node meets enters a chord as an exception, because an
item's error is data and a node's crash is the ledger's business.  Begin with `handle_node`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery.exceptions import Reject

from resilience.errors import StoreUnavailable
from rlm_tasks.engine.node import run_node
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.errors import UnknownOperation
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.item_failures import failure_of
from rlm_tasks.ledger.partials import compact_split
from rlm_tasks.messaging.dispatch import body_of, group_id
from rlm_tasks.operations import registry

logger = logging.getLogger(__name__)

PUT_BACK_S = 0.25


def handle_node(runtime: Runtime, task: Any, job: str, node: str) -> None:
    """Run one node; a message that is not for this worker goes back.  Raises Celery's Reject."""
    header = task.request.get("rlm") or {}
    if why := beyond_this_worker(header):
        _put_back(task, why)
    elif runtime.goes_back((task.request.delivery_info or {}).get("routing_key", "")):
        raise Reject(requeue=True)
    elif not _guarded(runtime, job, lambda: run_node(runtime, job, node, header.get("message", 0))):
        _leave_slot(task.request)


def handle_merge(runtime: Runtime, task: Any, job: str, split: str) -> None:
    """Compact the partials of one split, as the body of its chord."""
    _guarded(runtime, job, lambda: _merge(runtime, task.request, job, split))


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
    if split.split and (outer := runtime.ledger.split(job, split.split)):
        # The message does not carry what encloses its chord: see dispatch.
        request.update(
            group=group_id(job, split.split),
            group_index=split.index,
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
