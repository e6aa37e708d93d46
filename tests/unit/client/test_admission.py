"""The door of a client: what it looks at, how often, and what it answers while something is
away.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError

from resilience.degradation import Level
from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from rlm_tasks import JobRequest
from rlm_tasks.client.admission import LOOK_EVERY_S, AdmissionCheck
from rlm_tasks.client.client import Client
from rlm_tasks.settings.model import Settings
from scheduler.board import Board, ClusterReport, HostReport
from scheduler.queues import QueueReport
from scheduler.settings import PressureSettings
from scheduler.slots import SlotBoard
from tests.unit.harness import Platform
from tests.unit.world import World, world

__all__ = ["world"]


class Door:
    """An intake whose broker is ours."""

    def __init__(self, world: World, **pressure: Any) -> None:
        self.settings = Settings(namespace="unit", pressure=PressureSettings(**pressure))
        self.world, self.store = world, world.store()
        self.board = Board(self.store, Keys("unit"), self.settings.pressure)
        self.intake = AdmissionCheck(
            Celery("unit", set_as_current=False), self.store, self.settings, world.time
        )
        self.queues: dict[str, QueueReport] = {}
        self.reads: list[tuple[str, ...]] = []
        self.broker_is_away = False
        self.intake.gauge = self  # type: ignore[assignment]  # it reads
        self.serve()

    def read(self, names: Sequence[str]) -> dict[str, QueueReport]:
        self.reads.append(tuple(names))
        if self.broker_is_away:
            raise OperationalError("cut off by the test")
        return {name: self.queues.get(name, QueueReport(0)) for name in names}

    def serve(self, *queues: str) -> None:
        served = queues or ("unit.critical", "unit.high", "unit.normal", "unit.low")
        self.store.call(SlotBoard(self.store, Keys("unit")).publish("w1", 4, 0, served))

    def host(self, level: Level) -> None:
        self.store.call(self.board.publish(HostReport("w1", level, 90.0, "", 4, 0, (), {})))

    def announce(self, level: Level) -> None:
        self.board.announce(ClusterReport(level, "", 0.0), b"")

    def answer(self, priority: str = "normal") -> str:
        refused = self.intake.refusal(f"unit.{priority}", priority)
        return refused.code if refused is not None else ""


@pytest.fixture
def door(world: World) -> Door:
    return Door(world)


# --- by level ---------------------------------------------------------------------------------


def test_a_calm_platform_takes_everything_in(door: Door) -> None:
    assert [door.answer(each) for each in ("critical", "high", "normal", "low")] == [""] * 4


@pytest.mark.parametrize(
    ("cluster", "host", "forced", "refused"),
    [
        (None, None, None, []),
        (Level.HIGH, None, None, ["low"]),
        (Level.CRITICAL, Level.NORMAL, None, ["normal", "low"]),
        (Level.NORMAL, Level.EMERGENCY, None, []),  # the monitor knows all hosts
        (None, Level.HIGH, None, ["low"]),  # nobody monitors: as most hosts say
        (Level.EMERGENCY, Level.EMERGENCY, "normal", []),
        (Level.NORMAL, None, "emergency", ["high", "normal", "low"]),
        (None, Level.EMERGENCY, "elevated", []),
    ],
)
def test_work_is_turned_away_by_the_clusters_level(
    world: World, cluster: Level | None, host: Level | None, forced: str | None, refused: list[str]
) -> None:
    door = Door(world)
    if cluster is not None:
        door.announce(cluster)
    if host is not None:
        door.host(host)
    if forced is not None:
        door.board.force(forced)
    assert [each for each in ("critical", "high", "normal", "low") if door.answer(each)] == refused
    assert {door.answer(each) for each in refused} <= {"OVERLOADED"}


def test_switched_off_no_level_turns_work_away(world: World) -> None:
    door = Door(world, enabled=False)
    door.announce(Level.EMERGENCY)
    door.board.force("emergency")
    assert door.answer("low") == ""


def test_who_is_turned_away_is_told_when_to_come_back(door: Door) -> None:
    door.announce(Level.CRITICAL)
    refused = door.intake.refusal("unit.low", "low")
    assert refused is not None
    assert refused.retry_after_s == 2 * door.settings.pressure.release_s
    assert "critical" in str(refused)


# --- by queue ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "report", "served", "expected"),
    [
        ("normal", QueueReport(9_999, 29.0), True, ""),
        ("normal", QueueReport(10_000, 29.0), True, "QUEUE_FULL"),
        ("normal", QueueReport(3, 31.0), True, "QUEUE_FULL"),
        ("high", QueueReport(3, 11.0), True, "QUEUE_FULL"),
        ("low", QueueReport(3, 59.0), True, ""),
        ("critical", QueueReport(3, 9_999.0), True, ""),
        (
            "normal",
            QueueReport(3, 9_999.0),
            False,
            "",
        ),  # it keeps what it is given, up to its depth
        ("normal", QueueReport(10_000, 9_999.0), False, "QUEUE_FULL"),
        ("normal", QueueReport(3), True, ""),
    ],
)
def test_a_queue_that_is_full_takes_nothing(
    world: World, priority: str, report: QueueReport, served: bool, expected: str
) -> None:
    door = Door(world)
    queue = f"unit.{priority}"
    if not served:
        door.serve("unit.elsewhere")
    door.queues[queue] = report
    assert door.answer(priority) == expected


def test_a_broker_that_does_not_answer_has_empty_queues_and_levels_still_count(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    door.broker_is_away = True
    door.announce(Level.HIGH)
    assert (door.answer("normal"), door.answer("low")) == ("", "OVERLOADED")
    assert "taken for empty" in caplog.text


# --- how often --------------------------------------------------------------------------------


def test_a_loop_of_submissions_asks_once_a_second(door: Door, world: World) -> None:
    door.announce(Level.NORMAL)
    door.store.round_trips = 0
    for _ in range(1000):
        door.answer("normal")
    assert (door.store.round_trips, len(door.reads)) == (1, 1)
    door.announce(Level.EMERGENCY)
    assert door.answer("normal") == ""
    world.sleep(LOOK_EVERY_S)
    assert door.answer("normal") == "OVERLOADED"


def test_a_queue_that_was_not_looked_at_is_looked_at_with_the_others(door: Door) -> None:
    door.queues["unit.high"] = QueueReport(3, 60.0)
    assert (door.answer("normal"), door.answer("high"), door.answer("normal")) == (
        "",
        "QUEUE_FULL",
        "",
    )
    assert door.reads == [("unit.normal",), ("unit.normal", "unit.high")]


def test_while_redis_is_away_a_submission_is_told_so_and_nothing_is_taken_for_seen(
    door: Door, world: World
) -> None:
    door.announce(Level.HIGH)
    assert door.answer("normal") == ""
    door.store.lost = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            door.answer("low")
    door.store.lost = False
    world.sleep(2)
    assert door.answer("low") == "OVERLOADED"


def test_who_comes_while_another_looks_at_a_queue_does_not_take_it_for_empty(door: Door) -> None:
    door.queues["unit.high"] = QueueReport(3, 60.0)
    door.answer("normal")
    looking, go_on, answers = threading.Event(), threading.Event(), []
    read = door.read

    def slow(names: Sequence[str]) -> dict[str, QueueReport]:
        looking.set()
        assert go_on.wait(20)
        return read(names)

    door.read = slow  # type: ignore[method-assign]
    first = threading.Thread(target=lambda: answers.append(door.answer("high")))
    first.start()
    assert looking.wait(20)
    second = threading.Thread(target=lambda: answers.append(door.answer("high")))
    second.start()
    second.join(0.2)
    go_on.set()
    first.join()
    second.join()
    assert answers == ["QUEUE_FULL", "QUEUE_FULL"]


# --- jobs that wait to be taken in ------------------------------------------------------------


def test_a_job_that_cannot_be_noted_as_waiting_is_open_and_wakes_by_its_own_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was opened, parked, before: an error would tell its user that it was not."""
    caplog.set_level("INFO")
    app = Celery("unit", set_as_current=False)
    app.rlm_settings = Settings(namespace="unit")
    client = Client(app)

    def lost() -> int:
        raise RedisConnectionError("cut off by the test")

    monkeypatch.setattr(client.session.store, "now_ms", lost)
    client._submission.let_wait([Platform().submit(JobRequest(operation="sum", items=range(10)))])
    assert "it wakes at its own time" in caplog.text
