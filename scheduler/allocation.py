"""How many nodes of an operation may run at once: by its policy, by pressure, and by priority.

`rlm_tasks.engine.slot_shares` asks it before a node starts, and `rlm_tasks.client.admission` for
the size of a batch.  Urgent work keeps its share when there is little to share.  Begin with
`workers_for`, then `ResourceAllocationPolicy`.  Field names, defaults and the formula of a batch
are those of other orchestrators.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from pydantic import ConfigDict, Field, model_validator

from resilience.bulkhead import URGENCY
from resilience.degradation import Level
from resilience.errors import InvalidValue
from resilience.validation import Checked
from scheduler.settings import AllocationSettings

OTHERS = "*"
"""The entry for all operations that have no own policy."""
_ANY_MB = 1.0
"""Memory of a node without a policy: so small that memory does not bound it.

With 1,024 MB, the default of a policy, a host with 4 GB free would run only four such nodes,
without any pressure.
"""
_STEPS = 4
"""Each level takes a quarter of the way from max_workers to min_workers: levels begin at equal
distances.
"""


class ExecutorPriority(StrEnum):
    """The priority of an operation, the most urgent first."""

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
"""Number of levels by which each priority shrinks later than normal work; critical work never
shrinks.
"""
TIMEOUT_FACTORS = {
    ExecutorPriority.CRITICAL: 2.0,
    ExecutorPriority.HIGH: 1.5,
    ExecutorPriority.NORMAL: 1.0,
    ExecutorPriority.LOW: 1.0,
}
"""The time limit of an item is multiplied by this.

An urgent item that is stopped early costs most, so it gets more time.  Low work gets no less time,
because its items are not shorter.
"""


class AllocationFields(TypedDict, total=False):
    """The fields of `ResourceAllocationPolicy` with the types that its constructor takes."""

    executor_id: str
    operation: str
    priority: ExecutorPriority | Literal["critical", "high", "normal", "low"]
    min_memory_mb: float
    max_memory_mb: float
    min_workers: int
    max_workers: int
    is_memory_intensive: bool


class ResourceAllocationPolicy(Checked):
    """The number of nodes and the memory that one operation may have.  Raises InvalidValue."""

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[AllocationFields]) -> None: ...

    executor_id: str = Field(
        min_length=1, description="Name of the operation; `operation` is an alias of this field."
    )
    priority: ExecutorPriority = Field(
        default=ExecutorPriority.NORMAL,
        description="Priority of the operation; `normal` keeps the priority of each job.",
    )
    min_memory_mb: float = Field(
        default=256.0,
        gt=0,
        allow_inf_nan=False,
        description="A node starts only on a host with this amount of memory free.",
    )
    max_memory_mb: float = Field(
        default=1024.0,
        gt=0,
        allow_inf_nan=False,
        description="Memory that is counted for each node; a host runs as many as fit.",
    )
    min_workers: int = Field(
        default=2, ge=1, description="Nodes at once that the operation keeps under any pressure."
    )
    max_workers: int = Field(
        default=6, ge=1, description="Nodes at once while there is no pressure."
    )
    is_memory_intensive: bool = Field(
        default=False, description="Whether the number of nodes shrinks one level earlier."
    )

    @model_validator(mode="before")
    @classmethod
    def _named_as_elsewhere(cls, fields: Any) -> Any:
        return (
            cls.renamed(fields, "operation", "executor_id") if isinstance(fields, dict) else fields
        )

    @model_validator(mode="after")
    def _ordered(self) -> ResourceAllocationPolicy:
        _at_most(self, "min_memory_mb", "max_memory_mb")
        _at_most(self, "min_workers", "max_workers")
        return self


class ResourceLimits(Checked):
    """The limits for all operations together; fields may be changed.  Raises InvalidValue."""

    model_config = ConfigDict(frozen=False)

    max_memory_mb: float = Field(
        default=4096.0, gt=0, allow_inf_nan=False, description="Memory of a host."
    )
    max_cpu_percent: float = Field(default=85.0, gt=0, le=100, description="CPU that may be busy.")
    max_workers: int = Field(
        default=32,
        ge=1,
        description="Most nodes of one operation at once, if the operation has no policy.",
    )
    min_workers: int = Field(
        default=4, ge=1, description="Nodes that such an operation keeps under any pressure."
    )

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a field, if all limits together stay valid.  Raises InvalidValue."""
        changed = type(self)(**{**self.model_dump(), name: value})
        super().__setattr__(name, getattr(changed, name))

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
        """Start with one policy for all operations: workers as in the settings, priority normal,
        any memory.
        """
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
        """Use a policy from now on, in place of an earlier one of the same operation."""
        self._named[policy.executor_id] = policy

    def declares(self, operation: str) -> bool:
        """Return whether an operation has a policy under its name."""
        return operation in self._named

    def of(self, operation: str) -> ResourceAllocationPolicy:
        """Return an operation's policy: its own, else the one for all others under its name."""
        own = self._named.get(operation)
        return own or self._named[OTHERS].model_copy(update={"executor_id": operation})

    def load(self, path: str | Path) -> None:
        """Register the policies of a JSON file, a list of objects: all of them, or none.

        Raises InvalidValue with the file, the entry (from 1) and the field.
        """
        self._named.update({policy.executor_id: policy for policy in read_policies(path)})


def read_policies(path: str | Path) -> list[ResourceAllocationPolicy]:
    """Return the policies of a JSON file, a list of objects.

    Raises InvalidValue with the file, the entry (from 1) and the field.
    """
    return list(_policies(Path(path)))


def _policies(path: Path) -> Iterator[ResourceAllocationPolicy]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidValue(
            "policies",
            str(path),
            f"cannot be read: {error.strerror}; correct the path, or its rights",
        ) from None
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
        raise error.within(where) from None


def priority_of(policy: ResourceAllocationPolicy, priority: str) -> ExecutorPriority:
    """Return the priority of a job's nodes, from the job's `priority` and its operation's policy.

    A critical or high operation raises its jobs to at least its priority.  A low operation lowers
    all its jobs to low.  A normal operation changes nothing.  Raises InvalidValue for an unknown
    priority.
    """
    of_job, of_operation = _known(priority), policy.priority
    if of_operation is ExecutorPriority.NORMAL:
        return of_job
    if of_operation is ExecutorPriority.LOW:
        return of_operation
    return min(of_operation, of_job, key=URGENCY.__getitem__)


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
    """Return the number of nodes of an operation that may run at once; at least 1.

    - `slots`: the number of nodes that all workers can run together.
    - `available_mb`: the memory that these nodes may fill, with the memory that they hold already;
      None if it is unknown.

    The rules:

    - Without pressure the number is max_workers.  Each level takes a quarter of the way down to
      min_workers.
    - High work is one level behind.  Low work and memory-intensive work are one level ahead.
    - Critical work keeps its share, and only memory bounds it.
    - In an emergency low work has one node: nobody waits for it, but it must not stop for ever.

    Raises InvalidValue for an unknown priority.
    """
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
    """Return '' if a node may start on a host with this amount of memory free, else the reason.

    With None, an unknown amount, a node may start.
    """
    if available_mb is None or available_mb >= policy.min_memory_mb:
        return ""
    needed = f"{policy.executor_id} starts with {policy.min_memory_mb:g} MB free (min_memory_mb)"
    return f"{needed}, and this host has {available_mb:.0f} MB"


def timeout_factor(priority: str) -> float:
    """Return the factor for the time limit of an item.  Raises InvalidValue for an unknown
    priority.
    """
    return TIMEOUT_FACTORS[_known(priority)]


def calculate_optimal_batch_size(
    cpu_percent: float, memory_percent: float, max_batch_size: int = 50
) -> int:
    """Return the number of requests to open at a time; with the default of 50: 12, 50 or 100.

    It is a quarter, at least 5, if CPU or memory is above 80 %.  It is twice as many, at most 100,
    if both are below 50 %.
    """
    if cpu_percent > 80 or memory_percent > 80:
        return max(5, max_batch_size // 4)
    if cpu_percent < 50 and memory_percent < 50:
        return min(100, max_batch_size * 2)
    return max_batch_size
