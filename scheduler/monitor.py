"""One look at the whole platform: hosts, queues and Redis become the level that all act on.

Decides what counts for the cluster's level, what is expected within a minute, how many workers
there should be, and what is told of it.  Whoever looks continues where the last one stopped.
Refuses to know who asks for a look, and how often."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
from redis.exceptions import ResponseError

from resilience.breaker import CircuitBreakers
from resilience.degradation import CONSTRAINTS, Level
from resilience.store import Store
from resilience.waiters import URGENCY, Wake
from scheduler.admission import SHED_FROM, WaitingRoom, full, sheds
from scheduler.alerts import Alerts, ResourcePressureEvent, Webhook
from scheduler.autoscale import Advice, ClusterAdvice, Load
from scheduler.board import Board, ClusterReport, HostReport, mean, prevailing
from scheduler.events import Event, Events, EventSeverity
from scheduler.forecast import LOAD_BUCKET_S, Holt, Rise, will_rise
from scheduler.ladder import Ladder, LadderState
from scheduler.queues import QueueReport, priority_of
from scheduler.settings import AdmissionSettings, AutoscaleSettings, PressureSettings
from scheduler.snapshots import Snapshots
from scheduler.usage import Usage

ALERTING = frozenset({"execution.slow", "memory.high"})
"""Events of workers that may be alerted; the monitor's own it alerts itself."""
CALLED_PER_SLOT = 4
"""Jobs that are let in at a look, for each slot: as many as a first fan-out makes nodes."""
NO_ADVICE = Advice(desired=0, why="", changed=False)
BELOW_CRITICAL_PCT = 0.1
"""Waiting alone reaches HIGH, and no more: what is optional is left out, but nothing is simplified
while machines are fine.
"""


class Memory(msgspec.Struct):
    """What one look must know of those before it."""

    queues: LadderState = msgspec.field(default_factory=LadderState)
    redis: LadderState = msgspec.field(default_factory=LadderState)
    pressure: Holt = msgspec.field(default_factory=lambda: Holt(bucket_s=LOAD_BUCKET_S))
    advice: ClusterAdvice = msgspec.field(default_factory=ClusterAdvice)
    level: int = 0
    open: list[str] = []  # breakers
    event: str = ""  # the last one of the stream that was looked at
    at: float = 0.0
    depth: int = 0
    nodes: int = 0
    busy_us: int = 0
    snapped: float = 0.0  # when operations were last compared with their past


class Signal(NamedTuple):
    """Something that may raise the level, and how to say so."""

    level: Level
    percent: float
    why: str


class MonitorSettings(NamedTuple):
    """The settings that a look follows."""

    pressure: PressureSettings
    admission: AdmissionSettings
    autoscale: AutoscaleSettings


class Monitor:
    """Looks when asked; of all who are asked at once, one."""

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
        self._room, self._wake = room, wake
        self._board, self._store, self._settings, self._usage = board, store, settings, usage
        self._gauge, self._events, self._alerts, self._webhook, self._worker = (
            gauge,
            events,
            alerts,
            webhook,
            worker,
        )
        self._breakers, self._snapshots = breakers, snapshots

    def look(self) -> ClusterReport | None:
        """Look at everything and publish what follows; None when another has, a moment ago.

        Raises StoreUnavailable, and what the broker's client raises.
        """
        now = self._board.take_turn(self._worker, int(self._settings.pressure.monitor_s * 800))
        if now is None:
            return None
        memory, hosts = self._remembered(), self._board.hosts()
        queues = self._gauge(sorted({queue for host in hosts for queue in host.queues}))
        report = self._judged(memory, hosts, queues, now)
        before, memory.level = Level(memory.level), report.level
        self._tell(report, before, hosts)
        self._tell_breakers(memory)
        self._compare(memory, now)
        self._pass_on(memory)
        self._board.announce(report, msgspec.msgpack.encode(memory))
        self._call_up(report)
        return report

    def _call_up(self, report: ClusterReport) -> None:
        """Let jobs begin that were not taken in before, the most urgent first, as many as there are
        slots and places for.
        """
        forced = self._board.orders().forced
        level = Level(report.level) if forced is None else forced
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

    def _remembered(self) -> Memory:
        kept = self._board.memory()
        try:
            return msgspec.msgpack.decode(kept, type=Memory) if kept else Memory()
        except msgspec.MsgspecError:  # of another release
            return Memory()

    # --- what follows --------------------------------------------------------------------------

    def _judged(
        self,
        memory: Memory,
        hosts: Sequence[HostReport],
        queues: Mapping[str, QueueReport],
        now: float,
    ) -> ClusterReport:
        redis_pct = self._redis_pct()
        signals = [
            _of_hosts(hosts),
            self._laddered(memory.queues, *self._of_queues(queues), now),
            self._laddered(
                memory.redis,
                redis_pct or 0.0,
                f"Redis uses {redis_pct or 0:.0f} % of its memory",
                now,
            ),
        ]
        worst = max(signals, key=lambda signal: (signal.level, signal.percent))
        percent = max(signal.percent for signal in signals)
        rise = self._rise(memory, percent, worst.level, now)
        load = self._load(memory, hosts, queues, now)
        settings = self._settings.autoscale
        advice = memory.advice.decide(load, settings, now) if settings.enabled else NO_ADVICE
        self._advise(advice)
        return ClusterReport(
            level=worst.level,
            why=worst.why if worst.level else "",
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
        """Return the level that is expected soon; one that still lasts from before is no news."""
        memory.pressure.observe(percent, now)
        rise = will_rise(memory.pressure, percent, thresholds=self._settings.pressure.thresholds)
        return rise if rise and rise.level > level else None

    def _of_queues(self, queues: Mapping[str, QueueReport]) -> tuple[float, str]:
        """Return how pressed queues are, in percent.  Low work is there to wait.

        A queue that waits as long as it may is ELEVATED, and one that waits twice as long is HIGH.
        """
        elevated, high, critical, _ = self._settings.pressure.thresholds
        found = [(0.0, "")]
        for name, report in queues.items():
            priority, most = priority_of(name), self._settings.admission.queue_depth
            if priority == "low" or not report.depth:
                continue
            bound_s, age = self._settings.admission.wait_s(priority), report.oldest_s or 0.0
            waits = (
                elevated + (high - elevated) * math.log2(age / bound_s)
                if bound_s and age > 0
                else 0.0
            )
            deep = 100.0 * report.depth / most if most else 0.0
            why = f"{report.depth} messages wait in {name}" + (
                f", the oldest for {age:.0f} s" if age >= 1 else ""
            )
            found.append((min(critical - BELOW_CRITICAL_PCT, max(waits, deep, 0.0)), why))
        return max(found)

    def _redis_pct(self) -> float | None:
        """Return how full Redis is; None where it has no limit, or must not be asked."""
        try:
            about = self._store.call(lambda client: client.info("memory"))
        except ResponseError:
            return None
        most = int(about.get("maxmemory", 0))
        return round(100 * int(about["used_memory"]) / most, 1) if most else None

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

    # --- what is told of it --------------------------------------------------------------------

    def _tell(self, report: ClusterReport, before: Level, hosts: Sequence[HostReport]) -> None:
        level = Level(report.level)
        if level != before:
            self._events.emit(*_changes(report, level, before))
        for event in (
            _as_resource_event(report, hosts),
            *(_of_host(host, report) for host in hosts if host.sample),
        ):
            self._alerts.process_event(event)

    def _tell_breakers(self, memory: Memory) -> None:
        now_open = [
            name for name, about in self._breakers.status().items() if about["state"] != "closed"
        ]
        changes = [
            *(
                _breaker("breaker.opened", name, EventSeverity.WARNING, now_open)
                for name in now_open
                if name not in memory.open
            ),
            *(
                _breaker("breaker.closed", name, EventSeverity.INFO, now_open)
                for name in memory.open
                if name not in now_open
            ),
        ]
        self._events.emit(*changes)
        for event in changes:
            self._alerts.process_event(event)
        memory.open = now_open

    def _compare(self, memory: Memory, now: float) -> None:
        """Take a snapshot of each operation when it is time, and tell which became slower."""
        if self._snapshots is None or now - memory.snapped < self._snapshots.every_s:
            return
        memory.snapped, changes = now, self._snapshots.take(now)
        self._events.emit(*changes)
        for event in changes:
            self._alerts.process_event(event)

    def _pass_on(self, memory: Memory) -> None:
        """Alert what workers have told since the last look; what was told before the first is
        history.
        """
        if not memory.event:
            newest = self._events.recent(1)
            memory.event = newest[0].id if newest else "0-0"
            return
        for event in self._events.read(memory.event):
            memory.event = event.id
            if event.name in ALERTING:
                self._alerts.process_event(event)

    def _advise(self, advice: Advice) -> None:
        if not advice.changed:
            return
        told = {"desired_workers": advice.desired, "why": advice.why}
        self._events.emit(
            Event(
                "scaling.advised", f"{advice.desired} workers are advised: {advice.why}", data=told
            )
        )
        if self._webhook is not None:
            self._webhook.send(f"scaling-{advice.desired}", told)


def _of_hosts(hosts: Sequence[HostReport]) -> Signal:
    level = prevailing(hosts)
    percent = max((host.percent for host in hosts if host.level == level), default=0.0)
    why = next(
        (f"{host.why} on {host.worker}" for host in hosts if host.level == level and host.why), ""
    )
    return Signal(level, percent, why)


def _changes(report: ClusterReport, level: Level, before: Level) -> Iterable[Event]:
    severity = (
        EventSeverity.INFO,
        EventSeverity.INFO,
        EventSeverity.WARNING,
        EventSeverity.ERROR,
        EventSeverity.CRITICAL,
    )[level]
    data: dict[str, Any] = {"level": level.label, "before": before.label, "why": report.why}
    because = f": {report.why}" if report.why else ""
    yield Event(
        "pressure.changed",
        f"pressure went from {before.label} to {level.label}{because}",
        severity,
        data,
    )
    strategies = list(CONSTRAINTS[level].strategies)
    if level > before:
        yield Event(
            "degradation.started",
            f"from now on: {', '.join(strategies)}",
            data={"strategies": strategies},
        )
    elif not level:
        yield Event("degradation.ended", "nothing is left out any more", data={"strategies": []})


def _breaker(name: str, breaker: str, severity: EventSeverity, now_open: Sequence[str]) -> Event:
    return Event(
        name,
        f"breaker {breaker} has {name.partition('.')[2]}",
        severity,
        {"breaker": breaker, "open": list(now_open)},
    )


def _as_resource_event(report: ClusterReport, hosts: Sequence[HostReport]) -> ResourcePressureEvent:
    level, memory_mb = (
        Level(report.level),
        sum(host.sample.memory_mb for host in hosts if host.sample),
    )
    return ResourcePressureEvent(
        timestamp=datetime.fromtimestamp(report.at, UTC),
        pressure_level=level,
        cpu_percent=report.cpu_pct,
        memory_mb=memory_mb,
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
