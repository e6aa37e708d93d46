"""What a job tells its user: records, no decisions."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from resilience.budget import Spending


class Status(StrEnum):
    """State of a job; the last four are final."""

    PENDING = "pending"  # open, no node claimed yet
    RUNNING = "running"
    MERGING = "merging"  # every item is accounted for, the answer is being made
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
    """An item whose operation raised: which one, and what it raised."""

    index: int  # of the item, from 0; -1: the merge
    type: str  # the exception's class
    message: str
    traceback: str = field(default="", repr=False)
    code: str = ""  # what the error means: TIMEOUT, RATE_LIMITED, OPERATION_FAILED, ...


@dataclass(frozen=True, slots=True)
class QuarantinedItem:
    """An item that is not run again, because its process died too often while it ran."""

    job_id: str
    index: int
    operation: str
    item: str  # where it lies; never the item itself
    attempts: int  # how often it was tried
    last_signal: str  # what its process died of the last time


class SuccessfulItems(Sequence[int]):
    """The indexes of the items that succeeded, in order, held as ranges."""

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
        return f"<{len(self)} items in {len(self._runs)} ranges>"


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a job cost."""

    items: int  # of the whole job
    nodes: int  # finished nodes, the root included
    splits: int  # cuts into two or more children
    yields: int  # cuts into one
    max_depth: int  # of the tree; 0: it was never cut in two
    execution_time_ms: float  # from the first claim to the end
    busy_ms: float  # summed time inside the operation, over all nodes
    peak_memory_mb: float  # largest worker process seen
    waited_ms: float  # from opening to the first claim


def metrics_of(rounds: Sequence[Mapping[str, str]]) -> Metrics:
    """Return the cost of a job and its rounds from their facts in the ledger.

    Times are those of the job, the first of them, which spans its rounds.
    """
    facts = rounds[0]
    nodes, splits, yields, busy_us = (
        sum(int(each[name]) for each in rounds) for name in ("nodes", "splits", "yields", "busy_us")
    )
    opened, started, closed = (
        int(facts.get(name, 0)) for name in ("opened_ms", "started_ms", "closed_ms")
    )
    started = started or closed
    return Metrics(
        items=int(facts["n"]),
        nodes=nodes,
        splits=splits,
        yields=yields,
        max_depth=max(int(each["depth"]) for each in rounds),
        execution_time_ms=float(closed - started),
        busy_ms=busy_us / 1000,
        peak_memory_mb=max(int(each["peak_kb"]) for each in rounds) / 1024,
        waited_ms=float(started - opened),
    )


@dataclass(frozen=True, slots=True)
class Shaped:
    """Items whose outcome was shaped by one strategy at one pressure level."""

    strategy: str  # reduce_entity_limits, skip_optional_analysis, ...: see docs/pressure.md
    level: str  # elevated, high, critical, emergency
    items: int  # how many


class Receipt(tuple[Shaped, ...]):
    """What was left out of a job's answer, under which pressure; empty when nothing was."""

    __slots__ = ()

    def __str__(self) -> str:
        return (
            "; ".join(f"{each.strategy} at {each.level}: {each.items} items" for each in self)
            or "nothing was left out"
        )


NOTHING_LEFT_OUT = Receipt()


def receipt_of(rounds: Sequence[Mapping[str, str]]) -> Receipt:
    """Return the receipt of a job and its rounds from their facts in the ledger."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, count in (each for facts in rounds for each in facts.items()):
        if name.startswith("shaped:"):
            _, strategy, level = name.split(":")
            counts[strategy, level] += int(count)
    return Receipt(
        Shaped(strategy, level, items) for (strategy, level), items in sorted(counts.items())
    )


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended."""

    job_id: str
    status: Status
    output: Any  # of the merge; without one a list in item order; None unless it succeeded
    total: int  # items
    done: int  # items that succeeded
    failed_count: int
    skipped: (
        int  # items that were not run: empty ones, or all that were left when the job ended early
    )
    failed: list[ItemFailure]  # the first 1,000; failed_count counts all
    successful: SuccessfulItems  # their indexes
    metrics: Metrics  # what it cost
    stopped: str = (
        ""  # why the job ended before its items did: early, budget, failed, expired, cancelled
    )
    error: ItemFailure | None = None  # what its merge raised
    receipt: Receipt = NOTHING_LEFT_OUT  # what pressure has shaped of it
    spent: Spending | None = None  # on calls to models, by it and its rounds; None: it makes none

    @property
    def failure_rate(self) -> float:
        """Failed items over all items; 0.0 for a job without items."""
        return self.failed_count / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, without the list of successful indexes."""
        shown = {name: getattr(self, name) for name in self.__slots__ if name != "successful"}
        shown |= {"failed": [asdict(each) for each in self.failed], "metrics": asdict(self.metrics)}
        shown |= {"receipt": [asdict(each) for each in self.receipt]}
        shown |= {"spent": asdict(self.spent) if self.spent else None}
        shown |= {
            "error": asdict(self.error) if self.error else None,
            "failure_rate": self.failure_rate,
        }
        return shown


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job's whole tree is, as one figure."""

    status: Status
    total: int  # items
    done: int  # items that succeeded
    failed: int
    skipped: int
    nodes: int  # finished
    pending: int  # nodes queued, running or parked
    splits: int  # cuts into two or more nodes
    elapsed_s: float  # since the first claim, until the end
    rate: float  # items a second since the first claim
    eta_s: float | None  # seconds to the end at that rate; None while nothing is known
    phase: str = "process"  # validate: items are being validated, done counts those
    round: int = 0  # it is in; the items of all rounds so far are counted

    @property
    def fraction(self) -> float:
        """Share of items that are accounted for, 0 to 1."""
        return (
            min(1.0, (self.done + self.failed + self.skipped) / self.total) if self.total else 1.0
        )


@dataclass(frozen=True, slots=True)
class Partial:
    """The best answer so far: what it is and how much of the job it covers."""

    output: Any  # shaped as the job's will be
    coverage: float  # share of items whose outcome is in the output, 0 to 1
    ranges: list[tuple[int, int]]  # item ranges that are in it


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that has happened to a job."""

    at: float  # seconds since the epoch, by the server's clock
    event: str  # opened, started, released, merging, closed, ...
    detail: str


@dataclass(frozen=True, slots=True)
class TreeNode:
    """One node of a job's tree."""

    id: str
    parent: str  # the id of the node that cut it
    lo: int  # its first item
    hi: int  # the first item after it
    worked: int  # items it worked through itself
    depth: int  # 0: the root
    state: str  # queued, running, parked, done, cut, skipped
    why: str  # the reason it was cut, or waits
    worker: str  # that ran it last
    duration_ms: float
    attempts: int  # claims


COLUMNS = ("model", "calls", "tokens", "money")


def rows(spent: Spending) -> list[tuple[str, ...]]:
    """Return what was spent, for a person: a row for each model, one for all of them, and one for
    the budget if there is one.
    """
    found = [
        (
            "all",
            {unit: spent.spent.get(unit, 0.0) + spent.held.get(unit, 0.0) for unit in COLUMNS[1:]},
        )
    ]
    found += [("budget", spent.limits)] if spent.limits else []
    return [
        (name, *(_shown(unit, units) for unit in COLUMNS[1:]))
        for name, units in [*sorted(spent.by_label.items()), *found]
    ]


def _shown(unit: str, units: Mapping[str, float]) -> str:
    if unit not in units:
        return ""
    return f"{units[unit]:,.4f}" if unit == "money" else f"{units[unit]:,.0f}"
