"""Whether a worker, or the whole platform, is well: one judgement for the port of a worker and for clients.

Decides what makes something ``failing`` (it is to be replaced, or nothing runs), ``degraded`` (it does less than it could),
or ``ok``; and measures how far Redis is.  Refuses to know who asks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from resilience.degradation import Level
from resilience.errors import StoreUnavailable
from resilience.store import Store
from rlm_tasks import __version__
from rlm_tasks.telemetry import limit_reports

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client
    from rlm_tasks.client.platform_status import PlatformStatus


# --- one judgement -----------------------------------------------------------------------------------


def judged(failing: Sequence[str], unwell: Sequence[str]) -> dict[str, Any]:
    """Return ``status`` (ok, degraded, failing) and ``why``, each reason once."""
    status = "failing" if failing else "degraded" if unwell else "ok"
    return {"status": status, "why": list(dict.fromkeys([*failing, *unwell]))}


def pressed(level: Level) -> list[str]:
    """Return the level as a reason, from high on."""
    return [f"pressure is {level.label}"] if level >= Level.HIGH else []


def shut(breakers: Mapping[str, str]) -> list[str]:
    """Return a reason for each breaker that is not closed."""
    return [f"the breaker of {name} is {state}" for name, state in breakers.items() if state != "closed"]


def silent(redis_ms: float | None) -> list[str]:
    """Return the silence of Redis as a reason."""
    return ["Redis does not answer"] if redis_ms is None else []


def latency_ms(store: Store) -> float | None:
    """Return how long Redis took to answer, in ms; None when it did not."""
    began = time.perf_counter()
    try:
        store.reached(lambda client: client.ping())
    except StoreUnavailable:
        return None
    return round(1000 * (time.perf_counter() - began), 2)


def quotas(reports: Sequence[limit_reports.LimitReport]) -> list[dict[str, Any]]:
    """Return limits as plain data, each with how full it is."""
    return [{**asdict(each), "fill": round(each.fill, 3)} for each in reports]


# --- of the platform ---------------------------------------------------------------------------------


def of_platform(client: Client, *, detailed: bool) -> dict[str, Any]:
    """Return how the platform is, as `Client.health_check` tells it; raises nothing of what Redis and the broker raise."""
    redis_ms = latency_ms(client.ledger.store)
    about = {"latency_ms": redis_ms}
    if redis_ms is None:
        return {**judged(silent(redis_ms), []), **about}
    try:
        status = client.status()
        failing = [] if status.hosts else ["no worker reports: nothing runs"]
        unwell = pressed(Level[status.level.upper()])
        if not detailed:
            return {**judged(failing, unwell), **about}
        return _detailed(client, status, failing, unwell) | about
    except StoreUnavailable as error:  # it went away meanwhile, or the broker is another server and away
        return {**judged([str(error)], []), **about}


def _detailed(client: Client, status: PlatformStatus, failing: list[str], unwell: list[str]) -> dict[str, Any]:
    states = {name: str(each["state"]) for name, each in status.circuit_breakers.items()}
    slots, busy = sum(host.slots for host in status.hosts), sum(host.busy for host in status.hosts)
    served = {queue for host in status.hosts for queue in host.queues}
    depths = client.queues()
    lonely = [f"nobody consumes {name}" for name, at in depths.items() if name not in served and at.depth]
    return {
        **judged(failing, [*unwell, *shut(states), *lonely]),
        "version": __version__,
        "pressure": {"level": status.level, "why": status.why, "forced": status.forced},
        "slots": {"total": slots, "busy": busy, "free": max(0, slots - busy)},
        "memory_mb": status.resource_usage["memory_mb"],
        "workers": {
            host.worker: {"level": Level(host.level).label, "slots": host.slots, "busy": host.busy, "version": host.version}
            for host in status.hosts
        },
        "queues": {name: {"depth": at.depth, "oldest_s": at.oldest_s, "consumed": name in served} for name, at in depths.items()},
        "quotas": quotas(client.limits()),
        "circuit_breakers": states,
    }
