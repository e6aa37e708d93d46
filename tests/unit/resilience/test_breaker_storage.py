"""The configuration of breakers."""

from __future__ import annotations

from resilience.breaker_storage import PRESETS, BreakerConfig


def test_the_presets_and_the_other_names_of_fields() -> None:
    found = {
        name: (c.failure_threshold, c.recovery_timeout_s, c.half_open_max_calls)
        for name, c in PRESETS.items()
    }
    assert found == {
        "default": (5, 60, 3),
        "client": (5, 30, 3),
        "executor": (10, 60, 3),
        "realtime": (3, 30, 3),
    }
    assert (PRESETS["default"].half_open_timeout_s, PRESETS["default"].success_threshold) == (30, 3)
    assert PRESETS["default"].memory_threshold_mb == 2048
    assert BreakerConfig(
        failureThreshold=5, recoveryTimeoutMs=30000, halfOpenMaxCalls=3
    ) == BreakerConfig(recovery_timeout_s=30)
    assert BreakerConfig(timeout_seconds=60.0, half_open_timeout=30.0).half_open_timeout_s == 30
