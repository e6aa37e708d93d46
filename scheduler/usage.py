"""Usage of each operation over all workers: executions, failures, memory and time.

An item that runs twice counts as two executions.  The engine counts each node with `tally`; clients
and the monitor read the sums.  Begin with `Usage`.  `OperationUsage` has the field names of other
orchestrators.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from resilience.connections import RecordUnreadable
from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from resilience.validation import readable, tell_unreadable

TTL_S = 30 * 86_400
"""The usage of an operation is kept for this long after its last run."""

_TALLY, _READ = Script.load("scheduler", "usage_tally"), Script.load("scheduler", "usage_read")


@dataclass(frozen=True, slots=True)
class OperationUsage:
    """The executions of one operation."""

    executor_id: str  # the operation's name
    total_executions: int = 0  # items; an item that ran twice counts twice
    successful_executions: int = 0
    failed_executions: int = 0
    avg_memory_mb: float = 0.0  # mean memory of the process at the end of each node
    peak_memory_mb: float = 0.0  # memory of the largest process
    avg_duration_ms: float = 0.0  # mean time of an item

    @property
    def success_rate_percent(self) -> float:
        """Share of successful executions, in percent with two decimals; 0 without executions."""
        return round(100 * self.successful_executions / max(self.total_executions, 1), 2)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "success_rate_percent": self.success_rate_percent}


class Usage:
    """The executions of one platform, by operation."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._keys = store, keys

    def tally(
        self,
        operation: str,
        *,
        done: int,
        failed: int,
        busy_us: int,
        memory_kb: int,
        version: int = 1,
    ) -> Call:
        """Return the call that adds one node's counts; `memory_kb` is the memory of its process."""
        return Call(
            _TALLY,
            self._keys.usage(operation),
            (operation, done, failed, busy_us, memory_kb, TTL_S, version),
            otherwise=None,
        )

    def record(self, operation: str, *, ok: bool, duration_s: float, memory_mb: float) -> None:
        """Count one execution outside of a node; while Redis is away it is not counted."""
        counts = {
            "done": int(ok),
            "failed": int(not ok),
            "busy_us": int(duration_s * 1e6),
            "memory_kb": int(memory_mb * 1024),
        }
        with suppress(StoreUnavailable):
            self._store.call(self.tally(operation, **counts))

    def of(self, operation: str) -> OperationUsage:
        """Return the usage of one operation.  Raises StoreUnavailable."""
        return _usage(operation, self._counts([operation])[0])

    def all(self) -> list[OperationUsage]:
        """Return the usage of each operation, by name.  Raises StoreUnavailable."""
        names = self.names()
        return [_usage(*each) for each in zip(names, self._counts(names), strict=True)]

    def totals(self) -> tuple[int, int]:
        """Return the number of nodes that have ended, and the summed time of their items in us.

        Raises StoreUnavailable.
        """
        counts = self._counts(self.names())
        return sum(each.nodes for each in counts), sum(each.busy_us for each in counts)

    def names(self) -> list[str]:
        """Return the names of the operations that have run.  Raises StoreUnavailable."""
        try:
            names = self._store.call(lambda client: client.smembers(self._keys.usage("")[0]))
        except RecordUnreadable as error:
            tell_unreadable("the names of operations", error.cause)
            return []
        return sorted(readable("the name of an operation", names, bytes.decode))

    def _counts(self, operations: Sequence[str]) -> list[_Counts]:
        """Return the counts of operations; those of a damaged record are 0."""
        calls = [Call(_READ, self._keys.usage(name)[1:], (), ()) for name in operations]
        answers = self._store.call(*calls) if calls else []
        return [
            counts
            for answer in answers
            for counts in readable("the usage of an operation", [answer], _counted) or [_Counts()]
        ]


class _Counts(NamedTuple):
    """The counts of one operation, as the script returns them."""

    done: int = 0
    failed: int = 0
    busy_us: int = 0
    nodes: int = 0
    memory_kb: int = 0
    peak_kb: int = 0


def _counted(answer: Sequence[bytes]) -> _Counts:
    return _Counts(*map(int, answer))


def _usage(name: str, counts: _Counts) -> OperationUsage:
    done, failed, busy_us, nodes, memory_kb, peak_kb = counts
    total = done + failed
    return OperationUsage(
        name,
        total,
        done,
        failed,
        avg_memory_mb=round(memory_kb / 1024 / max(nodes, 1), 1),
        peak_memory_mb=round(peak_kb / 1024, 1),
        avg_duration_ms=round(busy_us / 1000 / max(total, 1), 3),
    )
