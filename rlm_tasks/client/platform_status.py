"""The platform's status for operators, and its pressure, which a drill can force.

`Platform.status` and `Platform.pressure` of a client use it.  The monitor and the hosts measure;
this module only reads their reports.  Begin with `Pressure.status`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from resilience.degradation import CONSTRAINTS, Level
from rlm_tasks.operations import registry
from rlm_tasks.words import count
from scheduler.board import (
    ClusterReport,
    HostReport,
    Orders,
    acted_on,
    fingerprint,
    prevailing,
)
from scheduler.queues import QueueReport
from scheduler.snapshots import Snapshots, Trend
from scheduler.usage import OperationUsage

if TYPE_CHECKING:
    from rlm_tasks.client.session import Session

TREND = 60
"""Number of the monitor's reports in a status: five minutes of them."""


@dataclass(frozen=True, slots=True)
class PlatformStatus:
    """The status of the platform at one moment."""

    level: str  # normal, elevated, high, critical, emergency; normal if not known or switched off
    why: str  # the signal that decides the level
    forced: str  # the level of a drill, '' for none
    monitored: bool  # beat runs the monitor; without it each host acts on its own level
    hosts: list[HostReport]  # one for each worker that has reported lately
    resource_usage: dict[str, float]  # cpu_percent, memory_mb, memory_percent, worker_count
    active: dict[str, int]  # operation -> nodes that run now
    strategies: list[str]  # kinds of work that operations leave out now
    operations: list[dict[str, Any]]
    """Executions, success rate, memory, duration, breaker and trend of each operation."""
    circuit_breakers: dict[str, dict[str, Any]]  # name -> `CircuitBreaker.status`
    queues: dict[str, QueueReport]  # name -> depth and age; empty without a monitor
    recent_pressure_events: list[dict[str, Any]]  # timestamp, level, message
    recent_events: list[dict[str, Any]]  # the newest fifty, the newest first
    rising_to: str  # the level expected within a minute, '' for none
    desired_workers: int  # 0: not known
    trend: list[dict[str, Any]]
    """Reports on the cluster, the oldest first: at, level, cpu_pct, memory_pct, depth, busy."""
    enabled: bool = True  # False: pressure is switched off, by RLM_PRESSURE__ENABLED

    @property
    def known(self) -> bool:
        """Whether the level is that of workers, and not only assumed to be normal."""
        return bool(self.hosts) and self.enabled

    def sentence(self, command: str) -> str:
        """Return the level, its cause and what to do, in words.

        `command` is the beginning of Celery's commands: "celery -A shop".
        """
        if not self.enabled:
            drill = f" The drill at {self.forced} has no effect." if self.forced else ""
            return f"Pressure is switched off (RLM_PRESSURE__ENABLED=0).{drill}"
        if not self.hosts:
            return f"The pressure is not known: no worker reports. Type: {command} worker"
        why = f": {self.why}" if self.why else ""
        rising = f"; {self.rising_to} is expected within a minute" if self.rising_to else ""
        advice = (
            f" The advice is to run {count(self.desired_workers, 'worker')}."
            if self.desired_workers
            else ""
        )
        blind = "" if self.monitored else f" Each host acts on its own. Type: {command} beat"
        return f"Pressure is {self.level}{why}{rising}.{advice}{blind}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return msgspec.to_builtins(asdict(self))  # type: ignore[no-any-return]  # a dataclass becomes a dict


class Pressure:
    """The pressure of one platform.  Every method raises StoreUnavailable."""

    def __init__(self, session: Session) -> None:
        self._session, self._board = session, session.board

    def level(self) -> Level:
        """Return the pressure level of the cluster.

        A drill's level comes first, then the monitor's, then the highest level that at least half
        of all slots have reached.  It is normal when pressure is switched off.  Raises
        StoreUnavailable.
        """
        return self._level(self._board.orders(), self._board.hosts())

    def _level(self, orders: Orders, hosts: list[HostReport]) -> Level:
        if not self._session.settings.pressure.enabled:
            return Level.NORMAL
        return acted_on(Level.NORMAL if orders.cluster is not None else prevailing(hosts), orders)

    def force(self, level: Level | str | int, for_s: float = 600.0) -> None:
        """Make all workers act on a level, for a drill.

        It begins within a second, and ends after `for_s` seconds or by `release`.  Raises
        InvalidValue, StoreUnavailable.
        """
        self._board.force(level, for_s)

    def release(self) -> bool:
        """End a drill; return whether there was one.  Raises StoreUnavailable."""
        return self._board.release()

    def consumers(self) -> dict[str, list[str]]:
        """Return the workers of each queue that has any.  Raises StoreUnavailable."""
        found: dict[str, list[str]] = {}
        for host in self._board.hosts():
            for queue in host.queues:
                found.setdefault(queue, []).append(host.worker)
        return found

    def history(self, limit: int = 100) -> list[ClusterReport]:
        """Return the monitor's latest reports, the newest first.

        Raises InvalidValue for a wrong `limit`, and StoreUnavailable.
        """
        return self._board.history(limit)

    def status(self) -> PlatformStatus:
        """Return the present status of the platform.  Raises StoreUnavailable."""
        orders, hosts = self._board.orders(), self._board.hosts()
        events = self._session.events.recent(50)
        level, cluster = self._level(orders, hosts), orders.cluster
        services = dict(item for host in hosts for item in host.services.items())
        services |= registry.services()
        breakers, usage = self._session.breakers.status(), self._session.usage.all()
        trends = Snapshots(
            self._session.store, self._session.keys, self._session.settings.snapshots
        ).trends([each.executor_id for each in usage])
        enabled = _is_enabled(hosts, self._session.settings.pressure.enabled)
        why = "it is forced" if orders.forced is not None else _why(cluster, hosts, level)
        return PlatformStatus(
            level=level.label,
            why=why if enabled else "",
            forced=orders.forced.label if orders.forced is not None else "",
            monitored=cluster is not None,
            hosts=hosts,
            resource_usage=_resources(hosts),
            active=dict(sum((Counter(host.active) for host in hosts), Counter())),
            strategies=list(CONSTRAINTS[level].strategies),
            operations=[
                _figures(
                    each, breakers.get(services.get(each.executor_id, each.executor_id)), trend
                )
                for each, trend in zip(usage, trends, strict=True)
            ],
            circuit_breakers=breakers,
            queues=cluster.queues if cluster else {},
            recent_pressure_events=[
                {
                    "timestamp": _time(each.at),
                    "level": each.data.get("level", ""),
                    "message": each.message,
                }
                for each in events
                if each.name == "pressure.changed"
            ],
            recent_events=[each.fields() for each in events],
            rising_to=cluster.rising_to if cluster and enabled else "",
            desired_workers=cluster.desired_workers if cluster else 0,
            trend=[_point(each) for each in self.history(TREND)][::-1],
            enabled=enabled,
        )


def _resources(hosts: list[HostReport]) -> dict[str, float]:
    samples = [(host.sample, host.slots) for host in hosts if host.sample is not None]
    slots = sum(each for _, each in samples)
    return {
        "cpu_percent": round(sum(sample.cpu_pct * each for sample, each in samples) / slots, 1)
        if slots
        else 0.0,
        "memory_mb": round(sum(sample.memory_mb for sample, _ in samples), 1),
        "memory_percent": round(
            sum(sample.memory_pct * each for sample, each in samples) / slots, 1
        )
        if slots
        else 0.0,
        "worker_count": sum(host.slots for host in hosts),
    }


def _why(cluster: ClusterReport | None, hosts: Sequence[HostReport], level: Level) -> str:
    """Return the measured cause of a level; without a monitor, that of a host which has it."""
    if cluster is not None:
        return cluster.why
    return next(
        (f"{each.why} on {each.worker}" for each in hosts if each.level == level and each.why), ""
    )


def _is_enabled(hosts: Sequence[HostReport], here: bool) -> bool:
    """Return whether pressure is on: in a worker that reports it, else in this process."""
    off = fingerprint(repr(False))
    told = [host.settings for host in hosts if host.settings is not None]
    return any(each.get(_SWITCH) != off for each in told) if told else here


_SWITCH = "RLM_PRESSURE__ENABLED"


def _figures(usage: OperationUsage, breaker: dict[str, Any] | None, trend: Trend) -> dict[str, Any]:
    state = (breaker or {}).get("state", "closed")
    change = None if trend.change is None else round(100 * trend.change, 1)
    return {
        **usage.to_dict(),
        "circuit_breaker_state": str(state),
        "change_percent": change,
        "slower": trend.slower,
    }


def _point(report: ClusterReport) -> dict[str, Any]:
    depth = sum(queue.depth for queue in report.queues.values())
    level = Level(report.level).label
    return {
        "at": report.at,
        "level": level,
        "cpu_pct": report.cpu_pct,
        "memory_pct": report.memory_pct,
        "depth": depth,
        "busy": report.busy,
    }


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
