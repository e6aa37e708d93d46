"""Admission at a client: the state it reads, how often, and its answers during an outage."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError

from resilience.degradation import Level
from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from rlm_tasks import JobRequest
from rlm_tasks.client.admission import READ_EVERY_S, AdmissionCheck
from rlm_tasks.client.client import Client
from rlm_tasks.errors import UnknownOperation
from rlm_tasks.operations.registry import Operation
from rlm_tasks.settings.model import Settings
from scheduler.board import Board, ClusterReport, HostReport, reported, version_on
from scheduler.queues import QueueReport
from scheduler.settings import PressureSettings
from scheduler.slots import SlotBoard
from tests.unit.harness import Platform
from tests.unit.world import World, world

__all__ = ["world"]


class AdmissionClient:
    """The admission check of a client, with a broker of the test."""

    def __init__(self, world: World, **pressure: Any) -> None:
        self.settings = Settings(namespace="unit", pressure=PressureSettings(**pressure))
        self.world, self.store = world, world.store()
        self.board = Board(self.store, Keys("unit"), self.settings.pressure)
        self.check = AdmissionCheck(
            Celery("unit", set_as_current=False), self.store, self.settings, world.time
        )
        self.queues: dict[str, QueueReport] = {}
        self.reads: list[tuple[str, ...]] = []
        self.broker_is_away = False
        self.check.gauge = self  # type: ignore[assignment]  # it has `read`
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
        refused = self.check.refusal(f"unit.{priority}", priority)
        return refused.code if refused is not None else ""


@pytest.fixture
def admission(world: World) -> AdmissionClient:
    return AdmissionClient(world)


# --- by level ---------------------------------------------------------------------------------


def test_a_calm_platform_admits_all_work(admission: AdmissionClient) -> None:
    assert [admission.answer(each) for each in ("critical", "high", "normal", "low")] == [""] * 4


@pytest.mark.parametrize(
    ("cluster", "host", "forced", "refused"),
    [
        (None, None, None, []),
        (Level.HIGH, None, None, ["low"]),
        (Level.CRITICAL, Level.NORMAL, None, ["normal", "low"]),
        (Level.NORMAL, Level.EMERGENCY, None, []),  # the monitor has the reports of all hosts
        (None, Level.HIGH, None, ["low"]),  # no monitor: the level of most hosts counts
        (Level.EMERGENCY, Level.EMERGENCY, "normal", []),
        (Level.NORMAL, None, "emergency", ["high", "normal", "low"]),
        (None, Level.EMERGENCY, "elevated", []),
    ],
)
def test_work_is_denied_by_the_level_of_the_cluster(
    world: World, cluster: Level | None, host: Level | None, forced: str | None, refused: list[str]
) -> None:
    admission = AdmissionClient(world)
    if cluster is not None:
        admission.announce(cluster)
    if host is not None:
        admission.host(host)
    if forced is not None:
        admission.board.force(forced)
    assert [
        each for each in ("critical", "high", "normal", "low") if admission.answer(each)
    ] == refused
    assert {admission.answer(each) for each in refused} <= {"OVERLOADED"}


@pytest.mark.parametrize("monitored", [True, False])
def test_a_level_of_busy_cpus_refuses_no_job(admission: AdmissionClient, monitored: bool) -> None:
    busy = {"refusing": Level.NORMAL, "refusing_why": ""}
    host = HostReport("w1", Level.HIGH, 80.0, "4.0 tasks on each CPU", 4, 0, (), {}, **busy)
    admission.store.call(admission.board.publish(host))
    if monitored:
        admission.board.announce(ClusterReport(Level.HIGH, host.why, 0.0, **busy), b"")

    assert [admission.answer(each) for each in ("critical", "high", "normal", "low")] == [""] * 4


@pytest.mark.parametrize("monitored", [True, False])
def test_a_refusal_names_host_measure_limit_and_two_ways_out(
    admission: AdmissionClient, monitored: bool
) -> None:
    full = {"refusing": Level.CRITICAL, "refusing_why": "memory 91 % of 2048 MB"}
    host = HostReport("w1", Level.CRITICAL, 91.0, "", 4, 0, (), {}, **full)
    admission.store.call(admission.board.publish(host))
    if monitored:
        full["refusing_why"] += " on w1"
        admission.board.announce(ClusterReport(Level.CRITICAL, "", 0.0, **full), b"")

    refused = admission.check.refusal("unit.normal", "normal")

    assert str(refused) == (
        "admission: pressure is critical (memory 91 % of 2048 MB on w1), and normal jobs are "
        "accepted below critical (85 %); come back in 20 s. To wait instead, submit with "
        'overload="delay"; to accept all jobs, set RLM_PRESSURE__ENABLED=0'
    )


def test_switched_off_no_level_denies_work(world: World) -> None:
    admission = AdmissionClient(world, enabled=False)
    admission.announce(Level.EMERGENCY)
    admission.board.force("emergency")
    assert admission.answer("low") == ""


def test_a_denial_has_a_retry_time(admission: AdmissionClient) -> None:
    admission.announce(Level.CRITICAL)
    refused = admission.check.refusal("unit.low", "low")
    assert refused is not None
    assert refused.retry_after_s == 2 * admission.settings.pressure.release_s
    assert "critical" in str(refused)


# --- by operation -----------------------------------------------------------------------------


def knowing(*names: str, queues: tuple[str, ...] = ("unit.normal",)) -> HostReport:
    """Return the report of a worker that knows these operations."""
    operations = reported(dict.fromkeys(names, 1))
    return HostReport("w1", Level.NORMAL, 1.0, "", 4, 0, queues, {}, operations=operations)


def operation(name: str = "price", version: int = 1, module: str = "shop") -> Operation:
    def function(item: int) -> int:
        return item

    function.__module__ = module
    return Operation(name, function, version=version)


def test_an_operation_that_no_worker_of_the_queue_knows_is_refused(
    admission: AdmissionClient,
) -> None:
    admission.store.call(admission.board.publish(knowing("prize", "sum")))
    with pytest.raises(UnknownOperation) as refused:
        admission.check.check_known(operation(), "unit.normal")

    assert str(refused.value) == (
        "operation='price': no live worker of queue unit.normal knows it; they know prize, sum; "
        "set RLM_OPERATIONS of the workers to its module, and restart them"
    )
    admission.store.call(admission.board.publish(knowing("price")))
    admission.check.check_known(operation(), "unit.normal")


def test_an_operation_of_a_notebook_is_refused_with_the_advice_to_move_it(
    admission: AdmissionClient,
) -> None:
    admission.store.call(admission.board.publish(knowing("sum")))
    with pytest.raises(UnknownOperation, match="put it in a module, and set RLM_OPERATIONS"):
        admission.check.check_known(operation(module="__main__"), "unit.normal")


@pytest.mark.parametrize(
    "report",
    [
        None,
        msgspec.structs.replace(knowing("sum"), operations=None),
        knowing("sum", queues=("unit.low",)),
    ],
    ids=["no worker lives", "an older release", "a worker of another queue"],
)
def test_an_operation_is_not_refused_while_it_is_unknown_who_knows_it(
    admission: AdmissionClient, report: HostReport | None
) -> None:
    if report is not None:
        admission.store.call(admission.board.publish(report))
    admission.check.check_known(operation(), "unit.normal")


def test_an_operation_of_a_notebook_is_warned_of_while_no_worker_lives(
    admission: AdmissionClient, caplog: pytest.LogCaptureFixture
) -> None:
    admission.check.check_known(operation(module="__main__"), "unit.normal")
    assert "is defined in __main__, which workers cannot import" in caplog.text


def test_a_newer_version_than_that_of_all_workers_is_warned_of(
    admission: AdmissionClient, caplog: pytest.LogCaptureFixture
) -> None:
    admission.store.call(admission.board.publish(knowing("price")))
    admission.check.check_known(operation(version=2), "unit.normal")
    assert "has version 2 here, and 1 on the workers of queue unit.normal" in caplog.text


def test_a_known_operation_costs_no_round_trip_of_its_own(
    admission: AdmissionClient, world: World
) -> None:
    admission.store.call(admission.board.publish(knowing("price")))
    admission.announce(Level.NORMAL)
    before = admission.store.round_trips
    for _ in range(5):
        admission.check.check_known(operation(), "unit.normal")
        admission.check.refusal("unit.normal", "normal")
    assert admission.store.round_trips == before + 1
    world.sleep(31)
    admission.check.check_known(operation(), "unit.normal")
    assert admission.store.round_trips == before + 2


@pytest.mark.parametrize("count", [5, 500, 5000])
def test_a_report_of_many_operations_is_small_and_knows_each(count: int) -> None:
    names = [f"shop.operation_{number}_{'x' * number}"[:300] for number in range(count)]
    host = knowing(*names)

    assert len(msgspec.json.encode(host)) < 40_000
    if count == 5000:
        assert host.operations is None, "then nothing is refused"
    else:
        assert {version_on([host], name) for name in names} == {1}
        assert version_on([host], "price") == 0


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
        ),  # a queue without a worker keeps messages up to its bound
        ("normal", QueueReport(10_000, 9_999.0), False, "QUEUE_FULL"),
        ("normal", QueueReport(3), True, ""),
    ],
)
def test_a_full_queue_denies_work(
    world: World, priority: str, report: QueueReport, served: bool, expected: str
) -> None:
    admission = AdmissionClient(world)
    queue = f"unit.{priority}"
    if not served:
        admission.serve("unit.elsewhere")
    admission.queues[queue] = report
    assert admission.answer(priority) == expected


def test_without_a_broker_queues_count_as_empty_and_levels_still_hold(
    admission: AdmissionClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    admission.broker_is_away = True
    admission.announce(Level.HIGH)
    assert (admission.answer("normal"), admission.answer("low")) == ("", "OVERLOADED")
    assert "Queues count as empty" in caplog.text


# --- how often the state is read --------------------------------------------------------------


def test_many_submissions_read_the_state_once_a_second(
    admission: AdmissionClient, world: World
) -> None:
    admission.announce(Level.NORMAL)
    admission.store.round_trips = 0
    for _ in range(1000):
        admission.answer("normal")
    assert (admission.store.round_trips, len(admission.reads)) == (1, 1)
    admission.announce(Level.EMERGENCY)
    assert admission.answer("normal") == ""
    world.sleep(READ_EVERY_S)
    assert admission.answer("normal") == "OVERLOADED"


def test_a_queue_not_yet_read_is_read_together_with_the_others(
    admission: AdmissionClient,
) -> None:
    admission.queues["unit.high"] = QueueReport(3, 60.0)
    assert (
        admission.answer("normal"),
        admission.answer("high"),
        admission.answer("normal"),
    ) == (
        "",
        "QUEUE_FULL",
        "",
    )
    assert admission.reads == [("unit.normal",), ("unit.normal", "unit.high")]


def test_without_redis_a_submission_raises_and_the_state_is_read_again(
    admission: AdmissionClient, world: World
) -> None:
    admission.announce(Level.HIGH)
    assert admission.answer("normal") == ""
    admission.store.lost = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            admission.answer("low")
    admission.store.lost = False
    world.sleep(2)
    assert admission.answer("low") == "OVERLOADED"


def test_a_submission_waits_while_another_thread_reads_the_queue(
    admission: AdmissionClient,
) -> None:
    admission.queues["unit.high"] = QueueReport(3, 60.0)
    admission.answer("normal")
    looking, go_on, answers = threading.Event(), threading.Event(), []
    read = admission.read

    def slow(names: Sequence[str]) -> dict[str, QueueReport]:
        looking.set()
        assert go_on.wait(20)
        return read(names)

    admission.read = slow  # type: ignore[method-assign]
    first = threading.Thread(target=lambda: answers.append(admission.answer("high")))
    first.start()
    assert looking.wait(20)
    second = threading.Thread(target=lambda: answers.append(admission.answer("high")))
    second.start()
    second.join(0.2)
    go_on.set()
    first.join()
    second.join()
    assert answers == ["QUEUE_FULL", "QUEUE_FULL"]


# --- jobs that wait for admission -------------------------------------------------------------


def test_a_job_that_cannot_enter_the_waiting_room_wakes_by_its_own_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is already open and parked, so an error would be wrong."""
    caplog.set_level("INFO")
    app = Celery("unit", set_as_current=False)
    app.rlm_settings = Settings(namespace="unit")
    client = Client(app)

    def lost() -> int:
        raise RedisConnectionError("cut off by the test")

    monkeypatch.setattr(client.session.store, "now_ms", lost)
    submitted = Platform().submit(JobRequest(operation="sum", items=range(10)))
    client._submission.enter_waiting_room([submitted])
    assert "it wakes at its own time" in caplog.text
