"""The names of the queues of jobs: one for each priority.

Clients, workers and reports call it.
"""

from __future__ import annotations

from rlm_tasks.requests import Priority
from rlm_tasks.settings.model import Settings


def queue_name(namespace: str, priority: str) -> str:
    """Return the queue of a priority."""
    return f"{namespace}.{priority}"


def queue_names(settings: Settings) -> list[str]:
    """Return all queues of jobs, the most urgent first."""
    return [queue_name(settings.namespace, each) for each in Priority]
