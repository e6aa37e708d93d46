"""How the items of a job are stored, and how a worker reads a range of them.

Clients write with `ItemWriter`, nodes read with `ItemReader`.  Messages never carry items.  A
`range` is stored as start and step, a file is read in place, all other items are packed blocks in
Redis.  Each kind of stored items is one record with `read` and `describe`,
in the job's specification.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from resilience.store import Store
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.storable import NotStorable

BLOCK_ITEMS = 1024
"""Most items of one block."""
BLOCK_BYTES = 1 << 20
"""A larger block is halved, down to one item."""
PIPELINE_BYTES = 4 << 20
"""Bytes that are sent to Redis in one pipeline."""
CACHE_BYTES = 8 << 20
"""Bytes of blocks that one process keeps in memory."""
Decode = Callable[[Any, int], list[Any]]
"""Returns the items of a block from its stored value and their number."""


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


class BlockSource(msgspec.Struct, frozen=True, tag="blocks"):
    """Packed blocks of items in Redis."""

    def read(self, blocks: Blocks, lo: int, hi: int) -> Sequence[Any]:
        """Return the items of [lo, hi).  Raises LookupError when some are gone."""
        return blocks.read(lo, hi, lambda items, _count: cast(list[Any], items))

    def describe(self, index: int) -> str:
        """Return the number of an item without its value, because items may be confidential."""
        return f"stored item {index}"


class LineSource(msgspec.Struct, frozen=True, tag="lines"):
    """Lines of a text file; Redis keeps the byte offset of every BLOCK_ITEMS-th line."""

    path: str
    encoding: str
    size: int
    modified_ns: int

    def read(self, blocks: Blocks, lo: int, hi: int) -> Sequence[Any]:
        """Return the items of [lo, hi).  Raises LookupError when the file has changed."""
        return blocks.read(lo, hi, self._lines)

    def describe(self, index: int) -> str:
        """Return path and line of an item."""
        return f"{self.path}, line {index + 1}"

    def _lines(self, offset: int, count: int) -> list[Any]:
        path = Path(self.path)
        about = path.stat()
        if (about.st_size, about.st_mtime_ns) != (self.size, self.modified_ns):
            raise LookupError(f"{path} has changed since the job was submitted")
        with path.open("rb") as file:
            file.seek(offset)
            lines = itertools.islice(file, count)
            return [line.decode(self.encoding).rstrip("\r\n") for line in lines]


StoredItems = RangeSource | BlockSource | LineSource


# --- writing -----------------------------------------------------------------------------------


class ItemWriter:
    """Store the items of one job in packed blocks, and return the record that reads them."""

    def __init__(
        self, store: Store, index: str, blocks: str, *, ttl_s: int, max_item_bytes: int
    ) -> None:
        self._store, self._index, self._blocks = store, index, blocks
        self._ttl_s, self._max_item_bytes = ttl_s, max_item_bytes
        self._waiting: list[tuple[int, int, bytes]] = []
        self._bytes = 0

    def items(self, items: Iterable[Any]) -> tuple[StoredItems, int]:
        """Store items; return their record and number.

        Raises InvalidRequest naming the first item that cannot be stored.
        """
        count = 0
        iterator = iter(items)
        while block := list(itertools.islice(iterator, BLOCK_ITEMS)):
            self._add(count, block)
            count += len(block)
        self._flush()
        return BlockSource(), count

    def lines(self, path: Path, encoding: str) -> tuple[StoredItems, int]:
        """Store the offsets of a file's lines; return their record and number.  Raises OSError."""
        about = path.stat()
        count, offset = 0, 0
        with path.open("rb") as file:
            while block := list(itertools.islice(file, BLOCK_ITEMS)):
                self._queue(count, count + len(block), codec.pack(offset))
                count += len(block)
                offset += sum(len(line) for line in block)
        self._flush()
        return LineSource(str(path), encoding, about.st_size, about.st_mtime_ns), count

    def _add(self, lo: int, block: list[Any]) -> None:
        data = self._encoded(lo, block)
        if (data is None or len(data) > BLOCK_BYTES) and len(block) > 1:
            half = len(block) // 2
            self._add(lo, block[:half])
            self._add(lo + half, block[half:])
            return
        assert data is not None  # one item is encoded or refused
        if len(data) > self._max_item_bytes and len(block) == 1:
            raise InvalidRequest(
                f"items[{lo}]",
                block[0],
                f"packs to {len(data)} bytes, more than RLM_MAX_ITEM_BYTES={self._max_item_bytes}",
            )
        self._queue(lo, lo + len(block), codec.compress(data))

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
        self._waiting.append((lo, hi, data))
        self._bytes += len(data)
        if self._bytes >= PIPELINE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        pipe = self._store.client.pipeline(transaction=False)
        pipe.hset(self._blocks, mapping={f"{lo}:{hi}": data for lo, hi, data in self._waiting})
        pipe.zadd(self._index, {f"{lo}:{hi}": lo for lo, hi, _ in self._waiting})
        pipe.expire(self._blocks, self._ttl_s)
        pipe.expire(self._index, self._ttl_s)
        pipe.execute()
        self._waiting, self._bytes = [], 0


# --- reading -----------------------------------------------------------------------------------


class ItemReader:
    """Read ranges of items in a worker; recently read blocks stay in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cache: OrderedDict[tuple[str, int], list[Any]] = OrderedDict()
        self._sizes: dict[tuple[str, int], int] = {}
        self._hits = self._misses = 0

    def forget(self) -> None:
        """Drop all blocks from memory."""
        self._cache.clear()
        self._sizes.clear()

    def lookups(self) -> tuple[int, int]:
        """Return the reads since the last call: from memory, and from Redis."""
        counts, self._hits, self._misses = (self._hits, self._misses), 0, 0
        return counts

    def read(self, source: StoredItems, index: str, blocks: str, lo: int, hi: int) -> Sequence[Any]:
        """Return the items of [lo, hi); `index` and `blocks` are keys of the job.

        Raises LookupError when some are gone or the file has changed.
        """
        return source.read(Blocks(self, index, blocks), lo, hi)

    def block(self, index: str, blocks: str, at: int, decode: Decode) -> tuple[int, list[Any]]:
        """Return the index of the first item of a block, and the items; the block holds item `at`.

        Raises LookupError when it is gone.
        """
        for (key, start), items in reversed(self._cache.items()):
            if key == blocks and start <= at < start + len(items):
                self._hits += 1
                return start, items
        self._misses += 1
        client = self._store.client
        names = cast(
            list[bytes], client.zrange(index, at, "-inf", desc=True, byscore=True, offset=0, num=1)
        )
        data = cast(bytes | None, client.hget(blocks, names[0].decode())) if names else None
        if data is None:
            raise LookupError(f"item {at} of this job is not stored")
        start, end = (int(edge) for edge in names[0].split(b":"))
        raw = codec.decompress(data)
        items = decode(codec.decode(raw), end - start)
        self._remember((blocks, start), items, len(raw))
        return start, items

    def _remember(self, key: tuple[str, int], items: list[Any], size: int) -> None:
        self._cache[key], self._sizes[key] = items, size
        while len(self._cache) > 1 and sum(self._sizes[each] for each in self._cache) > CACHE_BYTES:
            self._sizes.pop(self._cache.popitem(last=False)[0])


@dataclass(frozen=True, slots=True)
class Blocks:
    """The stored blocks of one job."""

    reader: ItemReader
    index: str  # keys of the job
    blocks: str

    def read(self, lo: int, hi: int, decode: Decode) -> Sequence[Any]:
        """Return the items of [lo, hi).  Raises LookupError when some are gone."""
        collected: list[Any] = []
        at = lo
        while at < hi:
            start, items = self.reader.block(self.index, self.blocks, at, decode)
            part = items[at - start : hi - start]
            if not part:
                raise LookupError(f"items [{at}, {hi}) of this job are not stored")
            collected += part
            at += len(part)
        return collected
