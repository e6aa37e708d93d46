"""Where a number is going: its level and its trend, for the next minute.

Decides what a value is expected to be soon (Holt's double exponential smoothing), and whether a
percentage is about to enter the next level.  Refuses to know what is measured, and what is done
about it."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from resilience.degradation import THRESHOLDS, Level, level_of

ALPHA, BETA = 0.3, 0.1
"""What a bucket weighs against all before it: in the level, and in the trend."""
BUCKET_S = 30.0
LOAD_BUCKET_S = 10.0
"""For percentages of load.  In simulation a rise of 5 % a minute was foretold 55 s ahead with it, 5
s ahead with 30 s; 5 s foretold no more and raised three times the false alarms."""
HORIZON_S = 60.0
"""How far to look ahead: what a new worker needs to start."""


class Holt(msgspec.Struct):
    """One number's past as plain data, to be kept in Redis between the processes that take turns to
    watch it.

    Observations may come at any times.  Those within `bucket_s` of the first are one, their mean at
    the mean of their times; a pause lets what was known before it weigh as little as buckets in
    that time would have."""

    bucket_s: float = BUCKET_S
    level: float = 0.0
    trend: float = 0.0  # per second
    at: float = 0.0  # time of the level
    known: int = 0  # buckets in level and trend: with one there is a level, with two a trend
    opened: float = 0.0  # the bucket that is being filled: when it began, ...
    count: int = 0
    total: float = 0.0  # ... of its values, ...
    elapsed: float = 0.0  # ... and of their times since it began
    last: float = 0.0  # time of the last observation

    def observe(self, value: float, now: float) -> None:
        """Take in a value; a clock that is set back stands still until it has caught up."""
        now = max(now, self.last)
        if self.count and now - self.opened >= self.bucket_s:
            self.level, self.trend, self.at = self._joined()
            self.known += 1
            self.count, self.total, self.elapsed = 0, 0.0, 0.0
        if not self.count:
            self.opened = now
        self.count += 1
        self.total += value
        self.elapsed += now - self.opened
        self.last = now

    @property
    def settled(self) -> bool:
        """Whether there is a trend to believe: two buckets are full."""
        return self.known > 1

    def predict(self, in_s: float) -> float:
        """Return what is expected so many seconds after the last observation; 0 when there was
        none.
        """
        if not self.count:
            return 0.0
        level, trend, at = self._joined()
        return level + (self.last + in_s - at) * (trend if self.settled else 0.0)

    @property
    def slope(self) -> float:
        """How much it rises in a second."""
        return self._joined()[1] if self.settled else 0.0

    def _joined(self) -> tuple[float, float, float]:
        """Return level, trend and their time with the open bucket in them; its weight is that of
        its distance.
        """
        value, at = self.total / self.count, self.opened + self.elapsed / self.count
        if not self.known:
            return value, 0.0, at
        passed = at - self.at
        if self.known == 1:
            return value, (value - self.level) / passed, at
        expected = self.level + self.trend * passed
        level = expected + self._weight(ALPHA, passed) * (value - expected)
        return (
            level,
            self.trend + self._weight(BETA, passed) * ((level - self.level) / passed - self.trend),
            at,
        )

    def _weight(self, of_a_bucket: float, passed_s: float) -> float:
        return 1.0 - math.pow(1.0 - of_a_bucket, passed_s / self.bucket_s)


class Rise(NamedTuple):
    """A level that is about to be reached."""

    level: Level
    in_s: float


def will_rise(
    load: Holt,
    percent: float,
    *,
    thresholds: tuple[float, ...] = THRESHOLDS,
    within_s: float = HORIZON_S,
) -> Rise | None:
    """Return the level above that of `percent`, the value of now, and when it begins; None: not
    within `within_s`.

    `load` has seen the same percentages, in buckets of `LOAD_BUCKET_S`.
    """
    level = level_of(percent, thresholds)
    if level == Level.EMERGENCY or load.slope <= 0 or load.predict(within_s) < thresholds[level]:
        return None
    # The forecast lags behind a rise, the value of now does not.
    return Rise(
        Level(level + 1),
        max(0.0, (thresholds[level] - max(percent, load.predict(0.0))) / load.slope),
    )
