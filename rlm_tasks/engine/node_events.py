"""What a node notices for those who operate the platform: items that take long, a process that
grows large.

Decides what is worth an event, and how often.  Refuses to know who is alerted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduler.events import EXECUTION_SLOW, MEMORY_HIGH, Event, Events
from scheduler.settings import AlertSettings

MEMORY_EVERY_S = 300.0
"""A process tells of its size again after this: source document 1 warns of memory every 5
minutes.
"""
MOST_SLOW = 10
"""Slow items that one node tells of."""


class NodeEvents:
    """The notices of one process."""

    def __init__(self, events: Events, settings: AlertSettings, clock: Callable[[], float]) -> None:
        self._events, self._settings, self._clock = events, settings, clock
        self._told_at = float("-inf")

    @property
    def slow_s(self) -> float:
        """An item that takes so long is slow."""
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
        """Tell of slow items (index, seconds) and of the process's memory, if there is anything to
        tell.
        """
        told = [_slow(operation, job, index, seconds) for index, seconds in slow[:MOST_SLOW]]
        if (
            memory_mb >= self._settings.memory_mb
            and self._clock() - self._told_at >= MEMORY_EVERY_S
        ):
            self._told_at = self._clock()
            message = f"a process of {host} holds {memory_mb:.0f} MB after a node of {operation}"
            data = {"host": host, "operation": operation, "memory_mb": round(memory_mb, 1)}
            told.append(MEMORY_HIGH.event(message, data))
        if told:
            self._events.emit(*told)


def _slow(operation: str, job: str, index: int, seconds: float) -> Event:
    data = {
        "operation": operation,
        "job": job,
        "index": index,
        "duration_ms": round(seconds * 1000, 1),
    }
    return EXECUTION_SLOW.event(f"item {index} of {operation} took {seconds:.1f} s", data)
