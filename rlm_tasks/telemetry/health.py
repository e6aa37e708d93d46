"""The health rules of a worker and of the whole platform.

The worker's port and `Client.health_check` call it.  A worker or platform is ``failing`` when it
must be replaced or nothing runs, ``degraded`` when it does less than it could, and else ``ok``.
Begin with `status_of`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from resilience.degradation import Level
from resilience.errors import StoreFull, StoreReadOnly
from resilience.store import Store

if TYPE_CHECKING:
    from rlm_tasks.telemetry.limit_reports import LimitReport


def status_of(failing: Sequence[str], degraded: Sequence[str]) -> dict[str, Any]:
    """Return ``status`` (ok, degraded, failing) and ``why``, from the reasons for each status.

    Each reason stands once in ``why``.
    """
    status = "failing" if failing else "degraded" if degraded else "ok"
    return {"status": status, "why": list(dict.fromkeys([*failing, *degraded]))}


def pressure_reasons(level: Level) -> list[str]:
    """Return a reason when the pressure level is high or above."""
    return [f"pressure is {level.label}"] if level >= Level.HIGH else []


def breaker_reasons(breakers: Mapping[str, str]) -> list[str]:
    """Return a reason for each breaker that is not closed."""
    return [
        f"the breaker of {name} is {state}" for name, state in breakers.items() if state != "closed"
    ]


def redis_health(store: Store) -> tuple[float | None, list[str]]:
    """Return the time of one small write in ms, and a reason when Redis does not take it.

    A Redis that is full, or a replica, still answers reads.  The time is None when it does not
    answer at all.
    """
    began = time.perf_counter()
    refused = store.refusal()
    if refused is None or isinstance(refused, StoreFull | StoreReadOnly):
        return round(1000 * (time.perf_counter() - began), 2), [str(refused)] if refused else []
    return None, [str(refused)]


def quotas(reports: Sequence[LimitReport]) -> list[dict[str, Any]]:
    """Return limits as plain data, each with the share of it that is used."""
    return [{**asdict(each), "fill": round(each.fill, 3)} for each in reports]
