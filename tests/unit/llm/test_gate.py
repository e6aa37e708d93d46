"""The gate of a model call: its guards, and what is returned when one denies it
or the call fails.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from msgspec.structs import replace

from resilience.degradation import Strategy
from resilience.errors import BulkheadFull, CallTimeout, Denied, RateLimited
from rlm_tasks.engine.guards import Postponed, ProcessGuards
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.llm.gate import BudgetSpent, Gate, HeldCall
from rlm_tasks.llm.wire.answers import Answer, TokenUsage
from rlm_tasks.llm.wire.errors import ProviderDown, UnusableAnswer
from rlm_tasks.llm.wire.rate_limit_headers import LimitState, RateLimitHeaders
from rlm_tasks.operations import registry
from rlm_tasks.operations.context import Context
from rlm_tasks.settings.llm import EndpointSettings, LlmSettings
from rlm_tasks.settings.model import Settings
from tests.unit.world import World, world

__all__ = ["world"]

registry.import_operations(())
MODEL = "gpt-4.1-mini"
UNSAID = RateLimitHeaders(LimitState(), LimitState())
ANSWER = Answer(MODEL, "so", "stop", UNSAID, 0.5, TokenUsage(10, 5))


class JobGate:
    """The gate of one job, with its guards and budget."""

    def __init__(
        self,
        world: World,
        budget: dict[str, float],
        *,
        priority: str = "normal",
        cache_ttl_s: float = 0,
        **llm: Any,
    ) -> None:
        self.store = world.store()
        self.stopped: list[tuple[str, str]] = []
        settings = LlmSettings(**{"endpoints": (EndpointSettings(name="one"),), **llm})
        self.guards = ProcessGuards(
            self.store,
            Settings(llm=settings),
            lambda waiters: None,
            lambda job, why, **_: self.stopped.append((job, why)),
        )
        spec = JobSpec(
            "job",
            "llm.map",
            RangeSource(0, 1),
            9,
            Shape("flat"),
            "unit.normal",
            priority=priority,
            budget=budget,
            cache_ttl_s=cache_ttl_s,
        )
        self.guards.budgets.open(spec, last=True)
        found = registry.get("llm.map").gate(self.guards, registry.get("llm.map"), spec)  # type: ignore[misc]  # llm.map has a gate
        assert isinstance(found, Gate)
        self.gate = found
        self.params: dict[str, Any] = {"prompt": "Say {item}", "max_tokens": 100}
        self.provider = found._pool

    def enter(self, index: int = 0, item: str = "") -> HeldCall:
        entry = self.gate.enter(
            item or f"item {index}", Context("job", self.params, index=index), ""
        )
        assert isinstance(entry, HeldCall)
        return entry

    def answered(self, entry: HeldCall, answer: Answer = ANSWER) -> None:
        entry.answer = answer
        self.gate.leave(entry)

    @property
    def nothing_is_held(self) -> bool:
        place = self.provider.endpoints["one"]
        used = self.provider.bucket(place, MODEL).status()
        held = self.guards.budgets.budget("job").status().held
        return (
            not any(self.provider.router.in_flight.values())
            and not any(held.values())
            and all(used[name]["used"] == 0 for name in ("requests", "tokens"))
        )


def spent(job_gate: JobGate) -> dict[str, float]:
    return job_gate.guards.budgets.budget("job").status().spent


def test_a_call_reserves_its_maximum_cost_and_settles_to_the_real_one(world: World) -> None:
    job_gate = JobGate(world, {"tokens": 1000})
    entry = job_gate.enter()
    held = job_gate.guards.budgets.budget("job").status().held

    assert held["calls"] == 1
    assert 100 < held["tokens"] < 115
    job_gate.answered(entry)
    assert spent(job_gate) == pytest.approx(
        {"calls": 1, "tokens": 15, "money": (10 * 0.4 + 5 * 1.6) / 1e6}
    )
    assert (
        job_gate.provider.bucket(job_gate.provider.endpoints["one"], MODEL).status()["tokens"][
            "used"
        ]
        == 15
    )
    job_gate.answered(entry)  # a second time has no effect
    assert spent(job_gate)["calls"] == 1


@pytest.mark.parametrize(
    ("markup", "reserved"),
    [(10, 10), (0.5, 1), (None, 1), (1e9, 100)],  # one absurd bill must not stop all later jobs
)
def test_a_call_reserves_the_price_that_a_gateway_billed_before(
    world: World, markup: float | None, reserved: float
) -> None:
    price = (4 * 0.4 + 5 * 1.6) / 1e6
    bill = None if markup is None else markup * price
    first = JobGate(world, {"tokens": 1000})
    usual = first.provider.most(MODEL, first.enter(1).draft).amounts["money"]
    first.answered(first.enter(), replace(ANSWER, usage=TokenUsage(4, 5, money=bill)))

    entry = JobGate(world, {"tokens": 1000}).enter(2)

    assert entry.reserved is not None
    assert entry.reserved.amounts["money"] == pytest.approx(reserved * usual, rel=0.05)


def test_a_denied_call_gives_back_all_that_it_has_taken(world: World) -> None:
    job_gate = JobGate(world, {"tokens": 10_000}, requests=6.0, tokens=700.0)
    first = job_gate.enter(0)
    with pytest.raises(RateLimited):  # a sixth of the window may be used at once
        job_gate.enter(1)
    job_gate.gate.leave(first, ProviderDown("one", "answers 500"))
    first.grant.settle(requests=0, tokens=0)  # type: ignore[union-attr]  # it was granted

    assert job_gate.nothing_is_held
    world.sleep(60)
    assert job_gate.enter(1).flight.state == "mine"  # no flight is left over


def test_a_failing_endpoint_cannot_put_an_item_off_for_a_day(world: World) -> None:
    gate = JobGate(world, {}, hold_most_s=5.0).gate
    outcome = gate._after_failure(ProviderDown("one", "answers 503", 86_400.0), tries=0)

    assert isinstance(outcome, Postponed)
    assert 5.0 <= outcome.wait_s <= 5.5


@pytest.mark.parametrize(("keys", "turn_s"), [(["A"], 10.0), (["A", "A"], 10.0), (["A", "B"], 5.0)])
def test_denied_calls_wait_in_one_line_for_any_number_of_endpoints(
    world: World, monkeypatch: pytest.MonkeyPatch, keys: list[str], turn_s: float
) -> None:
    for key in keys:
        monkeypatch.setenv(key, "any")
    places = tuple(
        EndpointSettings(name=f"at-{number}", key_env=key) for number, key in enumerate(keys)
    )
    job_gate = JobGate(world, {}, endpoints=places, requests=6.0, tokens=1e6)
    for index in range(len(set(keys))):
        job_gate.enter(index)

    waits = []
    for index in range(10, 18):
        with pytest.raises(RateLimited) as refused:
            job_gate.enter(index)
        waits.append(refused.value.retry_after_s)

    assert (max(waits) - min(waits)) / 7 == pytest.approx(turn_s, rel=0.2), (
        "with a limit of 6 a minute there is a call every 10 s"
    )


def test_a_process_has_no_more_calls_than_its_pool(world: World) -> None:
    job_gate = JobGate(world, {}, per_host=2)
    for index in (0, 1):
        job_gate.enter(index)

    with pytest.raises(BulkheadFull):
        job_gate.enter(2)


def test_a_spent_budget_stops_the_job_when_no_call_in_flight_can_return_enough(
    world: World,
) -> None:
    job_gate = JobGate(world, {"calls": 1})
    entry = job_gate.enter(0)
    with pytest.raises(BudgetSpent) as waits:
        job_gate.enter(1)
    assert (waits.value.final, job_gate.stopped) == (False, [])

    job_gate.answered(entry)
    with pytest.raises(BudgetSpent) as ends:
        job_gate.enter(1)
    assert (ends.value.final, job_gate.stopped) == (True, [("job", "budget")])


@pytest.mark.parametrize(("model", "found"), [(MODEL, "cache"), ("another", "")])
def test_a_call_that_shares_an_answer_caches_it_only_for_the_same_model(
    world: World, model: str, found: str
) -> None:
    makes, waits = JobGate(world, {}), JobGate(world, {}, cache_ttl_s=60)
    makes.params["temperature"] = waits.params["temperature"] = 0
    first = makes.enter(0, "the same")
    second = waits.enter(1, "the same")
    assert second.flight.state == "others"

    makes.answered(first, replace(ANSWER, model=model))
    context = Context("job", {}, entry=second)
    assert asyncio.run(waits.gate.reply(context)) == "so"

    assert (Strategy.OTHER_MODEL in context.degradation.shaped) == (model != MODEL)
    assert waits.enter(2, "the same").flight.source == found


def test_an_outage_does_not_stop_a_job_that_cannot_pay_a_larger_model(world: World) -> None:
    one_call = (20 * 0.4 + 100 * 1.6) / 1e6
    models = {"gpt-4.1-nano": {"context_tokens": 50}}
    job_gate = JobGate(world, {"money": 2 * one_call}, models=models)
    breaker = job_gate.provider.breaker("one")
    assert breaker is not None
    breaker.open()

    with pytest.raises(Denied) as refused:
        job_gate.enter()

    assert refused.value.code == "CIRCUIT_OPEN"
    assert job_gate.stopped == []
    assert job_gate.nothing_is_held


@pytest.mark.parametrize(
    ("error", "tokens"),
    [
        (
            CallTimeout("endpoint one", 60),
            111,
        ),  # the provider may have answered: the reserved amount counts
        (UnusableAnswer("one", "it is cut"), 111),
        (UnusableAnswer("one", "it has no choice", TokenUsage(9, 40)), 49),
        (UnusableAnswer("one", "it has no choice", TokenUsage(None, 40)), 51),
        (ProviderDown("one", "answers 504", sent=True), 11),  # the prompt counts
        (ProviderDown("one", "answers 500"), 0),
        (RateLimited("endpoint one", 1.0, "the provider answered 429"), 0),
    ],
)
def test_the_cost_of_a_failed_call(world: World, error: Exception, tokens: float) -> None:
    job_gate = JobGate(world, {"tokens": 1000})

    job_gate.gate.leave(job_gate.enter(), error)

    assert spent(job_gate).get("tokens", 0) == pytest.approx(tokens, abs=1)
    assert not any(job_gate.guards.budgets.budget("job").status().held.values())
    assert not any(job_gate.provider.router.in_flight.values())


def test_without_redis_no_call_is_made(world: World) -> None:
    job_gate = JobGate(world, {"tokens": 1000})
    job_gate.store.lost = True

    with pytest.raises(Denied, match="Redis does not answer"):
        job_gate.enter()

    assert not any(job_gate.provider.router.in_flight.values())


def test_an_answer_is_kept_for_its_item_until_its_node_has_ended(world: World) -> None:
    job_gate, again = JobGate(world, {"calls": 9}), JobGate(world, {"calls": 9})
    entry = job_gate.enter(3, "same")
    job_gate.answered(entry)

    assert again.enter(3, "same").flight.source == "memo"
    assert again.enter(4, "same").flight.state == "mine"
    job_gate.store.call(*job_gate.gate.forgetting(3))
    assert again.enter(3, "same").flight.state == "landed"
    job_gate.store.call(*job_gate.gate.forgetting(4))
    assert again.enter(3, "same").flight.state != "landed"


def test_an_unusable_answer_is_retried_and_costs_an_attempt(world: World) -> None:
    gate = JobGate(world, {}, attempts=3).gate

    first = gate._after_failure(UnusableAnswer("one", "it is empty"), 0)
    assert isinstance(first, Postponed)
    assert first.tries == 1
    assert isinstance(gate._after_failure(UnusableAnswer("one", "it is empty"), 2), UnusableAnswer)


def test_a_call_that_cannot_be_settled_leaves_the_router_once(world: World) -> None:
    job_gate = JobGate(world, {"tokens": 1000})
    entry = job_gate.enter()
    entry.answer = replace(ANSWER, text="\ud83d")  # half of a surrogate pair cannot be stored

    for _ in range(2):
        with suppress(TypeError):
            job_gate.gate.leave(entry)

    assert dict(job_gate.provider.router.in_flight) == {"one": 0}


def test_critical_calls_may_use_the_reserve(world: World) -> None:
    limits: dict[str, Any] = {
        "requests": 120.0,
        "tokens": 1e6,
        "endpoints": (EndpointSettings(name="one", in_flight=None),),
    }  # 10 at once, of which normal work must leave 1.5
    normal, critical = (
        JobGate(world, {}, **limits),
        JobGate(world, {}, priority="critical", **limits),
    )
    for index in range(8):
        normal.enter(index)

    with pytest.raises(RateLimited):
        normal.enter(8)
    assert critical.enter(8).endpoint == "one"


@pytest.mark.parametrize("in_flight", ["auto", 4, None])
def test_a_limit_of_calls_in_flight_costs_no_round_trip(world: World, in_flight: Any) -> None:
    """A permit is taken with the rate limit, and given back when the cost is settled."""
    job_gate = JobGate(
        world,
        {"tokens": 10_000},
        endpoints=(EndpointSettings(name="one", in_flight=in_flight),),
    )
    for index in range(2):  # the first call reads the state of breakers and of endpoints
        before = job_gate.store.round_trips
        entry = job_gate.enter(index)
        assert (entry.permit is None) == (in_flight is None)
        job_gate.answered(entry)
        spent_trips = job_gate.store.round_trips - before

    assert spent_trips == 5


def test_a_full_endpoint_denies_a_node_with_items_in_flight_without_a_round_trip(
    world: World,
) -> None:
    job_gate = JobGate(world, {}, endpoints=(EndpointSettings(name="one", in_flight=1),))
    first = job_gate.enter(0)
    context = Context("job", job_gate.params, index=1)
    context.beside = 1
    with pytest.raises(BulkheadFull, match="the endpoint one has its limit of 1 call in flight"):
        job_gate.gate.enter("item 1", context, "job 1")
    before = job_gate.store.round_trips

    with pytest.raises(BulkheadFull) as denied:
        job_gate.gate.enter("item 1", context, "job 1")
    assert not denied.value.noted
    assert job_gate.store.round_trips == before

    context.beside = 0  # its other items have ended: it stands in the line, and is woken
    with pytest.raises(BulkheadFull) as denied:
        job_gate.gate.enter("item 1", context, "job 1")
    assert denied.value.noted
    assert job_gate.gate.still_waits("job 1")
    job_gate.answered(first)
    assert not job_gate.gate.still_waits("job 1")


@pytest.mark.parametrize("in_flight", [0, -1, 2.5, True, "many"])
def test_a_wrong_limit_of_calls_in_flight_is_refused(in_flight: Any) -> None:
    with pytest.raises(ValueError, match="in_flight"):
        EndpointSettings(name="one", in_flight=in_flight)
