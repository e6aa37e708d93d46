"""Operations whose items say when they ran, and take as long as a file says."""

from __future__ import annotations

import time
from pathlib import Path

from rlm_tasks import operation


@operation("stamped")
def stamped(seconds: float) -> tuple[float, float]:
    """Wait, and answer with the beginning and the end by the machine's clock."""
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


@operation("as_slow_as")
def as_slow_as(path: str) -> None:
    """Wait for as many milliseconds as a file says."""
    time.sleep(float(Path(path).read_text()) / 1000)
