"""An operation that notes when it begins."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rlm_tasks import Context, operation

ITEM_S = 0.01


@operation("take_turns")
def take_turns(item: str, ctx: Context) -> None:
    """Note that an item has begun, and hold the slot for a while."""
    note(Path(ctx.params["journal"]), item)
    time.sleep(ITEM_S)


def note(journal: Path, word: Any) -> None:
    """Append a line; one this short is appended whole, whoever writes beside."""
    with journal.open("a", encoding="utf-8") as file:
        file.write(f"{word}\n")
