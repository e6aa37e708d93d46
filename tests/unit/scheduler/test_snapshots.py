"""Operations beside their own past: what counts as slower, what is kept, what is told, and how
often Redis is asked.
"""

from __future__ import annotations

from random import Random
from statistics import fmean
from typing import Any

import pytest

from resilience.keys import Keys
from scheduler.events import EventSeverity
from scheduler.settings import SnapshotSettings
from scheduler.snapshots import MIN_ITEMS, MIN_PAST, RECENT, Snapshot, Snapshots, Trend, trend
from scheduler.usage import Usage
from tests.unit.scheduler.test_board import world
from tests.unit.scheduler.test_monitor import Platform
from tests.unit.world import CountingStore, World

__all__ = ["world"]

EVERY_S = 60.0


def history(*averages_ms: float, items: int = 100, version: int = 1) -> list[Snapshot]:
    """Return snapshots of these averages, given oldest first, a minute apart."""
    told = [
        Snapshot(60.0 * at, items, 0, round(each * 1000 * items), 1024, version)
        for at, each in enumerate(averages_ms)
    ]
    return told[::-1]


STEADY = [10.0] * MIN_PAST
UNSTEADY = [8.0, 12.5] * (MIN_PAST // 2)


# --- what counts as slower --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("averages", "slower"),
    [
        ([*STEADY, *[12.1] * RECENT], True),
        ([*STEADY, *[11.9] * RECENT], False),  # less than the threshold
        ([*STEADY, *[10.0] * (RECENT - 1), 14.0], False),  # one is an accident
        ([*STEADY, *[10.0] * (RECENT - 1), 30.0], True),  # ... unless it is enormous
        ([*STEADY, *[5.0] * RECENT], False),
        ([*UNSTEADY, *[13.0] * RECENT], False),  # such is its way
        ([*UNSTEADY, *[20.0] * RECENT], True),
        ([*STEADY[1:], *[20.0] * RECENT], False),  # that is no past
        ([20.0] * RECENT, False),
        ([], False),
    ],
)
def test_an_operation_is_slower_when_its_recent_items_take_clearly_longer_than_those_before(
    averages: list[float], slower: bool
) -> None:
    assert trend(history(*averages), 0.2).slower is slower


def test_the_change_is_told_once_there_is_a_past() -> None:
    found = trend(history(*STEADY, *[13.0] * RECENT), 0.2)

    assert (found.change, found.recent_ms, found.past_ms) == pytest.approx((0.3, 13.0, 10.0))
    assert trend(history(*STEADY), 0.2) == Trend(None, False)


def test_snapshots_of_few_items_are_not_compared() -> None:
    few = history(*[50.0] * 30, items=MIN_ITEMS - 1)

    assert trend(few + history(*STEADY, *[10.0] * RECENT), 0.2).change == pytest.approx(0.0)


def test_a_new_version_has_a_new_past() -> None:
    before = history(*STEADY * 3)
    after = history(*[20.0] * (MIN_PAST + RECENT - 1), version=2)

    assert trend(after + before, 0.2) == Trend()
    assert trend(history(*STEADY, *[20.0] * RECENT, version=2) + before, 0.2).slower


@pytest.mark.parametrize(
    ("now_ms", "slower"), [(13.0, True), (11.2, True), (10.9, False), (8.0, False)]
)
def test_it_is_over_when_half_of_the_threshold_is_not_reached(now_ms: float, slower: bool) -> None:
    since = 60.0 * MIN_PAST

    assert trend(history(*STEADY, *[13.0] * 50, *[now_ms] * RECENT), 0.2, since).slower is slower


def test_a_slow_down_does_not_become_its_own_past_until_nothing_else_is_left() -> None:
    since = 60.0 * MIN_PAST

    assert trend(history(*STEADY, *[13.0] * 200), 0.2, since).slower
    assert trend(history(*STEADY, *[13.0] * 200)[:-1], 0.2, since) == Trend()


# --- noise ------------------------------------------------------------------------------------


def told_of_a_day(minutes: int, slow_from: int, *, seed: int = 1) -> list[int]:
    """Return the minutes at which an operation of lognormal items (sigma 1, 300 a minute) is told
    to be slower.
    """
    random, kept, told, since = Random(seed), list[Snapshot](), [], None
    for minute in range(minutes):
        items = round(300 * random.uniform(0.5, 1.5))
        mean_ms = fmean(random.lognormvariate(2.0, 1.0) for _ in range(items)) * (
            1.3 if minute >= slow_from else 1.0
        )
        kept = [Snapshot(60.0 * minute, items, 0, round(mean_ms * 1000 * items), 1024, 1), *kept][
            :240
        ]
        slower = trend(kept, 0.2, since).slower
        if slower and since is None:
            told.append(minute)
        since = (since or kept[RECENT - 1].at) if slower else None
    return told


def test_noise_raises_at_most_one_false_alarm_a_day() -> None:
    assert len(told_of_a_day(24 * 60, slow_from=24 * 60)) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_items_that_take_30_percent_longer_are_told_of_within_five_snapshots(seed: int) -> None:
    told = told_of_a_day(220, slow_from=200, seed=seed)

    assert [each for each in told if each >= 200]
    assert min(each for each in told if each >= 200) < 205
    assert len(told) == 1, "once, however long it lasts"


# --- what is kept -----------------------------------------------------------------------------


class Operated:
    """Operations that run when told to, and one who takes snapshots."""

    def __init__(self, world: World, **settings: Any) -> None:
        self.world, self.keys = world, Keys("unit")
        self.store: CountingStore = world.store()
        self.usage = Usage(self.store, self.keys)
        self.snapshots = Snapshots(self.store, self.keys, SnapshotSettings(**settings))

    def ran(
        self,
        operation: str,
        ms: float = 10.0,
        items: int = 100,
        *,
        failed: int = 0,
        mb: int = 50,
        version: int = 1,
    ) -> None:
        counts = {
            "done": items - failed,
            "failed": failed,
            "busy_us": round(ms * 1000 * items),
            "memory_kb": mb * 1024,
        }
        self.store.call(self.usage.tally(operation, **counts, version=version))

    def take(self) -> list[str]:
        self.world.sleep(EVERY_S)
        return [
            f"{each.name} {each.data['operation']}" for each in self.snapshots.take(self.world.now)
        ]

    def minutes(
        self, number: int, ms: float, operation: str = "parse", version: int = 1
    ) -> list[str]:
        told = []
        for _ in range(number):
            self.ran(operation, ms, version=version)
            told += self.take()
        return told


@pytest.fixture
def operated(world: World) -> Operated:
    return Operated(world)


def test_a_snapshot_has_what_was_done_since_the_last_one(operated: Operated) -> None:
    operated.ran("parse", 10.0, 100, failed=3, mb=200)
    operated.take()
    operated.ran("parse", 20.0, 50, mb=80, version=2)
    operated.ran("parse", 30.0, 50, mb=90, version=2)
    operated.take()
    operated.take()  # it has done nothing

    latest, first = operated.snapshots.of("parse")

    assert (first.executions, first.failures, first.avg_ms, first.peak_kb, first.version) == (
        100,
        3,
        10.0,
        200 * 1024,
        1,
    )
    assert (latest.executions, latest.failures, latest.avg_ms, latest.peak_kb, latest.version) == (
        100,
        0,
        25.0,
        90 * 1024,
        2,
    )
    assert latest.at - first.at == EVERY_S
    assert latest.to_dict()["peak_memory_mb"] == 90.0
    assert operated.snapshots.of("nobody's") == []


def test_as_many_are_kept_as_are_to_be(world: World) -> None:
    operated = Operated(world, keep=30)

    operated.minutes(40, 10.0)

    assert len(operated.snapshots.of("parse")) == 30
    assert world.client().llen("unit:{usage}:snapshots:parse") == 30
    assert world.client().ttl("unit:{usage}:snapshots:parse") > 0


def test_a_slow_down_and_its_end_are_told_once(operated: Operated) -> None:
    assert operated.minutes(20, 10.0) == []
    assert operated.minutes(30, 13.0) == ["performance.degraded parse"]
    assert operated.snapshots.trends(["parse", "other"]) == [
        pytest.approx((0.3, True, 13.0, 10.0)),
        Trend(),
    ]
    assert operated.minutes(10, 10.0) == ["performance.recovered parse"]


def test_a_new_version_is_not_compared_with_the_one_before(operated: Operated) -> None:
    operated.minutes(20, 10.0)
    assert operated.minutes(4, 20.0, version=2) == []
    assert operated.minutes(16, 20.0, version=2) == []
    assert operated.minutes(4, 30.0, version=2) == ["performance.degraded parse"]
    assert operated.minutes(3, 30.0, version=3) == ["performance.recovered parse"]


def test_what_is_told_says_how_much_and_why(operated: Operated) -> None:
    operated.minutes(20, 10.0)
    assert operated.minutes(3, 12.5) == []
    operated.ran("parse", 12.5)
    operated.world.sleep(EVERY_S)
    [event] = operated.snapshots.take(operated.world.now)

    assert (event.severity, event.message) == (
        EventSeverity.WARNING,
        "items of parse take 12.5 ms, 25 % longer than before",
    )
    assert event.data == {
        "operation": "parse",
        "change_percent": 25.0,
        "recent_ms": 12.5,
        "past_ms": 10.0,
    }


def test_redis_is_asked_twice_for_all_operations_together(operated: Operated) -> None:
    for at in range(20):
        operated.ran(f"operation {at}")
    calls: list[tuple[Any, ...]] = []
    call = operated.store.call

    def counting(*what: Any, **more: Any) -> Any:
        calls.append(what)
        return call(*what, **more)

    operated.store.call = counting  # type: ignore[method-assign]

    operated.take()

    assert [callable(what[0]) for what in calls] == [True, False], "their names, then all figures"


# --- by the monitor ---------------------------------------------------------------------------


def test_the_monitor_compares_once_a_minute_and_alerts(world: World) -> None:
    platform, operated = Platform(world), Operated(world)
    sizes: list[int] = []
    for minute in range(20):
        for _ in range(12):
            monitor, store = platform.monitor()
            monitor._snapshots = Snapshots(store, platform.keys, SnapshotSettings())
            operated.ran("parse", 10.0 if minute < 14 else 14.0)
            platform.look(monitor)
        sizes.append(len(operated.snapshots.of("parse")))

    assert sizes == list(range(1, 21))
    assert [each.data["operation"] for each in platform.events("performance.degraded")] == ["parse"]
    assert platform.alerts() == [("performance.degraded", "parse", EventSeverity.WARNING)]
