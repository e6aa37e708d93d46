"""How many nodes of an operation may run at once: by its policy, by pressure, and by how urgent
they are.

Decides shares; urgent work keeps its own when there is little to share.  Records and defaults are
those of source document 1, the size of a batch that of source document 4.  Refuses to know who runs
nodes, and how load is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from resilience.degradation import Level
from resilience.errors import InvalidValue
from resilience.validation import Checked
from resilience.waiters import URGENCY
from scheduler.settings import AllocationSettings

OTHERS = "*"
"""The entry of all operations that have none of their own."""
_ANY_MB = 1.0
"""What a node may be taken to need while nobody has said: no bound.  Document 1's 1,024 MB would
hold an operation without a policy to four nodes on a host with 4 GB free and no pressure at all."""
_STEPS = 4
"""Levels begin at equal distances, so each takes the same: a quarter of what lies between
max_workers and min_workers.
"""


class ExecutorPriority(StrEnum):
    """How urgent an operation is, the most urgent first."""

    CRITICAL = "critical"
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


_LATER = {
    ExecutorPriority.CRITICAL: len(Level),
    ExecutorPriority.HIGH: 1,
    ExecutorPriority.NORMAL: 0,
    ExecutorPriority.LOW: -1,
}
"""How many levels later than normal work each shrinks; critical work never does."""
TIMEOUT_FACTORS = {
    ExecutorPriority.CRITICAL: 2.0,
    ExecutorPriority.HIGH: 1.5,
    ExecutorPriority.NORMAL: 1.0,
    ExecutorPriority.LOW: 1.0,
}
"""An item's time limit is stretched by this.  Document 1 has priority affect time limits and gives
no numbers: an urgent item that is stopped early costs most, so it gets more time; low work gets no
less, for its items are not shorter."""


class ResourceAllocationPolicy(Checked):
    """What one operation may have (source document 1).  Raises InvalidValue."""

    executor_id: str = Field(
        min_length=1, description="The operation's name; `operation` is the same."
    )
    priority: ExecutorPriority = Field(
        ExecutorPriority.NORMAL, description="Its urgency; `normal` leaves it to each job."
    )
    min_memory_mb: float = Field(
        256.0, gt=0, allow_inf_nan=False, description="A node starts on a host with so much free."
    )
    max_memory_mb: float = Field(
        1024.0, gt=0, allow_inf_nan=False, description="What each node is taken to need at most."
    )
    min_workers: int = Field(
        2, ge=1, description="Nodes at once that are left to it under any pressure."
    )
    max_workers: int = Field(6, ge=1, description="Nodes at once while there is no pressure.")
    is_memory_intensive: bool = Field(False, description="Shrinks one level earlier.")

    @model_validator(mode="before")
    @classmethod
    def _named_as_elsewhere(cls, fields: Any) -> Any:
        if (
            isinstance(fields, dict)
            and "operation" in fields
            and not {"executor_id", "executorId"} & fields.keys()
        ):
            return {
                ("executor_id" if name == "operation" else name): value
                for name, value in fields.items()
            }
        return fields

    @model_validator(mode="after")
    def _ordered(self) -> ResourceAllocationPolicy:
        _at_most(self, "min_memory_mb", "max_memory_mb")
        _at_most(self, "min_workers", "max_workers")
        return self


class ResourceLimits(Checked):
    """What everything together may have (source document 1).  Raises InvalidValue."""

    max_memory_mb: float = Field(4096.0, gt=0, allow_inf_nan=False, description="Memory of a host.")
    max_cpu_percent: float = Field(85.0, gt=0, le=100, description="CPU that may be busy.")
    max_workers: int = Field(
        32, ge=1, description="Nodes of one operation at once, without a policy of its own."
    )
    min_workers: int = Field(4, ge=1, description="... that are left to it under any pressure.")

    @model_validator(mode="after")
    def _ordered(self) -> ResourceLimits:
        _at_most(self, "min_workers", "max_workers")
        return self


def _at_most(record: Checked, least: str, most: str) -> None:
    if getattr(record, least) > getattr(record, most):
        raise InvalidValue(
            least, getattr(record, least), f"must be at most {most}={getattr(record, most)}"
        )


class Policies:
    """The policies of one process, by operation."""

    def __init__(self, settings: AllocationSettings | None = None) -> None:
        """Begin with one for all operations: the settings' workers, priority normal, any memory."""
        workers = settings or AllocationSettings()
        others = ResourceAllocationPolicy(
            executor_id=OTHERS,
            min_memory_mb=_ANY_MB,
            max_memory_mb=_ANY_MB,
            min_workers=workers.min_workers,
            max_workers=workers.max_workers,
        )
        self._named = {OTHERS: others}

    def register(self, policy: ResourceAllocationPolicy) -> None:
        """Let a policy hold from now on, in place of an earlier one of its operation."""
        self._named[policy.executor_id] = policy

    def declares(self, operation: str) -> bool:
        """Whether a policy was registered for an operation by its name."""
        return operation in self._named

    def of(self, operation: str) -> ResourceAllocationPolicy:
        """Return the policy of an operation: its own, else the one for all others, in its name."""
        own = self._named.get(operation)
        return own or self._named[OTHERS].model_copy(update={"executor_id": operation})

    def load(self, path: str | Path) -> None:
        """Register the policies of a JSON file, a list of objects: all of them, or none.

        Raises InvalidValue, which names the file, the entry (from 1) and the field.
        """
        self._named.update({policy.executor_id: policy for policy in _read(Path(path))})


def _read(path: Path) -> Iterator[ResourceAllocationPolicy]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidValue("policies", str(path), f"cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not even text
        raise InvalidValue("policies", str(path), f"is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise InvalidValue("policies", str(path), "must hold a JSON list of objects")
    first: dict[str, int] = {}
    for number, entry in enumerate(entries, 1):
        policy = _entry(f"{path}, entry {number}", entry)
        if (earlier := first.setdefault(policy.executor_id, number)) != number:
            raise InvalidValue(
                f"{path}, entry {number}: executor_id",
                policy.executor_id,
                f"entry {earlier} has it; keep one",
            )
        yield policy


def _entry(where: str, entry: Any) -> ResourceAllocationPolicy:
    if not isinstance(entry, dict):
        raise InvalidValue(where, entry, "must be an object")
    try:
        return ResourceAllocationPolicy(**entry)
    except InvalidValue as error:
        raise InvalidValue(f"{where}: {error.field}", error.value, error.advice) from None


def priority_of(policy: ResourceAllocationPolicy, priority: str) -> ExecutorPriority:
    """Return how urgent a job's nodes are, from its own `priority` and its operation's.

    An operation of critical or high priority lifts its jobs to at least that, one of low priority
    holds them all down, and a normal one leaves it to them.  Raises InvalidValue for a priority
    that does not exist."""
    asked, own = _known(priority), policy.priority
    if own is ExecutorPriority.NORMAL:
        return asked
    return own if own is ExecutorPriority.LOW else min(own, asked, key=URGENCY.__getitem__)


def _known(priority: str) -> ExecutorPriority:
    if priority not in URGENCY:
        raise InvalidValue("priority", priority, f"must be one of {', '.join(URGENCY)}")
    return ExecutorPriority(priority)


def workers_for(
    policy: ResourceAllocationPolicy,
    level: Level,
    *,
    slots: int,
    available_mb: float | None,
    priority: str,
) -> int:
    """Return how many nodes of an operation may run at once; at least 1.

    `slots` is how many nodes the workers can run together, and `available_mb` the memory these
    nodes may fill, with what they hold already, or None when unknown.  Without pressure it is
    max_workers; each level takes a quarter of the way down to min_workers.  High work is one level
    behind, low work and work that needs much memory one ahead; critical work keeps its share, which
    only memory bounds.  In an emergency low work has one node: nobody waits for it, but it must not
    stop for ever. Raises InvalidValue for a priority that does not exist."""
    urgency = priority_of(policy, priority)
    most, least = (
        max(1, min(workers, slots)) for workers in (policy.max_workers, policy.min_workers)
    )
    if level == Level.EMERGENCY and urgency is ExecutorPriority.LOW:
        least = 1
    step = level - _LATER[urgency] + policy.is_memory_intensive if level else 0
    allowed = least + (most - least) * (_STEPS - min(max(step, 0), _STEPS)) // _STEPS
    return (
        allowed
        if available_mb is None
        else min(allowed, max(1, int(available_mb // policy.max_memory_mb)))
    )


def may_start(policy: ResourceAllocationPolicy, available_mb: float | None) -> str:
    """Return '' when a node may start on a host with so much memory free, else why not; None:
    nobody knows.
    """
    if available_mb is None or available_mb >= policy.min_memory_mb:
        return ""
    return f"{policy.executor_id} starts with {policy.min_memory_mb:g} MB free (min_memory_mb), and this host has {available_mb:.0f} MB"


def timeout_factor(priority: str) -> float:
    """Return what the time limit of an item is multiplied by.  Raises InvalidValue for a priority
    that does not exist.
    """
    return TIMEOUT_FACTORS[_known(priority)]


def calculate_optimal_batch_size(
    cpu_percent: float, memory_percent: float, max_batch_size: int = 50
) -> int:
    """Return how many requests to open at a time, by the formula of source document 4: 12, 50 or
    100 of 50.
    """
    if cpu_percent > 80 or memory_percent > 80:
        return max(5, max_batch_size // 4)
    if cpu_percent < 50 and memory_percent < 50:
        return min(100, max_batch_size * 2)
    return max_batch_size
