"""The host of a worker: its samples, its exchange with the board, and the level of its nodes."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state

from resilience.degradation import Level
from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.operations import registry
from rlm_tasks.settings.document import fingerprints
from rlm_tasks.settings.model import Settings
from rlm_tasks.version import __version__
from rlm_tasks.worker.host import Host
from rlm_tasks.worker.queue_order import QueueOrder
from scheduler.board import Board, ClusterReport, HostReport, Orders, reported
from scheduler.queues import QueueReport
from scheduler.sampling import Sample, held_mb
from scheduler.settings import PressureSettings
from tests.unit.harness import Platform

QUEUES = ["unit.normal", "unit.low"]


class Sensor:
    """A stand-in for the sampler."""

    def __init__(self) -> None:
        self.memory_pct: float | None = 20.0
        self.broken = False

    def sample(self) -> Sample | None:
        if self.broken:
            raise RuntimeError("the sensor is broken")
        if self.memory_pct is None:
            return None
        return Sample(
            self.memory_pct, 10 * self.memory_pct, 1000.0, 1000 - 10 * self.memory_pct, "host"
        )


class Machine:
    """The host of one worker, at times that the test sets."""

    def __init__(self, patch: pytest.MonkeyPatch, **pressure: Any) -> None:
        self.sensor, self.queues = Sensor(), list(QUEUES)
        patch.setattr("rlm_tasks.worker.host.Sampler", lambda _settings: self.sensor)
        patch.setattr(QueueOrder, "facts", QueueOrder.facts)
        self.platform = Platform(
            settings=Settings(namespace="unit", pressure=PressureSettings(**pressure))
        )
        self.runtime = self.platform.runtime
        self.page, self.board = self.runtime.page, self.runtime.board
        broker = "redis://:secret@broker:6379/1"
        self.now, self.later_s = 1000.0, 0.0
        self.host = Host(
            self.runtime,
            lambda: 4,
            lambda: self.queues,
            lambda: time.time() + self.later_s,
            broker=broker,
        )

    def measure(self, memory_pct: float | None = 20.0, times: int = 2) -> Level:
        """Take that number of samples, a second apart; return the level of nodes."""
        self.sensor.memory_pct = memory_pct
        for _ in range(times):
            self.now += 1
            self.host.measure(self.now)
        return self.page.level

    def exchange(self) -> Level:
        """Publish and receive once, as the supervisor does."""
        store, runtime = self.platform.store, self.runtime
        store.call(runtime.slots.publish("unit", 4, 4, self.queues))
        self.host.receive(store.call(*self.host.board_calls()), self.now)
        return self.page.level

    def announce(self, level: Level, **about: Any) -> None:
        self.board.announce(ClusterReport(level, "a test", 0.0, **about), b"")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


# --- the level --------------------------------------------------------------------------------


def test_before_the_first_sample_there_is_no_pressure(machine: Machine) -> None:
    assert machine.page.level is Level.NORMAL


def test_a_host_acts_on_its_own_sample_before_and_without_redis(machine: Machine) -> None:
    assert machine.measure(20.0) is Level.NORMAL
    assert machine.measure(80.0, times=1) is Level.NORMAL, (
        "one sample does not suffice below critical"
    )
    assert machine.measure(80.0, times=1) is Level.HIGH
    assert machine.measure(99.0, times=1) is Level.EMERGENCY


def test_a_host_that_cannot_be_measured_counts_as_elevated(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.measure(20.0)
    machine.sensor.broken = True
    assert machine.measure(20.0) is Level.ELEVATED
    assert "could not be measured" in caplog.text
    machine.exchange()
    assert [host.level for host in machine.board.hosts()] == [Level.ELEVATED]
    machine.sensor.broken = False
    assert machine.measure(20.0) is Level.NORMAL


def test_a_system_without_samples_counts_as_elevated(machine: Machine) -> None:
    assert machine.measure(None) is Level.ELEVATED


def test_the_worse_level_of_host_and_cluster_counts(machine: Machine) -> None:
    machine.announce(Level.CRITICAL)
    machine.measure(20.0)
    assert machine.exchange() is Level.CRITICAL
    assert machine.measure(99.0) is Level.EMERGENCY, "also between two exchanges"
    machine.announce(Level.NORMAL)
    assert machine.exchange() is Level.EMERGENCY


def test_an_old_level_of_the_cluster_no_longer_counts(machine: Machine) -> None:
    stale_s = machine.runtime.settings.pressure.stale_s
    machine.announce(Level.CRITICAL)
    machine.measure(20.0)
    machine.exchange()
    machine.now += stale_s - 1.5
    assert machine.measure(20.0, times=1) is Level.CRITICAL
    assert machine.measure(20.0, times=1) is Level.NORMAL, "the host trusts its own sample"


def test_a_drill_ends_when_an_outage_hides_its_end(machine: Machine) -> None:
    machine.board.force("emergency")
    machine.measure(20.0)
    machine.exchange()
    machine.now += machine.runtime.settings.pressure.stale_s + 1
    assert machine.measure(20.0) is Level.NORMAL


def test_a_drill_holds_until_it_is_released(machine: Machine) -> None:
    machine.measure(99.0)
    machine.board.force("normal")
    assert machine.exchange() is Level.NORMAL
    assert machine.measure(99.0) is Level.NORMAL
    machine.board.force("high")
    assert machine.exchange() is Level.HIGH
    machine.board.release()
    assert machine.exchange() is Level.EMERGENCY


def test_a_change_is_logged_once_with_its_cause(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.measure(90.0, times=5)
    machine.announce(Level.EMERGENCY)
    machine.exchange()
    machine.board.force("high")
    machine.exchange()
    machine.exchange()
    assert [
        record.message for record in caplog.records if record.message.startswith("Pressure is")
    ] == [
        "Pressure is critical: memory 90 % of 1000 MB",
        "Pressure is emergency: a test",
        "Pressure is high: it is forced",
    ]


def test_switched_off_the_level_is_normal_and_published_as_normal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, enabled=False)
    machine.announce(Level.CRITICAL)
    machine.board.force("emergency")
    machine.measure(99.0)
    assert machine.exchange() is Level.NORMAL
    machine.sensor.broken = True
    machine.measure()
    machine.exchange()
    assert [host.level for host in machine.board.hosts()] == [Level.NORMAL]


def test_a_node_learns_that_a_busy_cpu_refuses_no_jobs(machine: Machine) -> None:
    machine.exchange()
    machine.announce(Level.HIGH, refusing=Level.NORMAL)
    machine.measure()
    machine.exchange()
    assert (machine.page.level, machine.page.refusing) == (Level.HIGH, Level.NORMAL)
    machine.measure(90.0)
    assert (machine.page.level, machine.page.refusing) == (Level.CRITICAL, Level.CRITICAL)
    machine.board.force("emergency")
    machine.exchange()
    assert (machine.page.level, machine.page.refusing) == (Level.EMERGENCY, Level.EMERGENCY)


# --- the report -------------------------------------------------------------------------------


def test_the_report_of_a_host(machine: Machine) -> None:
    machine.measure(80.0)
    machine.exchange()
    [report] = machine.board.hosts()
    assert report == HostReport(
        "unit",
        Level.HIGH,
        80.0,
        "memory 80 % of 1000 MB",
        4,
        0,
        tuple(QUEUES),
        {},
        machine.sensor.sample(),
        __version__,
        SCHEMA,
        report.at,
        Level.HIGH,
        "memory 80 % of 1000 MB",
        reported(registry.versions()),
        services=registry.services(),
        draining=False,
        broker="redis://:***@broker:6379/1",
        limits=report.limits,
        endpoints=(),
        settings=fingerprints(machine.runtime.settings),
    )
    assert abs(machine.board.clocks()["unit"]) < 5, "in this test its clock is that of the server"


def test_a_report_has_the_time_for_which_the_worker_has_consumed_no_queue(machine: Machine) -> None:
    assert machine.host.report().deaf_s == 0
    machine.queues.clear()
    machine.later_s = 7
    assert machine.host.report().queues == ()
    assert machine.host.report().deaf_s == pytest.approx(7, abs=2)
    machine.queues.append("unit.high")
    assert machine.host.report().deaf_s == 0


def test_one_exchange_is_one_round_trip(machine: Machine) -> None:
    machine.measure()
    machine.platform.store.client.script_flush()
    trips: list[int] = []
    pipelined = machine.platform.store._pipelined
    machine.platform.store._pipelined = lambda *args, **kwargs: (
        trips.append(1),
        pipelined(*args, **kwargs),
    )[1]  # type: ignore[method-assign]
    machine.platform.store.call(*machine.host.board_calls())
    assert len(trips) == 2, "one, and one more for scripts that the server does not have yet"
    trips.clear()
    machine.platform.store.call(*machine.host.board_calls())
    assert len(trips) == 1


def request(operation: str | None) -> Any:
    headers = {} if operation is None else {"rlm": {"operation": operation}}
    return SimpleNamespace(request_dict=headers)


class Requests:
    """A stand-in for Celery's weak set: a set of weak references."""

    def __init__(self, *held: Any) -> None:
        self.kept = list(held)
        self.data = {self._reference(each) for each in held}

    @staticmethod
    def _reference(each: Any) -> Any:
        return lambda: each


def test_running_operations_are_counted_and_other_tasks_are_not(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Requests(request("sum"), request("sum"), request("llm"), request(None), None)
    monkeypatch.setattr(state, "active_requests", running)
    machine.measure()
    machine.exchange()
    assert machine.board.hosts()[0].active == {"sum": 2, "llm": 1}


def test_requests_may_begin_and_end_while_they_are_counted(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weakref import WeakSet

    class Request:
        request_dict: dict[str, Any] = {"rlm": {"operation": "sum"}}

    held: WeakSet[Request] = WeakSet()
    monkeypatch.setattr(state, "active_requests", held)
    kept, stop = [Request() for _ in range(200)], threading.Event()
    for each in kept:
        held.add(each)

    def churn() -> None:
        while not stop.is_set():
            for each in [Request() for _ in range(50)]:
                held.add(each)

    thread, interval = threading.Thread(target=churn), sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1e-6)
    try:
        counts = [machine.host.report().active["sum"] for _ in range(300)]
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert min(counts) >= 200


def test_orders_may_be_forgotten_while_the_event_loop_reads_ages(machine: Machine) -> None:
    """The thread of the supervisor may forget stale orders between any two steps of
    the event loop.
    """
    report = ClusterReport(
        0, "", 0.0, queues={"unit.low": QueueReport(2, 5.0), "unit.high": QueueReport(1)}
    )

    class Forgetful(Host):
        answers = [Orders(report, None)]

        @property
        def _orders(self) -> Orders | None:
            return self.answers.pop() if self.answers else None

        @_orders.setter
        def _orders(self, value: Orders | None) -> None:
            pass

    host = Forgetful(machine.runtime, lambda: 4, lambda: QUEUES)
    assert host._ages() == {"unit.low": 5.0}
    assert host._ages() == {}


def test_the_host_gives_the_order_of_queues_its_ages_and_slots(machine: Machine) -> None:
    assert QueueOrder.facts.ages() == {}
    machine.announce(Level.NORMAL, queues={"unit.low": QueueReport(2, 90.0)})
    machine.measure()
    machine.exchange()
    facts = QueueOrder.facts
    assert (facts.ages(), facts.slots(), facts.target_s("high")) == ({"unit.low": 90.0}, 4, 10.0)


# --- slots and memory -------------------------------------------------------------------------


def test_the_slots_of_all_workers_are_received(machine: Machine) -> None:
    machine.platform.store.call(machine.runtime.slots.publish("another", 6, 0, ["unit.normal"]))
    machine.measure()
    machine.exchange()
    assert machine.page.slots == 10


def test_a_worker_that_reconnects_keeps_the_number_of_slots(machine: Machine) -> None:
    machine.measure()
    machine.exchange()
    machine.queues.clear()
    machine.exchange()
    assert machine.page.slots == 4


def test_available_memory_is_free_memory_and_that_of_running_nodes(
    machine: Machine,
) -> None:
    for index in range(3):  # three threads of one process
        machine.page.entry(index).hold(os.getpid(), "job", f"node{index}", "00" * 8, 0.0)
    machine.measure(20.0)
    assert machine.page.free_mb == 800.0
    assert machine.page.available_mb == pytest.approx(800 + held_mb(os.getpid()), rel=0.05)


def test_an_ended_process_holds_no_memory() -> None:
    assert held_mb(2**22 - 1) == 0.0
    assert held_mb(os.getpid()) > 10


def test_the_board_returns_the_report_as_it_was_published(machine: Machine) -> None:
    machine.board.force("critical")
    [answer] = machine.platform.store.call(machine.board.orders_call())
    assert Board.read(answer).forced is Level.CRITICAL
