"""Each operation beside its own past: a snapshot a minute, and whether its items take longer than
they did.

Decides what counts as slower (`trend`), and when that is over; a new version of an operation has a
new past.  What is noise for one operation is news for another, so an operation is measured by its
own unrest.  Refuses to know who asks for a snapshot, and who is told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import msgspec

from resilience.keys import Keys
from resilience.store import Call, Script, Store
from scheduler.events import Event, EventSeverity
from scheduler.settings import SnapshotSettings
from scheduler.usage import TTL_S, Usage

RECENT = 4
"""Snapshots that are held against all before them: one may be an accident, and a slow-down is to be
told within five.
"""
MIN_PAST = 10
"""Fewer snapshots are no past."""
MIN_ITEMS = 20
"""A snapshot of fewer items is kept, and not compared."""
UNREST = 4.0
"""The recent mean must lie so many standard errors above the past.  In 40 simulated days of 300
lognormal items a minute (sigma 1: a minute's mean varies by 8 % itself) there was no false alarm,
and 30 % more time was told within five snapshots each time.  Where a minute's mean varies by 12 %
there were 14 in 40 days, and it was told within five in 25 of 40 cases."""

_TAKE, _READ, _SLOWER = (
    Script.load("scheduler", name) for name in ("snapshot", "snapshot_read", "snapshot_slower")
)


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """What one operation did between two looks."""

    at: float  # seconds of the server's clock, when it ended
    executions: int  # items
    failures: int
    busy_us: int  # summed time of items
    peak_kb: int  # largest process at the end of a node
    version: int  # of the operation

    @property
    def avg_ms(self) -> float:
        """Mean time of an item."""
        return self.busy_us / 1000 / self.executions

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "at": self.at,
            "executions": self.executions,
            "failures": self.failures,
            "avg_ms": round(self.avg_ms, 3),
            "peak_memory_mb": round(self.peak_kb / 1024, 1),
            "version": self.version,
        }


class Trend(NamedTuple):
    """How an operation does, beside its past; without a past `change` is None."""

    change: float | None = None  # 0.3: items take 30 % longer
    slower: bool = False
    recent_ms: float = 0.0
    past_ms: float = 0.0


def trend(newest_first: Sequence[Snapshot], threshold: float, since: float | None = None) -> Trend:
    """Return how the latest snapshots of an operation stand to those before them.

    Those before `since`, where the operation has been slower from then on: else a slow-down would
    become its own past. It is over when half of the threshold is not reached any more."""
    version = newest_first[0].version if newest_first else 0
    told = [
        each
        for each in newest_first
        if each.executions >= MIN_ITEMS and each.busy_us > 0 and each.version == version
    ]
    recent = told[:RECENT]
    past = [each for each in told[RECENT:] if since is None or each.at < since]
    if len(recent) < RECENT or len(past) < MIN_PAST:
        return Trend()
    # Ratios are what is compared, so the mean is that of logarithms.
    before, now = (
        [math.log(each.avg_ms) for each in past],
        [math.log(each.avg_ms) for each in recent],
    )
    step, error = (
        fmean(now) - fmean(before),
        stdev(before) * math.sqrt(1 / len(now) + 1 / len(before)),
    )
    found = Trend(math.expm1(step), False, math.exp(fmean(now)), math.exp(fmean(before)))
    if since is not None:
        return found._replace(slower=step > math.log1p(threshold / 2))
    return found._replace(slower=step > math.log1p(threshold) and step > UNREST * error)


class Snapshots:
    """The snapshots of one platform."""

    def __init__(self, store: Store, keys: Keys, settings: SnapshotSettings) -> None:
        self._store, self._keys, self._settings, self._usage = (
            store,
            keys,
            settings,
            Usage(store, keys),
        )

    @property
    def every_s(self) -> float:
        """How often they are to be taken."""
        return self._settings.every_s

    def of(self, operation: str) -> list[Snapshot]:
        """Return the snapshots of an operation, the newest first.  Raises StoreUnavailable."""
        return self._read([operation])[0][0]

    def trends(self, operations: Sequence[str]) -> list[Trend]:
        """Return how operations do beside their past, in one round trip.  Raises
        StoreUnavailable.
        """
        return [
            trend(found, self._settings.threshold, since) for found, since in self._read(operations)
        ]

    def take(self, now: float) -> list[Event]:
        """Take a snapshot of each operation that has run; return what is to be told of it.  Raises
        StoreUnavailable.

        Two round trips for all operations together, and a third when one became slower, or is no
        longer."""
        names = self._usage.names()
        about = (self._settings.keep, TTL_S)
        calls = [
            Call(
                _TAKE, (self._keys.usage(name)[1], *self._keys.snapshots(name)), (name, now, *about)
            )
            for name in names
        ]
        answers = self._store.call(*calls) if calls else []
        changes = [
            each
            for name, answer in zip(names, answers, strict=True)
            for each in self._changed(name, *_parsed(answer), now)
        ]
        if changes:
            self._store.call(*(call for call, _ in changes))
        return [event for _, event in changes]

    def _changed(
        self, operation: str, found: Sequence[Snapshot], since: float | None, now: float
    ) -> Iterator[tuple[Call, Event]]:
        """Yield what is to be noted and told of an operation, when it became slower or is no
        longer.
        """
        if not found or found[0].at < now:
            return  # it has done nothing
        at = trend(found, self._settings.threshold, since)
        if at.slower == (since is not None):
            return
        began = found[RECENT - 1].at if at.slower else ""
        note = Call(_SLOWER, (self._keys.snapshots(operation)[1],), (operation, began, TTL_S))
        yield note, _degraded(operation, at) if at.slower else _recovered(operation, at)

    def _read(self, operations: Sequence[str]) -> list[tuple[list[Snapshot], float | None]]:
        calls = [Call(_READ, self._keys.snapshots(name), (name,)) for name in operations]
        return [_parsed(answer) for answer in (self._store.call(*calls) if calls else ())]


def _parsed(answer: Any) -> tuple[list[Snapshot], float | None]:
    told, since = answer
    return [msgspec.json.decode(each, type=Snapshot) for each in told], float(
        since
    ) if since else None


def _degraded(operation: str, at: Trend) -> Event:
    told = f"items of {operation} take {at.recent_ms:.3g} ms, {100 * (at.change or 0.0):.0f} % longer than before"
    return Event("performance.degraded", told, EventSeverity.WARNING, _about(operation, at))


def _recovered(operation: str, at: Trend) -> Event:
    told = f"items of {operation} take {at.recent_ms:.3g} ms, as before"
    if at.change is None:
        told = f"nothing is left of the past that {operation} was compared with: it has a new version, or stayed slower for long"
    return Event("performance.recovered", told, data=_about(operation, at))


def _about(operation: str, at: Trend) -> dict[str, Any]:
    change = None if at.change is None else round(100 * at.change, 1)
    return {
        "operation": operation,
        "change_percent": change,
        "recent_ms": round(at.recent_ms, 3),
        "past_ms": round(at.past_ms, 3),
    }
