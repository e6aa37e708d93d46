"""The health of the whole platform, which never raises while Redis or the broker is away.

`Client.health_check` calls `of_platform`.  The rules are in `telemetry.health`, as for a worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resilience.connections import RecordUnreadable
from resilience.degradation import Level
from resilience.errors import StoreUnavailable
from rlm_tasks.client.platform_status import PlatformStatus, Pressure
from rlm_tasks.telemetry.health import (
    breaker_reasons,
    pressure_reasons,
    quotas,
    redis_health,
    status_of,
)
from rlm_tasks.telemetry.limit_reports import limit_reports
from rlm_tasks.version import __version__

if TYPE_CHECKING:
    from rlm_tasks.client.session import Session


def of_platform(session: Session, *, detailed: bool) -> dict[str, Any]:
    """Return the dict that `Client.health_check` documents.

    An error of Redis or of the broker is not raised: it makes the status ``failing``.
    """
    redis_ms, reasons = redis_health(session.store)
    about = {"latency_ms": redis_ms}
    if reasons:
        return {**status_of(reasons, []), **about}
    try:
        status = Pressure(session).status()
        failing = [] if status.hosts else ["no worker reports: nothing runs"]
        degraded = pressure_reasons(Level[status.level.upper()])
        if not detailed:
            return {**status_of(failing, degraded), **about}
        return _detailed(session, status, failing, degraded) | about
    except (StoreUnavailable, RecordUnreadable) as error:
        # Redis went away since the first call, or the broker is another server and is away.
        return {**status_of([str(error)], []), **about}


def _detailed(
    session: Session, status: PlatformStatus, failing: list[str], degraded: list[str]
) -> dict[str, Any]:
    states = {name: str(each["state"]) for name, each in status.circuit_breakers.items()}
    slots, busy = sum(host.slots for host in status.hosts), sum(host.busy for host in status.hosts)
    served = {queue for host in status.hosts for queue in host.queues}
    depths = session.queues()
    unserved = [
        f"nobody consumes {name}"
        for name, report in depths.items()
        if name not in served and report.depth
    ]
    return {
        **status_of(failing, [*degraded, *breaker_reasons(states), *unserved]),
        "version": __version__,
        "pressure": {"level": status.level, "why": status.why, "forced": status.forced},
        "slots": {"total": slots, "busy": busy, "free": max(0, slots - busy)},
        "memory_mb": status.resource_usage["memory_mb"],
        "workers": {
            host.worker: {
                "level": Level(host.level).label,
                "slots": host.slots,
                "busy": host.busy,
                "version": host.version,
            }
            for host in status.hosts
        },
        "queues": {
            name: {"depth": report.depth, "oldest_s": report.oldest_s, "consumed": name in served}
            for name, report in depths.items()
        },
        "quotas": quotas(limit_reports(session.guards, status.hosts)),
        "circuit_breakers": states,
    }
