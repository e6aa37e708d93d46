"""Preemption: running nodes of less urgent jobs yield to urgent nodes that find no free slot.

At most as many nodes yield as urgent nodes wait.  Each waiting node adds a token, which lives until
that node is claimed.  A running node yields only if it wins a token.

Delivery announces urgent nodes, and the engine asks for a token at the end of each slice.  Begin
with `Preemption.announce`, then `win`; the states are in `lua/preempt.lua`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from redis.exceptions import RedisError

from resilience.bulkhead import URGENCY
from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from scheduler.slots import SlotBoard

logger = logging.getLogger(__name__)

TTL_MS = 60_000
"""A token expires after this if its node was never claimed.  It is longer than most items take,
because a node yields between two items.
"""
GRACE_MS = 200
"""For this long a free slot counts as taken: the message for it may still be in transit."""

PATIENCE_MS = 1000
"""For this long less urgent work leaves a given-up slot alone, if the broker does not deliver
urgent messages first.
"""

_VERBS = ("ask", "insist", "win", "yielded", "claimed", "open", "awaited")
_ASK, _INSIST, _WIN, _YIELDED, _CLAIMED, _OPEN, _AWAITED = (
    Script.load("scheduler", f"preempt_{verb}", prelude="preempt") for verb in _VERBS
)


def more_urgent(ranks: int, priority: str) -> str:
    """Return the most urgent priority in `ranks` that is above `priority`; '' for none.

    `ranks` has one bit for each priority, see `rank_of`.
    """
    above = ranks & (rank_of(priority) - 1)
    return next((name for name in URGENCY if above & rank_of(name)), "") if above else ""


def rank_of(priority: str) -> int:
    """Return a priority as one bit, the most urgent as the lowest; 0 for an unknown priority."""
    return 1 << URGENCY[priority] if priority in URGENCY else 0


class Preemption:
    """The tokens of one platform: one set for each queue in which urgent nodes wait."""

    def __init__(self, store: Store, keys: Keys, slots: SlotBoard) -> None:
        self._store, self._keys, self._slots = store, keys, slots

    def announce(self, queue: str, nodes: Sequence[str], *, freed: int = 0) -> Sequence[str]:
        """Add tokens for nodes that are about to be sent; return the nodes that find no free slot.

        The caller is about to free `freed` slots, which the first nodes get.  A node is named
        "<job> <node>".  While Redis is away nothing is added, and nothing is raised.
        """
        try:
            [[taken, total]] = self._store.call(self._slots.take(queue, max(0, len(nodes) - freed)))
            counted = nodes[:total]
            if counted:
                self._store.call(self.ask(queue, counted, promised=freed + taken))
        except (StoreUnavailable, RedisError) as error:
            logger.info("No node was asked to yield; urgent work waits for free slots: %s", error)
            return ()
        return counted[freed + taken :]

    def insist(self, queue: str, nodes: Sequence[str]) -> None:
        """End the grace of nodes that were sent and find no free slot: other nodes yield at once.

        While Redis is away nothing happens, and nothing is raised.
        """
        try:
            self._store.call(self._call(_INSIST, queue, *nodes))
        except (StoreUnavailable, RedisError) as error:
            logger.info("Nodes yield for urgent work a little later: %s", error)

    def settle(self, queue: str, node: str) -> None:
        """Remove the token of a node that was claimed.

        While Redis is away the token stays until it expires, and nothing is raised.
        """
        try:
            self._store.call(self.claimed(queue, node))
        except (StoreUnavailable, RedisError) as error:
            logger.info("A preemption token was not removed; it expires: %s", error)

    def ask(self, queue: str, nodes: Sequence[str], *, promised: int) -> Call:
        """Return the call that adds a token for each waiting node; the first `promised` nodes have
        a free slot.
        """
        return self._call(_ASK, queue, GRACE_MS, promised, *nodes)

    def win(self, queue: str) -> Call:
        """Return the call that takes a token: it answers 1 while there are tokens, then 0."""
        return self._call(_WIN, queue)

    def yielded(self, queue: str, yielder: str) -> Call:
        """Return the call that reports the free slot of a node that had won a token.

        It answers the number of open tokens.
        """
        return self._call(_YIELDED, queue, yielder)

    def claimed(self, queue: str, node: str) -> Call:
        """Return the call that reports that a node has its slot, by a yield or otherwise.

        It answers the number of open tokens.
        """
        return self._call(_CLAIMED, queue, node)

    def awaited(self, queue: str) -> Call:
        """Return the call that answers 1 if a less urgent node's slot belongs to a waiting node,
        else 0.
        """
        return self._call(_AWAITED, queue, PATIENCE_MS)

    def open(self, queue: str) -> Call:
        """Return the call that answers the number of open tokens, those in their grace included."""
        return self._call(_OPEN, queue)

    def _call(self, script: Script, queue: str, *args: str | int) -> Call:
        """Return a call on the tokens of a queue; where these are damaged, it finds none."""
        return Call(script, self._keys.preemption(queue), (TTL_MS, *args), otherwise=0)
