"""Operations that return their times, or take the time that a file gives."""

from __future__ import annotations

import time
from pathlib import Path

from rlm_tasks import operation


@operation("stamped")
def stamped(seconds: float) -> tuple[float, float]:
    """Sleep; return the begin and the end by the machine's monotonic clock."""
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


@operation("as_slow_as")
def as_slow_as(path: str) -> None:
    """Sleep for the milliseconds that a file gives."""
    time.sleep(float(Path(path).read_text()) / 1000)
