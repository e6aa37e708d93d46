"""Decide how a range is cut, and when a running node hands over its rest.

Pure functions over sizes and timings: no Redis, no Celery, no clock.  Every cut returns half-open
ranges that tile what was cut, in order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import msgspec

ROOT_PARTS_PER_SLOT = 4
"""A first fan-out of 4 parts per slot comes within 5 % of the ideal makespan: docs/design.md,
Splitting.
"""
MAX_FANOUT = 1000
"""Children one node may publish: it bounds the memory of one chord and the length of one script."""
WORTH_PLANNING_MS = 200.0
"""A root that knows its items to take this long in all fans out before it runs the first, which may
be a long one.
"""
MIN_CHUNK_MS = 20.0
"""Less work than this is not worth a message of about 2 ms on an idle slot."""


class Reason(StrEnum):
    """Why a node ends before its range does."""

    PLANNED = "its strategy plans it so"
    ISOLATE = "an item in its range was in flight when a process died"
    HUNGRY = "a free slot wants work"
    TARGET = "it has run its target time"
    FULL = "it has run its largest chunk"
    PREEMPTED = "more urgent work waits for a slot"
    DRAINING = "its worker is draining"
    FLUSH = "what runs may decide the job"
    WAITING = "a bucket is empty, a breaker is open or a bulkhead is full"
    RETRY = "an item is to be tried again later"
    STOPPED = "the job ends"


@dataclass(frozen=True, slots=True)
class CutRule:
    """What a reason to cut fixes: how many children, when they may run, whether the tree gets
    deeper.
    """

    children: Literal["none", "one", "many"]
    when: Literal["never", "now", "later"]
    deeper: bool


RULES: dict[Reason, CutRule] = {
    Reason.PLANNED: CutRule("many", "now", deeper=True),
    Reason.ISOLATE: CutRule("many", "now", deeper=True),
    Reason.HUNGRY: CutRule("many", "now", deeper=True),
    Reason.TARGET: CutRule("one", "now", deeper=False),
    Reason.FULL: CutRule("one", "now", deeper=False),
    Reason.PREEMPTED: CutRule("one", "now", deeper=False),
    Reason.DRAINING: CutRule("one", "now", deeper=False),
    Reason.FLUSH: CutRule("one", "now", deeper=False),
    Reason.WAITING: CutRule("one", "later", deeper=False),
    Reason.RETRY: CutRule(
        "many", "later", deeper=True
    ),  # the item alone waits; its neighbours run now
    Reason.STOPPED: CutRule("none", "never", deeper=False),
}


class Shape(msgspec.Struct, frozen=True):
    """A strategy, settled: what it fixes for every node of its job."""

    mode: Literal["sequential", "flat", "tree"]
    factor: int = 2  # children of one planned split, and most of one cut
    min_chunk: int = 1  # items; no cut is smaller
    plan_min: int = 1  # items; no part of a planned tree is smaller
    max_chunk: int = 0  # items; no node works through more; 0: no bound
    exact: bool = False  # planned parts have max_chunk items each, the last one the rest
    max_depth: int = 10
    eager: bool = False  # the plan is carried out before any item runs
    target_ms: float = 1000.0

    @property
    def bounded(self) -> bool:
        """Whether parts must keep to a smallest or largest size."""
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
    """Return the nodes of a plan, in item order."""
    if isinstance(part, Leaf):
        return [part]
    return [leaf for inner in part.parts for leaf in leaves(inner)]


def evenly(lo: int, hi: int, count: int) -> list[tuple[int, int]]:
    """Cut a range into `count` parts whose sizes differ by one at most."""
    size, more = divmod(hi - lo, count)
    edges = [lo + i * size + min(i, more) for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def tapered(lo: int, hi: int, count: int) -> list[tuple[int, int]]:
    """Cut a range into `count` parts that become smaller in even steps, each with an item at least.

    Late parts are small, so slots end together whatever the items cost: the idea of guided
    self-scheduling (Polychronopoulos and Kuck, 1987).
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
    """Return a split in which each suspect item is a node of its own."""
    around = {edge for index in suspects for edge in (index, index + 1) if lo < edge < hi}
    edges = sorted({lo, hi} | around)
    return Fork(lo, hi, depth, tuple(Leaf(a, b, depth + 1) for a, b in itertools.pairwise(edges)))


def plan(shape: Shape, lo: int, hi: int, depth: int, slots: int) -> Part:
    """Return the tree a strategy makes of a range from its size alone.

    An eager shape is planned to its smallest parts, at most MAX_FANOUT at a time: a part that is
    still too large plans again when it runs.  Others are planned for about 4 parts per live slot.
    """
    if shape.mode == "sequential":
        return Leaf(lo, hi, depth)
    if shape.mode == "flat":
        return _flat(shape, lo, hi, depth, slots)
    most = max(1, math.floor(math.log(MAX_FANOUT, shape.factor) + 1e-9))
    wanted = math.ceil(math.log(max(ROOT_PARTS_PER_SLOT * slots, 2), shape.factor) - 1e-9)
    return _tree(shape, lo, hi, depth, most if shape.eager else min(most, max(1, wanted)))


def _tree(shape: Shape, lo: int, hi: int, depth: int, levels: int) -> Part:
    count = min(shape.factor, (hi - lo) // shape.plan_min)
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
    """Put a fan-out too wide for one chord under several, each a whole number of chunks."""
    groups = -(-needed // MAX_FANOUT)
    step = -(-needed // groups) * shape.max_chunk
    return Fork(
        lo, hi, depth, tuple(Leaf(a, min(a + step, hi), depth + 1) for a in range(lo, hi, step))
    )


@dataclass(frozen=True, slots=True)
class NodeProgress:
    """Where a running node stands at a slice boundary."""

    done: int  # items it has worked through
    rest: int  # items it still owns
    elapsed_ms: float
    depth: int
    order: str = "go"  # the ledger's word: go, stop, flush
    draining: bool = False
    preempted: bool = False  # it has won the right to make room

    @property
    def rest_ms(self) -> float:
        """Estimated time of the rest, at the pace so far."""
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
    return Reason.TARGET if overdue or at.elapsed_ms >= 4 * shape.target_ms else None


def may_fan_out(shape: Shape, at: NodeProgress) -> bool:
    """Say whether the rest is worth more than one child."""
    deep = at.depth >= shape.max_depth or shape.mode == "sequential"
    return (
        not deep and at.rest >= 2 * shape.min_chunk and at.rest >= 2 and at.rest_ms >= MIN_CHUNK_MS
    )


def share_out(shape: Shape, at: NodeProgress, lo: int, hi: int, wants: int) -> Fork:
    """Cut a rest for `wants` free slots and the slot that cuts it.

    Where the rest is long enough it is cut into `factor` parts, so that the next slot to become
    free finds a part in its queue and need not wait for another cut."""
    spare = min(shape.factor, int(at.rest_ms / (2 * MIN_CHUNK_MS)))
    count = min(max(wants + 1, spare), MAX_FANOUT, (hi - lo) // shape.min_chunk)
    return fork(lo, hi, at.depth, max(2, count), bounded=shape.bounded)


def estimate_optimal_chunk_size(
    total_items: int, estimated_item_processing_time_ms: float, target_parallelism: int
) -> int:
    """Return a chunk size that keeps every slot busy and still pays for its message.

    10,000 items of 5 ms on 8 slots give 1,250.  Chunks hold at least 20 ms of work (MIN_CHUNK_MS).
    Raises ValueError for sizes below one and times that are not positive.
    """
    if total_items < 1 or target_parallelism < 1 or estimated_item_processing_time_ms <= 0:
        raise ValueError(
            "total_items and target_parallelism must be at least 1, the item time above 0 ms"
        )
    fair = -(-total_items // target_parallelism)
    worthwhile = math.ceil(MIN_CHUNK_MS / estimated_item_processing_time_ms)
    return min(total_items, max(fair, worthwhile))
