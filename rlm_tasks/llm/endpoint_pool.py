"""All endpoints of one process, with their order, limits, breakers and calls in flight.

Each pool process makes one for its gates; plans make one to read limits.  A model has one limit for
each API key; a provider's headers may lower it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import structs
from pydantic import SecretStr

from resilience.bucket import Rate, TokenBucket
from resilience.bulkhead import Aimd
from resilience.single_flight import SingleFlight
from rlm_tasks.llm.endpoint import Endpoint
from rlm_tasks.llm.endpoint_health import EndpointHealth
from rlm_tasks.llm.learned import ANY, CallKind, Learned
from rlm_tasks.llm.wire.answers import TokenUsage
from rlm_tasks.llm.wire.rate_limit_headers import RateLimitHeaders
from rlm_tasks.operations.protection import Protection
from rlm_tasks.settings.environment import key_of
from scheduler.routing import Router

if TYPE_CHECKING:
    from resilience.breaker import CircuitBreaker
    from resilience.bulkhead import Bulkhead
    from resilience.store import Call
    from rlm_tasks.engine.guards import ProcessGuards
    from rlm_tasks.llm.draft import Draft
    from rlm_tasks.settings.llm import EndpointSettings, LlmSettings

BREAKER = "client"
"""The preset of endpoints' breakers: 5 failures in a row, 30 s, 3 probes."""
FIRST_IN_FLIGHT, MOST_IN_FLIGHT = 2, 10_000
"""The first and the largest limit of calls in flight at an endpoint whose limit adapts."""
SLOW_SHARE = 1 / 4
"""The share of a call's time limit from which waiting in the provider counts as overload.

The limit may double before the next calls show their time, and still none of them times out."""
BURST_SHARE = 1 / 12
"""The share of a window's limit that calls may take at once.

They reserve far more than most of them use."""
MOST_DOUBLINGS = 5
"""After repeated answers of 429, the pause is up to 32 times as long as the provider asks."""


MARGIN = 1.05
"""Factor on the estimate of a prompt; a provider that counts more than that answers 429."""
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Bill:
    """The tokens of a call, and its cost by unit: `calls`, `tokens`, `money`, and `repairs`."""

    prompt: float
    completion: float
    amounts: dict[str, float]


NOTHING = Bill(0.0, 0.0, {})


def service_of(endpoint: str) -> str:
    """Return the name of an endpoint's breaker."""
    return f"llm:{endpoint}"


def rates(settings: LlmSettings, model: str) -> dict[str, Rate]:
    """Return the limits of a model in any window: requests, tokens and bytes."""
    limits = settings.model(model)
    windows = {
        "requests": limits.requests or settings.requests,
        "tokens": limits.tokens or settings.tokens,
    }
    return {**_in_windows(settings, windows), "bytes": Rate(settings.bytes_per_s)}


def _in_windows(settings: LlmSettings, limits: Mapping[str, float]) -> dict[str, Rate]:
    return {
        name: Rate(limit, settings.window_s, max(1.0, limit * BURST_SHARE))
        for name, limit in limits.items()
    }


def protection_of(endpoint: EndpointSettings, settings: LlmSettings) -> Protection:
    """Return the breaker of an endpoint, and its limit of calls in flight."""
    in_flight = endpoint.in_flight
    return Protection(
        service_of(endpoint.name),
        breaker=BREAKER,
        bulkhead=Aimd(FIRST_IN_FLIGHT, MOST_IN_FLIGHT, settings.timeout_s * SLOW_SHARE)
        if in_flight == "auto"
        else in_flight,
        timeout_s=2 * settings.timeout_s,  # a permit must last longer than a call
    )


def protections(settings: LlmSettings) -> Iterator[Protection]:
    """Yield the guards of each endpoint, and the limits of each model and key, to show them."""
    tiers = dict.fromkeys((settings.small, settings.medium, settings.large))
    for each in settings.endpoints_or_default:
        yield protection_of(each, settings)
        for model in tiers:
            if not each.models or model in each.models:
                yield Protection(f"llm:{each.key_env}:{model}", rate_limit=rates(settings, model))


class EndpointPool:
    """All endpoints of one process."""

    def __init__(self, guards: ProcessGuards) -> None:
        self.settings: LlmSettings = guards.settings.llm
        self._guards = guards
        self.endpoints = {each.name: each for each in self.settings.endpoints_or_default}
        self.router = Router(
            {each.name: each.weight for each in self.endpoints.values()}, self.settings.routing
        )
        self.flights = SingleFlight("llm", guards.store, lease_s=2 * self.settings.timeout_s)
        self.learned = Learned(guards.store, guards.store.clock)
        self.health = EndpointHealth(guards.store, self.settings)
        self._clients: dict[str, Endpoint] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._refused: dict[str, tuple[int, float]] = {}
        """Bucket -> answers of 429 in a row, and the end of the pause after the last one."""

    def endpoint(self, name: str) -> Endpoint:
        """Return the endpoint of a name, to call it."""
        if name not in self._clients:
            settings, about = self.settings, self.endpoints[name]
            self._clients[name] = Endpoint(
                about,
                SecretStr(key_of(about.key_env)),
                timeout_s=settings.timeout_s,
                per_host=settings.per_host,
                idle_s=settings.idle_s,
                learn=partial(self._lower, about),
            )
        return self._clients[name]

    def open(self) -> EndpointPool:
        """Make the clients before any grant, because a grant should not wait for that."""
        for name in self.endpoints:
            self.endpoint(name).open()
        return self

    def order(self, model: str, key: str) -> list[EndpointSettings]:
        """Return the healthy endpoints that have a model, in the order to try."""
        unhealthy = self.health.unhealthy()
        names = [name for name in self.router.order(key) if name not in unhealthy]
        ordered = [self.endpoints[name] for name in names]
        return [each for each in ordered if not each.models or model in each.models]

    def most(self, model: str, draft: Draft, kind: CallKind = ANY) -> Bill:
        """Return the most that a call may cost: the estimated prompt, and all of max_tokens.

        Its money is that of our prices, or more if a gateway has billed more for earlier calls.
        """
        past = self.learned.of(model, kind)
        usage = TokenUsage(round(past.reserved(draft.estimated) * MARGIN), draft.max_tokens)
        money = self.price(model, usage) * max(1.0, past.price_ratio)
        bill = self._bill(model, structs.replace(usage, money=money))
        if draft.is_repair:
            bill.amounts["repairs"] = 1.0
        return bill

    def bill(self, model: str, usage: TokenUsage, reserved: Bill) -> Bill:
        """Return the cost of a call with this usage; what it does not state counts as reserved."""
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        known = structs.replace(
            usage,
            prompt_tokens=reserved.prompt if prompt is None else prompt,
            completion_tokens=reserved.completion if completion is None else completion,
        )
        bill = self._bill(model, known)
        if repairs := reserved.amounts.get("repairs"):
            bill.amounts["repairs"] = repairs
        return bill

    def _bill(self, model: str, usage: TokenUsage) -> Bill:
        prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
        money = self.price(model, usage) if usage.money is None else usage.money
        amounts = {"calls": 1.0, "tokens": float(prompt + completion), "money": money}
        return Bill(prompt, completion, amounts)

    def price(self, model: str, usage: TokenUsage) -> float:
        """Return the money for this usage by the prices of our settings."""
        prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
        prices = self.settings.model(model)
        cached_price = prices.input_price if prices.cached_price is None else prices.cached_price
        return (
            (prompt - usage.cached_tokens) * prices.input_price
            + usage.cached_tokens * cached_price
            + completion * prices.output_price
        ) / 1e6

    @property
    def is_full(self) -> bool:
        """Whether the limit of calls in flight is reached, in all or at each endpoint."""
        in_flight = self.router.in_flight.values()
        return sum(in_flight) >= self.settings.pool or min(in_flight) >= self.settings.per_host

    def breaker(self, name: str) -> CircuitBreaker | None:
        """Return the breaker of an endpoint; None if breakers are off."""
        return self._guards.breaker(protection_of(self.endpoints[name], self.settings))

    def bulkhead(self, name: str) -> Bulkhead | None:
        """Return the shared limit of an endpoint's calls in flight; None if it is off."""
        return self._guards.bulkhead(protection_of(self.endpoints[name], self.settings))

    def full(self) -> Bulkhead | None:
        """Return a limit of calls in flight if those of all endpoints are known to be reached."""
        limits = [self.bulkhead(name) for name in self.endpoints]
        return (
            limits[0] if all(each is not None and each.is_known_full for each in limits) else None
        )

    def lines(self, waiter: str) -> list[Call]:
        """Return the calls that answer whether a waiter stands in the line of a guard."""
        guards = [*map(self.breaker, self.endpoints), *map(self.bulkhead, self.endpoints)]
        return [
            *(each.waits(waiter) for each in self._buckets.values()),
            *(each.waits(waiter) for each in guards if each is not None),
        ]

    def bucket(self, endpoint: EndpointSettings, model: str) -> TokenBucket:
        """Return the bucket with the limits of a model for an endpoint's key."""
        name = f"llm:{endpoint.key_env}:{model}"
        if name not in self._buckets:
            self._limit(name, rates(self.settings, model))
        return self._buckets[name]

    def _limit(self, name: str, limits: dict[str, Rate]) -> None:
        rates: dict[str, Any] = dict(limits)
        self._buckets[name] = TokenBucket(
            name, self._guards.store, hold_most_s=self.settings.hold_most_s, **rates
        )

    def hold(self, endpoint: EndpointSettings, model: str, wait_s: float) -> None:
        """Pause a limit for the seconds of a 429; double that for each further 429 in a row.

        A pause lasts `hold_most_s` at most.
        """
        bucket, now = self.bucket(endpoint, model), self._guards.store.clock()
        count, until = self._refused.get(bucket.name, (0, now))
        count += now >= until  # calls that were in flight together count once
        doubled_s = wait_s * 2.0 ** min(count - 1, MOST_DOUBLINGS)
        held_s = min(doubled_s, self.settings.hold_most_s)
        self._refused[bucket.name] = count, max(until, now + held_s)
        bucket.hold(held_s)

    def passed(self, bucket: TokenBucket) -> None:
        """Forget the 429 answers of a limit if it grants before the end of its pause.

        Somebody has released it then, so its next pause is as long as the provider asks.
        """
        if self._refused.get(bucket.name, (0, 0.0))[1] > self._guards.store.clock():
            del self._refused[bucket.name]

    def learn(self, endpoint: EndpointSettings, model: str, limits: RateLimitHeaders) -> None:
        """Lower a limit to the value in the headers of a good answer; a higher one is ignored."""
        self._refused.pop(self.bucket(endpoint, model).name, None)
        self._lower(endpoint, model, limits)

    def _lower(self, endpoint: EndpointSettings, model: str, limits: RateLimitHeaders) -> None:
        bucket = self.bucket(endpoint, model)
        sent = {"requests": limits.requests.limit, "tokens": limits.tokens.limit}
        lower = {
            name: limit
            for name, limit in sent.items()
            if limit and limit < bucket.rates[name].limit
        }
        if lower:
            self._limit(bucket.name, {**bucket.rates, **_in_windows(self.settings, lower)})
