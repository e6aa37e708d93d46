"""Operations that tests of pressure and preemption run."""

from __future__ import annotations

import os
import time
from typing import Any

from rlm_tasks import Context, operation


@operation("nap", merge=sum)
def nap(seconds: float) -> int:
    """Take a while, and no processor."""
    time.sleep(seconds)
    return 1


@operation("stamp")
def stamp(_: Any) -> float:
    """Say when the item began."""
    return time.time()


@operation("where_and_when")
def where_and_when(seconds: float, ctx: Context) -> tuple[int, float, float]:
    """Say which process ran the item, and from when to when."""
    began = time.time()
    time.sleep(seconds)
    return os.getpid(), began, time.time()
