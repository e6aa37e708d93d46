"""What is known of a queue: how urgent its work is, how much of it waits, and for how long.

Decides by its name alone what a queue is for.  Refuses to know which broker holds it.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from resilience.waiters import URGENCY

CONTROL = "control"
"""The queue of the platform's own work, ``<namespace>.control``: short, and nothing else is right
without it.
"""


class QueueReport(msgspec.Struct, frozen=True):
    """How many messages wait in a queue, and how many seconds the oldest has; None when nobody can
    say.
    """

    depth: int
    oldest_s: float | None = None


def priority_of(queue: str) -> str:
    """Return how urgent a queue's work is, or ``control``: a queue that is not ours is normal."""
    last = queue.rpartition(".")[2]
    return last if last in URGENCY or last == CONTROL else "normal"


def ages(reports: Mapping[str, QueueReport]) -> dict[str, float]:
    """Return the ages that are known, in seconds, by queue."""
    return {
        queue: report.oldest_s for queue, report in reports.items() if report.oldest_s is not None
    }
