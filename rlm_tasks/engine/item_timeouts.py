"""The time limit of an item, and the alarm that interrupts an item in its own process.

A node asks `ItemTimeouts` for the limit, and runs its items within an `ItemAlarm`, which raises
CallTimeout.  If an item does not react to the alarm, the main process kills its pool process
(`worker.supervisor`).
"""

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

LEARN_EVERY_S = 10.0
"""A process records the times of its items this often.

To record them after each node cost a small node 5 % more time.
"""
MOST_SAMPLES = 1000
"""Times of one operation that a process keeps before it records them."""
_UNLIMITED = 0.0
_T = TypeVar("_T")


class ItemTimeouts:
    """The time limits of one process's items."""

    def __init__(
        self, timeouts: Timeouts, settings: NodeSettings, clock: Callable[[], float]
    ) -> None:
        self._timeouts, self._settings, self._clock = timeouts, settings, clock
        self._samples: dict[str, list[float]] = {}
        self._learned_at = clock()

    def limit_s(
        self,
        operation: str,
        declared_s: float | None,
        complexity: str,
        tries: int,
        priority: str = "normal",
        estimate_s: float = 0.0,
    ) -> float:
        """Return the seconds that an item may take, 0 for no limit.

        The limit is the operation's, otherwise the setting's, otherwise the learned one, which is
        longer for urgent work, and at least twice the request's estimate.
        """
        fixed_s = declared_s or self._settings.item_limit_s
        if fixed_s or not self._settings.adaptive_timeouts:
            return fixed_s or _UNLIMITED
        return self._timeouts.limit_s(
            operation,
            complexity,
            estimate_s=estimate_s,
            retries=tries,
            stretch=timeout_factor(priority),
        )

    def step_limit_s(self, operation: str, complexity: str) -> float:
        """Return the seconds that a merge, `finalize`, `then` or the reading of items may take."""
        return self._settings.step_limit_s or self._timeouts.base_s(operation, complexity)

    def took(self, operation: str, seconds: list[float]) -> None:
        """Keep the times of an operation's items, and record all kept times when that is due."""
        if not self._settings.adaptive_timeouts:
            return
        kept = self._samples.setdefault(operation, [])
        kept += seconds[-MOST_SAMPLES:]
        if self._clock() - self._learned_at > LEARN_EVERY_S or len(kept) >= MOST_SAMPLES:
            for name, durations in self._samples.items():
                self._timeouts.learn(name, durations)
            self._samples, self._learned_at = {}, self._clock()


class ItemAlarm:
    """Interrupts an item by SIGALRM, in the operation's own code and nowhere else.

    The timer is set once for a node, so an item costs no system call.  If it rings too early for
    the current item, it is set again, to the end of that item's limit.  Python runs signal handlers
    only in a process's main thread, so in a pool of threads items cannot be interrupted.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = (
            limit_s if threading.current_thread() is threading.main_thread() else _UNLIMITED
        )
        self._until = 0.0  # the time at which the current item must end; 0: none runs

    def __enter__(self) -> ItemAlarm:
        if self._limit_s:
            self._before: Any = signal.signal(signal.SIGALRM, self._on_alarm)
            signal.setitimer(signal.ITIMER_REAL, self._limit_s)
        return self

    def __exit__(self, *_: object) -> None:
        if self._limit_s:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    def run(self, function: Callable[..., _T], *args: Any) -> _T:
        """Call a function and return its result.  Raises CallTimeout when it takes too long."""
        if not self._limit_s:
            return function(*args)
        self._until = time.monotonic() + self._limit_s
        try:
            return function(*args)
        finally:
            self._until = 0.0

    def _on_alarm(self, _signal: int, _frame: FrameType | None) -> None:
        left_s = self._until - time.monotonic() if self._until else self._limit_s
        over = left_s <= 0
        signal.setitimer(signal.ITIMER_REAL, self._limit_s if over else left_s)
        if over:
            self._until = 0.0
            raise CallTimeout("the item", self._limit_s)
