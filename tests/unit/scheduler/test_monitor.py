"""The monitor: the level of the cluster, its events and alerts, forecasts, and calls of waiting
jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import ResponseError

from resilience.degradation import Level
from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from scheduler.admission import WaitingRoom
from scheduler.alerts import Alerts
from scheduler.board import Board, ClusterReport, HostReport
from scheduler.events import BREAKER_OPENED, FAULTS_ESCALATED, Event, Events, EventSeverity
from scheduler.monitor import CALLED_PER_SLOT, Monitor, MonitorSettings
from scheduler.queues import QueueReport
from scheduler.sampling import Sample
from scheduler.settings import AdmissionSettings, AlertSettings, AutoscaleSettings, PressureSettings
from scheduler.usage import Usage
from tests.unit.scheduler.test_admission import room
from tests.unit.scheduler.test_board import world
from tests.unit.world import CountingStore, World

__all__ = ["world"]

QUEUES = tuple(f"unit.{priority}" for priority in ("critical", "high", "normal", "low"))


class Breakers:
    """A stand-in for the breakers."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}

    def status(self) -> dict[str, dict[str, Any]]:
        return {name: {"state": state} for name, state in self.states.items()}


class Webhook:
    """A stand-in for the webhook of the advice."""

    def __init__(self) -> None:
        self.sent: list[Mapping[str, Any]] = []

    def send(self, _id: str, fields: Mapping[str, Any]) -> None:
        self.sent.append(fields)


class MonitoredPlatform:
    """Hosts, queues and a Redis of the test, with any number of monitors."""

    def __init__(self, world: World, **pressure: Any) -> None:
        self.world, self.keys = world, Keys("unit")
        self.settings = PressureSettings(**pressure)
        self.hosts: dict[str, HostReport] = {}
        self.queues: dict[str, QueueReport] = {}
        self.memory: dict[str, int] | Exception = {"maxmemory": 0, "used_memory": 1}
        self.broker_is_away = False
        self.breakers, self.webhook = Breakers(), Webhook()
        self.woken: list[str] = []
        self.asked: list[Sequence[str]] = []
        self.host()

    def host(
        self, worker: str = "w1", level: Level = Level.NORMAL, *, slots: int = 2, **changed: Any
    ) -> None:
        """Set the report of a host."""
        about = {
            "memory_pct": 20.0,
            "memory_mb": 200.0,
            "memory_limit_mb": 1000.0,
            "available_mb": 800.0,
            "source": "host",
        }
        sample = Sample(
            **about
            | {name: changed.pop(name) for name in ("memory_pct", "cpu_pct") if name in changed}
        )
        about_host: dict[str, Any] = {
            "percent": 20.0,
            "why": "memory" if level else "",
            "busy": 1,
            "queues": QUEUES,
            "active": {},
        }
        self.hosts[worker] = HostReport(
            worker, level, slots=slots, sample=sample, **about_host | changed
        )

    def monitor(self, worker: str = "m1") -> tuple[Monitor, CountingStore]:
        """Return the monitor of another worker, and its store."""
        store = self.world.store()
        store.client.info = lambda _section: self._info()  # type: ignore[method-assign, assignment, misc]
        events = Events(store)
        monitor = Monitor(
            Board(store, self.keys, self.settings),
            store,
            MonitorSettings(
                self.settings, AdmissionSettings(queue_depth=1000), AutoscaleSettings()
            ),
            usage=Usage(store, self.keys),
            breakers=self.breakers,
            gauge=self._gauge,
            events=events,  # type: ignore[arg-type]
            alerts=Alerts(store, AlertSettings(channels=()), events),
            room=WaitingRoom(store, self.keys),
            wake=self._wake,
            webhook=self.webhook,
            worker=worker,  # type: ignore[arg-type]
        )
        return monitor, store

    def look(
        self, monitor: Monitor | None = None, *, after_s: float | None = None
    ) -> ClusterReport:
        """Let time pass and run the monitor; by default a new one, which knows only the stored
        state.
        """
        self.world.sleep(self.settings.monitor_s if after_s is None else after_s)
        store = self.world.store()
        for report in self.hosts.values():
            store.call(Board(store, self.keys, self.settings).publish(report))
        found = (monitor or self.monitor()[0]).look()
        assert found is not None
        return found

    def look_repeatedly(self, times: int) -> ClusterReport:
        return [self.look() for _ in range(times)][-1]

    def events(self, *names: str) -> list[Event]:
        """Return the emitted events, oldest first."""
        return [
            each
            for each in reversed(Events(self.world.store()).recent(1000))
            if not names or each.name in names
        ]

    def alerts(self) -> list[tuple[str, str, EventSeverity]]:
        found = Alerts(self.world.store(), AlertSettings(channels=())).history(1000)
        return [(each.kind, each.subject, each.severity) for each in reversed(found)]

    def waiting(self, queue: str, *names: str) -> None:
        """Enter jobs that wait for admission, in this order."""
        WaitingRoom(self.world.store(), self.keys).enter(
            queue, {name: at for at, name in enumerate(names)}
        )

    def _info(self) -> dict[str, int]:
        if isinstance(self.memory, Exception):
            raise self.memory
        return self.memory

    def _gauge(self, names: Sequence[str]) -> dict[str, QueueReport]:
        self.asked.append(tuple(names))
        if self.broker_is_away:
            raise OperationalError("cut off by the test")
        return {name: self.queues.get(name, QueueReport(0)) for name in names}

    def _wake(self, waiters: Sequence[str]) -> int:
        self.woken += waiters
        return len(waiters)


@pytest.fixture
def platform(world: World) -> MonitoredPlatform:
    return MonitoredPlatform(world)


# --- the level --------------------------------------------------------------------------------


def test_a_quiet_platform_is_normal(platform: MonitoredPlatform, world: World) -> None:
    report = platform.look_repeatedly(5)
    assert (report.level, report.why, report.rising_to, report.redis_pct) == (
        Level.NORMAL,
        "",
        "",
        None,
    )
    assert (report.hosts, report.slots, report.busy, report.memory_pct, report.at) == (
        1,
        2,
        1,
        20.0,
        world.now,
    )
    assert platform.events("pressure.changed") == []
    assert platform.alerts() == []


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([(Level.CRITICAL, 1), (Level.NORMAL, 3)], Level.NORMAL),
        ([(Level.CRITICAL, 2), (Level.NORMAL, 2)], Level.CRITICAL),
        ([(Level.EMERGENCY, 1), (Level.HIGH, 1), (Level.NORMAL, 2)], Level.HIGH),
    ],
)
def test_hosts_count_by_their_slots(
    world: World, hosts: Sequence[tuple[Level, int]], expected: Level
) -> None:
    platform = MonitoredPlatform(world)
    platform.hosts.clear()
    for n, (level, slots) in enumerate(hosts):
        platform.host(f"w{n}", level, slots=slots)
    report = platform.look()
    assert report.level == expected
    assert bool(report.why) == bool(expected)
    assert report.slots == 4


def test_busy_cpus_of_hosts_raise_the_level_but_refuse_no_jobs(
    platform: MonitoredPlatform,
) -> None:
    platform.host("w1", Level.HIGH, refusing=Level.NORMAL, refusing_why="")
    report = platform.look()
    assert (report.level, report.refusing, report.refusing_why) == (Level.HIGH, Level.NORMAL, "")

    platform.host("w1", Level.CRITICAL, refusing=Level.CRITICAL, refusing_why="memory 90 %")
    report = platform.look()
    assert (report.level, report.refusing) == (Level.CRITICAL, Level.CRITICAL)
    assert report.refusing_why == "memory 90 % on w1"


def test_a_report_of_an_older_release_refuses_by_its_level(platform: MonitoredPlatform) -> None:
    platform.host("w1", Level.CRITICAL)
    assert platform.look().refusing == Level.CRITICAL


def test_means_are_weighted_by_slots(platform: MonitoredPlatform) -> None:
    platform.host("w1", slots=3, memory_pct=10.0, cpu_pct=40.0)
    platform.host("w2", slots=1, memory_pct=50.0, cpu_pct=80.0)
    report = platform.look()
    assert (report.memory_pct, report.cpu_pct) == (20.0, 50.0)


SCALES = [(65.0, 75.0, 85.0, 95.0), (40.0, 50.0, 60.0, 70.0), (90.0, 92.0, 94.0, 96.0)]


@pytest.mark.parametrize("thresholds", SCALES)
@pytest.mark.parametrize(
    ("times_its_bound", "expected"),
    [
        (0.01, Level.NORMAL),
        (0.99, Level.NORMAL),
        (1.0, Level.ELEVATED),
        (1.99, Level.ELEVATED),
        (2.0, Level.HIGH),
        (10_000.0, Level.HIGH),
    ],
)
@pytest.mark.parametrize(("priority", "bound_s"), [("high", 10.0), ("normal", 30.0)])
def test_a_wait_at_its_bound_is_elevated_and_at_twice_the_bound_high(
    world: World,
    thresholds: tuple[float, ...],
    times_its_bound: float,
    expected: Level,
    priority: str,
    bound_s: float,
) -> None:
    platform = MonitoredPlatform(world, thresholds=thresholds)
    platform.queues[f"unit.{priority}"] = QueueReport(3, times_its_bound * bound_s)
    report = platform.look_repeatedly(3)
    assert report.level == expected
    assert ("3 messages wait in unit." in report.why) == bool(expected)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (649, Level.NORMAL),
        (650, Level.ELEVATED),
        (750, Level.HIGH),
        (1000, Level.HIGH),
        (50_000, Level.HIGH),
    ],
)
def test_the_depth_of_a_queue_counts_by_its_bound_whatever_its_age(
    platform: MonitoredPlatform, depth: int, expected: Level
) -> None:
    platform.queues["unit.critical"] = QueueReport(depth)
    assert platform.look_repeatedly(3).level == expected


@pytest.mark.parametrize(
    ("queue", "report"),
    [
        ("unit.low", QueueReport(100_000, 86_400.0)),
        ("unit.critical", QueueReport(1, 86_400.0)),
        ("unit.high", QueueReport(0, 86_400.0)),
    ],
)
def test_low_work_and_queues_without_a_bound_may_wait(
    platform: MonitoredPlatform, queue: str, report: QueueReport
) -> None:
    platform.queues[queue] = report
    assert platform.look_repeatedly(3).level == Level.NORMAL


@pytest.mark.parametrize("queue", ["control", "unit.control"])
def test_the_control_queue_has_no_bound(platform: MonitoredPlatform, queue: str) -> None:
    platform.host("w1", queues=(*QUEUES, queue))
    platform.queues[queue] = QueueReport(3, 500.0)
    assert platform.look_repeatedly(3).level == Level.NORMAL


def test_only_queues_with_a_worker_are_read(platform: MonitoredPlatform) -> None:
    platform.host("w1", queues=("unit.low",))
    platform.host("w2", queues=("unit.low", "celery"))
    platform.look()
    assert platform.asked == [("celery", "unit.low")]


@pytest.mark.parametrize(
    ("used", "most", "expected", "percent"),
    [
        (96, 100, Level.EMERGENCY, 96.0),
        (85, 100, Level.CRITICAL, 85.0),
        (64, 100, Level.NORMAL, 64.0),
        (2000, 100, Level.EMERGENCY, 2000.0),
        (96, 0, Level.NORMAL, None),
    ],
)
def test_a_full_redis_is_pressure_at_once(
    platform: MonitoredPlatform, used: int, most: int, expected: Level, percent: float | None
) -> None:
    platform.memory = {"maxmemory": most, "used_memory": used}
    report = platform.look()
    assert (report.level, report.redis_pct) == (expected, percent)


def test_a_redis_that_refuses_info_does_not_count(platform: MonitoredPlatform) -> None:
    platform.memory = ResponseError("NOPERM this user has no permissions to run the 'info' command")
    platform.host("w1", Level.HIGH)
    assert (platform.look().level, platform.look().redis_pct) == (Level.HIGH, None)


def test_the_level_of_queues_rises_and_falls_as_that_of_a_host(platform: MonitoredPlatform) -> None:
    platform.queues["unit.normal"] = QueueReport(3, 60.0)
    assert [platform.look().level for _ in range(3)] == [Level.NORMAL, Level.HIGH, Level.HIGH], (
        "the level rises with the second consecutive sample"
    )
    platform.queues.clear()
    course = [platform.look().level for _ in range(24)]
    assert course[0] == Level.HIGH
    assert course == sorted(course, reverse=True)
    assert set(course) == {Level.HIGH, Level.ELEVATED, Level.NORMAL}, "one step at a time"


# --- the election of a monitor, and its state -------------------------------------------------


def test_of_two_monitors_at_once_one_is_elected(platform: MonitoredPlatform) -> None:
    (first, _), (second, store) = platform.monitor("m1"), platform.monitor("m2")
    assert platform.look(first) is not None
    store.round_trips = 0
    assert second.look() is None
    assert store.round_trips == 1, "the round trip that asks for the turn"
    assert len(Board(store, platform.keys, platform.settings).history()) == 1
    assert platform.look(second) is not None, "another monitor may have the next turn"


def test_a_monitor_continues_from_the_state_of_another(platform: MonitoredPlatform) -> None:
    platform.queues["unit.normal"] = QueueReport(3, 60.0)
    (first, _), (second, _) = platform.monitor("m1"), platform.monitor("m2")
    assert platform.look(first).level == Level.NORMAL
    assert platform.look(second).level == Level.HIGH, (
        "the second consecutive sample, and the first of this monitor"
    )


@pytest.mark.parametrize(
    "kept",
    [
        b"\xc1",
        b"{}",
        msgspec.msgpack.encode({"queues": 7}),
        msgspec.msgpack.encode([1, 2]),
        b"\x81",
    ],
)
def test_a_state_of_another_release_is_replaced(platform: MonitoredPlatform, kept: bytes) -> None:
    platform.look()
    platform.world.client().set(platform.keys.pressure().state, kept)
    assert platform.look().level == Level.NORMAL
    assert platform.world.client().get(platform.keys.pressure().state) != kept


def test_a_state_of_an_older_release_keeps_the_known_fields(platform: MonitoredPlatform) -> None:
    platform.world.client().set(
        platform.keys.pressure().state, msgspec.msgpack.encode({"level": 3, "gone": True})
    )
    platform.look()
    [changed] = platform.events("pressure.changed")
    assert changed.data["before"] == "critical"


def test_the_monitor_continues_when_the_clock_of_the_server_is_set_back(
    platform: MonitoredPlatform,
) -> None:
    platform.memory = {"maxmemory": 100, "used_memory": 96}
    platform.look_repeatedly(3)
    platform.world.now -= 3600
    platform.world.client().delete(platform.keys.pressure().turn)
    assert platform.look().level == Level.EMERGENCY


def test_without_a_broker_nothing_is_published(platform: MonitoredPlatform) -> None:
    platform.broker_is_away = True
    with pytest.raises(OperationalError):
        platform.look()
    store = platform.world.store()
    assert Board(store, platform.keys, platform.settings).orders().cluster is None


def test_without_redis_the_monitor_raises_an_error(platform: MonitoredPlatform) -> None:
    monitor, store = platform.monitor()
    store.lost = True
    with pytest.raises(StoreUnavailable):
        platform.look(monitor)


# --- events and alerts ------------------------------------------------------------------------


def test_each_change_of_level_emits_its_events_once(platform: MonitoredPlatform) -> None:
    platform.host("w1", Level.CRITICAL, why="memory 90 % of 1000 MB")
    platform.look_repeatedly(4)
    platform.host("w1", Level.HIGH)
    platform.look_repeatedly(2)
    platform.host("w1")
    platform.look_repeatedly(2)

    names = ("pressure.changed", "degradation.started", "degradation.ended")
    emitted = [
        (each.name.partition(".")[2], each.data.get("level"), each.severity)
        for each in platform.events(*names)
    ]
    assert emitted == [
        ("changed", "critical", EventSeverity.ERROR),
        ("started", None, EventSeverity.INFO),
        ("changed", "high", EventSeverity.WARNING),
        ("changed", "normal", EventSeverity.INFO),
        ("ended", None, EventSeverity.INFO),
    ]
    first = platform.events("pressure.changed")[0]
    assert first.message == "pressure went from normal to critical: memory 90 % of 1000 MB on w1"
    assert "use_simplified_methods" in platform.events("degradation.started")[0].data["strategies"]


def test_a_host_and_the_cluster_have_separate_alerts_once_each(
    platform: MonitoredPlatform,
) -> None:
    platform.host("w1", Level.CRITICAL, memory_pct=90.0)
    platform.look_repeatedly(10)
    assert sorted(each for each in platform.alerts() if each[0] == "pressure.changed") == [
        ("pressure.changed", "cluster", EventSeverity.ERROR),
        ("pressure.changed", "w1", EventSeverity.ERROR),
    ]
    assert ("memory.high", "w1", EventSeverity.WARNING) in platform.alerts()


def test_a_breaker_that_opens_or_closes_emits_an_event(platform: MonitoredPlatform) -> None:
    platform.breakers.states = {"llm": "closed", "web": "closed"}
    platform.look()
    platform.breakers.states["llm"] = "open"
    platform.look_repeatedly(2)
    platform.breakers.states["llm"] = "half_open"
    platform.look()
    assert [
        (each.name, each.data["breaker"])
        for each in platform.events("breaker.opened", "breaker.closed")
    ] == [("breaker.opened", "llm")]
    platform.breakers.states["llm"] = "closed"
    platform.look_repeatedly(2)
    assert [each.name for each in platform.events("breaker.opened", "breaker.closed")] == [
        "breaker.opened",
        "breaker.closed",
    ]
    assert platform.alerts() == [("breaker.opened", "llm", EventSeverity.WARNING)]


def test_events_of_workers_are_alerted_once_and_only_later_ones(
    platform: MonitoredPlatform,
) -> None:
    """Events before the first run of the monitor raise no alert."""

    def slow(operation: str) -> Event:
        return Event(
            "execution.slow",
            f"an item of {operation} took 60 s",
            EventSeverity.WARNING,
            {"operation": operation},
        )

    events = Events(platform.world.store())
    events.emit(slow("before"))
    platform.look()
    events.emit(
        slow("after"),
        BREAKER_OPENED.event("not to be alerted", {"breaker": "odd"}),
    )
    platform.look_repeatedly(3)
    assert platform.alerts() == [("execution.slow", "after", EventSeverity.WARNING)]


def test_a_fault_that_recurs_often_is_an_alert(platform: MonitoredPlatform) -> None:
    platform.look()
    Events(platform.world.store()).emit(
        FAULTS_ESCALATED.event("llm fails again and again", {"service": "llm"})
    )
    platform.look_repeatedly(3)

    assert platform.alerts() == [("faults.escalated", "llm", EventSeverity.WARNING)]


def test_many_events_are_alerted_once_for_each_operation(platform: MonitoredPlatform) -> None:
    platform.look()
    Events(platform.world.store()).emit(
        *(
            Event("execution.slow", "slow", EventSeverity.WARNING, {"operation": f"op{n % 3}"})
            for n in range(300)
        )
    )
    platform.look_repeatedly(5)
    assert sorted(subject for _, subject, _ in platform.alerts()) == ["op0", "op1", "op2"]


def test_advice_is_published_when_it_changes(platform: MonitoredPlatform) -> None:
    assert platform.look().desired_workers == 2, "the smallest number allowed"
    platform.host("w2")
    platform.queues["unit.normal"] = QueueReport(5000)
    platform.look(after_s=601)
    platform.look_repeatedly(3)
    sent = [each["desired_workers"] for each in platform.webhook.sent]
    assert sent == [2, 3]
    assert [each.data["desired_workers"] for each in platform.events("scaling.advised")] == sent
    assert "5,000 messages wait" in str(platform.webhook.sent[-1]["why"])


# --- forecasts --------------------------------------------------------------------------------


def test_a_rise_is_predicted_half_a_minute_ahead(platform: MonitoredPlatform, world: World) -> None:
    """After calm; with buckets of half a minute the forecast would lag by most of the minute."""
    began, predicted, reached = world.now + 600, None, None
    for _ in range(400):
        percent = 50 + max(0.0, 5 * (world.now - began) / 60)
        platform.host("w1", Level.ELEVATED if percent >= 65 else Level.NORMAL, percent=percent)
        report = platform.look()
        if predicted is None and report.rising_to:
            assert report.rising_to == "elevated"
            predicted = world.now
        if reached is None and report.level:
            reached = world.now
    assert predicted is not None
    assert reached is not None
    assert 30 <= reached - predicted <= 75


def test_steady_load_predicts_no_rise(platform: MonitoredPlatform) -> None:
    platform.host("w1", percent=64.0)
    assert {platform.look().rising_to for _ in range(60)} == {""}


def test_no_level_is_predicted_that_still_lasts(platform: MonitoredPlatform) -> None:
    """The load rises to ELEVATED while the level is still HIGH from before."""
    predicted = set()
    for step in range(60):
        platform.host("w1", Level.HIGH, percent=40 + 0.4 * step)
        predicted.add(platform.look().rising_to)
    assert predicted == {""}


# --- jobs that wait for admission -------------------------------------------------------------


def test_waiting_jobs_are_called_by_urgency_in_proportion_to_the_slots(
    platform: MonitoredPlatform,
) -> None:
    platform.waiting("unit.low", "low 0")
    platform.waiting("unit.normal", *(f"normal {n}" for n in range(20)))
    platform.waiting("unit.high", "high 0")
    platform.look()
    most = 2 * CALLED_PER_SLOT
    assert platform.woken == ["high 0", *(f"normal {n}" for n in range(most)), "low 0"]
    platform.woken.clear()
    platform.look()
    assert platform.woken == [f"normal {n}" for n in range(most, 2 * most)]


@pytest.mark.parametrize(
    ("level", "forced", "called"),
    [
        (Level.NORMAL, None, ["high", "normal", "low"]),
        (Level.HIGH, None, ["high", "normal"]),
        (Level.CRITICAL, None, ["high"]),
        (Level.EMERGENCY, None, []),
        (Level.NORMAL, "emergency", []),
        (Level.EMERGENCY, "normal", ["high", "normal", "low"]),
    ],
)
def test_jobs_that_would_be_denied_are_not_called(
    platform: MonitoredPlatform, level: Level, forced: str | None, called: list[str]
) -> None:
    platform.host("w1", level)
    for priority in ("low", "normal", "high"):
        platform.waiting(f"unit.{priority}", f"{priority} root")
    if forced is not None:
        Board(platform.world.store(), platform.keys, platform.settings).force(forced)
    platform.look()
    assert [each.partition(" ")[0] for each in platform.woken] == called


@pytest.mark.parametrize("report", [QueueReport(1000), QueueReport(3, 31.0)])
def test_no_job_is_called_into_a_full_queue(
    platform: MonitoredPlatform, report: QueueReport
) -> None:
    platform.queues["unit.normal"] = report
    platform.waiting("unit.normal", "normal root")
    platform.waiting("unit.high", "high root")
    platform.look()
    assert platform.woken == ["high root"]
    platform.queues.clear()
    platform.look(after_s=120)
    assert platform.woken == ["high root", "normal root"]


# --- places of jobs at work -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at_work", "called"), [(0, 6), (1, 5), (6, 0), (9, 0)]
)  # 9: the bound was lowered
def test_the_monitor_calls_no_more_jobs_than_there_are_places(
    world: World, at_work: int, called: int
) -> None:
    monitored = MonitoredPlatform(world)
    others = room(world, 100)
    assert all(others.crowded(f"busy-{each}", "normal") is None for each in range(at_work))
    monitored.host(level=Level.NORMAL, slots=10)
    monitored.waiting("unit.normal", *(f"job-{each:02} root" for each in range(20)))
    monitored.waiting("unit.critical", "urgent root")
    monitor, store = monitored.monitor()
    monitor._room = WaitingRoom(store, monitored.keys, 6)

    monitored.look(monitor)

    assert CALLED_PER_SLOT * 10 > 20
    assert monitored.woken == ["urgent root", *(f"job-{each:02} root" for each in range(called))]
