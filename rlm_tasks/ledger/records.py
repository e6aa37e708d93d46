"""The records of the ledger: what its scripts take and answer."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from rlm_tasks.jobs.spec import JobSpec

ROOT = "root"
MERGE = "merge"
PROCESS = "process"
SWEEP_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class ChordSlot:
    """The place in a chord that a node fills; an empty split is the root's."""

    split: str = ""
    index: int = 0
    task: str = ""


class Child(msgspec.Struct):
    """A range handed over by a cut, as FINISH registers it."""

    id: str
    lo: int
    hi: int
    depth: int = msgspec.field(name="d")
    split: str = msgspec.field(name="sp")
    index: int = msgspec.field(name="ix")
    task: str = msgspec.field(name="t")
    why: str
    wait_ms: int = -1  # it is parked for this long; -1: it may run now
    tries: int = 0  # how often its first item has failed


class Split(msgspec.Struct):
    """A chord: the range its body merges, and the slot that body fills."""

    id: str
    lo: int
    hi: int
    split: str = msgspec.field(name="sp")
    index: int = msgspec.field(name="ix")
    task: str = msgspec.field(name="t")
    size: int


class Report(msgspec.Struct):
    """What a node did with its range: worked through [lo, mid), handed over the rest."""

    mid: int
    done: int = 0
    failed: list[int] = []
    skipped: list[int] = []  # as empty
    failures: list[tuple[int, str]] = []  # index, JSON of ItemFailure
    quarantined: list[tuple[int, str]] = []  # index, JSON of its record
    kids: list[Child] = []
    splits: list[Split] = []
    shaped: list[tuple[str, str, int]] = []  # strategy, level, items whose outcome it has shaped
    why: str = ""
    busy_us: int = 0
    peak_kb: int = 0


@dataclass(frozen=True, slots=True)
class Suspect:
    """An item that was in flight when its process died."""

    index: int
    deaths: int
    by: str  # what the last process died of
    condemned: bool  # it must not run again


@dataclass(frozen=True, slots=True)
class Claim:
    """CLAIM's answer.  Only `run` carries the rest."""

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
    tries: int = 0  # how often its first item has failed
    waited: bool = False  # its first item has waited for its turn already
    spec: JobSpec | None = None
    losses: int = 0  # how often a holder was lost, nobody knows at which item
    lost_by: str = ""  # what the last of them died of
    one_by_one: bool = False  # a process died with several items in flight: find out which
    suspects: tuple[Suspect, ...] = ()
    known_failed: frozenset[int] = frozenset()
    remaining_ms: int = -1
    waiting: tuple[str, ...] = ()  # nodes whose message may be missing
    parent: str = ""  # the node that has handed it over, '' for the first one


@dataclass(frozen=True, slots=True)
class Finished:
    """FINISH's answer."""

    answer: str  # ok, stale
    registered: bool  # the children now wait for their messages
    outcome: str  # '', merge, process, closed
    waits: str  # node that now waits for a message, or the merge that the caller holds


@dataclass(frozen=True, slots=True)
class Swept:
    """SWEEP's answer."""

    state: str
    again_ms: int
    send: tuple[str, ...]

    @property
    def more(self) -> bool:
        """Whether there may be more to recover at once."""
        return len(self.send) >= SWEEP_AT_ONCE


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node as the ledger keeps it; enough to send its message again."""

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
class JobNodes:
    """How the nodes of an open job stand."""

    job: str  # its id
    queue: str
    state: str  # of the job: pending, running, merging
    queued: int  # nodes
    running: int
    parked: int
