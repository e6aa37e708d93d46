"""How the items of a job are stored, and how a worker reads a range of them.

Clients write with `ItemWriter`, nodes read with `ItemReader`.  Messages never carry items.  A
`range` is stored as start and step, a file is read in place, all other items are packed blocks in
Redis.  Each kind of stored items is one record with `read`, `describe` and `place`, in the job's
specification.
"""

from __future__ import annotations

import itertools
import sys
import time
from array import array
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import redis

from resilience.store import Store
from rlm_tasks.errors import InvalidRequest, ItemsUnreadable
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.file_roots import ANYWHERE, FilesRoot
from rlm_tasks.jobs.sizes import largest_value
from rlm_tasks.jobs.storable import NotStorable
from rlm_tasks.jobs.text_files import TextFile, decoded_lines, line_lengths

BLOCK_ITEMS = 1024
"""Most items of one block."""
BLOCK_BYTES = 1 << 20
"""A larger block is halved, down to one item."""
PIPELINE_BYTES = 4 << 20
"""Bytes that are sent to Redis in one pipeline."""
CACHE_BYTES = 8 << 20
"""Bytes of blocks that one process keeps in memory, packed."""
READ_BYTES = 8 << 20
"""A read ends behind the block with which its items have this many packed bytes."""
STAGED_S = 3600
"""Items whose job is not open yet are deleted after this time; each flush begins it anew."""
ALL = sys.maxsize
Decode = Callable[[bytes, int], list[Any]]
"""Returns the items of a part of a block from its bytes and their number."""


class Unreadable(Exception):
    """The first item that was asked for, and those behind it to before `until`, cannot be read.

    `error` is the failure of each of them.
    """

    def __init__(self, until: int, error: Exception) -> None:
        self.until, self.error = until, error
        super().__init__(str(error))


# --- blocks in memory --------------------------------------------------------------------------


class Block:
    """Items of a job, packed, in the memory of a worker; each reading decodes them anew.

    So the items of a reading are never those that an earlier reading has handed out: an operation
    may change its item in place.
    """

    def __init__(self, start: int, data: bytes, offsets: array[int], decode: Decode) -> None:
        """`offsets` has the place in `data` of each item, and the end of the last one."""
        self.start, self.end = start, start + len(offsets) - 1
        self._data, self._offsets, self._decode = data, offsets, decode
        self.size = len(data) + offsets.itemsize * len(offsets)

    def read(self, lo: int, hi: int) -> list[Any]:
        """Return the items from `lo` on: fewer when one before `hi` cannot be decoded.

        Raises Unreadable when it is the first one.
        """
        hi = min(hi, self.end)
        edges = self._offsets[lo - self.start], self._offsets[hi - self.start]
        try:
            return self._decode(self._data[slice(*edges)], hi - lo)
        except MemoryError:
            raise  # a smaller range may fit into memory
        except Exception as error:
            if hi - lo == 1:
                raise Unreadable(hi, error.with_traceback(None)) from None
            return self.read(lo, lo + (hi - lo) // 2)

    def bytes_of(self, lo: int, hi: int) -> int:
        """Return the packed size of some items."""
        return self._offsets[hi - self.start] - self._offsets[lo - self.start]


def _offsets(lengths: Iterable[int]) -> array[int]:
    return array("q", itertools.accumulate(lengths, initial=0))


# --- the kinds ---------------------------------------------------------------------------------


class RangeSource(msgspec.Struct, frozen=True, tag="range"):
    """The integers of a `range`."""

    start: int
    step: int

    def read(self, _blocks: Blocks, lo: int, hi: int) -> Sequence[Any]:
        """Return the items of [lo, hi)."""
        return range(self.start + lo * self.step, self.start + hi * self.step, self.step)

    def describe(self, index: int) -> str:
        """Return which integer of the range an item is."""
        return f"{self.start + index * self.step} of a range"

    def place(self, _blocks: Blocks, _index: int) -> str:
        """Return '': the index says all."""
        return ""


class BlockSource(msgspec.Struct, frozen=True, omit_defaults=True, tag="blocks"):
    """Packed blocks of items in Redis."""

    are_paths: bool = False  # each item is the path of a file, which names the item's place

    def read(self, blocks: Blocks, lo: int, hi: int) -> Sequence[Any]:
        """Return items from `lo` on, up to `hi`.  Raises Unreadable."""
        return blocks.read(lo, hi, self._block)

    def describe(self, index: int) -> str:
        """Return the number of an item without its value, because items may be confidential."""
        return f"stored item {index}"

    def place(self, blocks: Blocks, index: int) -> str:
        """Return the path of an item that is a file; '' for other items, and for a lost block."""
        if not self.are_paths:
            return ""
        try:
            [path] = self.read(blocks, index, index + 1)
        except Unreadable:
            return ""
        return str(path)

    def _block(self, start: int, end: int, stored: bytes) -> Block:
        try:
            data, sizes, decode = codec.parts(codec.decompress(stored))
        except Exception:
            raise Unreadable(end, _lost_items(start, end, "are damaged")) from None
        return Block(start, data, _offsets(sizes), decode)


class LineSource(msgspec.Struct, frozen=True, omit_defaults=True, tag="lines"):
    """Lines of a text file; Redis keeps the place of each block of lines."""

    path: str
    encoding: str
    size: int
    modified_ns: int
    given: str = ""  # the path as the user wrote it, if it was not the resolved one

    def read(self, blocks: Blocks, lo: int, hi: int) -> Sequence[Any]:
        """Return items from `lo` on, up to `hi`.  Raises Unreadable."""

        def block(start: int, end: int, stored: bytes) -> Block:
            try:
                return self._block(start, end, codec.unpack(stored), blocks.reader.root)
            except OSError as error:
                raise Unreadable(
                    ALL, self._lost(f"cannot be read: {error.strerror or type(error).__name__}")
                ) from None
            except InvalidRequest as error:
                raise Unreadable(ALL, error) from None

        return blocks.read(lo, hi, block)

    def describe(self, index: int) -> str:
        """Return path and line of an item."""
        return f"{self.given or self.path}, line {index + 1}"

    def place(self, _blocks: Blocks, index: int) -> str:
        """Return path and line of an item."""
        return self.describe(index)

    def _block(self, start: int, end: int, place: Any, root: FilesRoot) -> Block:
        path = root.checked(self.path)
        about = path.stat()
        if (about.st_size, about.st_mtime_ns) != (self.size, self.modified_ns):
            raise Unreadable(ALL, self._lost("has changed since the job was submitted"))
        with root.open(self.path) as file:
            if isinstance(place, int):  # a job of schema 1 has the offset only
                file.seek(place)
                data = b"".join(itertools.islice(file, end - start))
            else:
                file.seek(place[0])
                data = file.read(place[1])
        offsets = _offsets(line_lengths(data, self.encoding))
        if len(offsets) != end - start + 1:
            raise Unreadable(ALL, self._lost("has other lines than when the job was submitted"))
        return Block(start, data, offsets, lambda part, _count: decoded_lines(part, self.encoding))

    def _lost(self, why: str) -> ItemsUnreadable:
        return ItemsUnreadable(
            self.path, why, "submit it again, or call retry_failed(reread=True) on this job"
        )


StoredItems = RangeSource | BlockSource | LineSource


def _lost_items(lo: int, hi: int, why: str) -> ItemsUnreadable:
    return ItemsUnreadable(f"stored items {lo} to {hi - 1}", why, "submit them again")


# --- writing -----------------------------------------------------------------------------------


class ItemWriter:
    """Store the items of one job in packed blocks, and return the record that reads them.

    Items whose job is not opened within STAGED_S after the last of them are deleted.  Each call to
    Redis is one of `Store.call`; the iterable, which runs a user's code, is read outside of them.
    """

    def __init__(
        self,
        store: Store,
        index: str,
        blocks: str,
        *,
        max_item_bytes: int,
        root: FilesRoot = ANYWHERE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._index, self._blocks = store, index, blocks
        self._max_item_bytes, self._clock = max_item_bytes, clock
        self.root = root
        self._waiting: list[tuple[int, int, bytes]] = []
        self._bytes = 0
        self._renew_at = float("inf")  # the first flush sets it

    def items(self, items: Iterable[Any], *, are_paths: bool = False) -> tuple[StoredItems, int]:
        """Store items, which may be paths of files; return their record and number.

        Raises InvalidRequest naming the first item that cannot be stored, StoreUnavailable, and
        what the iterable raises.
        """
        count = 0
        iterator = self._renewing(items)
        while block := list(itertools.islice(iterator, BLOCK_ITEMS)):
            self._add(count, block)
            count += len(block)
        self._flush()
        return BlockSource(are_paths), count

    def lines(self, text: TextFile, given: str) -> tuple[StoredItems, int]:
        """Store the places of a file's lines; return their record and number.

        `given` is the path of the file as the user wrote it.

        Raises InvalidRequest for a line that is too long, and for a file that changes.
        """
        count, offset, rest = 0, text.begin, []
        for lengths in text.lengths():
            rest += lengths
            whole = len(rest) - len(rest) % BLOCK_ITEMS
            for at in range(0, whole, BLOCK_ITEMS):
                offset = self._add_lines(text, count, offset, rest[at : at + BLOCK_ITEMS])
                count += BLOCK_ITEMS
            del rest[:whole]
        if rest:
            self._add_lines(text, count, offset, rest)
        self._flush()
        path = str(text.path)
        source = LineSource(
            path=path,
            encoding=text.encoding,
            size=text.size,
            modified_ns=text.modified_ns,
            given="" if given == path else given,
        )
        return source, count + len(rest)

    def _renewing(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the items; a slow iterable does not outlive those that were stored before."""
        for item in items:
            yield item
            if self._clock() >= self._renew_at:
                self._renew()

    def _add(self, lo: int, block: list[Any]) -> None:
        data = self._encoded(lo, block)
        if data is not None and len(data) > self._max_item_bytes:
            self._refuse_large_items(lo, block, data)
        if (data is None or len(data) > BLOCK_BYTES) and len(block) > 1:
            half = len(block) // 2
            self._add(lo, block[:half])
            self._add(lo + half, block[half:])
            return
        assert data is not None  # one item is encoded or refused
        self._queue(lo, lo + len(block), codec.compress(data))

    def _add_lines(self, text: TextFile, lo: int, offset: int, lengths: list[int]) -> int:
        """Queue a block of lines, and return the place behind it."""
        size = sum(lengths)
        if size > self._max_item_bytes and (longest := max(lengths)) > self._max_item_bytes:
            raise InvalidRequest(
                "items",
                str(text.path),
                f"line {lo + lengths.index(longest) + 1} has {longest} bytes, more than "
                f"RLM_MAX_ITEM_BYTES={self._max_item_bytes}; shorten it, or raise the limit",
            )
        if size > BLOCK_BYTES and len(lengths) > 1:
            half = len(lengths) // 2
            offset = self._add_lines(text, lo, offset, lengths[:half])
            return self._add_lines(text, lo + half, offset, lengths[half:])
        self._queue(lo, lo + len(lengths), codec.pack([offset, size]))
        return offset + size

    def _refuse_large_items(self, lo: int, block: list[Any], data: bytes) -> None:
        for at, size in enumerate(codec.parts(data)[1]):
            if size > self._max_item_bytes:
                raise InvalidRequest(
                    f"items[{lo + at}]",
                    f"a {type(block[at]).__name__}",
                    f"packs to {size} bytes, more than RLM_MAX_ITEM_BYTES={self._max_item_bytes}; "
                    "store it as a file and pass its path, or raise the limit",
                )

    def _encoded(self, lo: int, block: list[Any]) -> bytes | None:
        """Return the packed block, None when only a smaller block can be packed.

        Raises InvalidRequest for an item that cannot be stored.
        """
        try:
            return codec.encode_all(block)
        except NotStorable as error:
            if not error.where and len(block) > 1:
                return None
            # The item's place in the block comes first.
            first, _, rest = (error.where or "[0]")[1:].partition("]")
            raise InvalidRequest(
                f"items[{lo + int(first)}]{rest}", error.value, error.why
            ) from None

    def _queue(self, lo: int, hi: int, data: bytes) -> None:
        if len(data) > BLOCK_BYTES and len(data) > (most := largest_value(self._store)):
            raise InvalidRequest(
                f"items[{lo}]",
                f"{len(data)} bytes",
                f"is larger than Redis takes (proto-max-bulk-len {most}); store it as a file and "
                "pass its path",
            )
        self._waiting.append((lo, hi, data))
        self._bytes += len(data)
        if self._bytes >= PIPELINE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._renew_at != float("inf"):
            self._renew()
        self._store.call(self._send)  # may send twice; an iterable could not be read twice
        self._waiting, self._bytes = [], 0
        self._renew_at = self._clock() + STAGED_S / 4

    def _send(self, client: redis.Redis) -> None:
        pipe = client.pipeline(transaction=False)
        pipe.hset(self._blocks, mapping={f"{lo}:{hi}": data for lo, hi, data in self._waiting})
        pipe.zadd(self._index, {f"{lo}:{hi}": lo for lo, hi, _ in self._waiting})
        pipe.expire(self._blocks, STAGED_S)
        pipe.expire(self._index, STAGED_S)
        pipe.execute()

    def _renew(self) -> None:
        renew_staged(self._store, self._index, self._blocks)
        self._renew_at = self._clock() + STAGED_S / 4


def renew_staged(store: Store, index: str, blocks: str) -> None:
    """Begin the time of staged items anew.  Raises InvalidRequest when they are deleted already."""

    def renew(client: redis.Redis) -> bool:
        pipe = client.pipeline(transaction=False)
        pipe.expire(index, STAGED_S)
        pipe.expire(blocks, STAGED_S)
        return all(pipe.execute())

    if not store.call(renew):
        raise InvalidRequest(
            "items",
            "an iterator",
            f"gave no item for more than {STAGED_S} s, so the items before it were deleted; "
            "collect all items first, then submit them",
        )


# --- reading -----------------------------------------------------------------------------------


class ItemReader:
    """Read ranges of items in a worker; recently read blocks stay in memory, packed."""

    def __init__(self, store: Store, root: FilesRoot = ANYWHERE) -> None:
        self._store, self.root = store, root
        self._cache: OrderedDict[tuple[str, int], Block] = OrderedDict()  # oldest reading first
        self._starts: dict[str, list[int]] = {}  # of each job's blocks in memory, in order
        self.held_bytes = 0
        self._hits = self._misses = 0

    def forget(self, blocks: str = "") -> None:
        """Drop the blocks of one job, by its key of blocks, or those of all jobs."""
        for key in [key for key in self._cache if blocks in ("", key[0])]:
            self._drop(key)

    def lookups(self) -> tuple[int, int]:
        """Return the reads since the last call: from memory, and from Redis."""
        counts, self._hits, self._misses = (self._hits, self._misses), 0, 0
        return counts

    def read(self, source: StoredItems, index: str, blocks: str, lo: int, hi: int) -> Sequence[Any]:
        """Return items from `lo` on, at most to `hi`; `index` and `blocks` are keys of the job.

        They are fewer when one of them cannot be read, or when they are large; at least one.
        Each reading returns new objects.  Raises Unreadable when the first cannot be read.
        """
        return source.read(Blocks(self, index, blocks), lo, hi)

    def place(self, source: StoredItems, index: str, blocks: str, at: int) -> str:
        """Return the place of an item in the user's input; '' if its index is its best name.

        A place is "payments.csv, line 839", or the path of a file.
        """
        return source.place(Blocks(self, index, blocks), at)

    def block(self, index: str, blocks: str, at: int, make: MakeBlock) -> Block:
        """Return the block that holds item `at`.  Raises Unreadable."""
        starts = self._starts.get(blocks, [])
        if place := bisect_right(starts, at):
            found = self._cache[key := (blocks, starts[place - 1])]
            if at < found.end:
                self._hits += 1
                self._cache.move_to_end(key)
                return found
        self._misses += 1
        made: Block = self._store.call(
            lambda client: self._fetched(client, index, blocks, at, make), on_outage="wait"
        )
        self._keep(blocks, made)
        return made

    def _fetched(self, client: Any, index: str, blocks: str, at: int, make: MakeBlock) -> Block:
        names = cast(
            list[bytes], client.zrange(index, at, "-inf", desc=True, byscore=True, offset=0, num=1)
        )
        start, end = (int(edge) for edge in names[0].split(b":")) if names else (0, 0)
        if at >= end:
            raise Unreadable(ALL, _lost_items(at, at + 1, "are not stored any more"))
        data = cast(bytes | None, client.hget(blocks, f"{start}:{end}"))
        if data is None:
            raise Unreadable(end, _lost_items(start, end, "are not stored any more"))
        return make(start, end, data)

    def _keep(self, blocks: str, block: Block) -> None:
        """Keep a block in memory, and drop the oldest ones that are too many."""
        if block.size > CACHE_BYTES:
            return
        self._cache[blocks, block.start] = block
        insort(self._starts.setdefault(blocks, []), block.start)
        self.held_bytes += block.size
        while self.held_bytes > CACHE_BYTES:
            self._drop(next(iter(self._cache)))

    def _drop(self, key: tuple[str, int]) -> None:
        self.held_bytes -= self._cache.pop(key).size
        starts = self._starts[key[0]]
        starts.remove(key[1])
        if not starts:
            del self._starts[key[0]]


MakeBlock = Callable[[int, int, bytes], Block]
"""Returns a block from its first item, the item behind it, and its stored value."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The stored blocks of one job."""

    reader: ItemReader
    index: str  # keys of the job
    blocks: str

    def read(self, lo: int, hi: int, make: MakeBlock) -> Sequence[Any]:
        """Return items from `lo` on, as `ItemReader.read` does."""
        collected: list[Any] = []
        at, size = lo, 0
        while at < hi and size < READ_BYTES:
            try:
                block = self.reader.block(self.index, self.blocks, at, make)
                part = block.read(at, hi)
            except Unreadable:
                if collected:
                    break
                raise
            collected += part
            size += block.bytes_of(at, at + len(part))
            at += len(part)
        return collected
