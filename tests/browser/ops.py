"""Operations that the browser's tests run: their items end when the test says so."""

from __future__ import annotations

import time
from pathlib import Path

from rlm_tasks import Context, operation


@operation("held")
def held(item: int, ctx: Context) -> int:
    """Wait until there is a file of the item's name, or one that lets all go."""
    folder = Path(ctx.params["folder"])
    while not ((folder / str(item)).exists() or (folder / "all").exists()):
        time.sleep(0.01)
    return item


@operation("limited")
def limited(item: int, ctx: Context) -> int:
    """Look at as many of 100 entities as pressure allows; odd items fail."""
    if item % 2:
        raise ValueError("odd")
    return ctx.limit(100)
