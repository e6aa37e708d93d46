"""A process that calls models, and the growth of its memory."""

from __future__ import annotations

import logging

import pytest
from celery import Celery

from rlm_tasks.installation import install
from rlm_tasks.llm.process_memory import Growth
from rlm_tasks.settings.llm import LlmSettings
from rlm_tasks.settings.model import Settings


def test_the_default_thresholds() -> None:
    settings = LlmSettings()

    assert (settings.memory_warn_mb, settings.memory_critical_mb) == (120, 140)


def test_a_growing_process_clears_its_caches_and_then_retires(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It clears them at each new maximum, and retires when that does not free enough."""
    caplog.set_level(logging.WARNING)
    runtime = install(Celery("unit", set_as_current=False), Settings()).rlm_runtime()
    held_mb, freed_mb = 500.0, 0.0
    cleared: list[float] = []

    def forget() -> None:
        nonlocal held_mb
        cleared.append(held_mb)
        held_mb -= freed_mb

    runtime.items.forget = forget
    growth = Growth(LlmSettings(), lambda: held_mb)
    samples = ((619.0, 0.0), (645.0, 20.0), (624.0, 0.0), (639.0, 0.0), (639.0, 0.0))
    for held_mb, freed_mb in samples:  # noqa: B007  # forget reads them
        growth.check(runtime)
        assert runtime.retiring is False

    held_mb = 640.0
    growth.check(runtime)

    assert cleared == [645.0, 639.0, 639.0, 640.0]
    assert runtime.retiring is True
    assert [each.getMessage().partition(";")[2] for each in caplog.records] == [
        " its caches are cleared",
        " it will be replaced",
    ]
