"""Nodes whose pool process died: the cause of its death, and the release of its node.

The supervisor calls it for processes that it finds dead, `node_request` for those that Celery
reports.
"""

from __future__ import annotations

import logging
import os
import signal

from redis.exceptions import RedisError

from resilience.errors import StoreUnavailable
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.engine.shared_page import NO_ITEM, Held

logger = logging.getLogger(__name__)
REAPED = "an unknown cause"
"""The cause of death of a process whose exit status billiard has taken already."""
UNREACHABLE = (RedisError, StoreUnavailable, OSError)
"""The errors of a call to the ledger while Redis is away."""


def give_back(runtime: Runtime, held: Held, died_of: str, *, condemned: bool = False) -> bool:
    """Release a node whose process is dead or will be killed; return whether it needs a message.

    The next claim of the node knows the item that was in flight.  A `condemned` item does not run
    again.  A death after the node was given up is no fault of the node.  While Redis is away the
    entry stays in the shared page, and the supervisor tries again.
    """
    try:
        waits = runtime.ledger.fail_fast().release(
            job=held.job,
            node=held.node,
            token=held.token,
            item=held.item if held.step is None else NO_ITEM,
            died_of="" if held.given_up else died_of,
            condemned=condemned,
        )
    except UNREACHABLE as error:
        logger.warning("Node %s of job %s is not given back yet: %s", held.node, held.job, error)
        return False
    runtime.page.forget(held.pid)
    if died_of:
        runtime.guards.forget(held.pid)
        runtime.shares.forget(held.pid)
    return waits


def cause_of_death(pid: int) -> str:
    """Return the signal or exit code by which a pool process died, '' while it lives.

    The process is left for billiard to reap.  REAPED when billiard has done so already.
    """
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return REAPED
    if found is None:
        return ""
    if found.si_code == os.CLD_EXITED:
        return f"exit code {found.si_status}"
    return signal.Signals(found.si_status).name
