"""Whether a worker, or the whole platform, is well: one judgement for the port of a worker and for
clients.

Decides what makes something ``failing`` (it is to be replaced, or nothing runs), ``degraded`` (it
does less than it could), or ``ok``; and measures how far Redis is.  Refuses to know who asks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from resilience.degradation import Level
from resilience.errors import StoreUnavailable
from resilience.store import Store
from rlm_tasks.telemetry import limit_reports

# --- one judgement -----------------------------------------------------------------------------


def judged(failing: Sequence[str], unwell: Sequence[str]) -> dict[str, Any]:
    """Return ``status`` (ok, degraded, failing) and ``why``, each reason once."""
    status = "failing" if failing else "degraded" if unwell else "ok"
    return {"status": status, "why": list(dict.fromkeys([*failing, *unwell]))}


def pressed(level: Level) -> list[str]:
    """Return the level as a reason, from high on."""
    return [f"pressure is {level.label}"] if level >= Level.HIGH else []


def shut(breakers: Mapping[str, str]) -> list[str]:
    """Return a reason for each breaker that is not closed."""
    return [
        f"the breaker of {name} is {state}" for name, state in breakers.items() if state != "closed"
    ]


def silent(redis_ms: float | None) -> list[str]:
    """Return the silence of Redis as a reason."""
    return ["Redis does not answer"] if redis_ms is None else []


def latency_ms(store: Store) -> float | None:
    """Return how long Redis took to answer, in ms; None when it did not."""
    began = time.perf_counter()
    try:
        store.call(lambda client: client.ping())
    except StoreUnavailable:
        return None
    return round(1000 * (time.perf_counter() - began), 2)


def quotas(reports: Sequence[limit_reports.LimitReport]) -> list[dict[str, Any]]:
    """Return limits as plain data, each with how full it is."""
    return [{**asdict(each), "fill": round(each.fill, 3)} for each in reports]


# --- of the platform --------------------------------------------------------------------------
