"""Nodes whose process died: what it died of, and how they are given back."""

from __future__ import annotations

import logging
import os
import signal

from redis.exceptions import RedisError

from resilience.errors import StoreUnavailable
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.engine.shared_page import Held

logger = logging.getLogger(__name__)
REAPED = "a cause unknown"
_UNREACHABLE = (RedisError, StoreUnavailable, OSError)


def give_back(runtime: Runtime, held: Held, died_of: str, *, condemned: bool = False) -> bool:
    """RELEASE a node whose process is gone or about to go; say whether it now waits for a message.

    Its next claim knows the item that was in flight; a `condemned` one is not run again.  While
    Redis is away the page still tells of it, and the guard comes back to it."""
    try:
        waits = runtime.ledger.fail_fast().release(
            job=held.job,
            node=held.node,
            token=held.token,
            item=held.item,
            died_of=died_of,
            condemned=condemned,
        )
    except _UNREACHABLE as error:
        logger.warning("Node %s of job %s is not given back yet: %s", held.node, held.job, error)
        return False
    runtime.page.forget(held.pid)
    if died_of:
        runtime.guards.forget(held.pid)
        runtime.shares.forget(held.pid)
    return waits


def cause_of_death(pid: int) -> str:
    """Return what a pool process died of, '' while it lives; it is left for billiard to reap."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return REAPED
    if found is None:
        return ""
    if found.si_code == os.CLD_EXITED:
        return f"exit code {found.si_status}"
    return signal.Signals(found.si_status).name
