"""Where a job's items come from, and how a worker reads a range of them.

Items never travel in messages: a `range` is described, a file is read where it lies, anything else
is streamed to Redis in packed blocks before the job opens.  Refuses to know what is done with the
items."""

from __future__ import annotations

import glob
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from resilience.store import Store
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs import codec

BLOCK_ITEMS = 1024
BLOCK_BYTES = 1 << 20
PIPELINE_BYTES = 4 << 20
CACHE_BYTES = 8 << 20


class RangeSource(msgspec.Struct, frozen=True, tag="range"):
    """The integers of a `range`."""

    start: int
    step: int


class BlockSource(msgspec.Struct, frozen=True, tag="blocks"):
    """Packed blocks of items in Redis."""


class LineSource(msgspec.Struct, frozen=True, tag="lines"):
    """Lines of a text file; Redis keeps the byte offset of every BLOCK_ITEMS-th one."""

    path: str
    encoding: str
    size: int
    modified_ns: int


Source = RangeSource | BlockSource | LineSource


def reference(source: Source, index: int) -> str:
    """Say where an item lies, without saying what it is: items may be confidential."""
    match source:
        case RangeSource():
            return f"{source.start + index * source.step} of a range"
        case LineSource():
            return f"{source.path}, line {index + 1}"
        case BlockSource():
            return f"stored item {index}"


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of a text file, without their line ends; workers must see the file at the same path.

    Only offsets are stored.  The file must not change while the job runs: a worker that finds it
    changed fails the items it should have read.
    """

    path: str | os.PathLike[str]
    encoding: str = "utf-8"


@dataclass(frozen=True, slots=True)
class Files:
    """Paths that match a glob pattern (`**` reaches into folders), sorted, as items."""

    pattern: str

    def __iter__(self) -> Iterator[str]:
        found = glob.iglob(self.pattern, recursive=True)  # noqa: PTH207  # Path.glob: no absolute pattern
        return iter(sorted(path for path in found if Path(path).is_file()))


class ItemWriter:
    """Store the items of one job; `write` returns their source and number."""

    def __init__(
        self, store: Store, index: str, blocks: str, *, ttl_s: int, max_item_bytes: int
    ) -> None:
        self._store, self._index, self._blocks = store, index, blocks
        self._ttl_s, self._max_item_bytes = ttl_s, max_item_bytes
        self._waiting: list[tuple[int, int, bytes]] = []
        self._bytes = 0

    def write(self, items: Any) -> tuple[Source, int]:
        """Store the items.  Raises InvalidRequest naming the first item that cannot be stored."""
        if isinstance(items, range):
            return RangeSource(items.start, items.step), len(items)
        if isinstance(items, Lines):
            return self._write_lines(items)
        if isinstance(items, str | bytes) or not isinstance(items, Iterable):
            raise InvalidRequest(
                "items", items, "must be an iterable of items, a range, Lines(...) or Files(...)"
            )
        count = 0
        iterator = iter(items)
        while block := list(itertools.islice(iterator, BLOCK_ITEMS)):
            self._add(count, block)
            count += len(block)
        self._flush()
        return BlockSource(), count

    def _add(self, lo: int, block: list[Any]) -> None:
        data = self._encoded(lo, block)
        if len(data) > BLOCK_BYTES and len(block) > 1:
            half = len(block) // 2
            self._add(lo, block[:half])
            self._add(lo + half, block[half:])
            return
        if len(data) > self._max_item_bytes and len(block) == 1:
            raise InvalidRequest(
                f"items[{lo}]",
                block[0],
                f"packs to {len(data)} bytes, more than RLM_MAX_ITEM_BYTES={self._max_item_bytes}",
            )
        self._queue(lo, lo + len(block), codec.compress(data))

    def _encoded(self, lo: int, block: list[Any]) -> bytes:
        try:
            return codec.encode(block)
        except TypeError:
            for index, item in enumerate(block, lo):
                try:
                    codec.encode(item)
                except TypeError as error:
                    raise InvalidRequest(
                        f"items[{index}]", item, f"cannot be stored as plain data: {error}"
                    ) from None
            raise

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

    def _write_lines(self, lines: Lines) -> tuple[Source, int]:
        path = Path(lines.path).resolve()
        try:
            about = path.stat()
            count = self._write_offsets(path)
        except OSError as error:
            raise InvalidRequest(
                "items", str(lines.path), f"cannot be read: {error.strerror}"
            ) from None
        return LineSource(str(path), lines.encoding, about.st_size, about.st_mtime_ns), count

    def _write_offsets(self, path: Path) -> int:
        count, offset = 0, 0
        with path.open("rb") as file:
            while block := list(itertools.islice(file, BLOCK_ITEMS)):
                self._queue(count, count + len(block), codec.pack(offset))
                count += len(block)
                offset += sum(len(line) for line in block)
        self._flush()
        return count


class ItemReader:
    """Read ranges of items in a worker; recently read blocks stay in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cache: OrderedDict[tuple[str, int], list[Any]] = OrderedDict()
        self._sizes: dict[tuple[str, int], int] = {}
        self._hits = self._misses = 0

    def forget(self) -> None:
        """Keep no block in memory."""
        self._cache.clear()
        self._sizes.clear()

    def looked_up(self) -> tuple[int, int]:
        """Return how often a block was in memory, and how often it was not, since this was asked
        last.
        """
        told, self._hits, self._misses = (self._hits, self._misses), 0, 0
        return told

    def read(self, source: Source, index: str, blocks: str, lo: int, hi: int) -> Sequence[Any]:
        """Return the items of [lo, hi).  Raises LookupError when some are gone or the file has
        changed.
        """
        if isinstance(source, RangeSource):
            return range(
                source.start + lo * source.step, source.start + hi * source.step, source.step
            )
        found: list[Any] = []
        at = lo
        while at < hi:
            start, items = self._block(source, index, blocks, at)
            part = items[at - start : hi - start]
            if not part:
                raise LookupError(f"items [{at}, {hi}) of this job are not stored")
            found += part
            at += len(part)
        return found

    def _block(self, source: Source, index: str, blocks: str, at: int) -> tuple[int, list[Any]]:
        for (key, start), items in reversed(self._cache.items()):
            if key == blocks and start <= at < start + len(items):
                self._hits += 1
                return start, items
        self._misses += 1
        name = cast(
            list[bytes],
            self._store.client.zrange(index, at, "-inf", desc=True, byscore=True, offset=0, num=1),
        )
        data = (
            cast(bytes | None, self._store.client.hget(blocks, name[0].decode())) if name else None
        )
        if data is None:
            raise LookupError(f"item {at} of this job is not stored")
        start, end = (int(edge) for edge in name[0].split(b":"))
        raw = codec.decompress(data)
        items = (
            self._lines(source, codec.decode(raw), end - start)
            if isinstance(source, LineSource)
            else codec.decode(raw)
        )
        self._remember((blocks, start), items, len(raw))
        return start, items

    def _remember(self, key: tuple[str, int], items: list[Any], size: int) -> None:
        self._cache[key], self._sizes[key] = items, size
        while len(self._cache) > 1 and sum(self._sizes[each] for each in self._cache) > CACHE_BYTES:
            self._sizes.pop(self._cache.popitem(last=False)[0])

    def _lines(self, source: LineSource, offset: int, count: int) -> list[Any]:
        path = Path(source.path)
        about = path.stat()
        if (about.st_size, about.st_mtime_ns) != (source.size, source.modified_ns):
            raise LookupError(f"{path} has changed since the job was submitted")
        with path.open("rb") as file:
            file.seek(offset)
            return [
                line.decode(source.encoding).rstrip("\r\n")
                for line in itertools.islice(file, count)
            ]
