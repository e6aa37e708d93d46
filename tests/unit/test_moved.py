"""Old import paths work for one more version, with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from rlm_tasks.moved import MOVED, RENAMED

NAMES = {
    "rlm_tasks.configuration": "export_config",
    "rlm_tasks.embedded": "server",
    "rlm_tasks.limits": "LimitReport",
    "rlm_tasks.llm.fake": "running",
    "rlm_tasks.pressure": "PlatformStatus",
}
"""A public name of each module that has moved."""


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_path_gives_the_name_of_the_new_one_and_warns(old: str, new: str) -> None:
    name = NAMES[old]

    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        found = getattr(importlib.import_module(old), name)

    assert found is getattr(importlib.import_module(new), name)


@pytest.mark.parametrize(("old", "name"), RENAMED)
def test_an_old_name_at_an_old_path_gives_the_renamed_one(old: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=RENAMED[old, name]):
        found = getattr(importlib.import_module(old), name)

    assert found is getattr(importlib.import_module(MOVED[old]), RENAMED[old, name])


@pytest.mark.parametrize("module", ["rlm_tasks.llm.fake", "rlm_tasks.testing.fake_provider"])
def test_the_fake_provider_starts_from_both_paths(module: str) -> None:
    started = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
    )

    assert "--latency" in started.stdout
