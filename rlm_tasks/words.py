"""Numbers, times and lists in words, alike in each sentence and table that people read.

The command line, Flower, explanations and errors use it.  Each function returns a short text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from resilience.errors import count as count
from resilience.errors import figure as figure

_UNITS = ((172_800.0, 86_400.0, "d"), (7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (1.0, 1.0, "s"))
"""A duration from the first number of seconds on has the unit, which has the second number."""
DATED_S = 43_200.0
"""A time that is longer ago than this is shown with its date, in seconds."""
NAMED = 3
"""A list names this many, and counts the others."""


def duration(seconds: float) -> str:
    """Return a time in the largest fitting unit: "0 s", "250 ms", "3.2 s", "74 s", "12 min"."""
    for least, unit_s, unit in _UNITS:
        if seconds >= least:
            amount = seconds / unit_s
            shown = f"{amount:.1f}".removesuffix(".0") if amount < 9.95 else f"{amount:.0f}"
            return f"{shown} {unit}"
    return f"{max(0.0, seconds) * 1000:.0f} ms" if seconds > 0 else "0 s"


def age(seconds: float) -> str:
    """Return how long ago something was: "74 s ago"."""
    return f"{duration(seconds)} ago"


def next_probe(state: str, retry_after_s: float) -> str:
    """Return when a breaker lets a call probe its service: "in 12 s"; '' for a closed one."""
    if state == "closed":
        return ""
    return f"in {duration(retry_after_s)}" if retry_after_s else "at the next call"


def clock(at: float) -> str:
    """Return a time of day from seconds since 1970: "14:02:11 UTC"."""
    return time.strftime("%H:%M:%S UTC", time.gmtime(at))


def instant(at: float, now: float | None = None) -> str:
    """Return a time since 1970 for people: "3 min ago (14:02:11 UTC)", with a date if it is older.

    Without `now` the text does not age: "at 2026-11-29 14:02:11 UTC".
    """
    dated = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
    if now is None:
        return f"at {dated}"
    return f"{age(now - at)} ({dated if now - at > DATED_S else clock(at)})"


def listed(names: Sequence[str], *, noun: str = "", most: int = NAMED) -> str:
    """Return names as a list that ends in the number of the others: "a, b, c and 2 more".

    With a noun the list begins with it: "worker a", "workers a and b".
    """
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    text = " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))
    return f"{noun}{'s' if len(names) > 1 else ''} {text}" if noun else text
