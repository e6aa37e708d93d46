"""A page of memory that a worker's main process shares with its pool processes.

Each pool process writes what it holds: job, node, token, the item in flight, when its last slice
ended. The main process beats leases from it and knows what was lost when a process dies; in the
other direction it sets the flags that running nodes read at slice boundaries.  Refuses to know what
is done about either."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from resilience.degradation import Level

SLOTS = 1024
NO_ITEM, SEVERAL_ITEMS = -1, -2
_HEADER = 64
_SLOT = struct.Struct(
    "<II8sqdd40s16sB"
)  # generation (odd: being written), pid, token, item, time, limit, job, node, doomed
_PID = struct.Struct("<I")
_ITEM = struct.Struct("<q")
_TIME = struct.Struct("<d")
_GENERATION = struct.Struct("<I")
_PID_AT, _ITEM_AT, _TIME_AT, _LIMIT_AT, _DOOMED_AT = 4, 16, 24, 32, 96
_DRAINING_AT, _HUNGRY_AT, _RECALLS_AT, _TERMINATING_AT, _URGENT_AT, _LEVEL_AT = 0, 1, 2, 3, 4, 8
_AVAILABLE_AT, _SLOTS_AT, _FREE_AT = 16, 24, 32
_LEVEL = struct.Struct(
    "<Q"
)  # monotonic ms << 8 | level, in one aligned word: a reader never sees half of a write
_LEVELS: tuple[Level, ...] = tuple(Level)


@dataclass(frozen=True, slots=True)
class Held:
    """What one pool process is working on."""

    pid: int
    job: str
    node: str
    token: str  # 16 hexadecimal digits: what the ledger knows the holder by
    item: int  # in flight; or NO_ITEM, or SEVERAL_ITEMS: a batch, or many at once
    since: float  # monotonic time of the last slice boundary
    limit_s: float  # an item may take so long; 0: no limit


class SharedPage:
    """The shared page; made before the pool forks."""

    def __init__(
        self, stale_s: float = 15.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._memory = mmap.mmap(-1, _HEADER + SLOTS * _SLOT.size)
        self._stale_ms, self._clock = int(stale_s * 1000), clock

    @property
    def level(self) -> Level:
        """The pressure to act on.  One that nobody renews is not trusted, nor called normal:
        ELEVATED.
        """
        told: int = _LEVEL.unpack_from(self._memory, _LEVEL_AT)[0]
        if not told:
            return Level.NORMAL  # nobody measures here
        if self._clock() * 1000 - (told >> 8) > self._stale_ms:
            return Level.ELEVATED
        return _LEVELS[told & 0xFF]

    @level.setter
    def level(self, level: Level) -> None:
        _LEVEL.pack_into(self._memory, _LEVEL_AT, int(self._clock() * 1000) << 8 | level)

    @property
    def urgent(self) -> int:
        """Which ranks of priority have work that waits for a slot of this worker, as bits: see
        scheduler.preemption.
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
        """Whether the worker ends its pool processes by signal: they then do not resist."""
        return self._memory[_TERMINATING_AT] == 1

    @terminating.setter
    def terminating(self, value: bool) -> None:
        self._memory[_TERMINATING_AT] = int(value)

    @property
    def hungry(self) -> bool:
        """Whether a slot of this worker wants work: nodes then look at once, not at their next
        slice.
        """
        return self._memory[_HUNGRY_AT] == 1

    @hungry.setter
    def hungry(self, value: bool) -> None:
        self._memory[_HUNGRY_AT] = int(value)

    @property
    def recalls(self) -> int:
        """How often nodes were asked to look at the ledger at once, modulo 256."""
        return self._memory[_RECALLS_AT]

    def recall(self) -> None:
        """Ask every running node of this worker to look at the ledger before its next item."""
        self._memory[_RECALLS_AT] = (self._memory[_RECALLS_AT] + 1) % 256

    @property
    def available_mb(self) -> float:
        """Memory of this host that the platform may fill, with what its nodes hold already; 0: not
        known.
        """
        return float(_TIME.unpack_from(self._memory, _AVAILABLE_AT)[0])

    @available_mb.setter
    def available_mb(self, megabytes: float) -> None:
        _TIME.pack_into(self._memory, _AVAILABLE_AT, megabytes)

    @property
    def free_mb(self) -> float | None:
        """Memory of this host that nobody holds; None: not known."""
        told: float = _TIME.unpack_from(self._memory, _FREE_AT)[0]
        return told - 1 if told else None

    @free_mb.setter
    def free_mb(self, megabytes: float) -> None:
        _TIME.pack_into(
            self._memory, _FREE_AT, megabytes + 1
        )  # a page begins with zeros, and 0 MB is an answer

    @property
    def slots(self) -> int:
        """How many slots all workers have together, as last heard; 1 while nothing was."""
        return max(1, int(_PID.unpack_from(self._memory, _SLOTS_AT)[0]))

    @slots.setter
    def slots(self, total: int) -> None:
        _PID.pack_into(self._memory, _SLOTS_AT, total)

    def entry(self, index: int) -> ProcessEntry:
        """Return the writer of one pool process."""
        return ProcessEntry(self._memory, _HEADER + index % SLOTS * _SLOT.size)

    def held(self) -> Iterator[Held]:
        """Yield what each pool process holds now."""
        for offset in range(_HEADER, len(self._memory), _SLOT.size):
            if (found := self._read(offset)) is not None:
                yield found

    def forget(self, pid: int) -> None:
        """Clear what a process held that is gone; its number may soon be another's."""
        for offset in range(_HEADER, len(self._memory), _SLOT.size):
            if (found := self._read(offset)) is not None and found.pid == pid:
                ProcessEntry(self._memory, offset).let_go()

    def doom(self, pid: int) -> None:
        """Say that a process is about to be terminated on purpose: a signal that it gets is meant
        for it.
        """
        for offset in range(_HEADER, len(self._memory), _SLOT.size):
            if (found := self._read(offset)) is not None and found.pid == pid:
                self._memory[offset + _DOOMED_AT] = 1

    def _read(self, offset: int) -> Held | None:
        if not _PID.unpack_from(self._memory, offset + _PID_AT)[0]:
            return None
        for _ in range(100):
            before = _GENERATION.unpack_from(self._memory, offset)[0]
            _, pid, token, item, since, limit_s, job, node, _ = _SLOT.unpack_from(
                self._memory, offset
            )
            if before % 2 == 0 and before == _GENERATION.unpack_from(self._memory, offset)[0]:
                name, id = job.rstrip(b"\0").decode(), node.rstrip(b"\0").decode()
                return (
                    Held(
                        pid=pid,
                        job=name,
                        node=id,
                        token=token.hex(),
                        item=item,
                        since=since,
                        limit_s=limit_s,
                    )
                    if name
                    else None
                )
        # Its writer died between the two halves of a write: nothing in the slot can be trusted.
        return None


class ProcessEntry:
    """Where one pool process writes what it holds."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory, self._offset = memory, offset

    def hold(self, pid: int, job: str, node: str, token: str, at: float) -> None:
        """Say that a node is being claimed, and worked on."""
        self._write(pid=pid, job=job, node=node, token=bytes.fromhex(token), at=at)

    def let_go(self) -> None:
        """Say that nothing is."""
        self._write(pid=0, job="", node="", token=bytes(8), at=0.0)

    @property
    def doomed(self) -> bool:
        """Whether this process is to be terminated on purpose."""
        return self._memory[self._offset + _DOOMED_AT] == 1

    def start_item(self, index: int) -> None:
        """Say which item is in flight, or that there are SEVERAL_ITEMS."""
        _ITEM.pack_into(self._memory, self._offset + _ITEM_AT, index)

    def limit(self, limit_s: float) -> None:
        """Say how long an item of this node may take, in seconds; 0: no limit."""
        _TIME.pack_into(self._memory, self._offset + _LIMIT_AT, limit_s)

    def boundary(self, at: float) -> None:
        """Say that a slice has ended, with no item in flight."""
        _ITEM.pack_into(self._memory, self._offset + _ITEM_AT, NO_ITEM)
        _TIME.pack_into(self._memory, self._offset + _TIME_AT, at)

    def _write(self, pid: int, job: str, node: str, token: bytes, at: float) -> None:
        odd = _GENERATION.unpack_from(self._memory, self._offset)[0] | 1
        _GENERATION.pack_into(self._memory, self._offset, odd)
        _SLOT.pack_into(
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
        )
        _GENERATION.pack_into(self._memory, self._offset, (odd + 1) & 0xFFFFFFFF)
