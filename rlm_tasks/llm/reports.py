"""How the endpoints of models stand, for those who operate the platform.

Decides what is told of an endpoint: its settings, what workers have found, its breaker.  Refuses to
know who is told; no key and no path of a URL is."""

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

if TYPE_CHECKING:
    from resilience.breaker import CircuitBreakers
    from resilience.store import Store
    from rlm_tasks.settings.llm import EndpointSettings, LlmSettings


@dataclass(frozen=True, slots=True)
class EndpointReport:
    """One endpoint."""

    name: str
    host: str  # and port; '' where OPENAI_BASE_URL says it, which is each worker's own
    models: tuple[str, ...]  # our names of those it has; none: it has all
    weight: float
    healthy: bool  # it gets calls
    strikes: int  # checks in a row that it did not pass
    latency_ms: float | None  # of its latest answer; None: it did not answer, or was not asked
    checked_s_ago: float | None  # None: nobody has asked it of late
    breaker: str  # closed, half-open or open
    why: str  # it did not pass the latest check


def endpoint_reports(
    store: Store, settings: LlmSettings, breakers: CircuitBreakers
) -> list[EndpointReport]:
    """Return the state of each endpoint, for `Client.endpoints`.  Raises StoreUnavailable."""
    if not configured(settings):
        return []
    health = EndpointHealth(store, settings)
    checkups = {each.name: each for each in health.checkups()}
    now_ms = store.call(lambda _: store.now_ms())
    found = []
    for place in settings.endpoints_or_default:
        breaker = str(breakers.get(service_of(place.name), BREAKER).status()["state"])
        at = checkups.get(place.name)
        found.append(
            _unseen(place, breaker)
            if at is None
            else _seen(place, breaker, at, now_ms, ill=health.is_ill(at))
        )
    return found


def _unseen(place: EndpointSettings, breaker: str) -> EndpointReport:
    """Return what there is to tell of an endpoint that nobody has asked: it gets calls."""
    host = urlsplit(place.base_url).netloc
    return EndpointReport(
        name=place.name,
        host=host,
        models=tuple(place.models),
        weight=place.weight,
        healthy=True,
        strikes=0,
        latency_ms=None,
        checked_s_ago=None,
        breaker=breaker,
        why="",
    )


def _seen(
    place: EndpointSettings, breaker: str, at: Checkup, now_ms: int, *, ill: bool
) -> EndpointReport:
    return replace(
        _unseen(place, breaker),
        healthy=not ill,
        strikes=at.strikes,
        latency_ms=_latency(at.latency_ms),
        checked_s_ago=max(0.0, (now_ms - at.at_ms) / 1000),
        why=at.why,
    )


def _latency(ms: float) -> float | None:
    return round(ms, 1) or None


def asked_now(settings: LlmSettings, known: Sequence[EndpointReport]) -> list[EndpointReport]:
    """Return reports with what the endpoints answer this process now; workers hear nothing of it.

    Raises InvalidRequest where the `openai` client is not installed.
    """
    if find_spec("openai") is None:
        raise InvalidRequest("check", True, "needs the openai client: pip install 'rlm-tasks[llm]'")
    from rlm_tasks.llm.endpoint_checks import ask

    found = asyncio.run(ask(settings)) if known else []
    return [
        replace(
            each,
            healthy=not at.why,
            latency_ms=_latency(1000 * at.latency_s),
            checked_s_ago=0.0,
            why=at.why,
        )
        for each, at in zip(known, found, strict=True)
    ]
