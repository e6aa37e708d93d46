"""Where a job's items come from: lines of a file, paths, a range, or any iterable of plain data.

Clients, plans and models get the kind of any items from `source_of`.  Each kind is one class with
`write` (store the items), `sample` (for plans) and iteration.  A new kind is a class of the
protocol `ItemSource` and, if it is stored in a new way, a record in `stored_items`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, ClassVar, Protocol, runtime_checkable

from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs.stored_items import ItemWriter, RangeSource, StoredItems

SAMPLED = 1000
"""Items of the largest sample."""
BLOCKS, BLOCK_BYTES = 16, 65_536
"""A text file longer than these 16 blocks together (1 MiB) is sampled by reading them only."""
MOST_ITEMS = 10**14 - 1
"""Items of the largest job: a larger number has no exact text in the scripts of the ledger."""
_KINDS = "an iterable of items, a range, Lines(...) or Files(...)"


@dataclass(frozen=True, slots=True)
class ItemSample:
    """Some items, spread evenly over all of them."""

    total: int
    items: list[tuple[int, Any]] = field(repr=False)  # index and item
    exact: bool = True  # False: the total is an estimate


@runtime_checkable
class ItemSource(Protocol):
    """One kind of items that a request may have."""

    of_texts: ClassVar[bool]  # False: its items only name texts, as paths do

    def write(self, writer: ItemWriter) -> tuple[StoredItems, int]:
        """Store the items; return the record by which workers read them, and their number.

        Raises InvalidRequest for items that cannot be read or stored.
        """

    def sample(self, random: Random) -> ItemSample:
        """Return a sample; of a sequence only the sampled items are read.

        Raises InvalidRequest for items that can be read once only.
        """

    def __iter__(self) -> Iterator[Any]:
        """Yield the items in order.  Raises InvalidRequest when they cannot be read."""


def source_of(items: Any) -> ItemSource:
    """Return the items of a request as their kind; a dict is one item.

    Raises InvalidRequest for other values, and for what is iterable but yields no items in order.
    """
    if isinstance(items, ItemSource):
        return items
    if isinstance(items, range):
        if _is_too_long(items):
            raise InvalidRequest("items", items, f"has more than {MOST_ITEMS:,} items; split it")
        return RangeItems(items)
    if isinstance(items, Mapping):
        return PlainItems([items])
    if why := _no_items(items):
        raise InvalidRequest("items", items, why)
    return PlainItems(items)


def _is_too_long(items: range) -> bool:
    try:
        return len(items) > MOST_ITEMS
    except OverflowError:
        return True


def _no_items(items: Any) -> str:
    """Return what to pass in place of a value that is no iterable of items; '' for one that is."""
    for name, advice in _FRAMES:
        if hasattr(items, name) and hasattr(items, "columns"):
            return f"a data frame yields the names of its columns; pass {advice}"
    if hasattr(items, "columns"):
        return "a table is not read row by row; pass a list of its rows"
    if hasattr(items, "dtype"):
        return "an array yields scalars of its own type; pass .tolist()"
    if hasattr(items, "model_dump") or (isinstance(items, tuple) and hasattr(items, "_fields")):
        return "one record yields its fields; pass a list of records, such as [dict(...)]"
    if isinstance(items, set | frozenset):
        return "a set has no order; pass sorted(...) or list(...)"
    if hasattr(items, "readline"):
        return "an open file cannot be read by workers; pass Lines(path), or a list of its lines"
    if isinstance(items, str | bytes | bytearray | memoryview) or not isinstance(items, Iterable):
        return f"must be {_KINDS}"
    return ""


_FRAMES = (
    ("to_dicts", ".to_dicts()"),  # polars
    ("to_pylist", ".to_pylist()"),  # pyarrow
    ("to_dict", '.to_dict("records")'),  # pandas
)
"""A method of each kind of data frame, and the call that returns its rows."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of a text file, without their line ends; workers must see the file at the same path.

    Only offsets are stored.  The file must not change while the job runs: a worker that finds it
    changed fails the items that it should have read.
    """

    of_texts: ClassVar[bool] = True
    path: str | os.PathLike[str]
    encoding: str = "utf-8"

    def write(self, writer: ItemWriter) -> tuple[StoredItems, int]:
        """Store the offset of every 1,024th line."""
        try:
            return writer.lines(Path(self.path).resolve(), self.encoding)
        except OSError as error:
            raise self._unreadable(error) from None

    def sample(self, random: Random) -> ItemSample:
        """Return lines of the whole file; of a long file, the whole lines inside some blocks."""
        try:
            size, blocks = _blocks(Path(self.path))
        except OSError as error:
            raise self._unreadable(error) from None
        pieces = [block.split(b"\n") for block in blocks]
        if exact := len(blocks) == 1:
            [lines] = pieces
            total = len(lines) if lines[-1] else len(lines) - 1
        else:
            lines = [line for block in pieces for line in block[1:-1]] or blocks
            ends = sum(len(block) - 1 for block in pieces)
            total = max(1, round(ends * size / (BLOCKS * BLOCK_BYTES)))
        texts = [
            lines[at].decode(self.encoding, "replace").rstrip("\r\n")
            for at in _evenly(min(total, len(lines)), random)
        ]
        return ItemSample(
            total, [(at * total // len(texts), text) for at, text in enumerate(texts)], exact
        )

    def __iter__(self) -> Iterator[str]:
        try:
            with Path(self.path).open(encoding=self.encoding) as file:
                yield from (line.rstrip("\r\n") for line in file)
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> InvalidRequest:
        return InvalidRequest("items", str(self.path), f"cannot be read: {error.strerror}")


@dataclass(frozen=True, slots=True)
class Files:
    """Paths that match a glob pattern (`**` reaches into folders), sorted, as items."""

    of_texts: ClassVar[bool] = False
    pattern: str

    def write(self, writer: ItemWriter) -> tuple[StoredItems, int]:
        """Store the paths."""
        return writer.items(self)

    def sample(self, random: Random) -> ItemSample:
        """Return some of the paths."""
        return _of_sequence(list(self), random)

    def __iter__(self) -> Iterator[str]:
        paths = glob.iglob(self.pattern, recursive=True)  # noqa: PTH207  # Path.glob: no absolute pattern
        return iter(sorted(path for path in paths if Path(path).is_file()))


@dataclass(frozen=True, slots=True)
class RangeItems:
    """The integers of a `range`, which are not stored."""

    of_texts: ClassVar[bool] = True
    items: range

    def write(self, _writer: ItemWriter) -> tuple[StoredItems, int]:
        """Store start and step."""
        return RangeSource(self.items.start, self.items.step), len(self.items)

    def sample(self, random: Random) -> ItemSample:
        """Return some of the integers."""
        return _of_sequence(self.items, random)

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)


@dataclass(frozen=True, slots=True)
class PlainItems:
    """Any iterable of plain data."""

    of_texts: ClassVar[bool] = True
    items: Iterable[Any]

    def write(self, writer: ItemWriter) -> tuple[StoredItems, int]:
        """Store the items in packed blocks."""
        return writer.items(self.items)

    def sample(self, random: Random) -> ItemSample:
        """Return some of the items."""
        if not isinstance(self.items, Sized):
            advice = "a plan would use up an iterator; pass a list, or Lines(...)"
            raise InvalidRequest("items", self.items, advice)
        if isinstance(self.items, Sequence):
            return _of_sequence(self.items, random)
        wanted = set(_evenly(len(self.items), random))
        sampled = [each for each in enumerate(self.items) if each[0] in wanted]
        return ItemSample(len(self.items), sampled)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


# --- samples -----------------------------------------------------------------------------------


def _of_sequence(items: Sequence[Any], random: Random) -> ItemSample:
    return ItemSample(len(items), [(at, items[at]) for at in _evenly(len(items), random)])


def _evenly(total: int, random: Random) -> list[int]:
    """Return up to SAMPLED indexes, a random one of each stride.

    A fixed place in the stride would mislead where items repeat at regular distances.
    """
    sampled = min(total, SAMPLED)
    return [
        random.randrange(at * total // sampled, (at + 1) * total // sampled)
        for at in range(sampled)
    ]


def _blocks(path: Path) -> tuple[int, list[bytes]]:
    """Return the size of a file in bytes, and its text: one block, or samples of a long file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        whole = size <= BLOCKS * BLOCK_BYTES
        begins = (
            [0] if whole else [at * (size - BLOCK_BYTES) // (BLOCKS - 1) for at in range(BLOCKS)]
        )
        return size, [_block(file, begin, size if whole else BLOCK_BYTES) for begin in begins]


def _block(file: BinaryIO, begin: int, size: int) -> bytes:
    file.seek(begin)
    return file.read(size)
