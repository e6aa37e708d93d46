"""Packages of users with the same name as one of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlm_tasks import import_path

LOOK = (
    "from rlm_tasks import import_path as look; print(look.found_instead(), look.hidden_by_ours())"
)


def found_with(*path: Path, first: str = "") -> str:
    """Return the findings of a new process with these folders first on its path."""
    done = subprocess.run(
        [sys.executable, "-c", f"{first}{LOOK}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=path[0],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
    )
    return done.stdout.strip()


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder with a user's package of our name, and with a folder that is no package."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "resilience").mkdir()
    return tmp_path


def test_a_package_in_place_of_ours_is_found_without_importing_ours(
    theirs: Path,
) -> None:
    said = found_with(theirs, import_path.HOME)

    assert str({"scheduler": f"{theirs}/scheduler/__init__.py"}) in said
    assert "resilience" not in said, "a folder without modules replaces no package"


def test_a_package_imported_in_place_of_ours_is_found_after_the_path_is_corrected(
    theirs: Path,
) -> None:
    mended = (
        f"import sys, scheduler; sys.path.remove({str(theirs)!r}); sys.path[:] = [each for each "
        f"in sys.path if each]; "
    )

    assert (
        found_with(theirs, import_path.HOME, first=mended)
        == f"{ {'scheduler': f'{theirs}/scheduler/__init__.py'} } {{}}"
    )
