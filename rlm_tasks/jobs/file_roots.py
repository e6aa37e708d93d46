"""The folder below which files may be read, when `RLM_FILES_ROOT` names one.

Clients check paths when a job is submitted, workers when they read: a worker trusts no path that
lies in Redis.  Begin with `FilesRoot.checked`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlm_tasks.errors import FileOutsideRoot


@dataclass(frozen=True, slots=True)
class FilesRoot:
    """A folder below which files may be read; '': any file may be read."""

    folder: str = ""

    def checked(self, path: str | Path) -> Path:
        """Return a path without links.  Raises FileOutsideRoot when it lies outside."""
        resolved = Path(path).resolve()
        if self.folder and not resolved.is_relative_to(Path(self.folder).expanduser().resolve()):
            raise FileOutsideRoot(str(path), self.folder)
        return resolved


ANYWHERE = FilesRoot()
