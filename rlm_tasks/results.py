"""Records that users get from a job: its result, progress, partial answer, events and tree.

`client` and the ledger make them; the command line and Flower show them.  Begin with `JobResult`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, overload

from resilience.errors import InvalidValue, count, figure

if TYPE_CHECKING:
    from resilience.budget import Spending


class Status(StrEnum):
    """State of a job; the last four are final."""

    PENDING = "pending"  # open, no node claimed yet
    RUNNING = "running"
    MERGING = "merging"  # every item is accounted for, the answer is being computed
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self in (Status.SUCCEEDED, Status.FAILED, Status.EXPIRED, Status.CANCELLED)


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """An item whose operation raised an exception."""

    index: int  # number of the item, from 0; -1: the merge
    type: str  # the exception's class
    message: str
    traceback: str = field(default="", repr=False)
    code: str = ""  # the kind of error: TIMEOUT, RATE_LIMITED, OPERATION_FAILED, ...
    where: str = ""  # its place in the input, "payments.csv, line 839"; '': its index says all

    def outline(self) -> ItemFailure:
        """Return it without message and traceback, which may contain the item."""
        return replace(self, message=hidden(self.message), traceback="")


def hidden(message: str) -> str:
    """Return what stands for a message that is not shown: its length."""
    return f"({len(message)} characters)" if message else ""


@dataclass(frozen=True, slots=True)
class QuarantinedItem:
    """An item that is not run again, because its process died too often while it ran."""

    job_id: str
    index: int
    operation: str
    item: str  # a description, such as file and line; never the item itself
    attempts: int  # number of tries
    last_signal: str  # the last cause of death of its process


class SuccessfulItems(Sequence[int]):
    """The indexes of the items that succeeded, in order, kept as ranges."""

    def __init__(self, ranges: Sequence[tuple[int, int]], left_out: Sequence[int]) -> None:
        self._runs: list[range] = []
        bad = sorted(left_out)
        for lo, hi in ranges:
            at = lo
            for index in bad[bisect_left(bad, lo) : bisect_left(bad, hi)]:
                self._runs.append(range(at, index))
                at = index + 1
            self._runs.append(range(at, hi))
        self._runs = [run for run in self._runs if run]

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def __iter__(self) -> Iterator[int]:
        for run in self._runs:
            yield from run

    def __contains__(self, index: object) -> bool:
        return any(index in run for run in self._runs)

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        left = at if at >= 0 else at + len(self)
        for run in self._runs:
            if 0 <= left < len(run):
                return run[left]
            left -= len(run)
        raise IndexError(at)

    def __repr__(self) -> str:
        return f"<{count(len(self), 'item')} in {count(len(self._runs), 'range')}>"


class Outputs(list[Any]):
    """The outputs of a job without a merge, in item order.

    A failed or skipped item has no output, so the list may be shorter than the items.
    `JobResult.rows` pairs each output with the index of its item.
    """

    __slots__ = ("failed", "failure_rate")

    def __init__(
        self, outputs: Iterable[Any], *, failed: list[ItemFailure], failure_rate: float
    ) -> None:
        """`failed` has the first 1,000 failed items; `failure_rate` is their share, 0.0 to 1.0."""
        super().__init__(outputs)
        self.failed = failed
        self.failure_rate = failure_rate

    @property
    def successful(self) -> list[Any]:
        """The outputs of the items that succeeded: the list itself."""
        return self

    @property
    def failureRate(self) -> float:  # noqa: N802  # the name in other orchestrators
        """The share of failed items, under its camelCase name."""
        return self.failure_rate


@dataclass(frozen=True, slots=True)
class Metrics:
    """The cost of a job: nodes, time and memory."""

    items: int  # items of the whole job
    nodes: int  # finished nodes, the root included
    splits: int  # cuts into two or more children
    yields: int  # cuts into one child
    max_depth: int  # depth of the tree; 0: no cut had two children
    execution_time_ms: float  # from the first claim to the end
    busy_ms: float  # time inside the operation, summed over all nodes
    peak_memory_mb: float  # memory of its largest worker process
    waited_ms: float  # from opening to the first claim


def metrics_of(rounds: Sequence[Mapping[str, str]]) -> Metrics:
    """Return the cost of a job and its rounds from their facts in the ledger.

    The first facts are the job's; its times span all rounds.
    """
    facts = rounds[0]
    nodes, splits, yields, busy_us = (
        sum(int(each[name]) for each in rounds) for name in ("nodes", "splits", "yields", "busy_us")
    )
    opened, started, closed = (
        int(facts.get(name, 0)) for name in ("opened_ms", "started_ms", "closed_ms")
    )
    started = started or closed or opened
    return Metrics(
        items=int(facts["n"]),
        nodes=nodes,
        splits=splits,
        yields=yields,
        max_depth=max(int(each["depth"]) for each in rounds),
        execution_time_ms=float(max(0, closed - started)),
        busy_ms=busy_us / 1000,
        peak_memory_mb=max(int(each["peak_kb"]) for each in rounds) / 1024,
        waited_ms=float(started - opened),
    )


@dataclass(frozen=True, slots=True)
class Shaped:
    """The number of items that one strategy has changed at one pressure level."""

    strategy: str  # reduce_entity_limits, skip_optional_analysis, ...: see docs/pressure.md
    level: str  # elevated, high, critical, emergency
    items: int  # number of items


class Receipt(tuple[Shaped, ...]):
    """The work left out of a job's answer, and the pressure level; empty when nothing was."""

    __slots__ = ()

    def __str__(self) -> str:
        return (
            "; ".join(
                f"{each.strategy} at {each.level}: {count(each.items, 'item')}" for each in self
            )
            or "nothing was left out"
        )


NOTHING_LEFT_OUT = Receipt()


def receipt_of(rounds: Sequence[Mapping[str, str]]) -> Receipt:
    """Return the receipt of a job and its rounds from their facts in the ledger."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, number in (each for facts in rounds for each in facts.items()):
        if name.startswith("shaped:"):
            _, strategy, level = name.split(":")
            counts[strategy, level] += int(number)
    return Receipt(
        Shaped(strategy, level, items) for (strategy, level), items in sorted(counts.items())
    )


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended."""

    job_id: str
    status: Status
    output: Any  # the merged output; without a merge Outputs; None unless it succeeded
    total: int  # items
    done: int  # items that succeeded
    failed_count: int  # items that failed
    skipped: int  # items that were not run: empty, or left when the job ended early
    failed: list[ItemFailure]  # the first 1,000; failed_count counts all
    successful: SuccessfulItems  # indexes of the items that succeeded
    metrics: Metrics  # nodes, time and memory
    stopped: str = ""  # cause of an early end: early, budget, failed, expired, cancelled
    error: ItemFailure | None = None  # the exception of its merge
    receipt: Receipt = NOTHING_LEFT_OUT  # work left out under pressure
    spent: Spending | None = None  # spent on models by it and its rounds; None: it calls none

    @property
    def failure_rate(self) -> float:
        """Failed items over all items; 0.0 for a job without items."""
        return self.failed_count / self.total if self.total else 0.0

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield the index of each item that succeeded, with its output, in item order.

        Failed and skipped items are left out.  Raises InvalidValue when the job has no output
        for each item: it has a merge, or it did not succeed.
        """
        if not isinstance(self.output, Outputs):
            raise InvalidValue(
                "rows",
                self.job_id,
                "needs one output per item, but this job has a merge or did not succeed; "
                "read `output`, or iterate over job.rows()",
            )
        return zip(self.successful, self.output, strict=True)

    def to_dict(self, *, messages: bool = True) -> dict[str, Any]:
        """Return the result as plain data, without the list of successful indexes.

        Without `messages` each failure has the length of its message, and no traceback: both may
        contain items.
        """

        def as_dict(failure: ItemFailure) -> dict[str, Any]:
            return asdict(failure if messages else failure.outline())

        shown = {name: getattr(self, name) for name in self.__slots__ if name != "successful"}
        shown |= {"failed": list(map(as_dict, self.failed)), "metrics": asdict(self.metrics)}
        shown |= {"receipt": [asdict(each) for each in self.receipt]}
        shown |= {"spent": asdict(self.spent) if self.spent else None}
        shown |= {
            "error": as_dict(self.error) if self.error else None,
            "failure_rate": self.failure_rate,
        }
        return shown


@dataclass(frozen=True, slots=True)
class Progress:
    """The counts of a job's items and nodes at one moment, over its whole tree."""

    status: Status
    total: int  # items
    done: int  # items that succeeded
    failed: int  # items that failed
    skipped: int  # items that were not run
    nodes: int  # nodes that have finished
    pending: int  # nodes queued, running or parked
    splits: int  # cuts into two or more nodes
    elapsed_s: float  # since the first claim, until the end
    rate: float  # items per second since the first claim
    eta_s: float | None  # seconds to the end at that rate; None while unknown, or nothing runs
    phase: str = "process"  # validate: done counts validated items
    round: int = 0  # the current round; items of all rounds so far are counted
    submitted_at: float = 0.0  # seconds since the epoch, by the server's clock
    running: int = 0  # nodes that run now on a live worker
    idle_s: float = 0.0  # while none runs: seconds since one has begun, or the job was opened

    @property
    def fraction(self) -> float:
        """Share of items that are accounted for, 0 to 1."""
        return (
            min(1.0, (self.done + self.failed + self.skipped) / self.total) if self.total else 1.0
        )


@dataclass(frozen=True, slots=True)
class Partial:
    """The best answer so far, and the share of the job that it covers."""

    output: Any  # in the form of the final output
    coverage: float  # share of items whose outcome is in the output, 0 to 1
    ranges: list[tuple[int, int]]  # ranges of items in the output


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job."""

    at: float  # seconds since the epoch, by the server's clock
    event: str  # opened, started, released, merging, closed, ...
    detail: str
    id: str = field(default="", repr=False)  # its place among the job's events


@dataclass(frozen=True, slots=True)
class TreeNode:
    """One node of a job's tree."""

    id: str
    parent: str  # the id of the node that cut it
    lo: int  # its first item
    hi: int  # the first item after it
    worked: int  # items that it ran itself
    depth: int  # 0: the root
    state: str  # queued, running, parked, done, cut, skipped
    why: str  # the reason why it was cut, or why it waits
    worker: str  # the worker that ran it last
    duration_ms: float
    attempts: int  # number of claims


class Tree(list[TreeNode]):
    """The nodes of a job's tree: parents before their children, siblings in item order."""

    def __init__(self, nodes: Iterable[TreeNode] = (), *, total: int | None = None) -> None:
        super().__init__(nodes)
        self.total = len(self) if total is None else total  # nodes that the job has had so far

    @property
    def note(self) -> str:
        """The part of a large tree that is in the list; '' when all nodes are."""
        if self.total <= len(self):
            return ""
        return (
            f"{len(self):,} of {self.total:,} nodes: those at work and the next in their queue, "
            "then those that ended last"
        )


COLUMNS = ("model", "calls", "tokens", "money")


def rows(spent: Spending) -> list[tuple[str, ...]]:
    """Return spending as rows of COLUMNS: one per model, one for all, one for a budget if set."""
    totals = [
        (
            "all",
            {unit: spent.spent.get(unit, 0.0) + spent.held.get(unit, 0.0) for unit in COLUMNS[1:]},
        )
    ]
    totals += [("budget", spent.limits)] if spent.limits else []
    return [
        (name, *(_shown(unit, units) for unit in COLUMNS[1:]))
        for name, units in [*sorted(spent.by_label.items()), *totals]
    ]


def _shown(unit: str, units: Mapping[str, float]) -> str:
    if unit not in units:
        return ""
    return figure(units[unit])
