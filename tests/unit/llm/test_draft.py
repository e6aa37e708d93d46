"""The models that a call may use."""

from __future__ import annotations

from typing import Any

import pytest

from resilience.degradation import Degradation, Level, Strategy
from rlm_tasks.llm.draft import models_for
from rlm_tasks.settings.llm import LlmSettings, ModelSettings


@pytest.mark.parametrize(
    ("level", "tier", "models", "shaped"),
    [
        (Level.NORMAL, "large", ["L", "M", "S"], set()),
        (Level.ELEVATED, "medium", ["M", "S", "L"], set()),
        (Level.HIGH, "large", ["M", "S", "L"], {Strategy.SMALLER_MODEL}),
        (Level.CRITICAL, "large", ["S", "M", "L"], {Strategy.SMALLER_MODEL}),
        (Level.EMERGENCY, "small", ["S", "M", "L"], set()),
    ],
)
def test_pressure_lowers_the_tier_and_orders_the_stand_ins(
    level: Level, tier: Any, models: list[str], shaped: set[Strategy]
) -> None:
    degradation = Degradation(level)

    assert models_for(tier, LlmSettings(small="S", medium="M", large="L"), degradation) == models
    assert degradation.shaped == shaped


def test_a_model_too_small_for_a_call_is_never_chosen() -> None:
    tiny, short = ModelSettings(context_tokens=1000), ModelSettings(max_output_tokens=200)
    settings = LlmSettings(small="S", medium="M", large="L", models={"S": tiny, "L": short})
    degradation = Degradation(Level.CRITICAL)

    assert models_for("medium", settings, degradation, prompt=600, answer=300) == ["M"]
    assert degradation.shaped == set()
    assert models_for("medium", settings, degradation, prompt=500, answer=200) == ["S", "M", "L"]
