"""The public names are stable.

Removing one takes a minor version with a warning, and a change of public_names.txt.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import resilience
import rlm_tasks


def test_the_public_names_equal_those_of_the_file() -> None:
    kept = Path(__file__).with_name("public_names.txt").read_text(encoding="utf-8").split()

    assert sorted(
        [*rlm_tasks.__all__, *(f"resilience.{name}" for name in resilience.__all__)]
    ) == sorted(kept)


def test_every_public_name_can_be_imported() -> None:
    assert [
        name
        for package in (rlm_tasks, resilience)
        for name in package.__all__
        if not hasattr(package, name)
    ] == []


def test_importing_the_package_connects_to_nothing_and_starts_nothing() -> None:
    code = (
        "import rlm_tasks, threading; rlm_tasks.Client; rlm_tasks.app; assert "
        "threading.active_count() == 1"
    )

    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"RLM_REDIS_URL": "redis://127.0.0.1:1/0"},
        timeout=30,
    )
