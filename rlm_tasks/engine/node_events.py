"""The platform events that a node reports: slow items and jobs, much memory, recurring faults.

`node` calls `NodeEvents.of_node` at the end of each node, `closing` calls `of_job`.
`scheduler.alerts` turns events into alerts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resilience.fault_log import Escalation
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.records import Closed
from scheduler.events import EXECUTION_SLOW, FAULTS_ESCALATED, MEMORY_HIGH, Event, Events
from scheduler.settings import AlertSettings

MEMORY_EVERY_S = 300.0
"""The shortest time between two memory events of one process."""
MOST_SLOW = 10
"""The most slow items that one node reports."""


class NodeEvents:
    """Emits the events of one process's nodes."""

    def __init__(self, events: Events, settings: AlertSettings, clock: Callable[[], float]) -> None:
        self._events, self._settings, self._clock = events, settings, clock
        self._reported_memory_at = float("-inf")

    @property
    def slow_s(self) -> float:
        """The time from which an item counts as slow, in seconds."""
        return self._settings.slow_execution_ms / 1000

    def of_node(
        self,
        operation: str,
        job: str,
        host: str,
        *,
        slow: Sequence[tuple[int, float]],
        memory_mb: float,
    ) -> None:
        """Emit events for slow items (index, seconds) and for a process with too much memory."""
        found = [_slow(operation, job, index, seconds) for index, seconds in slow[:MOST_SLOW]]
        if (
            memory_mb >= self._settings.memory_mb
            and self._clock() - self._reported_memory_at >= MEMORY_EVERY_S
        ):
            self._reported_memory_at = self._clock()
            message = f"a process of {host} holds {memory_mb:.0f} MB after a node of {operation}"
            data = {"host": host, "operation": operation, "memory_mb": round(memory_mb, 1)}
            found.append(MEMORY_HIGH.event(message, data))
        if found:
            self._events.emit(*found)

    def escalated(self, found: Escalation) -> None:
        """Emit the event of a fault that recurs too often; its text stays in the log."""
        data = {"service": found.service, "code": found.code, "severity": found.severity.name}
        self._events.emit(
            FAULTS_ESCALATED.event(
                f"{found.service} fails with {found.code} again and again; the severity is now "
                f"{found.severity.name}",
                data,
            )
        )

    def of_job(self, spec: JobSpec, closed: Closed) -> None:
        """Emit an event for a job that has ended and took long; a round counts with its job."""
        if not closed.state or spec.parent or closed.took_ms < self._settings.slow_execution_ms:
            return
        data = {"operation": spec.operation, "job": spec.job, "duration_ms": float(closed.took_ms)}
        seconds = closed.took_ms / 1000
        message = f"job {spec.job} of {spec.operation} took {seconds:.1f} s, {closed.state}"
        self._events.emit(EXECUTION_SLOW.event(message, data))


def _slow(operation: str, job: str, index: int, seconds: float) -> Event:
    data = {
        "operation": operation,
        "job": job,
        "index": index,
        "duration_ms": round(seconds * 1000, 1),
    }
    return EXECUTION_SLOW.event(f"item {index} of {operation} took {seconds:.1f} s", data)
