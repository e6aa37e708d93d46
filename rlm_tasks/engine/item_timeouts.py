"""How long one item may take, and how it is stopped in its own process.

Decides whose word counts (the operation's, the setting's, or what was learned) and raises
CallTimeout in an item that runs longer.  An item that never returns to Python is beyond this
process: the main process replaces it (worker)."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from resilience.errors import CallTimeout
from resilience.timeouts import Timeouts
from rlm_tasks.settings.sections import NodeSettings
from scheduler.allocation import timeout_factor

TELL_EVERY_S = 10.0
"""A process tells what items took about this often; telling after each node cost a small node 5 %
more time.
"""
MOST_SAMPLES = 1000
_UNLIMITED = 0.0
_T = TypeVar("_T")


class ItemTimeouts:
    """The limits of one process's items."""

    def __init__(
        self, timeouts: Timeouts, settings: NodeSettings, clock: Callable[[], float]
    ) -> None:
        self._timeouts, self._settings, self._clock = timeouts, settings, clock
        self._took: dict[str, list[float]] = {}
        self._told_at = clock()

    def limit_s(
        self,
        operation: str,
        declared_s: float | None,
        complexity: str,
        tries: int,
        priority: str = "normal",
    ) -> float:
        """Return the seconds an item may take, 0 for no limit; a word of the user's wins over what
        was learned.

        What was learned is stretched for urgent work.
        """
        fixed_s = declared_s or self._settings.item_limit_s
        if fixed_s or not self._settings.adaptive_timeouts:
            return fixed_s or _UNLIMITED
        return self._timeouts.limit_s(
            operation, complexity, retries=tries, stretch=timeout_factor(priority)
        )

    def took(self, operation: str, seconds: list[float]) -> None:
        """Keep what items of an operation took, to be told before long."""
        if not self._settings.adaptive_timeouts:
            return
        kept = self._took.setdefault(operation, [])
        kept += seconds[-MOST_SAMPLES:]
        if self._clock() - self._told_at > TELL_EVERY_S or len(kept) >= MOST_SAMPLES:
            for name, durations in self._took.items():
                self._timeouts.learn(name, durations)
            self._took, self._told_at = {}, self._clock()


class ItemAlarm:
    """Interrupts an item by SIGALRM: in the operation's own code and nowhere else.

    It is set for a node and rings on; when it rings early it is set again to the end of the item
    that runs, so an item costs no system call.  Python runs signal handlers in a process's main
    thread only: in a pool of threads items cannot be interrupted."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = (
            limit_s if threading.current_thread() is threading.main_thread() else _UNLIMITED
        )
        self._until = 0.0  # when the item that runs is to be over; 0: none runs

    def __enter__(self) -> ItemAlarm:
        if self._limit_s:
            self._before: Any = signal.signal(signal.SIGALRM, self._rings)
            signal.setitimer(signal.ITIMER_REAL, self._limit_s)
        return self

    def __exit__(self, *_: object) -> None:
        if self._limit_s:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    def within(self, run: Callable[..., _T], *args: Any) -> _T:
        """Run what may be interrupted, with its arguments.  Raises CallTimeout."""
        if not self._limit_s:
            return run(*args)
        self._until = time.monotonic() + self._limit_s
        try:
            return run(*args)
        finally:
            self._until = 0.0

    def _rings(self, _signal: int, _frame: FrameType | None) -> None:
        left_s = self._until - time.monotonic() if self._until else self._limit_s
        over = left_s <= 0
        signal.setitimer(signal.ITIMER_REAL, self._limit_s if over else left_s)
        if over:
            self._until = 0.0
            raise CallTimeout("the item", self._limit_s)
