"""Where a job's items come from: lines of a file, paths, a range, or any iterable of plain data.

Clients, plans and models get the kind of any items from `source_of`.  Each kind is one class with
`write` (store the items), `sample` (for plans) and iteration.  A new kind is a class of the
protocol `ItemSource` and, if it is stored in a new way, a record in `stored_items`.
"""

from __future__ import annotations

import glob
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from inspect import isgenerator
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Protocol, runtime_checkable

from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs.file_roots import ANYWHERE, FilesRoot
from rlm_tasks.jobs.stored_items import ItemWriter, RangeSource, StoredItems
from rlm_tasks.jobs.text_files import TextFile, line_lengths, storable_path

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

    def sample(self, random: Random, root: FilesRoot = ANYWHERE, /) -> ItemSample:
        """Return a sample; of a sequence only the sampled items are read.

        Raises InvalidRequest for items that can be read once only, and for files outside of `root`.
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
    if isgenerator(items) and items.gi_frame is None:
        return "this generator has been read to its end already; make a new one, or pass a list"
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

    Lines end as `open()` reads them, and a byte order mark is no part of the first one.  `~` and a
    relative path are resolved where the job is submitted.  Only offsets are stored.  The file must
    not change while the job runs: a worker that finds it changed fails the items that it should
    have read.  A line that is no text in the encoding fails alone, with UnicodeDecodeError.
    """

    of_texts: ClassVar[bool] = True
    path: str | os.PathLike[str]
    encoding: str = "utf-8"

    def write(self, writer: ItemWriter) -> tuple[StoredItems, int]:
        """Store the place of each block of lines.

        Raises InvalidRequest for a file or an encoding that cannot be read line by line.
        """
        with TextFile.opened(self.path, self.encoding, writer.root) as text:
            return writer.lines(text, storable_path(self.path))

    def sample(self, random: Random, root: FilesRoot = ANYWHERE, /) -> ItemSample:
        """Return lines of the whole file; of a long file, the whole lines inside some blocks."""
        with TextFile.opened(self.path, self.encoding, root) as text:
            pieces = [_lines_of(piece, text.encoding) for piece in _pieces(text)]
        if exact := len(pieces) == 1:
            [lines] = pieces
            total = len(lines)
        else:
            lines = [line for piece in pieces for line in piece[1:-1]] or pieces[0]
            ends = sum(len(piece) - 1 for piece in pieces)
            total = max(1, round(ends * text.size / (BLOCKS * BLOCK_BYTES)))
        chosen = _evenly(min(total, len(lines)), random)
        texts = [lines[at].decode(text.encoding, "replace").rstrip("\r\n") for at in chosen]
        return ItemSample(
            total, [(at * total // len(texts), text) for at, text in enumerate(texts)], exact
        )

    def __iter__(self) -> Iterator[str]:
        with TextFile.opened(self.path, self.encoding, ANYWHERE) as text:
            try:
                with io.TextIOWrapper(text.file, encoding=text.encoding) as lines:
                    yield from (line.removesuffix("\n") for line in lines)
            except UnicodeDecodeError:
                raise InvalidRequest(
                    "items",
                    str(self.path),
                    f"has a line that is no {text.encoding} text; mend it",
                ) from None


@dataclass(frozen=True, slots=True)
class Files:
    """Paths that match a glob pattern (`**` reaches into folders), sorted, as items.

    `~` and a relative pattern are resolved where the job is submitted, so the items are absolute
    paths; workers must see the files there.
    """

    of_texts: ClassVar[bool] = False
    pattern: str | os.PathLike[str]

    def write(self, writer: ItemWriter) -> tuple[StoredItems, int]:
        """Store the paths.  Raises InvalidRequest when no file matches."""
        return writer.items(self._below(writer.root), are_paths=True)

    def sample(self, random: Random, root: FilesRoot = ANYWHERE, /) -> ItemSample:
        """Return some of the paths.  Raises InvalidRequest when no file matches."""
        return _of_sequence(list(self._below(root)), random)

    def _below(self, root: FilesRoot) -> Iterator[str]:
        for path in self:
            root.checked(storable_path(path))
            yield path

    def __iter__(self) -> Iterator[str]:
        try:
            pattern = Path(storable_path(self.pattern)).expanduser().absolute()
        except RuntimeError as error:  # no home folder
            raise InvalidRequest("items", str(self.pattern), f"cannot be read: {error}") from None
        found = glob.iglob(str(pattern), recursive=True)  # noqa: PTH207  # Path.glob: no absolute pattern
        paths = sorted(path for path in found if Path(path).is_file())
        if not paths:
            raise InvalidRequest(
                "items",
                str(self.pattern),
                f"matches no file below {Path.cwd()}; correct the pattern, or the folder",
            )
        return iter(paths)


@dataclass(frozen=True, slots=True)
class RangeItems:
    """The integers of a `range`, which are not stored."""

    of_texts: ClassVar[bool] = True
    items: range

    def write(self, _writer: ItemWriter) -> tuple[StoredItems, int]:
        """Store start and step."""
        return RangeSource(self.items.start, self.items.step), len(self.items)

    def sample(self, random: Random, _root: FilesRoot = ANYWHERE, /) -> ItemSample:
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

    def sample(self, random: Random, _root: FilesRoot = ANYWHERE, /) -> ItemSample:
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


def _pieces(text: TextFile) -> list[bytes]:
    """Return the bytes of a file's lines: all in one piece, or some pieces of a long file."""
    size, whole = text.size - text.begin, text.size <= BLOCKS * BLOCK_BYTES
    begins = [0] if whole else [at * (size - BLOCK_BYTES) // (BLOCKS - 1) for at in range(BLOCKS)]
    pieces = []
    for begin in begins:
        text.file.seek(text.begin + begin - begin % 4)  # no encoding has wider units
        pieces.append(text.file.read(size if whole else BLOCK_BYTES))
    return pieces


def _lines_of(piece: bytes, encoding: str) -> list[bytes]:
    """Return the lines of a piece with their line ends; an empty piece has none."""
    ends = list(itertools.accumulate(line_lengths(piece, encoding), initial=0))
    return [piece[lo:hi] for lo, hi in itertools.pairwise(ends)]
