"""Whether the whole platform is well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resilience.degradation import Level
from resilience.errors import StoreUnavailable
from rlm_tasks.client.platform_status import PlatformStatus, Pressure
from rlm_tasks.telemetry import limit_reports
from rlm_tasks.telemetry.health import judged, latency_ms, pressed, quotas, shut, silent
from rlm_tasks.version import __version__

if TYPE_CHECKING:
    from rlm_tasks.client.session import Session


def of_platform(session: Session, *, detailed: bool) -> dict[str, Any]:
    """Return how the platform is, as `Client.health_check` tells it; raises nothing of what Redis
    and the broker raise.
    """
    redis_ms = latency_ms(session.store)
    about = {"latency_ms": redis_ms}
    if redis_ms is None:
        return {**judged(silent(redis_ms), []), **about}
    try:
        status = Pressure(session).status()
        failing = [] if status.hosts else ["no worker reports: nothing runs"]
        unwell = pressed(Level[status.level.upper()])
        if not detailed:
            return {**judged(failing, unwell), **about}
        return _detailed(session, status, failing, unwell) | about
    except (
        StoreUnavailable
    ) as error:  # it went away meanwhile, or the broker is another server and away
        return {**judged([str(error)], []), **about}


def _detailed(
    session: Session, status: PlatformStatus, failing: list[str], unwell: list[str]
) -> dict[str, Any]:
    states = {name: str(each["state"]) for name, each in status.circuit_breakers.items()}
    slots, busy = sum(host.slots for host in status.hosts), sum(host.busy for host in status.hosts)
    served = {queue for host in status.hosts for queue in host.queues}
    depths = session.queues()
    lonely = [
        f"nobody consumes {name}" for name, at in depths.items() if name not in served and at.depth
    ]
    return {
        **judged(failing, [*unwell, *shut(states), *lonely]),
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
            name: {"depth": at.depth, "oldest_s": at.oldest_s, "consumed": name in served}
            for name, at in depths.items()
        },
        "quotas": quotas(limit_reports.reports(session.guards)),
        "circuit_breakers": states,
    }
