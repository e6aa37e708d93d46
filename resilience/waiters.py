"""Nodes that wait in the line of a guard: the first is woken, and if its job has ended, the next.

Breakers and bulkheads call it when they have room again.  Begin with `call_up`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resilience.errors import StoreUnavailable
from resilience.store import Call, Script, Store

URGENCY = {"critical": 0, "high": 1, "normal": 2, "low": 3}
"""Priority -> urgency; 0 is the most urgent, and goes first."""

Wake = Callable[[Sequence[str]], int | None]
"""Wakes waiters and returns how many of them still waited; None stands for all."""

IN_LINE, _NEXT = Script.load("resilience", "in_line"), Script.load("resilience", "next_in_line")


def call_up(store: Store, line: str, wake: Wake, waiters: Sequence[str]) -> None:
    """Wake waiters that were taken out of a line.

    If jobs of some have ended, as many of the next in the line are taken out and woken instead.
    Does nothing more while Redis is away.
    """
    while waiters:
        woken = wake(waiters)
        missing = 0 if woken is None else len(waiters) - woken
        if not missing:
            return
        try:
            [following] = store.call(Call(_NEXT, (line,), (missing,)), on_outage="patient")
        except StoreUnavailable:
            return
        waiters = [each.decode() for each in following]
