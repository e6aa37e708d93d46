"""The handlers of Celery messages in a pool process: one for nodes, one for merges.

The tasks in `tasks` call them.  No exception of a node enters a chord: an item's error is data, and
the ledger handles a node's crash.  Begin with `handle_node`.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from celery.exceptions import Reject

from resilience.connections import Refused
from resilience.errors import StoreUnavailable, name_of
from rlm_tasks.engine.node import entry_of_next_node, run_node
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.errors import UnknownOperation
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.item_failures import failure_of, places, raise_if_shutdown
from rlm_tasks.ledger.partials import compact_split
from rlm_tasks.messaging.dispatch import (
    Header,
    body_of,
    group_id,
    is_id,
    legible,
    read_header,
)
from rlm_tasks.operations import registry

logger = logging.getLogger(__name__)

PUT_BACK_S = 0.25
"""The pause before a message that is too new for this worker returns to its queue."""


def handle_node(runtime: Runtime, task: Any, job: str, node: str) -> None:
    """Run one node; a message that this worker must not run returns to its queue.

    Raises Celery's Reject for a message whose slot was given up for urgent work.
    """
    if not (_is_legible(task, job) and _is_legible(task, node)):
        return
    header = read_header(task.request.get("rlm"))
    if why := beyond_this_worker(header):
        _put_back(task, why)
    elif runtime.goes_back((task.request.delivery_info or {}).get("routing_key", "")):
        raise Reject(requeue=True)
    elif not _run_safely(runtime, job, lambda: run_node(runtime, job, node, header.message)):
        _leave_slot(task.request)


def handle_merge(runtime: Runtime, task: Any, job: str, split: str) -> None:
    """Compact the partials of one split, as the body of its chord."""
    if not (_is_legible(task, job) and _is_legible(task, split)):
        return
    _run_safely(runtime, job, lambda: _merge(runtime, task.request, job, split))


def _is_legible(task: Any, id: object) -> bool:
    """Whether a message names an id; a message that does not is dropped with a log line."""
    if is_id(id):
        return True
    logger.warning("A message is dropped, because it names no id: %s", legible(id))
    _leave_slot(task.request)
    return False


def beyond_this_worker(header: Header) -> str:
    """Return why this worker must not run a message, '' when it may.

    A newer release of the platform, or a newer version of the operation, has opened such a job.
    """
    schema, name, version, _ = header
    if schema > specs.SCHEMA:
        return f"jobs of schema {schema}; this worker reads {specs.SCHEMA}"
    if name in registry.names() and version > (mine := registry.get(name).version):
        return f"version {version} of operation {name!r}; this worker has {mine}"
    return ""


@functools.lru_cache(maxsize=100)
def _warn_once(why: str) -> None:
    logger.warning("Messages go back to their queue untouched: %s. Upgrade this worker", why)


def _put_back(task: Any, why: str) -> None:
    """Send a message unchanged to the end of its queue, where a newer worker may take it.

    The pause before limits the rate while no newer worker runs.
    """
    _warn_once(why)
    time.sleep(PUT_BACK_S)
    task.signature_from_request(headers={"rlm": task.request.rlm}).apply_async()
    _leave_slot(task.request)


def _leave_slot(request: Any) -> None:
    """Let the task return without filling this message's slot in its chord: another node fills it.

    Celery's ``Ignore`` has the same effect, but Celery rebuilds its traceback.  That cost a quarter
    of a small node's time.  A pool process grew by 100 MB over 500 tail calls (measured with Celery
    5.7, billiard 4.3).
    """
    request.update(chord=None, group=None)


def _run_safely(runtime: Runtime, job: str, work: Callable[[], bool]) -> bool:
    """Return the result of `work`, False when it raised.

    The sweep repeats a node that lost Redis, or that Redis refused; any other error fails the job.
    """
    try:
        return work()
    except (StoreUnavailable, Refused) as error:
        # The main process warns of the outage, once for all its pool processes.
        logger.info("A node of job %s is given up; the sweep will repeat it: %s", job, error)
    except Exception as error:
        # Its text may contain an item, which no log may have.
        logger.error("A node of job %s failed outside of its items:\n%s", job, places(error))
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
        # The message does not name the chord around its chord: see `dispatch`.
        request.update(
            group=group_id(job, split.split),
            group_index=split.index,
            chord=body_of(job, spec.queue, outer),
        )
    if again:
        # Its process may have died of this merge.  The root merge will repeat it, and counts such
        # deaths.
        return True
    entry = entry_of_next_node(runtime)
    entry.hold(
        pid=os.getpid(), job=job, node=split_id, token=secrets.token_hex(8), at=runtime.clock()
    )
    try:
        compact_split(
            ledger=runtime.ledger,
            job=job,
            operation=runtime.steps(spec).marked(registry.get(spec.operation)),
            limit=runtime.output_limit,
            lo=split.lo,
            hi=split.hi,
        )
    except (StoreUnavailable, UnknownOperation) as error:
        logger.info("Split %s of job %s is left to the root merge: %s", split_id, job, error)
    except BaseException as error:
        raise_if_shutdown(error)
        # The root merge will raise the same error, and fails the job with it.
        logger.info("The merge of split %s of job %s raised %s", split_id, job, name_of(error))
    finally:
        entry.let_go()
    return True
