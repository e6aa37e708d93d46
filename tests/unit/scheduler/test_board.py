"""The board: reports of hosts, the level of the cluster, drills, and the election of a monitor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import fakeredis._socket._base as server_keys
import pytest

from resilience.degradation import Level
from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from scheduler.board import (
    LIVE_MS,
    MOST_REMEMBERED,
    REMEMBERED_MS,
    Board,
    ClusterReport,
    HostReport,
    Orders,
    acted_on,
    prevailing,
)
from scheduler.queues import QueueReport
from scheduler.sampling import Sample
from scheduler.settings import PressureSettings
from tests.unit.world import CountingStore, World

SETTINGS = PressureSettings()
SAMPLE = Sample(
    memory_pct=50.0, memory_mb=500.0, memory_limit_mb=1000.0, available_mb=500.0, source="host"
)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose keys expire by its own clock."""
    own = World()
    own.install(monkeypatch)
    monkeypatch.setattr(server_keys, "time", own)
    return own


def board(world: World, namespace: str = "unit") -> tuple[Board, CountingStore]:
    """Return the board as another process sees it, and its store."""
    store = world.store()
    return Board(store, Keys(namespace), SETTINGS), store


def host(
    worker: str = "a", level: Level = Level.NORMAL, slots: int = 2, **changed: Any
) -> HostReport:
    about: dict[str, Any] = {
        "percent": 10.0,
        "why": "",
        "busy": 1,
        "queues": ("unit.normal",),
        "active": {"sum": 1},
    }
    return HostReport(worker, level, slots=slots, **about | {"sample": SAMPLE} | changed)


def cluster(level: Level = Level.NORMAL, at: float = 0.0, **more: Any) -> ClusterReport:
    return ClusterReport(level, "a test", at, **more)


# --- rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "seen", "forced", "expected"),
    [
        (Level.NORMAL, None, None, Level.NORMAL),
        (Level.HIGH, Level.ELEVATED, None, Level.HIGH),
        (Level.ELEVATED, Level.CRITICAL, None, Level.CRITICAL),
        (None, None, None, Level.ELEVATED),
        (None, Level.NORMAL, None, Level.ELEVATED),
        (None, Level.HIGH, None, Level.HIGH),
        (Level.EMERGENCY, Level.EMERGENCY, Level.NORMAL, Level.NORMAL),
        (None, None, Level.NORMAL, Level.NORMAL),
        (Level.NORMAL, None, Level.EMERGENCY, Level.EMERGENCY),
    ],
)
def test_a_worker_acts_on_the_worse_of_host_and_cluster_or_on_a_drill(
    own: Level | None, seen: Level | None, forced: Level | None, expected: Level
) -> None:
    assert acted_on(own, Orders(None if seen is None else cluster(seen), forced)) is expected


def test_without_orders_a_worker_acts_on_its_own_host() -> None:
    assert acted_on(Level.HIGH, None) is Level.HIGH
    assert acted_on(None, None) is Level.ELEVATED


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([], Level.NORMAL),
        ([(Level.CRITICAL, 0)], Level.NORMAL),
        ([(Level.CRITICAL, 1)], Level.CRITICAL),
        ([(Level.CRITICAL, 1), (Level.NORMAL, 1)], Level.CRITICAL),
        ([(Level.CRITICAL, 1), (Level.NORMAL, 2)], Level.NORMAL),
        ([(Level.CRITICAL, 1), (Level.HIGH, 1), (Level.NORMAL, 2)], Level.HIGH),
        ([(Level.EMERGENCY, 1), (Level.ELEVATED, 8), (Level.NORMAL, 9)], Level.ELEVATED),
        ([(Level.EMERGENCY, 16), (Level.NORMAL, 1), (Level.NORMAL, 1)], Level.EMERGENCY),
    ],
)
def test_the_level_of_many_hosts_is_one_that_half_of_the_slots_have_reached(
    hosts: Sequence[tuple[Level, int]], expected: Level
) -> None:
    assert (
        prevailing([host(str(n), level, slots) for n, (level, slots) in enumerate(hosts)])
        is expected
    )


# --- hosts ------------------------------------------------------------------------------------


def test_each_host_is_listed_once_with_its_latest_report(world: World) -> None:
    here, store = board(world)
    for report in (host("b"), host("a"), host("b", Level.HIGH, why="memory 80 % of 1000 MB")):
        store.call(here.publish(report))

    assert board(world)[0].hosts() == [
        host("a"),
        host("b", Level.HIGH, why="memory 80 % of 1000 MB"),
    ]


def test_a_worker_without_recent_reports_is_remembered_as_lost(world: World) -> None:
    here, store = board(world)
    store.call(here.publish(host("gone")))
    world.sleep(SETTINGS.stale_s - 1)
    store.call(here.publish(host("there")))
    assert [each.worker for each in here.hosts()] == ["gone", "there"]

    world.sleep(1.1)

    workers = here.workers()
    assert [each.worker for each in here.hosts()] == ["there"]
    assert [each.worker for each in workers.live] == ["there"]
    assert workers.departed == [(host("gone"), pytest.approx(SETTINGS.stale_s + 0.1), False)]


def test_a_silent_worker_is_lost_before_its_level_is_too_old(world: World) -> None:
    here, store = board(world)
    store.call(here.publish(host("a", Level.HIGH)))
    world.sleep(LIVE_MS / 1000 + 1)

    assert [each.worker for each in here.hosts()] == ["a"]
    assert [each.report.worker for each in here.workers().departed] == ["a"]


def test_a_worker_that_ends_is_remembered_as_stopped(world: World) -> None:
    here, store = board(world)
    store.call(here.publish(host("a")))
    here.withdraw("a")
    here.withdraw("never seen")
    world.sleep(2)

    assert here.hosts() == []
    assert here.workers().departed == [(host("a"), pytest.approx(2.0), True)]
    assert here.clocks() == {}, "its clock was not reported"


def test_a_worker_that_starts_again_is_no_longer_gone(world: World) -> None:
    here, store = board(world)
    store.call(here.publish(host("a")))
    here.withdraw("a")
    store.call(here.publish(host("a")))

    assert here.workers() == ([host("a")], [])


def test_the_board_remembers_few_workers_and_for_an_hour(world: World) -> None:
    here, store = board(world)
    for number in range(MOST_REMEMBERED + 5):
        store.call(here.publish(host(f"w{number:02}")))
        here.withdraw(f"w{number:02}")
        world.sleep(1)

    departed = here.workers().departed
    assert [each.report.worker for each in departed][:2] == ["w24", "w23"], "the latest are first"
    assert len(departed) == MOST_REMEMBERED
    assert store.client.hlen(Keys("unit").pressure().hosts) == MOST_REMEMBERED
    world.sleep(REMEMBERED_MS / 1000)
    assert here.workers() == ([], [])


def test_the_last_worker_of_a_queue_is_found_among_those_that_are_gone(world: World) -> None:
    here, store = board(world)
    for worker, queues in (("a", ("q1", "q2")), ("b", ("q2",))):
        store.call(here.publish(host(worker, queues=queues)))
        here.withdraw(worker)
        world.sleep(1)
    workers = here.workers()

    found = {name: workers.last_of_queue(name) for name in ("q1", "q2", "q3")}
    assert {name: each and each.report.worker for name, each in found.items()} == {
        "q1": "a",
        "q2": "b",
        "q3": None,
    }


# --- the announced level ----------------------------------------------------------------------


def test_the_announced_level_holds_until_it_is_no_longer_renewed(world: World) -> None:
    here, store = board(world)
    report = cluster(
        Level.HIGH, world.now, queues={"unit.normal": QueueReport(3, 1.5)}, redis_pct=None
    )

    here.announce(report, b"remembered")

    there = board(world)[0]
    assert there.orders() == Orders(report, None)
    assert there.memory() == b"remembered"
    world.sleep(SETTINGS.stale_s + 0.1)
    assert there.orders() == Orders(None, None)
    assert there.memory() == b"remembered", "the memory outlasts an outage of all monitors"
    assert store.client.exists(Keys("unit").pressure().state)


def test_each_level_is_published_to_subscribers(world: World) -> None:
    here, store = board(world)
    listening = store.client.pubsub()
    listening.subscribe(Keys("unit").pressure().changes)
    assert listening.get_message(timeout=1)

    here.announce(cluster(Level.CRITICAL), b"")

    message = listening.get_message(timeout=1)
    assert message is not None
    assert message["data"] == b"3"


def test_the_history_is_bounded_and_has_the_newest_first(world: World) -> None:
    store = world.store()
    here = Board(store, Keys("unit"), PressureSettings(history=10))
    for at in range(300):
        here.announce(cluster(at=float(at)), b"")

    assert [report.at for report in here.history(3)] == [299.0, 298.0, 297.0]
    assert store.client.xlen(Keys("unit").pressure().history) < 300


def test_platforms_on_one_redis_are_separate(world: World) -> None:
    mine, store = board(world)
    store.call(mine.publish(host()))
    mine.announce(cluster(Level.HIGH), b"")
    mine.force("critical")
    assert mine.take_turn("a", 1000)

    other, _ = board(world, "other")

    assert (other.hosts(), other.orders(), other.memory(), other.history()) == (
        [],
        Orders(None, None),
        None,
        [],
    )
    assert other.take_turn("a", 1000)


def test_all_keys_share_a_hash_tag() -> None:
    assert {key.partition("{")[2].partition("}")[0] for key in Keys("unit").pressure()} == {
        "pressure"
    }


# --- drills -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["critical", "CRITICAL", 3, Level.CRITICAL])
def test_a_drill_holds_for_its_time_or_until_it_is_released(
    world: World, level: Level | str | int
) -> None:
    here, _ = board(world)
    here.force(level, 60)

    orders = board(world)[0].orders()
    assert orders.forced is Level.CRITICAL
    assert 59 < orders.forced_for_s <= 60
    assert here.release() is True
    assert here.orders() == Orders(None, None)
    assert here.release() is False
    here.force(level, 60)
    world.sleep(60.1)
    assert here.orders().forced is None


def test_a_drill_may_set_the_level_normal(world: World) -> None:
    here, _ = board(world)
    here.announce(cluster(Level.EMERGENCY), b"")
    here.force("normal")
    assert acted_on(Level.EMERGENCY, here.orders()) is Level.NORMAL


@pytest.mark.parametrize(
    ("level", "for_s", "field"),
    [("hihg", 60.0, "level"), (5, 60.0, "level"), (-1, 60.0, "level")]
    + [("high", for_s, "for_s") for for_s in (0.0, -1.0, 1e-9, math.nan, math.inf)],
)
def test_a_wrong_drill_is_refused_and_sets_nothing(
    world: World, level: str | int, for_s: float, field: str
) -> None:
    here, _ = board(world)
    with pytest.raises(InvalidValue) as error:
        here.force(level, for_s)
    assert error.value.field == field
    assert here.orders().forced is None


# --- the election of a monitor ----------------------------------------------------------------


def test_one_worker_is_elected_and_gets_the_time_of_the_server(world: World) -> None:
    asked = [board(world)[0].take_turn(worker, 4000) for worker in "abc"]
    assert asked == [world.now, None, None]
    world.sleep(3.9)
    assert board(world)[0].take_turn("d", 4000) is None
    world.sleep(0.2)
    assert board(world)[0].take_turn("d", 4000) == pytest.approx(world.now, abs=0.001)


def test_without_redis_every_call_raises_an_error(world: World) -> None:
    here, store = board(world)
    store.lost = True
    for ask in (
        here.hosts,
        here.orders,
        lambda: here.take_turn("a", 4000),
        lambda: here.announce(cluster(), b""),
    ):
        with pytest.raises(StoreUnavailable):
            ask()
