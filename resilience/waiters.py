"""Those who wait for a guard: the first is called, and who does not come passes the turn on.

Refuses to know what they wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resilience.errors import StoreUnavailable
from resilience.store import Call, Script, Store

URGENCY = {"critical": 0, "high": 1, "normal": 2, "low": 3}
"""Who goes first; 0 is the most urgent."""

Wake = Callable[[Sequence[str]], int | None]
"""Calls waiters, and answers how many of them have waited indeed; None: all of them."""

IN_LINE, _NEXT = Script.load("resilience", "in_line"), Script.load("resilience", "next_in_line")


def call_up(store: Store, line: str, wake: Wake, waiters: Sequence[str]) -> None:
    """Call those who were taken out of a line, and as many of the next as do not come: their jobs
    have ended.
    """
    while waiters:
        woken = wake(waiters)
        missing = 0 if woken is None else len(waiters) - woken
        if not missing:
            return
        try:
            [found] = store.call(Call(_NEXT, (line,), (missing,)), on_outage="answer")
        except StoreUnavailable:
            return
        waiters = [each.decode() for each in found]
