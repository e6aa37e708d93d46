"""Packages of a user's that have the name of one of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlm_tasks import import_path

LOOK = "from rlm_tasks import import_path as look; print(look.in_our_place(), look.behind_ours())"


def looked(*path: Path, first: str = "") -> str:
    """Return what a new process finds, with these folders in front of its path."""
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
    """A folder with a user's own package of our name, and with a folder that is no package."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "resilience").mkdir()
    return tmp_path


def test_a_package_in_place_of_ours_is_found_where_nothing_of_ours_can_be_imported(
    theirs: Path,
) -> None:
    said = looked(theirs, import_path.HOME)

    assert str({"scheduler": f"{theirs}/scheduler/__init__.py"}) in said
    assert "resilience" not in said, "a folder without modules takes no package's place"


def test_a_package_that_was_imported_in_place_of_ours_is_found_though_the_path_is_mended(
    theirs: Path,
) -> None:
    mended = (
        f"import sys, scheduler; sys.path.remove({str(theirs)!r}); sys.path[:] = [each for each "
        f"in sys.path if each]; "
    )

    assert (
        looked(theirs, import_path.HOME, first=mended)
        == f"{ {'scheduler': f'{theirs}/scheduler/__init__.py'} } {{}}"
    )
