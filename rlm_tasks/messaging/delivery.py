"""Send nodes again that wait or were lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from resilience.errors import StoreUnavailable
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.messaging.dispatch import Dispatcher
from rlm_tasks.operations import registry
from scheduler.preemption import Preemption
from scheduler.slots import SlotBoard

logger = logging.getLogger(__name__)


@contextmanager
def making_room(
    preemption: Preemption,
    dispatcher: Dispatcher,
    queue: str,
    nodes: Sequence[str],
    *,
    freed: int = 0,
) -> Iterator[None]:
    """Have less urgent nodes yield for urgent ones that are sent within the block, as far as there
    is no slot.

    They are counted before, so that a claim finds them, and asked for after, so that a slot that is
    given up finds them."""
    without = preemption.announce(queue, nodes, freed=freed) if nodes else ()
    yield
    if without:
        preemption.insist(queue, without)
    if nodes:
        dispatcher.ask_to_yield(queue)


def resend(ledger: Ledger, dispatcher: Dispatcher, job: str, nodes: Sequence[str]) -> None:
    """Send registered nodes again; the splits of an operation nobody knows here get no chord.

    Urgent ones need room as at first: what was lost or has waited has no slot.
    """
    spec = ledger.spec(job)
    if spec is not None:
        merges = (
            spec.operation in registry.names() and registry.get(spec.operation).merge is not None
        )
        urgent = [f"{job} {node}" for node in nodes] if spec.preempts else ()
        preemption = Preemption(ledger.store, ledger.keys, SlotBoard(ledger.store, ledger.keys))
        with making_room(preemption, dispatcher, spec.queue, urgent):
            dispatcher.resend(job, nodes, merges=merges)


def wake(ledger: Ledger, dispatcher: Dispatcher, waiters: Sequence[str]) -> int:
    """Let nodes go on that a guard has named: each is "job node", as it was noted.  Return how many
    have waited.
    """
    woken = 0
    for waiter in waiters:
        job, _, node = waiter.partition(" ")
        try:
            if ledger.unpark(job, node):
                woken += 1
                resend(ledger, dispatcher, job, [node])
        except StoreUnavailable as error:
            logger.info(
                "Node %s of job %s is not woken, it wakes by its time: %s", node, job, error
            )
    return woken
