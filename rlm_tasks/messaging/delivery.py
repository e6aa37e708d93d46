"""Send nodes again that were parked or lost, and make running nodes yield to urgent ones.

The runtime of a worker and the session of a client each hold one `Delivery`.  Begin with
`Delivery.resend`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from resilience.errors import StoreUnavailable
from resilience.validation import tell_unreadable
from rlm_tasks.errors import JobUnreadable
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.messaging.dispatch import Dispatcher
from rlm_tasks.operations import registry
from scheduler.preemption import Preemption

logger = logging.getLogger(__name__)


class Delivery:
    """The way of a registered node back to its queue."""

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher, preemption: Preemption) -> None:
        self._ledger, self._dispatcher, self._preemption = ledger, dispatcher, preemption

    def fail_fast(self) -> Delivery:
        """Return this delivery with calls that raise at once while Redis is away."""
        return Delivery(self._ledger.fail_fast(), self._dispatcher, self._preemption)

    @contextmanager
    def making_room(self, queue: str, nodes: Sequence[str], *, freed: int = 0) -> Iterator[None]:
        """Make less urgent nodes yield to urgent ones that are sent within the block.

        Only nodes without a free slot need another node to yield; `freed` slots will be free soon.
        The nodes are counted before the block, so that a claim finds them.  Slots are requested
        after the block, so that a slot that becomes free finds their messages.
        """
        without_slot = self._preemption.announce(queue, nodes, freed=freed) if nodes else ()
        yield
        if without_slot:
            self._preemption.insist(queue, without_slot)
        if nodes:
            self._dispatcher.ask_to_yield(queue)

    def resend(self, job: str, nodes: Sequence[str]) -> None:
        """Send registered nodes again; without chords if this process lacks the operation.

        Urgent nodes make others yield as at first, because a lost or parked node holds no slot.
        """
        try:
            spec = self._ledger.spec(job)
        except JobUnreadable as error:
            tell_unreadable(f"the specification of job {job}", error.why)
            return
        if spec is None:
            return
        known = spec.operation in registry.names()
        merges = known and registry.get(spec.operation).merge is not None
        urgent = [f"{job} {node}" for node in nodes] if spec.preempts else ()
        with self.making_room(spec.queue, urgent):
            self._dispatcher.resend(spec, nodes, merges=merges)

    def wake(self, waiters: Sequence[str]) -> int:
        """Wake the nodes that a guard names as "job node"; return the number that was parked."""
        woken = 0
        for waiter in waiters:
            job, _, node = waiter.partition(" ")
            try:
                if self._ledger.unpark(job, node):
                    woken += 1
                    self.resend(job, [node])
            except StoreUnavailable as error:
                logger.info(
                    "Node %s of job %s is not woken; it wakes at its own time: %s", node, job, error
                )
        return woken
