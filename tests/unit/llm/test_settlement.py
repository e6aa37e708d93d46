"""The end of a call to a model: whatever ends it, its cost is settled and nothing stays held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from random import Random

import pytest

from resilience.errors import BulkheadFull, CallTimeout, Category, RateLimited
from rlm_tasks.llm.endpoint_pool import NOTHING
from rlm_tasks.llm.settlement import HeldCall
from rlm_tasks.llm.wire.answers import Answer, TokenUsage, usage_in
from rlm_tasks.llm.wire.errors import ProviderDown, ProviderRefused, UnusableAnswer
from tests.unit.llm.test_gate import MODEL, UNSAID, JobGate, spent
from tests.unit.world import World, world

__all__ = ["world"]

USAGES = (
    {},
    {"prompt_tokens": 9, "completion_tokens": 4},
    {"prompt_tokens": 5000, "completion_tokens": 1},
    {"prompt_tokens": -3, "completion_tokens": -5000},
    {"prompt_tokens": "12", "completion_tokens": 3.0, "total_tokens": "15"},
    {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    {"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 922},
    {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 99}},
    {"prompt_tokens": float("nan"), "completion_tokens": float("inf"), "total_tokens": True},
    {"total_tokens": 40},
    {"prompt_tokens": 10, "completion_tokens": 5, "cost": 0.5},
)
ERRORS: tuple[Callable[[Random], BaseException], ...] = (
    lambda _: CallTimeout("endpoint one", 60),
    lambda _: RateLimited("endpoint one", 0.01, "the provider answered 429"),
    lambda _: ProviderDown("one", "answers 500"),
    lambda _: ProviderDown("one", "answers 504", sent=True),
    lambda _: ProviderRefused("one", Category.VALIDATION, "CONTEXT_LENGTH_EXCEEDED", "no", 400),
    lambda _: ProviderRefused("one", Category.AUTH, "UNAUTHORISED", "no", 401),
    lambda random: UnusableAnswer("one", "it is cut", usage_in(random.choice(USAGES))),
    lambda _: asyncio.CancelledError(),
    lambda _: KeyboardInterrupt(),
    lambda _: ValueError("anything"),
)


def end(job_gate: JobGate, held: HeldCall, random: Random) -> float:
    """End a call in any way; return the tokens that its provider bills, as far as it says so."""
    if random.random() < 0.4:
        job_gate.gate.leave(held, random.choice(ERRORS)(random))
        return 0.0
    usage = usage_in(random.choice(USAGES))
    fault = random.choice(("", "", "REFUSED", "ANSWER_EMPTY"))
    job_gate.answered(held, Answer(MODEL, "" if fault else "so", "stop", UNSAID, 0.5, usage, fault))
    return float((usage.prompt_tokens or 0) + (usage.completion_tokens or 0))


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_estimates_and_outcomes_leaves_nothing_held(
    world: World, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random, billed, calls = Random(seed), 0.0, 0
    job_gate = JobGate(world, {"tokens": 10_000_000}, tokens=1e8, requests=1e6)
    monkeypatch.setattr(job_gate.provider, "breaker", lambda name: None)
    held: list[HeldCall] = []
    for index in range(150):
        world.sleep(random.choice((0.1, 11.0)))  # after 10 s the learned figures are read again
        if len(held) < 9:
            words = "word " * random.choice((1, 1, 30, 900))
            with suppress(RateLimited, BulkheadFull):  # a 429 pauses the limit
                held.append(job_gate.enter(index, f"{index} {words}"))
                calls += 1
        while held and random.random() < 0.6:
            billed += end(job_gate, held.pop(random.randrange(len(held))), random)
    for each in held:
        billed += end(job_gate, each, random)

    used = job_gate.guards.budgets.budget("job").status()
    assert calls > 100
    assert not any(used.held.values())
    assert not any(job_gate.provider.router.in_flight.values())
    bulkhead = job_gate.provider.bulkhead("one")
    assert bulkhead is not None
    assert bulkhead.status()["used"] == 0
    client = world.client()
    assert not [key for key in client.scan_iter("*made*") if client.hexists(key, "holder")]
    assert used.spent["tokens"] >= billed
    assert min(used.spent.values()) >= 0


def test_a_late_change_of_the_estimate_does_not_change_what_was_reserved(world: World) -> None:
    job_gate = JobGate(world, {"tokens": 100_000})
    long = job_gate.enter(0, "word " * 400)
    for index in range(1, 4):  # ten tokens where one was estimated
        job_gate.answered(
            job_gate.enter(index), Answer(MODEL, "so", "stop", UNSAID, 0.5, TokenUsage(5000, 5))
        )
        world.sleep(11)
    before = spent(job_gate)["tokens"]

    job_gate.gate.leave(long, CallTimeout("endpoint one", 60))

    assert long.reserved is not None
    assert spent(job_gate)["tokens"] - before == long.reserved.amounts["tokens"]
    assert not any(job_gate.guards.budgets.budget("job").status().held.values())


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": "12", "completion_tokens": 3.0}, TokenUsage(12, 3)),
        ({"prompt_tokens": 12, "completion_tokens": -3}, TokenUsage(12)),
        ({"prompt_tokens": 0, "completion_tokens": 4}, TokenUsage(None, 4)),
        ({"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 922}, TokenUsage(10, 912)),
        ({"prompt_tokens": 10, "total_tokens": 30}, TokenUsage(10, 20)),
        ({"completion_tokens": 10, "total_tokens": 30}, TokenUsage(20, 10)),
        ({"total_tokens": 30}, TokenUsage(None, 30, total_only=True)),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 2,
                "completion_tokens_details": {"reasoning_tokens": 50},
            },
            TokenUsage(10, 52),
        ),
        (
            {"prompt_tokens": 90, "completion_tokens": 2, "prompt_cache_hit_tokens": 80},
            TokenUsage(90, 2, 80),
        ),
        ({"input_tokens": 9, "output_tokens": 2, "cost": "0.25"}, TokenUsage(9, 2, 0, 0.25)),
        ({"prompt_tokens": 1e99, "completion_tokens": True}, TokenUsage()),
    ],
)
def test_usage_is_read_in_the_forms_of_many_providers(
    usage: dict[str, object], expected: TokenUsage
) -> None:
    assert usage_in(usage) == expected


def test_cached_tokens_have_their_own_price_and_a_stated_price_is_believed(world: World) -> None:
    pool = JobGate(world, {}).provider
    most = pool.bill(MODEL, TokenUsage(10, 10), NOTHING)

    assert most.amounts["money"] == pytest.approx((10 * 0.4 + 10 * 1.6) / 1e6)
    cached = pool.bill(MODEL, TokenUsage(10_000, 0, 9984), most)
    assert cached.amounts["money"] == pytest.approx((16 * 0.4 + 9984 * 0.1) / 1e6)
    stated = pool.bill(MODEL, TokenUsage(10, 10, money=0.25), most)
    assert stated.amounts == {"calls": 1, "tokens": 20, "money": 0.25}


@pytest.mark.parametrize(
    ("status", "category", "state"),
    [
        (400, Category.VALIDATION, "closed"),  # the endpoint has answered
        (0, Category.VALIDATION, "half-open"),  # nothing was sent
        (401, Category.AUTH, "half-open"),
    ],
)
def test_a_refused_question_counts_as_a_success_of_the_breaker(
    world: World, status: int, category: Category, state: str
) -> None:
    job_gate = JobGate(world, {})
    breaker = job_gate.provider.breaker("one")
    assert breaker is not None
    breaker.open()
    world.sleep(31)

    for index in range(3):  # as many probes as close it
        refused = ProviderRefused("one", category, "CONTEXT_LENGTH_EXCEEDED", "no", status)
        job_gate.gate.leave(job_gate.enter(index), refused)

    assert breaker.status()["state"] == state
