"""Urgent work that finds every slot taken asks running nodes of less urgent jobs to yield: as many
as it needs, no more.

Decides who yields, in one script: a node yields only when it wins a token, and a token lives until
the node that waits for it is claimed.  Refuses to know what a yield is, and which slots there are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from redis.exceptions import RedisError

from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from resilience.waiters import URGENCY
from scheduler.slots import SlotBoard

logger = logging.getLogger(__name__)

TTL_MS = 60_000
"""A token whose node was never claimed is void after this: longer than most items take, for a node
yields between two.
"""
GRACE_MS = 200
"""So long a slot that is free is believed to take a node, and a message to be on its way."""

PATIENCE_MS = 1000
"""So long less urgent work leaves a slot alone that was given up, where the broker does not say
what goes first.
"""

_VERBS = ("ask", "insist", "win", "yielded", "claimed", "open", "awaited")
_ASK, _INSIST, _WIN, _YIELDED, _CLAIMED, _OPEN, _AWAITED = (
    Script.load("scheduler", f"preempt_{verb}", prelude="preempt") for verb in _VERBS
)


def more_urgent(ranks: int, priority: str) -> str:
    """Return the most urgent of the priorities above one's own that `ranks` names as bits; '' for
    none.
    """
    above = ranks & (rank_of(priority) - 1)
    return next((name for name in URGENCY if above & rank_of(name)), "") if above else ""


def rank_of(priority: str) -> int:
    """Return a priority as a bit; the most urgent is the lowest.  0 for a queue that is not
    ours.
    """
    return 1 << URGENCY[priority] if priority in URGENCY else 0


class Preemption:
    """The tokens of one platform, a set for each queue that urgent nodes wait in."""

    def __init__(self, store: Store, keys: Keys, slots: SlotBoard) -> None:
        self._store, self._keys, self._slots = store, keys, slots

    def announce(self, queue: str, nodes: Sequence[str], *, freed: int = 0) -> Sequence[str]:
        """Count nodes that are about to be sent, and return those of them that find no free slot.

        `freed` slots are about to be free, for the first of them.  A node is named by its job and
        itself."""
        try:
            [[taken, total]] = self._store.call(self._slots.take(queue, max(0, len(nodes) - freed)))
            counted = nodes[:total]
            if counted:
                self._store.call(self.ask(queue, counted, promised=freed + taken))
        except (StoreUnavailable, RedisError) as error:
            logger.info(
                "Nobody was asked to yield, urgent work waits for slots to become free: %s", error
            )
            return ()
        return counted[freed + taken :]

    def insist(self, queue: str, nodes: Sequence[str]) -> None:
        """Have others yield at once for nodes that have been sent and find no free slot."""
        try:
            self._store.call(Call(_INSIST, self._keys.preemption(queue), (TTL_MS, *nodes)))
        except (StoreUnavailable, RedisError) as error:
            logger.info("Nodes yield for urgent work a little later: %s", error)

    def settle(self, queue: str, node: str) -> None:
        """Say that a node has been claimed; its token is void then."""
        try:
            self._store.call(self.claimed(queue, node))
        except (StoreUnavailable, RedisError) as error:
            logger.info("A token is left over, it expires: %s", error)

    def ask(self, queue: str, nodes: Sequence[str], *, promised: int) -> Call:
        """Return the call that adds a token for each node that waits; the first `promised` of them
        have a free slot.
        """
        return Call(_ASK, self._keys.preemption(queue), (TTL_MS, GRACE_MS, promised, *nodes))

    def win(self, queue: str) -> Call:
        """Return the call that takes a token; it answers 1 to as many callers as there are
        tokens.
        """
        return Call(_WIN, self._keys.preemption(queue), (TTL_MS,))

    def yielded(self, queue: str, who: str) -> Call:
        """Return the call that says that the slot of somebody who has won a token is free."""
        return Call(_YIELDED, self._keys.preemption(queue), (TTL_MS, who))

    def claimed(self, queue: str, node: str) -> Call:
        """Return the call that says that a node has got its slot, by a yield or otherwise."""
        return Call(_CLAIMED, self._keys.preemption(queue), (TTL_MS, node))

    def awaited(self, queue: str) -> Call:
        """Return the call by which somebody less urgent asks whether the slot it has got is for a
        node that waits: 1 or 0.
        """
        return Call(_AWAITED, self._keys.preemption(queue), (TTL_MS, PATIENCE_MS))

    def open(self, queue: str) -> Call:
        """Return the call that answers how many tokens nobody has taken yet, those in their grace
        included.
        """
        return Call(_OPEN, self._keys.preemption(queue), (TTL_MS,))
