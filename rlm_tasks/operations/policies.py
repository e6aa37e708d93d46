"""Which allocation policy holds for an operation."""

from __future__ import annotations

from rlm_tasks.operations.registry import Operation
from rlm_tasks.settings.model import Settings
from scheduler.allocation import Policies, ResourceAllocationPolicy, priority_of


def policies(settings: Settings) -> Policies:
    """Return the operator's policies.  Raises InvalidValue naming the file, the entry and the
    field.
    """
    found = Policies(settings.allocation)
    if settings.allocation.policies:
        found.load(settings.allocation.policies)
    return found


def policy_of(operation: Operation, known: Policies) -> ResourceAllocationPolicy:
    """Return the policy of an operation: the operator's word counts, then its own, then the one for
    all others.
    """
    if operation.allocation is not None and not known.declares(operation.name):
        return operation.allocation
    return known.of(operation.name)


def priority_for(operation: Operation, known: Policies, asked: str) -> str:
    """Return how urgent a job of an operation is."""
    return str(priority_of(policy_of(operation, known), asked))
