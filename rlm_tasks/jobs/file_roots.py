"""The folder below which files may be read, when `RLM_FILES_ROOT` names one.

Clients check paths when a job is submitted, workers when they read: a worker trusts no path that
lies in Redis.  Begin with `FilesRoot.checked`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rlm_tasks.errors import FileOutsideRoot

_DESCRIPTORS = Path("/proc/self/fd")
"""Links from the open files of this process to their places, on Linux."""


@dataclass(frozen=True, slots=True)
class FilesRoot:
    """A folder below which files may be read; '': any file may be read."""

    folder: str = ""

    def checked(self, path: str | Path) -> Path:
        """Return a path without links.  Raises FileOutsideRoot when it lies outside."""
        resolved = Path(path).resolve()
        self._refuse_outside(resolved, path)
        return resolved

    def open(self, path: str | Path) -> BinaryIO:
        """Open a file to read its bytes.

        Raises OSError, and FileOutsideRoot also when a link took the place of the file, or of a
        folder above it, after the path was checked.
        """
        file = self.checked(path).open("rb")
        try:
            if self.folder and _DESCRIPTORS.is_dir():
                self._refuse_outside((_DESCRIPTORS / str(file.fileno())).readlink(), path)
        except BaseException:
            file.close()
            raise
        return file

    def _refuse_outside(self, place: Path, path: str | Path) -> None:
        if self.folder and not place.is_relative_to(Path(self.folder).expanduser().resolve()):
            raise FileOutsideRoot(str(path), self.folder)


ANYWHERE = FilesRoot()
