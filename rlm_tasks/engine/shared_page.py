"""The memory that a worker's main process shares with its pool processes.

Each pool process writes its entry: job, node, token, the item in flight, the end of its last slice.
The supervisor renews leases from the entries, and gives back the node of a dead process.  The main
process writes flags, which running nodes read when a slice ends.  Begin with `SharedPage`.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from resilience.degradation import Level
from rlm_tasks.operations.registry import Operation

ENTRIES = 1024
NO_ITEM, SEVERAL_ITEMS = -1, -2


class Step(IntEnum):
    """A part of a job that runs a user's code or waits for a disk, and belongs to no single item.

    While it runs, its number stands in the place of the item in flight.
    """

    READING = -3  # the items of a range are read
    MERGE = -4
    FINALIZE = -5
    THEN = -6

    @property
    def words(self) -> str:
        """The step as an error names it."""
        names = {Step.READING: "the reading of items", Step.MERGE: "the merge"}
        return names.get(self, self.name.lower())


_HEADER = 64
# generation (odd during a write), pid, token, item, time, limit, job, node, doomed, given up
_ENTRY = struct.Struct("<II8sqdd40s16sBB")
_PID = struct.Struct("<I")
_ITEM = struct.Struct("<q")
_TIME = struct.Struct("<d")
_IN_FLIGHT = struct.Struct("<qdd")  # item, time, limit
_GENERATION = struct.Struct("<I")
_PID_AT, _ITEM_AT, _TIME_AT, _LIMIT_AT, _DOOMED_AT, _GIVEN_UP_AT = 4, 16, 24, 32, 96, 97
_DRAINING_AT, _HUNGRY_AT, _RECALLS_AT, _TERMINATING_AT, _URGENT_AT, _LEVEL_AT = 0, 1, 2, 3, 4, 8
_AVAILABLE_AT, _SLOTS_AT, _FREE_AT = 16, 24, 32
# monotonic ms << 8 | level by which jobs are refused << 4 | level.  It is one aligned word, so a
# reader never sees half of a write.
_LEVEL = struct.Struct("<Q")
_LEVELS: tuple[Level, ...] = tuple(Level)


@dataclass(frozen=True, slots=True)
class Held:
    """The node that one pool process holds, and its item in flight."""

    pid: int
    job: str
    node: str
    token: str  # 16 hexadecimal digits, by which the ledger recognises the holder
    item: int  # in flight; NO_ITEM; SEVERAL_ITEMS: a batch, or many at once; or a Step
    since: float  # monotonic time of the last slice boundary, or of the step's start, in seconds
    limit_s: float  # the time limit of an item, or of the step; 0: no limit
    given_up: bool = False  # its process went on without Redis, and lives

    @property
    def step(self) -> Step | None:
        """The step that runs, None while items run or nothing does."""
        return Step(self.item) if self.item < SEVERAL_ITEMS else None


class ProcessEntries:
    """The part of the page that pool processes write: one entry for each process."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEADER + ENTRIES * _ENTRY.size)

    def entry(self, index: int) -> ProcessEntry:
        """Return the entry of one pool process, for that process to write."""
        return ProcessEntry(self._memory, _HEADER + index % ENTRIES * _ENTRY.size)

    def held(self) -> Iterator[Held]:
        """Yield the nodes that pool processes hold now."""
        for _, held in self._filled():
            yield held

    def forget(self, pid: int) -> None:
        """Clear the entry of a dead process; another process may get its number soon."""
        for offset, held in self._filled():
            if held.pid == pid:
                ProcessEntry(self._memory, offset).clear()

    def doom(self, pid: int) -> None:
        """Mark a process that will be terminated on purpose: a signal is meant for it alone."""
        for offset, held in self._filled():
            if held.pid == pid:
                self._memory[offset + _DOOMED_AT] = 1

    def _filled(self) -> Iterator[tuple[int, Held]]:
        """Yield each entry with a node, with its place in memory."""
        for offset in range(_HEADER, len(self._memory), _ENTRY.size):
            if (found := _read(self._memory, offset)) is not None:
                yield offset, found


class SharedPage(ProcessEntries):
    """The shared page: flags and numbers of the main process, and the entries of pool processes.

    It is made before the pool forks.
    """

    def __init__(
        self, stale_s: float = 15.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._stale_ms, self._clock = int(stale_s * 1000), clock

    @property
    def level(self) -> Level:
        """The pressure level of this worker; ELEVATED when it was not renewed for `stale_s`."""
        return self._level(0)

    @level.setter
    def level(self, level: Level) -> None:
        self.set_levels(level, level)

    @property
    def refusing(self) -> Level:
        """The level by which jobs are refused; it leaves out busy CPUs."""
        return self._level(4)

    def set_levels(self, level: Level, refusing: Level) -> None:
        """Renew the pressure level, and the level by which jobs are refused."""
        word = int(self._clock() * 1000) << 8 | refusing << 4 | level
        _LEVEL.pack_into(self._memory, _LEVEL_AT, word)

    def _level(self, shift: int) -> Level:
        word: int = _LEVEL.unpack_from(self._memory, _LEVEL_AT)[0]
        if not word:
            return Level.NORMAL  # this worker does not measure pressure
        if self._clock() * 1000 - (word >> 8) > self._stale_ms:
            return Level.ELEVATED
        return _LEVELS[word >> shift & 0xF]

    @property
    def urgent(self) -> int:
        """The ranks of priorities with work that waits for a slot here, as bits.

        See `scheduler.preemption`.
        """
        return self._memory[_URGENT_AT]

    @urgent.setter
    def urgent(self, ranks: int) -> None:
        self._memory[_URGENT_AT] = ranks

    @property
    def draining(self) -> bool:
        """Whether the worker is shutting down: running nodes then cut at their next slice."""
        return self._memory[_DRAINING_AT] == 1

    @draining.setter
    def draining(self, value: bool) -> None:
        self._memory[_DRAINING_AT] = int(value)

    @property
    def terminating(self) -> bool:
        """Whether the worker ends its pool processes by signal: they then exit at once."""
        return self._memory[_TERMINATING_AT] == 1

    @terminating.setter
    def terminating(self, value: bool) -> None:
        self._memory[_TERMINATING_AT] = int(value)

    @property
    def hungry(self) -> bool:
        """Whether a slot of this worker is free and no message waits for it.

        Running nodes then end their slice early, and may cut for it.
        """
        return self._memory[_HUNGRY_AT] == 1

    @hungry.setter
    def hungry(self, value: bool) -> None:
        self._memory[_HUNGRY_AT] = int(value)

    @property
    def recalls(self) -> int:
        """The number of recalls so far, modulo 256."""
        return self._memory[_RECALLS_AT]

    def recall(self) -> None:
        """Make every running node of this worker ask the ledger before its next item."""
        self._memory[_RECALLS_AT] = (self._memory[_RECALLS_AT] + 1) % 256

    @property
    def available_mb(self) -> float:
        """Memory of this host for the platform in MB, including that of its nodes; 0: unknown."""
        return float(_TIME.unpack_from(self._memory, _AVAILABLE_AT)[0])

    @available_mb.setter
    def available_mb(self, megabytes: float) -> None:
        _TIME.pack_into(self._memory, _AVAILABLE_AT, megabytes)

    @property
    def free_mb(self) -> float | None:
        """Free memory of this host in MB; None: unknown."""
        stored: float = _TIME.unpack_from(self._memory, _FREE_AT)[0]
        return stored - 1 if stored else None

    @free_mb.setter
    def free_mb(self, megabytes: float) -> None:
        # A new page is all zeros, which means unknown: 0 MB is stored as 1.
        _TIME.pack_into(self._memory, _FREE_AT, megabytes + 1)

    @property
    def slots(self) -> int:
        """The last known number of slots of all workers, at least 1."""
        return max(1, int(_PID.unpack_from(self._memory, _SLOTS_AT)[0]))

    @slots.setter
    def slots(self, total: int) -> None:
        _PID.pack_into(self._memory, _SLOTS_AT, total)


def _read(memory: mmap.mmap, offset: int) -> Held | None:
    """Return what an entry holds, None when its process holds no node."""
    if not _PID.unpack_from(memory, offset + _PID_AT)[0]:
        return None
    for _ in range(100):
        before = _GENERATION.unpack_from(memory, offset)[0]
        _, pid, token, item, since, limit_s, job, node, _, given_up = _ENTRY.unpack_from(
            memory, offset
        )
        if before % 2 == 0 and before == _GENERATION.unpack_from(memory, offset)[0]:
            held = Held(
                pid=pid,
                job=job.rstrip(b"\0").decode(),
                node=node.rstrip(b"\0").decode(),
                token=token.hex(),
                item=item,
                since=since,
                limit_s=limit_s,
                given_up=bool(given_up),
            )
            return held if held.job else None
    # Its writer died between the two halves of a write: nothing in the entry can be trusted.
    return None


class ProcessEntry:
    """The entry in which one pool process writes the node that it holds."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory, self._offset = memory, offset

    def hold(self, pid: int, job: str, node: str, token: str, at: float) -> None:
        """Write the node that this process claims and then runs; `at` is the time in seconds."""
        self._write(pid=pid, job=job, node=node, token=bytes.fromhex(token), at=at)

    def let_go(self) -> None:
        """Clear the entry, because this process holds no node; a node that is given up stays."""
        if not self._memory[self._offset + _GIVEN_UP_AT]:
            self.clear()

    def clear(self) -> None:
        """Clear the entry."""
        self._write(pid=0, job="", node="", token=bytes(8), at=0.0)

    def give_up(self) -> None:
        """Mark the node as given up: this process lost Redis, and stopped to work on the node.

        The supervisor gives the node back when Redis answers again, and so does this process before
        its next node.  Nothing has died, so this counts against no item and no merge.
        """
        self.start_item(NO_ITEM)
        self._memory[self._offset + _GIVEN_UP_AT] = 1

    @property
    def given_up(self) -> Held | None:
        """The node that this process has given up; None: it holds its node, or none."""
        if not self._memory[self._offset + _GIVEN_UP_AT]:
            return None
        return _read(self._memory, self._offset)

    @property
    def doomed(self) -> bool:
        """Whether this process will be terminated on purpose."""
        return self._memory[self._offset + _DOOMED_AT] == 1

    def start_item(self, index: int) -> None:
        """Write the index of the item in flight, or SEVERAL_ITEMS."""
        _ITEM.pack_into(self._memory, self._offset + _ITEM_AT, index)

    def limit(self, limit_s: float) -> None:
        """Write the time limit of this node's items, in seconds; 0: no limit."""
        _TIME.pack_into(self._memory, self._offset + _LIMIT_AT, limit_s)

    def boundary(self, at: float) -> None:
        """Write that a slice has ended, with no item in flight."""
        _ITEM.pack_into(self._memory, self._offset + _ITEM_AT, NO_ITEM)
        _TIME.pack_into(self._memory, self._offset + _TIME_AT, at)

    def swap(self, item: int, since: float, limit_s: float) -> tuple[int, float, float]:
        """Write an item or a step with its start and its time limit, and return those before."""
        before: tuple[int, float, float] = _IN_FLIGHT.unpack_from(
            self._memory, self._offset + _ITEM_AT
        )
        _IN_FLIGHT.pack_into(self._memory, self._offset + _ITEM_AT, item, since, limit_s)
        return before

    def _write(self, pid: int, job: str, node: str, token: bytes, at: float) -> None:
        odd = _GENERATION.unpack_from(self._memory, self._offset)[0] | 1
        _GENERATION.pack_into(self._memory, self._offset, odd)
        _ENTRY.pack_into(
            self._memory,
            self._offset,
            odd,
            pid,
            token,
            NO_ITEM,
            at,
            0.0,
            job.encode(),
            node.encode(),
            0,
            0,
        )
        _GENERATION.pack_into(self._memory, self._offset, (odd + 1) & 0xFFFFFFFF)


class Steps:
    """Writes into a process's entry which step of a node or of a merge runs, and its time limit."""

    def __init__(self, entry: ProcessEntry, clock: Callable[[], float], limit_s: float) -> None:
        """`limit_s` is the time limit of each step in seconds."""
        self._entry, self._clock, self._limit_s = entry, clock, limit_s

    def run(self, step: Step) -> _Running:
        """Mark the block as a step: the main process ends it when it takes too long."""
        return _Running(self, step)

    def begin(self, step: Step) -> tuple[int, float, float]:
        """Write that a step begins; return what was in flight before, for `end`."""
        return self._entry.swap(step, self._clock(), self._limit_s)

    def end(self, before: tuple[int, float, float]) -> None:
        """Write that the step has ended.  An item that goes on keeps its start and its limit."""
        item, since, limit_s = before
        self._entry.swap(item, self._clock() if item == NO_ITEM else since, limit_s)

    def marked(self, operation: Operation) -> Operation:
        """Return the operation with a merge, finalize and `then` that run as steps."""
        marked = copy(operation)
        for name, step in (("merge", Step.MERGE), ("finalize", Step.FINALIZE), ("then", Step.THEN)):
            if (function := getattr(operation, name)) is not None:
                object.__setattr__(marked, name, self._marked(step, function))
        return marked

    def _marked(self, step: Step, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with self.run(step):
                return function(*args)

        return run


class _Running:
    """A block that is a step.

    `contextlib` would write into the exception of the block, which a user's class may not allow.
    """

    def __init__(self, steps: Steps, step: Step) -> None:
        self._steps, self._step = steps, step

    def __enter__(self) -> None:
        self._before = self._steps.begin(self._step)

    def __exit__(self, *_: object) -> None:
        self._steps.end(self._before)
