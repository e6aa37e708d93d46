"""What one process knows of its providers: endpoints, who is next, what limits them, what is in
flight.

Built once in each pool process.  Decides which limit belongs to which model and key, and lowers it
to what a provider says; refuses to know what is asked and who pays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import SecretStr

from resilience.bucket import Rate, TokenBucket
from resilience.single_flight import SingleFlight
from rlm_tasks.llm.endpoint import Endpoint, Told
from rlm_tasks.llm.endpoint_health import EndpointHealth
from rlm_tasks.llm.learned import Learned
from rlm_tasks.operations.protection import Protection
from rlm_tasks.settings.environment import key_of
from scheduler.routing import Router

if TYPE_CHECKING:
    from resilience.breaker import CircuitBreaker
    from rlm_tasks.engine.guards import ProcessGuards
    from rlm_tasks.settings.llm import EndpointSettings, LlmSettings

BREAKER = "client"
"""The preset of endpoints' breakers: 5 failures in a row, 30 s, 3 probes (source document 0)."""
BURST_SHARE = 1 / 12
"""The share of a window's limit that may go at once: calls reserve far more than most of them
use.
"""
MOST_DOUBLINGS = 5
"""A provider that answers 429 again and again is left alone up to 32 times as long as it asks
(source document 3).
"""


def service_of(endpoint: str) -> str:
    """Return the name of an endpoint's breaker."""
    return f"llm:{endpoint}"


def rates(settings: LlmSettings, model: str) -> dict[str, Rate]:
    """Return what a provider allows of a model in any window."""
    its = settings.model(model)
    windows = {
        "requests": its.requests or settings.requests,
        "tokens": its.tokens or settings.tokens,
    }
    return {**_in_windows(settings, windows), "bytes": Rate(settings.bytes_per_s)}


def _in_windows(settings: LlmSettings, limits: Mapping[str, float]) -> dict[str, Rate]:
    return {
        name: Rate(limit, settings.window_s, max(1.0, limit * BURST_SHARE))
        for name, limit in limits.items()
    }


def protections(settings: LlmSettings) -> Iterator[Protection]:
    """Yield what protects the calls to each endpoint, and to each model by each key, to show it."""
    tiers = dict.fromkeys((settings.small, settings.medium, settings.large))
    for each in settings.endpoints_or_default:
        yield Protection(service_of(each.name), breaker=BREAKER)
        for model in tiers:
            if not each.models or model in each.models:
                yield Protection(f"llm:{each.key_env}:{model}", rate_limit=rates(settings, model))


class EndpointPool:
    """All endpoints of one process."""

    def __init__(self, guards: ProcessGuards) -> None:
        self.settings: LlmSettings = guards.settings.llm
        self._guards = guards
        self.places = {each.name: each for each in self.settings.endpoints_or_default}
        self.router = Router(
            {each.name: each.weight for each in self.places.values()}, self.settings.routing
        )
        self.flights = SingleFlight("llm", guards.store, lease_s=2 * self.settings.timeout_s)
        self.learned = Learned(guards.store, guards.store.clock)
        self.health = EndpointHealth(guards.store, self.settings)
        self._endpoints: dict[str, Endpoint] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._refused: dict[
            str, tuple[int, float]
        ] = {}  # bucket -> 429s in a row, and until when the last one holds

    def endpoint(self, name: str) -> Endpoint:
        """Return where to ask."""
        if name not in self._endpoints:
            its, place = self.settings, self.places[name]
            self._endpoints[name] = Endpoint(
                place,
                SecretStr(key_of(place.key_env)),
                timeout_s=its.timeout_s,
                per_host=its.per_host,
                idle_s=its.idle_s,
            )
        return self._endpoints[name]

    def open(self) -> EndpointPool:
        """Get ready to ask, before anything is granted: to make a client takes longer than a grant
        should wait.
        """
        for name in self.places:
            self.endpoint(name).open()
        return self

    def order(self, model: str, key: str) -> list[EndpointSettings]:
        """Return the endpoints that have a model and are well, the one to try first first."""
        ill = self.health.ill()
        found = [self.places[name] for name in self.router.order(key) if name not in ill]
        return [each for each in found if not each.models or model in each.models]

    @property
    def is_full(self) -> bool:
        """Whether this process has as many calls in flight as it may, in all or at each
        endpoint.
        """
        found = self.router.in_flight.values()
        return sum(found) >= self.settings.pool or min(found) >= self.settings.per_host

    def breaker(self, name: str) -> CircuitBreaker | None:
        """Return the breaker of an endpoint, None where breakers are off."""
        return self._guards.breaker(Protection(service_of(name), breaker=BREAKER))

    def bucket(self, place: EndpointSettings, model: str) -> TokenBucket:
        """Return the limits of a model by an endpoint's key."""
        name = f"llm:{place.key_env}:{model}"
        if name not in self._buckets:
            self._limit(name, rates(self.settings, model))
        return self._buckets[name]

    def _limit(self, name: str, limits: dict[str, Rate]) -> None:
        self._buckets[name] = TokenBucket(name, self._guards.store, **limits)  # type: ignore[arg-type]  # rates by their names

    def hold(self, place: EndpointSettings, model: str, wait_s: float) -> None:
        """Let nothing pass a limit for as long as a 429 says, and twice as long for each that
        follows at once.
        """
        bucket, now = self.bucket(place, model), self._guards.store.clock()
        count, until = self._refused.get(bucket.name, (0, now))
        count += now >= until  # those that were in flight with it tell the same
        held_s = wait_s * 2.0 ** min(count - 1, MOST_DOUBLINGS)
        self._refused[bucket.name] = count, max(until, now + held_s)
        bucket.hold(held_s)

    def learn(self, place: EndpointSettings, model: str, told: Told) -> None:
        """Lower a limit to what a provider says it is; one that it says is higher stays as it was
        set.
        """
        bucket = self.bucket(place, model)
        self._refused.pop(bucket.name, None)
        said = {"requests": told.requests.limit, "tokens": told.tokens.limit}
        lower = {
            name: limit
            for name, limit in said.items()
            if limit and limit < bucket.rates[name].limit
        }
        if lower:
            self._limit(bucket.name, {**bucket.rates, **_in_windows(self.settings, lower)})
