"""The measurement of the whole platform: hosts, queues and Redis become the cluster level.

A measurement also forecasts the level of the next minute, advises a number of workers, emits events
and alerts, and lets delayed jobs begin.  Beat asks all workers for one, and the first worker makes
it (`rlm_tasks.worker.monitor_thread`).  Each measurement continues from the state that the last one
stored in Redis.  Begin with `Monitor.look`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
from redis.exceptions import ResponseError

from resilience.breaker import CircuitBreakers
from resilience.bulkhead import URGENCY, Wake
from resilience.degradation import CONSTRAINTS, Level
from resilience.errors import StoreUnauthorised, count
from resilience.store import Store
from scheduler.admission import SHED_FROM, WaitingRoom, full, sheds
from scheduler.alerts import Alerts, ResourcePressureEvent, Webhook
from scheduler.autoscale import Advice, ClusterAdvice, Load
from scheduler.board import (
    Board,
    ClusterReport,
    HostReport,
    mean,
    prevailing,
    refusing,
    refusing_why,
)
from scheduler.events import (
    BREAKER_CLOSED,
    BREAKER_OPENED,
    DEGRADATION_ENDED,
    DEGRADATION_STARTED,
    ENDPOINT_ILL,
    EXECUTION_SLOW,
    FAULTS_ESCALATED,
    LEVEL_SEVERITIES,
    MEMORY_HIGH,
    PRESSURE_CHANGED,
    SCALING_ADVISED,
    Event,
    Events,
)
from scheduler.forecast import LOAD_BUCKET_S, Holt, Rise, will_rise
from scheduler.ladder import Ladder, LadderState
from scheduler.queues import QueueReport, priority_of
from scheduler.settings import AdmissionSettings, AutoscaleSettings, PressureSettings
from scheduler.snapshots import Snapshots
from scheduler.usage import Usage

ALERTING = frozenset(
    each.name for each in (EXECUTION_SLOW, MEMORY_HIGH, ENDPOINT_ILL, FAULTS_ESCALATED)
)
"""Events of workers that the monitor alerts; it alerts its own events directly."""
CALLED_PER_SLOT = 4
"""Most delayed jobs for each slot that begin after one measurement: a first fan-out has as many
nodes.
"""
NO_ADVICE = Advice(desired=0, why="", changed=False)
BELOW_CRITICAL_PCT = 0.1
"""Waiting messages alone reach HIGH at most: optional work is left out, but no work is simplified
while the machines are fine.
"""


class Memory(msgspec.Struct):
    """The state between two measurements, stored in Redis."""

    queues: LadderState = msgspec.field(default_factory=LadderState)
    redis: LadderState = msgspec.field(default_factory=LadderState)
    pressure: Holt = msgspec.field(default_factory=lambda: Holt(bucket_s=LOAD_BUCKET_S))
    advice: ClusterAdvice = msgspec.field(default_factory=ClusterAdvice)
    level: int = 0
    open: list[str] = []  # names of the breakers that are not closed
    event: str = ""  # id of the last event that was read
    at: float = 0.0  # time of the last measurement
    depth: int = 0  # number of waiting messages
    nodes: int = 0  # number of nodes that have ended
    busy_us: int = 0  # summed time of items
    snapped: float = 0.0  # time of the last snapshots of operations


class Signal(NamedTuple):
    """One cause of pressure: hosts, queues or Redis."""

    level: Level
    percent: float
    why: str


class MonitorSettings(NamedTuple):
    """The settings of a measurement."""

    pressure: PressureSettings
    admission: AdmissionSettings
    autoscale: AutoscaleSettings


class Monitor:
    """Measures the platform when it is asked; if many workers are asked at once, one measures."""

    def __init__(
        self,
        board: Board,
        store: Store,
        settings: MonitorSettings,
        *,
        usage: Usage,
        breakers: CircuitBreakers,
        gauge: Callable[[Sequence[str]], Mapping[str, QueueReport]],
        events: Events,
        alerts: Alerts,
        room: WaitingRoom,
        wake: Wake,
        webhook: Webhook | None = None,
        snapshots: Snapshots | None = None,
        worker: str = "",
    ) -> None:
        """`gauge` returns the reports of named queues; `wake` wakes the first nodes of delayed
        jobs.
        """
        self._board, self._store, self._settings = board, store, settings
        self._usage, self._breakers, self._snapshots = usage, breakers, snapshots
        self._events, self._alerts, self._webhook = events, alerts, webhook
        self._gauge, self._room, self._wake, self._worker = gauge, room, wake, worker

    def look(self) -> ClusterReport | None:
        """Measure the platform and publish the report; return None if another worker just did.

        Raises StoreUnavailable, and the errors of the broker's client.
        """
        now = self._board.take_turn(self._worker, int(self._settings.pressure.monitor_s * 800))
        if now is None:
            return None
        memory, hosts = self._stored_memory(), self._board.hosts()
        queues = self._gauge(sorted({queue for host in hosts for queue in host.queues}))
        report = self._report(memory, hosts, queues, now)
        before, memory.level = Level(memory.level), report.level
        self._report_level(report, before, hosts)
        self._report_breakers(memory)
        self._compare_operations(memory, now)
        self._alert_worker_events(memory)
        self._board.announce(report, msgspec.msgpack.encode(memory))
        self._admit_waiting(report)
        return report

    def _admit_waiting(self, report: ClusterReport) -> None:
        """Let delayed jobs begin, the most urgent first, within the slots and the free places."""
        forced = self._board.orders().forced
        level = Level(refusing(report)) if forced is None else forced
        most, places = CALLED_PER_SLOT * report.slots, self._room.places()
        for queue, depth in sorted(
            report.queues.items(), key=lambda item: URGENCY.get(priority_of(item[0]), 0)
        ):
            priority = priority_of(queue)
            fits = not sheds(priority, level) and not full(
                queue, priority, depth, self._settings.admission
            )
            takes_place = priority in SHED_FROM
            free = min(most, places) if takes_place else most
            if fits and free and (waiters := self._room.call(queue, free)):
                self._wake(waiters)
                places -= len(waiters) if takes_place else 0

    def _stored_memory(self) -> Memory:
        state = self._board.memory()
        try:
            return msgspec.msgpack.decode(state, type=Memory) if state else Memory()
        except msgspec.MsgspecError:  # another release wrote it in another form
            return Memory()

    # --- the report ----------------------------------------------------------------------------

    def _report(
        self,
        memory: Memory,
        hosts: Sequence[HostReport],
        queues: Mapping[str, QueueReport],
        now: float,
    ) -> ClusterReport:
        redis_pct = self._redis_pct()
        redis_why = f"Redis uses {redis_pct or 0:.0f} % of its memory"
        shared = [
            self._laddered(memory.queues, *self._of_queues(queues), now),
            self._laddered(memory.redis, redis_pct or 0.0, redis_why, now),
        ]
        signals = [_of_hosts(hosts), *shared]
        worst, refuses = (_worst(each) for each in (signals, [_refusing_hosts(hosts), *shared]))
        percent = max(signal.percent for signal in signals)
        rise = self._rise(memory, percent, worst.level, now)
        load = self._load(memory, hosts, queues, now)
        settings = self._settings.autoscale
        advice = memory.advice.decide(load, settings, now) if settings.enabled else NO_ADVICE
        self._report_advice(advice)
        return ClusterReport(
            level=worst.level,
            why=worst.why if worst.level else "",
            refusing=refuses.level,
            refusing_why=refuses.why if refuses.level else "",
            at=now,
            hosts=len(hosts),
            slots=load.slots,
            busy=sum(host.busy for host in hosts),
            cpu_pct=round(load.cpu_pct, 1),
            memory_pct=round(load.memory_pct, 1),
            redis_pct=redis_pct,
            queues=dict(queues),
            rising_to=rise.level.label if rise else "",
            rising_in_s=round(rise.in_s, 1) if rise else 0.0,
            desired_workers=advice.desired,
            desired_why=advice.why,
        )

    def _laddered(self, state: LadderState, percent: float, why: str, now: float) -> Signal:
        return Signal(Ladder(self._settings.pressure, state).step(percent, now), percent, why)

    def _rise(self, memory: Memory, percent: float, level: Level, now: float) -> Rise | None:
        """Return the level that is expected soon, if it is above the present level."""
        memory.pressure.observe(percent, now)
        rise = will_rise(memory.pressure, percent, thresholds=self._settings.pressure.thresholds)
        return rise if rise and rise.level > level else None

    def _of_queues(self, queues: Mapping[str, QueueReport]) -> tuple[float, str]:
        """Return the pressure of the worst queue, in percent, and the reason.

        A queue whose oldest message has waited for its bound is ELEVATED, after twice the bound it
        is HIGH.  Low queues do not count: low work may wait.
        """
        elevated, high, critical, _ = self._settings.pressure.thresholds
        pressures = [(0.0, "")]
        for name, report in queues.items():
            priority, most = priority_of(name), self._settings.admission.queue_depth
            if priority == "low" or not report.depth:
                continue
            bound_s, age_s = self._settings.admission.wait_s(priority), report.oldest_s or 0.0
            by_age = (
                elevated + (high - elevated) * math.log2(age_s / bound_s)
                if bound_s and age_s > 0
                else 0.0
            )
            by_depth = 100.0 * report.depth / most if most else 0.0
            oldest = f", the oldest for {age_s:.0f} s" if age_s >= 1 else ""
            percent = min(critical - BELOW_CRITICAL_PCT, max(by_age, by_depth, 0.0))
            pressures.append(
                (
                    percent,
                    f"{count(report.depth, 'message waits', 'messages wait')} in {name}{oldest}",
                )
            )
        return max(pressures)

    def _redis_pct(self) -> float | None:
        """Return the used memory of Redis in percent; None without a limit, or without permission
        to ask.
        """
        try:
            memory = self._store.call(lambda client: client.info("memory"))
        except (ResponseError, StoreUnauthorised):
            return None
        most = int(memory.get("maxmemory", 0))
        return round(100 * int(memory["used_memory"]) / most, 1) if most else None

    def _load(
        self,
        memory: Memory,
        hosts: Sequence[HostReport],
        queues: Mapping[str, QueueReport],
        now: float,
    ) -> Load:
        depth = sum(report.depth for report in queues.values())
        nodes, busy_us = self._usage.totals()
        passed = now - memory.at if memory.at else 0.0
        ended = max(0, nodes - memory.nodes)
        arrivals = max(0.0, (ended + depth - memory.depth) / passed) if passed > 0 else 0.0
        service_s = (busy_us - memory.busy_us) / 1e6 / ended if ended and memory.at else 0.0
        memory.at, memory.depth, memory.nodes, memory.busy_us = now, depth, nodes, busy_us
        return Load(
            workers=len(hosts),
            cpu_pct=mean(hosts, "cpu_pct"),
            memory_pct=mean(hosts, "memory_pct"),
            queue_depth=depth,
            oldest_wait_s=max((report.oldest_s or 0.0 for report in queues.values()), default=0.0),
            arrivals_per_s=arrivals,
            service_s=max(0.0, service_s),
            slots=sum(host.slots for host in hosts),
        )

    # --- events and alerts ---------------------------------------------------------------------

    def _report_level(
        self, report: ClusterReport, before: Level, hosts: Sequence[HostReport]
    ) -> None:
        level = Level(report.level)
        if level != before:
            self._events.emit(*_changes(report, level, before))
        for event in (
            _as_resource_event(report, hosts),
            *(_of_host(host, report) for host in hosts if host.sample),
        ):
            self._alerts.process_event(event)

    def _report_breakers(self, memory: Memory) -> None:
        statuses = self._breakers.status()
        now_open = [name for name, each in statuses.items() if each["state"] != "closed"]
        opened = [name for name in now_open if name not in memory.open]
        closed = [name for name in memory.open if name not in now_open]
        self._emit_and_alert(
            *(
                BREAKER_OPENED.event(
                    f"breaker {name} has opened", {"breaker": name, "open": list(now_open)}
                )
                for name in opened
            ),
            *(
                BREAKER_CLOSED.event(
                    f"breaker {name} has closed", {"breaker": name, "open": list(now_open)}
                )
                for name in closed
            ),
        )
        memory.open = now_open

    def _compare_operations(self, memory: Memory, now: float) -> None:
        """Take a snapshot of each operation when it is due, and report changes of its times."""
        if self._snapshots is None or now - memory.snapped < self._snapshots.every_s:
            return
        memory.snapped, changes = now, self._snapshots.take(now)
        self._emit_and_alert(*changes)

    def _emit_and_alert(self, *events: Event) -> None:
        self._events.emit(*events)
        for event in events:
            self._alerts.process_event(event)

    def _alert_worker_events(self, memory: Memory) -> None:
        """Alert the events of workers since the last measurement; the first one alerts none."""
        if not memory.event:
            newest = self._events.recent(1)
            memory.event = newest[0].id if newest else "0-0"
            return
        for event in self._events.read(memory.event):
            memory.event = event.id
            if event.name in ALERTING:
                self._alerts.process_event(event)

    def _report_advice(self, advice: Advice) -> None:
        if not advice.changed:
            return
        data = {"desired_workers": advice.desired, "why": advice.why}
        message = f"The advice is to run {count(advice.desired, 'worker')}: {advice.why}"
        self._events.emit(SCALING_ADVISED.event(message, data))
        if self._webhook is not None:
            self._webhook.send(f"scaling-{advice.desired}", data)


def _of_hosts(hosts: Sequence[HostReport]) -> Signal:
    level = prevailing(hosts)
    percent = max((host.percent for host in hosts if host.level == level), default=0.0)
    why = next(
        (f"{host.why} on {host.worker}" for host in hosts if host.level == level and host.why), ""
    )
    return Signal(level, percent, why)


def _refusing_hosts(hosts: Sequence[HostReport]) -> Signal:
    """Return the signal by which the hosts refuse jobs."""
    level = prevailing(hosts, refusing)
    return Signal(level, 0.0, refusing_why(hosts, level))


def _worst(signals: Sequence[Signal]) -> Signal:
    return max(signals, key=lambda signal: (signal.level, signal.percent))


def _changes(report: ClusterReport, level: Level, before: Level) -> Iterable[Event]:
    because = f": {report.why}" if report.why else ""
    yield PRESSURE_CHANGED.event(
        f"pressure went from {before.label} to {level.label}{because}",
        {"level": level.label, "before": before.label, "why": report.why},
        LEVEL_SEVERITIES[level],
    )
    strategies = list(CONSTRAINTS[level].strategies)
    if level > before:
        message = f"operations leave out work: {', '.join(strategies)}"
        yield DEGRADATION_STARTED.event(message, {"strategies": strategies})
    elif not level:
        yield DEGRADATION_ENDED.event("operations leave out no more work", {"strategies": []})


def _as_resource_event(report: ClusterReport, hosts: Sequence[HostReport]) -> ResourcePressureEvent:
    level = Level(report.level)
    return ResourcePressureEvent(
        timestamp=datetime.fromtimestamp(report.at, UTC),
        pressure_level=level,
        cpu_percent=report.cpu_pct,
        memory_mb=sum(host.sample.memory_mb for host in hosts if host.sample),
        memory_percent=report.memory_pct,
        worker_count=report.slots,
        active_executors=report.busy,
        degradation_applied=CONSTRAINTS[level].strategies,
        message=f"pressure of the cluster is {level.label}: {report.why}" if report.why else "",
    )


def _of_host(host: HostReport, report: ClusterReport) -> ResourcePressureEvent:
    assert host.sample is not None
    level = Level(host.level)
    return ResourcePressureEvent(
        timestamp=datetime.fromtimestamp(report.at, UTC),
        pressure_level=level,
        cpu_percent=host.sample.cpu_pct,
        memory_mb=host.sample.memory_mb,
        memory_percent=host.sample.memory_pct,
        worker_count=host.slots,
        active_executors=host.busy,
        message=f"pressure of {host.worker} is {level.label}: {host.why}" if host.why else "",
        host=host.worker,
    )
