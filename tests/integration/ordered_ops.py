"""An operation that adds a line to a journal when it begins."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rlm_tasks import Context, operation

ITEM_S = 0.01


@operation("take_turns")
def take_turns(item: str, ctx: Context) -> None:
    """Note the begin of the item, and keep the slot for ITEM_S."""
    note(Path(ctx.params["journal"]), item)
    time.sleep(ITEM_S)


def note(journal: Path, word: Any) -> None:
    """Append a line; a line this short is written at once, also beside other writers."""
    with journal.open("a", encoding="utf-8") as file:
        file.write(f"{word}\n")
