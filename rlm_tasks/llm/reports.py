"""Reports on the endpoints of models, for operators: settings, health and breaker of each.

`Client.endpoints` calls `endpoint_reports`, and `rlm endpoints --check` also `checked_now`.
Workers report their endpoints with `declared_endpoints`.  A report has no key, and of a URL only
host and port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rlm_tasks.errors import InvalidRequest
from rlm_tasks.llm.endpoint_health import Checkup, EndpointHealth, configured
from rlm_tasks.llm.endpoint_pool import BREAKER, service_of
from scheduler.board import DeclaredEndpoint, HostReport

if TYPE_CHECKING:
    from resilience.breaker import CircuitBreakers
    from resilience.store import Store
    from rlm_tasks.settings.llm import LlmSettings


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """The state of one endpoint."""

    name: str
    host: str  # and port; '' if OPENAI_BASE_URL sets it, which may differ from worker to worker
    models: tuple[str, ...]  # our names of its models; empty: it has all
    weight: float
    healthy: bool  # it gets calls
    strikes: int  # failed checks in a row
    latency_ms: float | None  # time of its latest answer; None: no answer, or no check
    checked_s_ago: float | None  # None: no recent check
    breaker: str  # closed, half-open or open
    why: str  # the cause why the latest check failed, or a note; '' if it passed


def declared_endpoints(settings: LlmSettings) -> tuple[DeclaredEndpoint, ...]:
    """Return the endpoints of this process; none without a key or an address."""
    if not configured(settings):
        return ()
    return tuple(
        DeclaredEndpoint(
            name=each.name,
            host=urlsplit(each.base_url).netloc,
            models=tuple(each.models),
            weight=each.weight,
            checked=bool(each.health_path),
        )
        for each in settings.endpoints_or_default
    )


def endpoint_reports(
    store: Store,
    settings: LlmSettings,
    breakers: CircuitBreakers,
    hosts: Sequence[HostReport] = (),
) -> list[EndpointReport]:
    """Return the state of each endpoint of live workers and of this process.

    A worker's declaration comes before one of this process.  Raises StoreUnavailable.
    """
    declared = {each.name: each for each in declared_endpoints(settings)}
    for host in reversed(hosts):
        declared |= {each.name: each for each in host.endpoints}
    if not declared:
        return []
    health = EndpointHealth(store, settings)
    checkups = {each.name: each for each in health.checkups()}
    now_ms = store.call(lambda _: store.now_ms())
    reported = []
    for each in declared.values():
        breaker = str(breakers.get(service_of(each.name), BREAKER).status()["state"])
        latest = checkups.get(each.name)
        report = _unchecked(each, breaker)
        if latest is not None:
            healthy = not health.is_unhealthy(latest)
            report = _checked(report, latest, now_ms, healthy=healthy)
            if healthy and latest.strikes >= settings.health_strikes:
                report = replace(report, why=f"{latest.why}; but it answers calls")
        reported.append(report)
    return reported


def _unchecked(endpoint: DeclaredEndpoint, breaker: str) -> EndpointReport:
    """Return the report on an endpoint without a recent check, which gets calls."""
    return EndpointReport(
        name=endpoint.name,
        host=endpoint.host,
        models=endpoint.models,
        weight=endpoint.weight,
        healthy=True,
        strikes=0,
        latency_ms=None,
        checked_s_ago=None,
        breaker=breaker,
        why="" if endpoint.checked else "it is not checked: its health_path is empty",
    )


def _checked(
    report: EndpointReport, latest: Checkup, now_ms: int, *, healthy: bool
) -> EndpointReport:
    return replace(
        report,
        healthy=healthy,
        strikes=latest.strikes,
        latency_ms=_latency(latest.latency_ms),
        checked_s_ago=max(0.0, (now_ms - latest.at_ms) / 1000),
        why=latest.why,
    )


def _latency(ms: float) -> float | None:
    return round(ms, 1) or None


def checked_now(settings: LlmSettings, known: Sequence[EndpointReport]) -> list[EndpointReport]:
    """Return reports with the results of a check from this process; workers do not get them.

    Raises InvalidRequest if the `openai` client is not installed.
    """
    if find_spec("openai") is None:
        raise InvalidRequest("check", True, "needs the openai client: pip install 'rlm-tasks[llm]'")
    from rlm_tasks.llm.endpoint_checks import check_all

    found = asyncio.run(check_all(settings)) if known else []
    results = {each.name: each for each in found}
    return [
        each
        if (result := results.get(each.name)) is None
        else replace(
            each,
            healthy=not result.failed,
            latency_ms=_latency(1000 * result.latency_s),
            checked_s_ago=0.0,
            why=result.why,
        )
        for each in known
    ]
