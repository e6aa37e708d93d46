"""The files in which a worker's processes count, one set for each slot of the pool.

A worker with a metrics port calls `begin`; metrics count with `count`; `telemetry.exposition` reads
the files.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from billiard.process import current_process

if TYPE_CHECKING:
    from prometheus_client.mmap_dict import MmapedDict


logger = logging.getLogger(__name__)


class SlotFiles:
    """The files of one worker in prometheus_client's format, one per kind of metric and slot.

    The values of prometheus_client itself do not fit.  They find their folder by an environment
    variable, which each program that an operation starts would inherit.  And they count by process,
    so each recycled process would leave a file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._pid = folder, os.getpid()
        self._open: dict[str, MmapedDict] = {}
        self._begun: set[str] = set()
        # For pools of threads; in other pools the main process never holds it.
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._told: set[tuple[str, str]] = set()

    def excess(
        self,
        family: str,
        given: Mapping[str, str],
        most: int,
        begin: Callable[[Sequence[str]], tuple[str, Sequence[str]]],
    ) -> Sequence[str]:
        """Return the labels of a metric whose value is one too many, of those `given`.

        All processes of the worker share the `most` values of a label.  For a new value, `begin`
        gets those labels, and returns the kind and the keys of the series that begin at 0.
        """
        new = [label for label, value in given.items() if value not in self._values[family, label]]
        if any(len(self._values[family, label]) < most for label in new):
            with self._lock, self._alone_in_folder():
                self._read_values()
                new = [label for label in new if given[label] not in self._values[family, label]]
                new = [label for label in new if len(self._values[family, label]) >= most]
                kind, keys = begin(new)
                for key in keys:
                    self._file(kind).read_value(key)
                for label in given.keys() - set(new):
                    self._values[family, label].add(given[label])
        for label in new:
            if (family, label) not in self._told:
                self._told.add((family, label))
                logger.warning(
                    "The label %s of %s has %d values, its most; others count together",
                    label,
                    family,
                    most,
                )
        return new

    @contextmanager
    def _alone_in_folder(self) -> Iterator[None]:
        import fcntl  # of Unix, as workers are; clients elsewhere load this module

        folder = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _read_values(self) -> None:
        """Read the values of all labels from the files of all slots."""
        from prometheus_client.mmap_dict import MmapedDict

        for path in self._folder.glob("*.db"):
            for key, *_ in MmapedDict.read_all_values_from_file(str(path)):
                family, _, labels, _ = json.loads(key)
                for label, value in labels.items():
                    self._values[family, label].add(value)

    def add(self, kind: str, *amounts: tuple[str, float], among: Sequence[str] = ()) -> None:
        """Add to the series of these keys; all series `among` which they are begin at 0."""
        with self._lock:
            file = self._file(kind)
            if among and among[0] not in self._begun:
                self._begun.add(among[0])
                for key in among:
                    file.read_value(key)
            for key, amount in amounts:
                file.write_value(key, file.read_value(key)[0] + amount, 0.0)

    def reach(self, key: str, value: float) -> None:
        """Keep the value if it is the greatest so far."""
        with self._lock:
            file = self._file("gauge_max")
            if value > file.read_value(key)[0]:
                file.write_value(key, value, 0.0)

    def close(self) -> None:
        """Close the files; their counts stay."""
        for file in self._open.values():
            file.close()
        self._open, self._begun = {}, set()

    def _file(self, kind: str) -> MmapedDict:
        if self._pid != os.getpid():
            self.close()  # a fork inherits the files of another slot
            self._pid = os.getpid()
        if kind not in self._open:
            self._open[kind] = self._opened(self._folder / f"{kind}_{_slot()}.db")
        return self._open[kind]

    def _opened(self, path: Path) -> MmapedDict:
        from prometheus_client.mmap_dict import MmapedDict

        if path.exists():
            return MmapedDict(str(path))
        new = path.with_suffix(".new")  # a reader must not find an empty file
        file = MmapedDict(str(new))
        new.replace(path)
        return file


def _slot() -> str:
    index = getattr(current_process(), "index", None)
    return "main" if index is None else str(index)


_files: SlotFiles | None = None


def begin(folder: Path) -> None:
    """Let this process and its forks count into a folder."""
    global _files  # noqa: PLW0603  # all metrics of a process count into one folder
    end()
    _files = SlotFiles(folder)


def end() -> None:
    """Stop counting in this process."""
    global _files  # noqa: PLW0603
    if _files is not None:
        _files.close()
    _files = None


def is_counting() -> bool:
    """Return whether this process counts; only a worker with a metrics port does."""
    return _files is not None


def count(write: Callable[[SlotFiles], None]) -> None:
    """Let a metric write into the files of this process, if it counts."""
    if _files is not None:
        try:
            write(_files)
        except OSError as error:
            logger.warning("This process counts no more, its metrics cannot be written: %s", error)
            end()
