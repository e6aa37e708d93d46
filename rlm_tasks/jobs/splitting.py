"""How a range of items is cut into parts, and when a running node hands over its rest.

The engine asks at the end of each slice (`should_yield`, `may_fan_out`); planning uses `plan`.  All
are pure functions over sizes and times: no Redis, no Celery, no clock.  Each cut returns half-open
ranges that tile the range before it, in order.  Begin with `Reason` and its table `RULES`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import msgspec
from pydantic import Field

from resilience.validation import Checked

ROOT_PARTS_PER_SLOT = 4
"""Parts per live slot of the first fan-out: 4 come within 5 % of the ideal total time.

See docs/design.md, Splitting."""
MAX_FANOUT = 1000
"""Most children of one node: this bounds the memory of one chord and the time of one script."""
WORTH_PLANNING_MS = 200.0
"""A root whose items are known to take this long in all fans out before it runs one.

The first item may be a long one."""
LONGEST_RUN = 4
"""A node hands over its rest after this many times its target, whatever its smallest chunk."""
MIN_CHUNK_MS = 20.0
"""A shorter part is not worth its message, which takes about 2 ms on an idle slot."""


class Reason(StrEnum):
    """Why a node ends before its range does; users read the text in the tree of a job."""

    PLANNED = "its strategy plans it so"
    ISOLATE = "an item in its range was in flight when a process died"
    HUNGRY = "a free slot wants work"
    TARGET = "it has run its target time"
    FULL = "it has run its largest chunk"
    PREEMPTED = "more urgent work waits for a slot"
    DRAINING = "its worker is draining"
    FLUSH = "its results are needed now"
    WAITING = "a bucket is empty, a breaker is open or a bulkhead is full"
    RETRY = "an item is to be tried again later"
    STOPPED = "the job ends"


@dataclass(frozen=True, slots=True)
class CutRule:
    """The consequences of one reason to cut; the engine reads them at the cut."""

    children: Literal["none", "one", "many"]
    """Nodes that get the rest: none, one (a tail call), or many (a chord).

    A rest that cannot be split goes to one node also where the row says many."""
    urgent: bool = False
    """The node stops at once: it waits for no item in flight."""
    may_be_put_off: bool = False
    """The node may go on while a cut would make it repeat items that have ended."""
    isolates: bool = False
    """The item that is the reason becomes a node of its own; its neighbours run now."""


RULES: dict[Reason, CutRule] = {
    Reason.PLANNED: CutRule("many"),
    Reason.ISOLATE: CutRule("many", isolates=True),
    Reason.HUNGRY: CutRule("many"),
    Reason.TARGET: CutRule("one", may_be_put_off=True),
    Reason.FULL: CutRule("one", may_be_put_off=True),
    Reason.PREEMPTED: CutRule("one", urgent=True),
    Reason.DRAINING: CutRule("one", urgent=True),
    Reason.FLUSH: CutRule("one", urgent=True),
    Reason.WAITING: CutRule("one"),
    Reason.RETRY: CutRule("many", isolates=True),
    Reason.STOPPED: CutRule("none", urgent=True),
}


class Shape(msgspec.Struct, frozen=True):
    """A strategy with all its sizes fixed, the same for every node of its job."""

    mode: Literal["sequential", "flat", "tree"]
    factor: int = 2  # children of one planned split, and the most of one cut
    min_chunk: int = 1  # items; no cut is smaller
    plan_min: int = 1  # items; no part of a planned tree is smaller
    max_chunk: int = 0  # items; no node runs more; 0: no bound
    exact: bool = False  # planned parts have max_chunk items each, the last one has the rest
    max_depth: int = 10
    eager: bool = False  # the range is cut as planned before any item runs
    wide: bool = False  # the first planned split has `factor` parts, however small
    target_ms: float = 1000.0  # running time after which a node hands over its rest

    @property
    def bounded(self) -> bool:
        """Whether parts have a smallest or largest size."""
        return self.min_chunk > 1 or self.max_chunk > 0


@dataclass(frozen=True, slots=True)
class Leaf:
    """A range that becomes a node."""

    lo: int
    hi: int
    depth: int


@dataclass(frozen=True, slots=True)
class Fork:
    """A range that becomes a chord over its parts."""

    lo: int
    hi: int
    depth: int
    parts: tuple[Leaf | Fork, ...]


Part = Leaf | Fork


def leaves(part: Part) -> list[Leaf]:
    """Return the leaves of a plan, in item order."""
    if isinstance(part, Leaf):
        return [part]
    return [leaf for inner in part.parts for leaf in leaves(inner)]


def evenly(lo: int, hi: int, count: int) -> list[tuple[int, int]]:
    """Return `count` parts of a range whose sizes differ by one at most."""
    size, more = divmod(hi - lo, count)
    edges = [lo + i * size + min(i, more) for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def tapered(lo: int, hi: int, count: int) -> list[tuple[int, int]]:
    """Return `count` parts of a range that become smaller in even steps, of one item at least.

    The last parts are small, so slots end together even when some items take long.  This is the
    idea of guided self-scheduling (Polychronopoulos and Kuck, 1987).
    """
    spare, steps = hi - lo - count, count * (count + 1) // 2
    edges, weight = [lo], 0
    for i in range(count):
        weight += count - i
        edges.append(lo + i + 1 + spare * weight // steps)
    return list(itertools.pairwise(edges))


def fork(lo: int, hi: int, depth: int, count: int, *, bounded: bool = False) -> Fork:
    """Return a split of a range into `count` nodes, one level deeper.

    Parts are tapered, or even where their size is bounded.
    """
    parts = evenly(lo, hi, count) if bounded else tapered(lo, hi, count)
    return Fork(lo, hi, depth, tuple(Leaf(a, b, depth + 1) for a, b in parts))


def isolate(lo: int, hi: int, depth: int, suspects: list[int]) -> Fork:
    """Return a split in which each suspect item is a node of its own, one level deeper."""
    around = {edge for index in suspects for edge in (index, index + 1) if lo < edge < hi}
    edges = sorted({lo, hi} | around)
    return Fork(lo, hi, depth, tuple(Leaf(a, b, depth + 1) for a, b in itertools.pairwise(edges)))


def plan(shape: Shape, lo: int, hi: int, depth: int, slots: int) -> Part:
    """Return the tree that a strategy makes of a range, from its size alone.

    An eager shape is planned down to its smallest parts, at most MAX_FANOUT at a time.  A part that
    is still too large plans again when it runs.  Other shapes get about 4 parts per live slot.
    """
    if shape.mode == "sequential":
        return Leaf(lo, hi, depth)
    if shape.mode == "flat":
        return _flat(shape, lo, hi, depth, slots)
    most = max(1, math.floor(math.log(MAX_FANOUT, shape.factor) + 1e-9))
    wanted = math.ceil(math.log(max(ROOT_PARTS_PER_SLOT * slots, 2), shape.factor) - 1e-9)
    return _tree(shape, lo, hi, depth, most if shape.eager else min(most, max(1, wanted)))


def _tree(shape: Shape, lo: int, hi: int, depth: int, levels: int) -> Part:
    smallest = 1 if shape.wide and depth == 0 else shape.plan_min
    count = min(shape.factor, (hi - lo) // smallest)
    if levels == 0 or depth >= shape.max_depth or count < 2:
        return Leaf(lo, hi, depth)
    return Fork(
        lo,
        hi,
        depth,
        tuple(_tree(shape, a, b, depth + 1, levels - 1) for a, b in evenly(lo, hi, count)),
    )


def _flat(shape: Shape, lo: int, hi: int, depth: int, slots: int) -> Part:
    size = hi - lo
    needed = -(-size // shape.max_chunk) if shape.max_chunk else 1
    if needed > MAX_FANOUT:
        return _grouped(shape, lo, hi, depth, needed)
    if shape.eager and (needed < 2 or depth >= max(shape.max_depth, 2)):
        return Leaf(lo, hi, depth)
    if shape.exact:
        step = shape.max_chunk
        return Fork(
            lo, hi, depth, tuple(Leaf(a, min(a + step, hi), depth + 1) for a in range(lo, hi, step))
        )
    wished = (
        min(ROOT_PARTS_PER_SLOT * slots, size // shape.min_chunk, MAX_FANOUT) if depth == 0 else 0
    )
    count = max(needed, wished)
    return fork(lo, hi, depth, count, bounded=shape.bounded) if count >= 2 else Leaf(lo, hi, depth)


def _grouped(shape: Shape, lo: int, hi: int, depth: int, needed: int) -> Fork:
    """Return groups for a fan-out too wide for one chord; each has a whole number of chunks."""
    groups = -(-needed // MAX_FANOUT)
    step = -(-needed // groups) * shape.max_chunk
    return Fork(
        lo, hi, depth, tuple(Leaf(a, min(a + step, hi), depth + 1) for a in range(lo, hi, step))
    )


@dataclass(frozen=True, slots=True)
class NodeProgress:
    """How far a running node is at the end of a slice."""

    done: int  # items it has run
    rest: int  # items it still owns
    elapsed_ms: float  # since its claim
    depth: int
    order: str = "go"  # the ledger's answer to the pulse: go, stop, flush
    draining: bool = False
    preempted: bool = False  # it holds the token to yield its slot

    @property
    def rest_ms(self) -> float:
        """Estimated time of the rest in milliseconds, at the pace so far."""
        return self.elapsed_ms / max(self.done, 1) * self.rest


def should_yield(shape: Shape, at: NodeProgress) -> Reason | None:
    """Return why a node must hand over its rest now, or None to go on."""
    if at.order == "stop":
        return Reason.STOPPED
    if at.rest == 0:
        return None
    if at.order == "flush":
        return Reason.FLUSH
    if at.draining:
        return Reason.DRAINING
    if at.preempted:
        return Reason.PREEMPTED
    if shape.max_chunk and at.done >= shape.max_chunk:
        return Reason.FULL
    overdue = at.elapsed_ms >= shape.target_ms and at.done >= shape.min_chunk
    return Reason.TARGET if overdue or at.elapsed_ms >= LONGEST_RUN * shape.target_ms else None


def may_fan_out(shape: Shape, at: NodeProgress) -> bool:
    """Return whether the rest is worth more than one child."""
    deep = at.depth >= shape.max_depth or shape.mode == "sequential"
    return (
        not deep and at.rest >= 2 * shape.min_chunk and at.rest >= 2 and at.rest_ms >= MIN_CHUNK_MS
    )


def share_out(shape: Shape, at: NodeProgress, lo: int, hi: int, wants: int) -> Fork:
    """Return a split of the rest for `wants` free slots and the slot of the node itself.

    A long rest is cut into `factor` parts.  Then the next slot that becomes free finds a part in
    its queue and need not wait for another cut.
    """
    spare = min(shape.factor, int(at.rest_ms / (2 * MIN_CHUNK_MS)))
    count = min(max(wants + 1, spare), MAX_FANOUT, (hi - lo) // shape.min_chunk)
    return fork(lo, hi, at.depth, max(2, count), bounded=shape.bounded)


class _ChunkedWork(Checked):
    total_items: int = Field(ge=1)
    estimated_item_processing_time_ms: float = Field(gt=0, allow_inf_nan=False)
    target_parallelism: int = Field(ge=1)


def estimate_optimal_chunk_size(
    total_items: int | Mapping[str, float],
    estimated_item_processing_time_ms: float | None = None,
    target_parallelism: int | None = None,
) -> int:
    """Return a chunk size in items that keeps every slot busy and is worth its message.

    10,000 items of 5 ms on 8 slots give 1,250.  A chunk has at least 20 ms of work (MIN_CHUNK_MS).
    One dict with the three names, in snake_case or camelCase, is accepted as well.  Raises
    InvalidValue.
    """
    given = {
        "estimated_item_processing_time_ms": estimated_item_processing_time_ms,
        "target_parallelism": target_parallelism,
    }
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    first = total_items if isinstance(total_items, Mapping) else {"total_items": total_items}
    work = _ChunkedWork(**{**first, **fields})
    fair = -(-work.total_items // work.target_parallelism)
    worthwhile = math.ceil(MIN_CHUNK_MS / work.estimated_item_processing_time_ms)
    return min(work.total_items, max(fair, worthwhile))
