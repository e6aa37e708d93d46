"""The files that a worker's processes count in, one for each slot of the pool."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from billiard.process import current_process

if TYPE_CHECKING:
    from prometheus_client.mmap_dict import MmapedDict


logger = logging.getLogger(__name__)


class SlotFiles:
    """The files of one worker, in prometheus_client's format: for each kind of metric one by each
    slot of the pool.

    prometheus_client's own values find their folder by an environment variable, which every program
    that an operation starts would inherit; and count by process, so that each recycled one would
    leave a file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._pid = folder, os.getpid()
        self._open: dict[str, MmapedDict] = {}
        self._begun: set[str] = set()
        self._lock = (
            threading.Lock()
        )  # for pools of threads; the main process of others never holds it

    def add(self, kind: str, *amounts: tuple[str, float], among: Sequence[str] = ()) -> None:
        """Add to the series of these keys; those they are `among` begin with them, at 0."""
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
        """Give the files back; what was counted stays in them."""
        for file in self._open.values():
            file.close()
        self._open, self._begun = {}, set()

    def _file(self, kind: str) -> MmapedDict:
        if self._pid != os.getpid():
            self.close()  # what was inherited by a fork is another slot's
            self._pid = os.getpid()
        if kind not in self._open:
            self._open[kind] = self._opened(self._folder / f"{kind}_{_slot()}.db")
        return self._open[kind]

    def _opened(self, path: Path) -> MmapedDict:
        from prometheus_client.mmap_dict import MmapedDict

        if path.exists():
            return MmapedDict(str(path))
        made = path.with_suffix(".new")  # a reader must not meet an empty file
        file = MmapedDict(str(made))
        made.replace(path)
        return file


def _slot() -> str:
    index = getattr(current_process(), "index", None)
    return "main" if index is None else str(index)


_files: SlotFiles | None = None


def begin(folder: Path) -> None:
    """Have this process, and those it forks, count into a folder."""
    global _files  # noqa: PLW0603  # a process counts in one place, whoever counts
    end()
    _files = SlotFiles(folder)


def end() -> None:
    """Count nothing any more in this process."""
    global _files  # noqa: PLW0603
    if _files is not None:
        _files.close()
    _files = None


def is_counting() -> bool:
    """Whether this process counts: only a worker with a metrics port does."""
    return _files is not None


def count(write: Callable[[SlotFiles], None]) -> None:
    if _files is not None:
        try:
            write(_files)
        except OSError as error:
            logger.warning("This process counts no more, its metrics cannot be written: %s", error)
            end()
