"""In which order a worker asks its queues: by weight, so that urgent work goes first and none waits
for ever.

Decides who is next by stride scheduling (Waldspurger and Weihl, 1995): a queue's pass grows with
each message by one over its weight, and the lowest goes first.  Refuses to know what a message is,
and where its facts come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from scheduler.queues import CONTROL, priority_of
from scheduler.settings import AdmissionSettings

WEIGHTS = {"critical": 8.0, "high": 4.0, "normal": 2.0, "low": 1.0}
"""Messages of each priority in a round of 15, while all of them have some."""
STRICT_SHARE = 0.8
"""Critical work need not compete for this share of a worker's slots; the others share what is left
of them.
"""
AGEING_S, MOST_AGEING = 30.0, 8.0
"""A queue gains 1 in weight for so many seconds that its oldest message waits beyond its target, up
to so much.
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker knows of its queues; all of it is read anew for each message, and must not
    raise.
    """

    ages: Callable[[], Mapping[str, float]] = dict
    """Seconds that the oldest message of a queue waits, by queue."""
    running: Callable[[str], int] = lambda _queue: 0
    """How many messages of a queue hold a slot."""
    slots: Callable[[], int] = lambda: 0
    """How many slots the worker has; of 0 none is kept for critical work, and weights alone
    decide.
    """
    target_s: Callable[[str], float] = AdmissionSettings().wait_s
    """How long a message of a priority may wait; 0: its queue does not age."""


class StrideCycle:
    """The order of one worker's queues.  It speaks kombu's protocol of a cycle: `update`,
    `consume`, `rotate`.
    """

    facts = Facts()

    def __init__(self, facts: Facts | None = None) -> None:
        """Without facts those of the class hold, as they are at each message."""
        if facts is not None:
            self.facts = facts
        self._queues: list[str] = []
        self._passes: dict[str, float] = {}
        self._now = 0.0  # virtual time: where the queue stood that was served last
        self._first: frozenset[str] = frozenset()

    def update(self, items: Iterable[str]) -> None:
        """Take the names of the queues."""
        self._queues = list(items)

    def consume(self, n: int) -> list[str]:
        """Return the first `n` queues in the order in which to ask them."""
        first = {CONTROL, "critical"} if self._is_strict() else {CONTROL}
        self._first = frozenset(queue for queue in self._queues if priority_of(queue) in first)
        return sorted(self._queues, key=self._place)[:n]

    def rotate(self, last_used: str) -> None:
        """Charge a queue for the message it gave, unless it was asked before its turn."""
        if last_used not in self._first:
            start = self._start(last_used)
            self._now = max(self._now, start)
            self._passes[last_used] = start + 1 / self._weight(last_used)

    def _weight(self, queue: str) -> float:
        """Return a queue's weight as it is now: its priority's, and what its age adds."""
        priority = priority_of(queue)
        target_s = self.facts.target_s(priority)
        late_s = self.facts.ages().get(queue, 0.0) - target_s if target_s else 0.0
        return WEIGHTS[priority] + min(MOST_AGEING, max(0.0, late_s) / AGEING_S)

    def _is_strict(self) -> bool:
        """Whether one more critical message keeps within the share that is theirs."""
        critical = sum(
            self.facts.running(each) for each in self._queues if priority_of(each) == "critical"
        )
        return critical + 1 <= STRICT_SHARE * self.facts.slots()

    def _place(self, queue: str) -> tuple[float, float]:
        """Sort by where the pass would be afterwards, and by urgency where that is equal."""
        if queue in self._first:
            return -math.inf, -WEIGHTS.get(priority_of(queue), math.inf)
        return self._start(queue) + 1 / self._weight(queue), -WEIGHTS[priority_of(queue)]

    def _start(self, queue: str) -> float:
        """Return a queue's pass; who had nothing to give for long has saved up one unit of virtual
        time, and no more.
        """
        return max(self._passes.get(queue, 0.0), self._now - 1)
