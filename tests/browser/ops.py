"""Operations of the browser tests: the test decides when their items end."""

from __future__ import annotations

import time
from pathlib import Path

from rlm_tasks import Context, operation


@operation("held")
def held(item: int, ctx: Context) -> int:
    """Wait until the folder has a file of the item's name, or a file named `all`."""
    folder = Path(ctx.params["folder"])
    while not ((folder / str(item)).exists() or (folder / "all").exists()):
        time.sleep(0.01)
    return item


@operation("limited")
def limited(item: int, ctx: Context) -> int:
    """Return how many of 100 entities the pressure level allows; odd items fail."""
    if item % 2:
        raise ValueError("odd")
    return ctx.limit(100)
