"""Snapshots of operations: comparison with earlier ones, events, and round trips."""

from __future__ import annotations

from random import Random
from statistics import fmean
from typing import Any

import pytest

from resilience.keys import Keys
from scheduler.events import Event, EventSeverity
from scheduler.settings import SnapshotSettings
from scheduler.snapshots import MIN_ITEMS, MIN_PAST, RECENT, Snapshot, Snapshots, Trend, trend
from scheduler.usage import Usage
from tests.unit.scheduler.test_board import world
from tests.unit.scheduler.test_monitor import MonitoredPlatform
from tests.unit.world import CountingStore, World

__all__ = ["world"]

EVERY_S = 60.0


def history(*averages_ms: float, items: int = 100, version: int = 1) -> list[Snapshot]:
    """Return snapshots of these averages, given oldest first, a minute apart."""
    reported = [
        Snapshot(60.0 * at, items, 0, round(each * 1000 * items), 1024, version)
        for at, each in enumerate(averages_ms)
    ]
    return reported[::-1]


STEADY = [10.0] * MIN_PAST
UNSTEADY = [8.0, 12.5] * (MIN_PAST // 2)


# --- comparison -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("averages", "slower"),
    [
        ([*STEADY, *[12.1] * RECENT], True),
        ([*STEADY, *[11.9] * RECENT], False),  # below the threshold
        ([*STEADY, *[10.0] * (RECENT - 1), 14.0], False),  # one snapshot is an accident
        ([*STEADY, *[10.0] * (RECENT - 1), 30.0], True),  # ... unless it is enormous
        ([*STEADY, *[5.0] * RECENT], False),
        ([*UNSTEADY, *[13.0] * RECENT], False),  # the operation varies as much anyway
        ([*UNSTEADY, *[20.0] * RECENT], True),
        ([*STEADY[1:], *[20.0] * RECENT], False),  # too few earlier snapshots
        ([20.0] * RECENT, False),
        ([], False),
    ],
)
def test_an_operation_is_slower_when_recent_items_take_clearly_longer(
    averages: list[float], slower: bool
) -> None:
    assert trend(history(*averages), 0.2).slower is slower


def test_the_change_is_known_once_there_are_enough_snapshots() -> None:
    found = trend(history(*STEADY, *[13.0] * RECENT), 0.2)

    assert (found.change, found.recent_ms, found.past_ms) == pytest.approx((0.3, 13.0, 10.0))
    assert trend(history(*STEADY), 0.2) == Trend(None, False)


def test_snapshots_of_few_items_are_not_compared() -> None:
    few = history(*[50.0] * 30, items=MIN_ITEMS - 1)

    assert trend(few + history(*STEADY, *[10.0] * RECENT), 0.2).change == pytest.approx(0.0)


def test_a_new_version_is_compared_with_itself_only() -> None:
    before = history(*STEADY * 3)
    after = history(*[20.0] * (MIN_PAST + RECENT - 1), version=2)

    assert trend(after + before, 0.2) == Trend()
    assert trend(history(*STEADY, *[20.0] * RECENT, version=2) + before, 0.2).slower


@pytest.mark.parametrize(
    ("now_ms", "slower"), [(13.0, True), (11.2, True), (10.9, False), (8.0, False)]
)
def test_a_slow_down_ends_below_half_of_the_threshold(now_ms: float, slower: bool) -> None:
    since = 60.0 * MIN_PAST

    assert trend(history(*STEADY, *[13.0] * 50, *[now_ms] * RECENT), 0.2, since).slower is slower


def test_a_slow_down_is_compared_with_the_time_before_it_while_that_is_kept() -> None:
    since = 60.0 * MIN_PAST

    assert trend(history(*STEADY, *[13.0] * 200), 0.2, since).slower
    assert trend(history(*STEADY, *[13.0] * 200)[:-1], 0.2, since) == Trend()


# --- noise ------------------------------------------------------------------------------------


def minutes_reported(minutes: int, slow_from: int, *, seed: int = 1) -> list[int]:
    """Return the minutes at which an operation of lognormal items (sigma 1, 300 a minute) is
    reported as slower.
    """
    random, kept, reported, since = Random(seed), list[Snapshot](), [], None
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
            reported.append(minute)
        since = (since or kept[RECENT - 1].at) if slower else None
    return reported


def test_noise_raises_at_most_one_false_alarm_a_day() -> None:
    assert len(minutes_reported(24 * 60, slow_from=24 * 60)) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_items_that_take_30_percent_longer_are_reported_within_five_snapshots(seed: int) -> None:
    reported = minutes_reported(220, slow_from=200, seed=seed)

    assert [each for each in reported if each >= 200]
    assert min(each for each in reported if each >= 200) < 205
    assert len(reported) == 1, "one report, however long it lasts"


# --- kept snapshots ---------------------------------------------------------------------------


class Operations:
    """Operations that the test runs, and their snapshots."""

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
        reported = []
        for _ in range(number):
            self.ran(operation, ms, version=version)
            reported += self.take()
        return reported


@pytest.fixture
def operations(world: World) -> Operations:
    return Operations(world)


@pytest.mark.parametrize(
    ("failed", "items", "told"),
    [(11, 100, 1), (10, 100, 0), (19, 19, 0), (3, 20, 1), (100, 100, 1)],
)
def test_many_failed_items_since_the_last_snapshot_are_told_once(
    operations: Operations, failed: int, items: int, told: int
) -> None:
    events = []
    for _ in range(3):
        operations.ran("parse", items=items, failed=failed)
        operations.ran("scan")
        events += operations.take()
    assert events == ["errors.high parse"] * told

    operations.ran("parse")
    assert operations.take() == []
    operations.ran("parse", items=items, failed=failed)
    assert operations.take() == ["errors.high parse"] * told


def test_the_error_rate_that_is_told_can_be_set(world: World) -> None:
    operations = Operations(world, error_rate=0.5)
    operations.ran("parse", failed=50)
    assert operations.take() == []
    operations.ran("parse", failed=51)
    [event] = take_events(operations)
    assert event.message == "51 % of the items of parse fail: 51 of 100"
    assert event.data == {"operation": "parse", "failed": 51, "items": 100, "percent": 51.0}


def take_events(operations: Operations) -> list[Event]:
    operations.world.sleep(EVERY_S)
    return operations.snapshots.take(operations.world.now)


def test_a_snapshot_has_the_work_since_the_last_one(operations: Operations) -> None:
    operations.ran("parse", 10.0, 100, failed=3, mb=200)
    operations.take()
    operations.ran("parse", 20.0, 50, mb=80, version=2)
    operations.ran("parse", 30.0, 50, mb=90, version=2)
    operations.take()
    operations.take()  # the operation has done nothing

    latest, first = operations.snapshots.of("parse")

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
    assert operations.snapshots.of("nobody's") == []


def test_the_number_of_snapshots_is_a_setting(world: World) -> None:
    operations = Operations(world, keep=30)

    operations.minutes(40, 10.0)

    assert len(operations.snapshots.of("parse")) == 30
    assert world.client().llen("unit:{usage}:snapshots:parse") == 30
    assert world.client().ttl("unit:{usage}:snapshots:parse") > 0


def test_a_slow_down_and_its_end_emit_one_event_each(operations: Operations) -> None:
    assert operations.minutes(20, 10.0) == []
    assert operations.minutes(30, 13.0) == ["performance.degraded parse"]
    assert operations.snapshots.trends(["parse", "other"]) == [
        pytest.approx((0.3, True, 13.0, 10.0)),
        Trend(),
    ]
    assert operations.minutes(10, 10.0) == ["performance.recovered parse"]


def test_a_new_version_is_not_compared_with_the_one_before(operations: Operations) -> None:
    operations.minutes(20, 10.0)
    assert operations.minutes(4, 20.0, version=2) == []
    assert operations.minutes(16, 20.0, version=2) == []
    assert operations.minutes(4, 30.0, version=2) == ["performance.degraded parse"]
    assert operations.minutes(3, 30.0, version=3) == ["performance.recovered parse"]


def test_the_event_has_the_change_and_both_times(operations: Operations) -> None:
    operations.minutes(20, 10.0)
    assert operations.minutes(3, 12.5) == []
    operations.ran("parse", 12.5)
    operations.world.sleep(EVERY_S)
    [event] = operations.snapshots.take(operations.world.now)

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


def test_all_operations_together_need_two_calls_of_redis(operations: Operations) -> None:
    for at in range(20):
        operations.ran(f"operation {at}")
    calls: list[tuple[Any, ...]] = []
    call = operations.store.call

    def counting(*what: Any, **more: Any) -> Any:
        calls.append(what)
        return call(*what, **more)

    operations.store.call = counting  # type: ignore[method-assign]

    operations.take()

    assert [callable(what[0]) for what in calls] == [True, False], "their names, then all figures"


# --- by the monitor ---------------------------------------------------------------------------


def test_the_monitor_compares_once_a_minute_and_raises_alerts(world: World) -> None:
    platform, operations = MonitoredPlatform(world), Operations(world)
    sizes: list[int] = []
    for minute in range(20):
        for _ in range(12):
            monitor, store = platform.monitor()
            monitor._snapshots = Snapshots(store, platform.keys, SnapshotSettings())
            operations.ran("parse", 10.0 if minute < 14 else 14.0)
            platform.look(monitor)
        sizes.append(len(operations.snapshots.of("parse")))

    assert sizes == list(range(1, 21))
    assert [each.data["operation"] for each in platform.events("performance.degraded")] == ["parse"]
    assert platform.alerts() == [("performance.degraded", "parse", EventSeverity.WARNING)]


def test_many_failed_items_are_an_event_and_an_alert(world: World) -> None:
    platform, operations = MonitoredPlatform(world), Operations(world)
    monitor, store = platform.monitor()
    monitor._snapshots = Snapshots(store, platform.keys, SnapshotSettings())
    operations.ran("parse", failed=20)
    operations.ran("scan", failed=1)
    platform.look(monitor)

    assert [each.data["failed"] for each in platform.events("errors.high")] == [20]
    assert platform.alerts() == [("errors.high", "parse", EventSeverity.WARNING)]
