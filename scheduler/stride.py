"""The order in which a worker polls its queues: by weight, with urgent work first.

No queue waits for ever.  This is stride scheduling (Waldspurger and Weihl, 1995).  A queue's pass
grows by 1 / weight with each message.  The queue with the lowest pass is polled first.

`rlm_tasks.worker.queue_order` gives the order to kombu.  Begin with `StrideCycle`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from scheduler.queues import CONTROL, priority_of
from scheduler.settings import AdmissionSettings

WEIGHTS = {"critical": 8.0, "high": 4.0, "normal": 2.0, "low": 1.0}
"""Number of messages of each priority in a round of 15, while no queue is empty."""
STRICT_SHARE = 0.8
"""Critical work has this share of a worker's slots without competing; for the rest it competes with
the other priorities.
"""
AGEING_S, MOST_AGEING = 30.0, 8.0
"""A queue gains 1 in weight for each 30 s that its oldest message waits beyond its target, 8 at
most.
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts on which the order depends; each is read for every message, and must not raise."""

    ages: Callable[[], Mapping[str, float]] = dict
    """Age of the oldest message in seconds, by queue."""
    running: Callable[[str], int] = lambda _queue: 0
    """Number of messages of a queue that hold a slot."""
    slots: Callable[[], int] = lambda: 0
    """Number of slots of the worker; with 0, no slot is kept for critical work, and only weights
    count.
    """
    target_s: Callable[[str], float] = AdmissionSettings().wait_s
    """Longest wait of a message of a priority, in seconds; 0: its queue does not age."""


class StrideCycle:
    """The order of one worker's queues, with the methods of kombu's cycles: `update`, `consume`,
    `rotate`.
    """

    facts = Facts()

    def __init__(self, facts: Facts | None = None) -> None:
        """Without `facts` the facts of the class are read at each message."""
        if facts is not None:
            self.facts = facts
        self._queues: list[str] = []
        self._passes: dict[str, float] = {}
        self._now = 0.0  # virtual time: the pass of the queue that was served last
        self._first: frozenset[str] = frozenset()

    def update(self, items: Iterable[str]) -> None:
        """Set the names of the queues."""
        self._queues = list(items)

    def consume(self, n: int) -> list[str]:
        """Return the first `n` queues in the order in which to poll them."""
        first = {CONTROL, "critical"} if self._is_strict() else {CONTROL}
        self._first = frozenset(queue for queue in self._queues if priority_of(queue) in first)
        return sorted(self._queues, key=self._sort_key)[:n]

    def rotate(self, last_used: str) -> None:
        """Charge a queue for the message that it delivered, unless it was polled out of turn."""
        if last_used not in self._first:
            start = self._start(last_used)
            self._now = max(self._now, start)
            self._passes[last_used] = start + 1 / self._weight(last_used)

    def _weight(self, queue: str) -> float:
        """Return a queue's present weight: that of its priority, plus the weight that it gained by
        age.
        """
        priority = priority_of(queue)
        target_s = self.facts.target_s(priority)
        late_s = self.facts.ages().get(queue, 0.0) - target_s if target_s else 0.0
        return WEIGHTS[priority] + min(MOST_AGEING, max(0.0, late_s) / AGEING_S)

    def _is_strict(self) -> bool:
        """Return whether one more critical message stays within the share of critical work."""
        critical = sum(
            self.facts.running(each) for each in self._queues if priority_of(each) == "critical"
        )
        return critical + 1 <= STRICT_SHARE * self.facts.slots()

    def _sort_key(self, queue: str) -> tuple[float, float]:
        """Return the pass that the queue would have after a message, then its urgency."""
        if queue in self._first:
            return -math.inf, -WEIGHTS.get(priority_of(queue), math.inf)
        return self._start(queue) + 1 / self._weight(queue), -WEIGHTS[priority_of(queue)]

    def _start(self, queue: str) -> float:
        """Return a queue's pass; a queue that was empty for long is at most one unit of virtual
        time behind.
        """
        return max(self._passes.get(queue, 0.0), self._now - 1)
