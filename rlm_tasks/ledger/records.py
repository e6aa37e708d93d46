"""The records of the ledger: the arguments and the answers of its scripts.

The engine, the worker and clients read them.  Begin with `Claim` and `Report`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from rlm_tasks.jobs.index_ranges import IndexRanges
from rlm_tasks.jobs.item_failures import outline
from rlm_tasks.jobs.spec import JobSpec

ROOT = "root"
MERGE = "merge"
PROCESS = "process"
SWEEP_AT_ONCE = 100
KNOWN_AT_ONCE = 2048
"""A claim knows at most this many items that failed in validation."""


@dataclass(frozen=True, slots=True)
class ChordSlot:
    """The place in a chord that a node fills; the root's has an empty split."""

    split: str = ""
    index: int = 0
    task: str = ""


class Child(msgspec.Struct):
    """A range that a cut hands over."""

    id: str
    lo: int
    hi: int
    depth: int
    split: str
    index: int
    task: str
    why: str
    wait_ms: int = -1  # it is parked for this time; -1: it may run now
    tries: int = 0  # failures of its first item so far


class Split(msgspec.Struct):
    """A chord: the range that its body merges, and the slot that its body fills."""

    id: str
    lo: int
    hi: int
    split: str = msgspec.field(name="sp")
    index: int = msgspec.field(name="ix")
    task: str = msgspec.field(name="t")
    size: int


class Report(msgspec.Struct):
    """The report of an ended node: it worked through [lo, mid) and handed over the rest."""

    mid: int
    done: int = 0
    failed: list[int] = []
    failed_ranges: list[tuple[int, int]] = []  # two and more failed items in a row
    skipped: list[int] = []  # empty items
    failures: list[tuple[int, str]] = []  # index, JSON of ItemFailure; a range has `until`, too
    quarantined: list[tuple[int, str]] = []  # index, JSON of its record
    kids: list[Child] = []
    splits: list[Split] = []
    shaped: list[tuple[str, str, int]] = []  # strategy, level, number of items that it changed
    why: str = ""
    busy_us: int = 0
    peak_kb: int = 0

    @property
    def failed_count(self) -> int:
        """The number of failed items."""
        return len(self.failed) + sum(hi - lo for lo, hi in self.failed_ranges)


@dataclass(frozen=True, slots=True)
class Suspect:
    """An item that was in flight when its process died."""

    index: int
    deaths: int
    by: str  # cause of the last death
    condemned: bool  # it must not run again


@dataclass(frozen=True, slots=True)
class Claim:
    """CLAIM's answer.  Only the answer `run` has the other fields."""

    answer: str
    job: str
    node: str
    token: str
    epoch: int = 0
    lo: int = 0
    hi: int = 0
    depth: int = 0
    slot: ChordSlot = ChordSlot()
    phase: str = PROCESS
    tries: int = 0  # failures of its first item so far
    waited: bool = False  # it was parked, so its first item has waited for its turn
    spec: JobSpec | None = None
    losses: int = 0  # holders lost at an unknown item
    lost_by: str = ""  # cause of the last of these losses
    one_by_one: bool = False  # a process died with several items in flight: run them one at a time
    suspects: tuple[Suspect, ...] = ()
    known_failed: IndexRanges = field(default_factory=IndexRanges)  # failed in validation
    remaining_ms: int = -1  # to the deadline; -1: no deadline
    waiting: tuple[str, ...] = ()  # nodes whose message may be missing
    parent: str = ""  # the node that was cut to make it, '' for the first one

    @property
    def until(self) -> int:
        """The end of the items that this claim may run; the rest is another node's.

        Beyond it, the claim does not know which items failed in validation.
        """
        known = self.known_failed.ranges
        return self.hi if len(known) < KNOWN_AT_ONCE else known[-1][1]


@dataclass(frozen=True, slots=True)
class Finished:
    """FINISH's answer."""

    answer: str  # ok, stale
    registered: bool  # the children now wait for their messages
    outcome: str  # '', merge, process, closed
    waits: str  # node that now waits for a message, or the merge that the caller holds


@dataclass(frozen=True, slots=True)
class Closed:
    """CLOSE's answer."""

    state: str  # the final state; '' when the caller does not hold the root merge
    took_ms: int  # since the job was opened


@dataclass(frozen=True, slots=True)
class Swept:
    """SWEEP's answer."""

    state: str
    again_ms: int
    send: tuple[str, ...]

    @property
    def more(self) -> bool:
        """Whether more nodes may be overdue, so that the sweep should be repeated at once."""
        return len(self.send) >= SWEEP_AT_ONCE


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node as the ledger stores it, with all that its message needs."""

    id: str
    lo: int
    hi: int
    depth: int
    slot: ChordSlot
    state: str
    epoch: int
    parent: str
    mid: int
    why: str
    worker: str
    ms: int
    losses: int
    lost_by: str
    one_by_one: bool
    tries: int
    waited: bool
    message: int  # number of its latest message

    @classmethod
    def parse(cls, id: str, text: bytes) -> NodeRecord:
        """Return the record of one field of the nodes hash."""
        r = msgspec.json.decode(text)
        lo = int(r["lo"])
        return cls(
            id=id,
            lo=lo,
            hi=int(r["hi"]),
            depth=int(r["d"]),
            slot=ChordSlot(r["sp"], int(r["ix"]), r["t"]),
            state=r["s"],
            epoch=int(r["e"]),
            parent=r["p"],
            mid=int(r.get("mid", lo)),
            why=r["why"],
            worker=r.get("w", ""),
            ms=int(r.get("ms", 0)),
            losses=int(r.get("x", 0)),
            lost_by=r.get("by", ""),
            one_by_one=bool(r.get("one")),
            tries=int(r.get("tr", 0)),
            waited=bool(r.get("wt")),
            message=int(r.get("m", 0)),
        )


@dataclass(frozen=True, slots=True)
class NodesAtWork:
    """The nodes of one open job by state, as sums."""

    queued: int = 0
    running: int = 0
    parked: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)  # why nodes are parked -> their number
    holders: Mapping[str, int] = field(default_factory=dict)
    """Worker -> nodes that it holds, of the first hundred; empty: not read."""

    def without_texts(self) -> NodesAtWork:
        """Return the sums; no reason has words of an operation, which may contain items."""
        reasons = Counter[str]()
        for why, count in self.reasons.items():
            reasons[outline(why)] += count
        return replace(self, reasons=reasons)


@dataclass(frozen=True, slots=True)
class JobNodes:
    """The nodes of an open job by state."""

    job: str  # its id
    queue: str
    state: str  # the job's: pending, running, merging
    queued: int  # nodes
    running: int
    parked: int
