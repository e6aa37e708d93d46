"""The tone of a status, a level or a breaker's state, by which Flower and terminals colour it.

`jobs.endings` has the tones of a job's status.
"""

from __future__ import annotations

from typing import Literal

from resilience.degradation import Level

Tone = Literal["", "active", "success", "warning", "danger"]
"""One of the classes of Flower's own badges; '' for no colour."""
BREAKER_TONES: dict[str, Tone] = {"closed": "success", "half-open": "warning", "open": "danger"}
_LEVEL_TONES: dict[Level, Tone] = {
    Level.NORMAL: "success",
    Level.ELEVATED: "active",
    Level.HIGH: "warning",
}


def level_tone(level: Level) -> Tone:
    """Return the tone of a pressure level."""
    return _LEVEL_TONES.get(level, "danger")
