"""The allocation policy of an operation, from the operator's file or its own declaration.

Submission and the engine's slot shares ask here.
"""

from __future__ import annotations

from rlm_tasks.operations.registry import Operation
from rlm_tasks.settings.model import Settings
from scheduler.allocation import Policies, ResourceAllocationPolicy, priority_of


def policies(settings: Settings) -> Policies:
    """Return the operator's policies.  Raises InvalidValue with file, entry and field."""
    of_operator = Policies(settings.allocation)
    if settings.allocation.policies:
        of_operator.load(settings.allocation.policies)
    return of_operator


def policy_of(operation: Operation, known: Policies) -> ResourceAllocationPolicy:
    """Return the policy of an operation: the operator's, or its own, or the one for all others."""
    if operation.allocation is not None and not known.declares(operation.name):
        return operation.allocation
    return known.of(operation.name)


def priority_for(operation: Operation, known: Policies, requested: str) -> str:
    """Return the priority of a job: that of its request, as its operation's policy allows."""
    return str(priority_of(policy_of(operation, known), requested))
