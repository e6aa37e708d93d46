"""Snapshots of each operation, one a minute, and whether its items take longer than before.

Operations vary differently, so each is compared with its own variation.  A new version of an
operation begins a new past.  Many failed items are an event, too.  The monitor calls
`Snapshots.take`; clients read `of` and `trends`.  Begin with `trend`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import msgspec

from resilience.keys import Keys
from resilience.store import Call, Script, Store
from resilience.validation import readable
from scheduler.events import ERRORS_HIGH, PERFORMANCE_DEGRADED, PERFORMANCE_RECOVERED, Event
from scheduler.settings import SnapshotSettings
from scheduler.usage import TTL_S, Usage

RECENT = 4
"""Number of snapshots that are compared with all before them.  One may be an accident, but a
slow-down must be reported within five.
"""
MIN_PAST = 10
"""With fewer earlier snapshots nothing is compared."""
MIN_ITEMS = 20
"""A snapshot of fewer items is kept, but not compared."""
UNREST = 4.0
"""The recent mean must be above the past by this number of standard errors.

In 40 simulated days of 300 lognormal items a minute (sigma 1) a minute's mean varies by 8 %.  There
was no false alarm, and 30 % more time was reported within five snapshots, 40 times of 40.  With a
minute's mean that varies by 12 % there were 14 false alarms in 40 days.  The slow-down was reported
within five snapshots 25 times of 40.
"""

_TAKE, _READ, _SLOWER = (
    Script.load("scheduler", name) for name in ("snapshot", "snapshot_read", "snapshot_slower")
)


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """The work of one operation between two measurements."""

    at: float  # seconds of the server's clock at its end
    executions: int  # number of items
    failures: int  # number of failed items
    busy_us: int  # summed time of the items
    peak_kb: int  # memory of the largest process at the end of a node
    version: int  # version of the operation

    @property
    def avg_ms(self) -> float:
        """Mean time of an item, in milliseconds."""
        return self.busy_us / 1000 / self.executions

    def fails(self, rate: float) -> bool:
        """Whether more than a share of the items failed, of a number that says something."""
        return self.executions >= MIN_ITEMS and self.failures > rate * self.executions

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
    """The recent times of an operation beside its past; without a past `change` is None."""

    change: float | None = None  # relative change: 0.3 if items take 30 % longer
    slower: bool = False  # whether the operation counts as slower
    recent_ms: float = 0.0  # mean time of an item in the latest snapshots
    past_ms: float = 0.0  # mean time of an item before


def trend(newest_first: Sequence[Snapshot], threshold: float, since: float | None = None) -> Trend:
    """Return the latest snapshots of an operation compared with its earlier ones.

    `since` is the time since when the operation counts as slower, None if it does not.  Only
    snapshots before `since` are then its past: a slow-down must not become its own past.  The
    slow-down ends when the change is at most half of the threshold.
    """
    version = newest_first[0].version if newest_first else 0
    usable = [
        each
        for each in newest_first
        if each.executions >= MIN_ITEMS and each.busy_us > 0 and each.version == version
    ]
    recent = usable[:RECENT]
    past = [each for each in usable[RECENT:] if since is None or each.at < since]
    if len(recent) < RECENT or len(past) < MIN_PAST:
        return Trend()
    # Ratios are compared, so means are those of logarithms.
    before = [math.log(each.avg_ms) for each in past]
    now = [math.log(each.avg_ms) for each in recent]
    step = fmean(now) - fmean(before)
    error = stdev(before) * math.sqrt(1 / len(now) + 1 / len(before))
    result = Trend(math.expm1(step), False, math.exp(fmean(now)), math.exp(fmean(before)))
    if since is not None:
        return result._replace(slower=step > math.log1p(threshold / 2))
    return result._replace(slower=step > math.log1p(threshold) and step > UNREST * error)


class Snapshots:
    """The snapshots of one platform."""

    def __init__(self, store: Store, keys: Keys, settings: SnapshotSettings) -> None:
        self._store, self._keys, self._settings = store, keys, settings
        self._usage = Usage(store, keys)

    @property
    def every_s(self) -> float:
        """Interval between two snapshots, in seconds."""
        return self._settings.every_s

    def of(self, operation: str) -> list[Snapshot]:
        """Return the snapshots of an operation, the newest first.  Raises StoreUnavailable."""
        return self._read([operation])[0][0]

    def trends(self, operations: Sequence[str]) -> list[Trend]:
        """Return the trend of each operation, in one round trip.  Raises StoreUnavailable."""
        return [
            trend(snapshots, self._settings.threshold, since)
            for snapshots, since in self._read(operations)
        ]

    def take(self, now: float) -> list[Event]:
        """Take a snapshot of each operation that has run; return the events to emit.

        It takes two round trips for all operations together, and a third if an operation became
        slower, or is no longer slower.  Raises StoreUnavailable.
        """
        names = self._usage.names()
        calls = [
            Call(
                _TAKE,
                (self._keys.usage(name)[1], *self._keys.snapshots(name)),
                (name, now, self._settings.keep, TTL_S),
                otherwise=((), None),
            )
            for name in names
        ]
        answers = self._store.call(*calls) if calls else []
        taken = [(name, *_parsed(each)) for name, each in zip(names, answers, strict=True)]
        changes = [change for each in taken for change in self._changes(*each, now)]
        if changes:
            self._store.call(*(call for call, _ in changes))
        failing = [event for name, found, _ in taken for event in self._failing(name, found, now)]
        return [*(event for _, event in changes), *failing]

    def _failing(
        self, operation: str, snapshots: Sequence[Snapshot], now: float
    ) -> Iterator[Event]:
        """Yield an event if many items of an operation fail since its latest snapshot."""
        rate, (latest, before) = self._settings.error_rate, ([*snapshots, None, None][:2])
        if latest is None or latest.at < now or not latest.fails(rate):
            return
        if before is None or not before.fails(rate):
            failed, items = latest.failures, latest.executions
            percent = round(100 * failed / items, 1)
            yield ERRORS_HIGH.event(
                f"{percent:g} % of the items of {operation} fail: {failed} of {items}",
                {"operation": operation, "failed": failed, "items": items, "percent": percent},
            )

    def _changes(
        self, operation: str, snapshots: Sequence[Snapshot], since: float | None, now: float
    ) -> Iterator[tuple[Call, Event]]:
        """Yield the call that records a change and its event, if an operation became slower or is
        no longer slower.
        """
        if not snapshots or snapshots[0].at < now:
            return  # the operation has not run since the last snapshot
        latest = trend(snapshots, self._settings.threshold, since)
        if latest.slower == (since is not None):
            return
        began = snapshots[RECENT - 1].at if latest.slower else ""
        record = Call(_SLOWER, (self._keys.snapshots(operation)[1],), (operation, began, TTL_S))
        event = _degraded(operation, latest) if latest.slower else _recovered(operation, latest)
        yield record, event

    def _read(self, operations: Sequence[str]) -> list[tuple[list[Snapshot], float | None]]:
        calls = [
            Call(_READ, self._keys.snapshots(name), (name,), otherwise=((), None))
            for name in operations
        ]
        return [_parsed(answer) for answer in (self._store.call(*calls) if calls else ())]


_DECODER = msgspec.json.Decoder(Snapshot)


def _parsed(answer: Any) -> tuple[list[Snapshot], float | None]:
    entries, since = answer
    snapshots = readable("a snapshot of an operation", entries, _DECODER.decode)
    slower = readable("the time of an operation that is slower", [since] if since else [], float)
    return snapshots, slower[0] if slower else None


def _degraded(operation: str, latest: Trend) -> Event:
    longer = f"{100 * (latest.change or 0.0):.0f} % longer than before"
    message = f"items of {operation} take {latest.recent_ms:.3g} ms, {longer}"
    return PERFORMANCE_DEGRADED.event(message, _data(operation, latest))


def _recovered(operation: str, latest: Trend) -> Event:
    message = f"items of {operation} take {latest.recent_ms:.3g} ms, as before"
    if latest.change is None:
        message = (
            f"{operation} has no earlier snapshots to compare with: "
            "it has a new version, or was slower for long"
        )
    return PERFORMANCE_RECOVERED.event(message, _data(operation, latest))


def _data(operation: str, latest: Trend) -> dict[str, Any]:
    change = None if latest.change is None else round(100 * latest.change, 1)
    return {
        "operation": operation,
        "change_percent": change,
        "recent_ms": round(latest.recent_ms, 3),
        "past_ms": round(latest.past_ms, 3),
    }
