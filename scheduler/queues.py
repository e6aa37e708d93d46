"""Reports on queues: priority, number of waiting messages, and age of the oldest message.

The priority follows from the queue's name alone.  `rlm_tasks.messaging.queue_depths` makes the
reports; the monitor, admission and the order of queues use them.  Begin with `QueueReport`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from resilience.bulkhead import URGENCY

CONTROL = "control"
"""Last part of the name ``<namespace>.control``: the queue of the platform's own work.  Its work is
short, and all other work depends on it.
"""


class QueueReport(msgspec.Struct, frozen=True):
    """The state of one queue."""

    depth: int  # number of messages that wait
    oldest_s: float | None = None  # age of the oldest in seconds; None: the broker does not know it


def priority_of(queue: str) -> str:
    """Return the priority of a queue, or ``control``; queues of other applications are normal."""
    last = queue.rpartition(".")[2]
    return last if last in URGENCY or last == CONTROL else "normal"


def ages(reports: Mapping[str, QueueReport]) -> dict[str, float]:
    """Return the known ages of the oldest messages, in seconds, by queue."""
    return {
        queue: report.oldest_s for queue, report in reports.items() if report.oldest_s is not None
    }
