"""Figures of earlier calls: the tokens of prompts, the lengths of answers, repairs and times."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import BulkheadFull, RateLimited
from resilience.keys import Keys
from rlm_tasks.llm.learned import (
    FEW,
    FIRST_LINE,
    HALVE_AT,
    READ_EVERY_S,
    TTL_PER_CALL_S,
    TTL_S,
    AnsweredCall,
    CallKind,
    CallStatistics,
    Learned,
    SlotPace,
)
from rlm_tasks.llm.wire.answers import Answer, TokenUsage
from rlm_tasks.llm.wire.rate_limit_headers import LimitState, RateLimitHeaders
from tests.unit.world import World, world

__all__ = ["world"]

MODEL = "gpt-4.1-mini"
UNSAID = RateLimitHeaders(LimitState(), LimitState())
LABELS = CallKind.of("llm.map", {"prompt": "Label {item}", "max_tokens": 20})
PAGES = CallKind.of("llm.map", {"prompt": "Sum up {item}", "max_tokens": 400})


class Figures:
    """The figures of one platform, and calls that are added to them."""

    def __init__(self, world: World) -> None:
        self.store = world.store()
        self.learned = Learned(self.store, world.time)

    def add(
        self, kind: CallKind, estimated: int, tokens: int, answer: int = 10, **more: Any
    ) -> None:
        usage = TokenUsage(tokens, answer)
        said = Answer(MODEL, "so", "stop", UNSAID, more.pop("latency_s", 0.5), usage)
        call = AnsweredCall(kind, estimated, more.pop("max_tokens", 100), said, **more)
        self.store.call(self.learned.learning(MODEL, call))

    def of(self, kind: CallKind) -> CallStatistics:
        return self.learned.of(MODEL, kind, whole=True)


def test_short_and_long_prompts_are_both_estimated(world: World) -> None:
    """A chat has 7 tokens around a prompt: one ratio fits short prompts or long ones, not both."""
    figures, random = Figures(world), Random(1)
    for _ in range(50):
        for estimated in (2, 5, 400, 2000):
            noise = random.uniform(0.95, 1.05)
            figures.add(PAGES, estimated, round((7 + 1.3 * estimated) * noise))

    line = figures.of(PAGES).prompt

    for estimated in (2, 30, 400, 8000):
        assert line.tokens(estimated) == pytest.approx(7 + 1.3 * estimated, rel=0.05)


def test_short_prompts_do_not_raise_the_reservation_of_long_ones(world: World) -> None:
    """Before, three prompts of "hi" made a prompt of 500 tokens reserve 5,000."""
    figures = Figures(world)
    for _ in range(3):
        figures.add(LABELS, 1, 10)

    assert 500 <= figures.of(LABELS).reserved(500) < 700
    assert figures.of(LABELS).reserved(1) >= 8


def test_each_template_has_its_own_figures(world: World) -> None:
    figures = Figures(world)
    for _ in range(60):
        figures.add(LABELS, 20, 33, answer=4, max_tokens=20, latency_s=0.1)
        figures.add(PAGES, 500, 800, answer=120, max_tokens=400, latency_s=3.0)

    labels, pages = figures.of(LABELS), figures.of(PAGES)

    assert labels.answer_share(20)[0] * 20 == pytest.approx(4, rel=0.1)
    assert pages.answer_share(400)[0] * 400 == pytest.approx(120, rel=0.1)
    assert labels.seconds < 0.5 < 2.5 < pages.seconds
    assert (labels.own, labels.calls) == (60, 120)


def test_a_new_template_begins_with_the_figures_of_its_operation_and_says_so(world: World) -> None:
    figures, new = Figures(world), CallKind.of("llm.map", {"prompt": "New {item}"})
    for _ in range(60):
        figures.add(PAGES, 500, 800, answer=40, max_tokens=100)

    known, found = figures.of(PAGES), figures.of(new)

    assert found.own == 0
    assert found.prompt.tokens(500) == pytest.approx(known.prompt.tokens(500), rel=0.02)
    expected, most = found.answer_share(1000)
    assert 40 < expected * 1000 < most * 1000 == pytest.approx(400, rel=0.02)
    assert found.answer_spread > 5 * known.answer_spread
    assert found.prompt_spread > 3 * known.prompt_spread


def test_an_unknown_template_reserves_at_least_the_first_estimate(world: World) -> None:
    figures = Figures(world)
    for number in range(FEW):
        assert figures.of(LABELS).reserved(1000) >= FIRST_LINE.tokens(1000)
        figures.add(LABELS, 1000 + number, 300)

    assert figures.of(LABELS).reserved(1000) < 800


def test_one_wrong_count_changes_little(world: World) -> None:
    figures = Figures(world)
    for number in range(100):
        figures.add(PAGES, 100 + number, 110 + number)
    before = figures.of(PAGES).prompt.tokens(150)

    figures.add(PAGES, 150, 900_000_000)
    figures.add(PAGES, 150, 1)

    assert figures.of(PAGES).prompt.tokens(150) == pytest.approx(before, rel=0.1)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 10**9), st.integers(0, 10**9)), max_size=20
    ),
    st.lists(st.integers(0, 10**6), min_size=2, max_size=10),
)
def test_any_counts_leave_an_estimate_that_grows_with_the_prompt(
    calls: list[tuple[int, int, int]], sizes: list[int]
) -> None:
    figures = Figures(World())
    for estimated, tokens, answer in calls:
        figures.add(PAGES, estimated, tokens, answer)

    found = figures.of(PAGES)

    reserved = [found.reserved(each) for each in sorted(set(sizes))]
    assert all(math.isfinite(each) and each >= 0 for each in reserved)
    assert all(few < many for few, many in pairwise(reserved))
    assert all(0 <= each <= 1 for each in found.answer_share(100))


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": "nan"},
        {"tokens": "inf"},
        {"inverse": "-1"},
        {"estimates": "0"},
        {"calls": "0"},
        {"squares": "many"},
        {"tokens": "1e300"},
        {"estimates": "1e-300"},
        {"ratios": "1e300", "tokens": "1"},
    ],
)
def test_damaged_sums_leave_a_possible_estimate(world: World, damage: dict[str, str]) -> None:
    figures = Figures(world)
    for _ in range(30):
        figures.add(PAGES, 100, 120)
    keys = Keys(figures.store.namespace)
    for key in (
        keys.model(MODEL),
        keys.model(MODEL, "calls", PAGES.operation),
        keys.model(MODEL, "calls", *PAGES),
    ):
        client: Any = figures.store.client
        client.hset(key, mapping=damage)

    found = Learned(figures.store, world.time).of(MODEL, PAGES, whole=True)

    assert 60 < found.prompt.tokens(100) < 240
    assert all(math.isfinite(each) for each in (found.seconds, found.share, found.slot_s))


def test_sums_of_the_release_before_are_read(world: World) -> None:
    store = world.store()
    old = {
        "calls": 40.0,
        "estimated": 4000.0,
        "prompt": 6000.0,
        "share": 10.0,
        "share2": 2.6,
        "seconds": 80.0,
        "seconds2": 170.0,
    }
    client: Any = store.client
    client.hset(Keys(store.namespace).model(MODEL), mapping=old)

    found = Learned(store, world.time).of(MODEL, PAGES, whole=True)

    assert found.prompt.tokens(100) == pytest.approx(150)
    assert (found.calls, found.own, found.share, found.seconds) == (40, 0, 0.25, 2.0)


def test_repairs_are_known_for_calls_with_a_form(world: World) -> None:
    figures = Figures(world)
    for number in range(40):
        figures.add(PAGES, 100, 120, has_form=True)
        if number % 4 == 0:
            figures.add(PAGES, 150, 170, has_form=True, is_repair=True)
        figures.add(LABELS, 10, 20)

    assert figures.of(PAGES).repairs == pytest.approx(0.25)
    assert figures.of(CallKind.of("llm.map", {"prompt": "New"})).repairs == pytest.approx(0.25)


def test_answers_of_this_process_count_at_once_and_of_others_after_some_seconds(
    world: World,
) -> None:
    ours, theirs = Figures(world), Figures(world)
    ours.of(PAGES)
    theirs.add(PAGES, 100, 120)
    ours.add(LABELS, 10, 20)

    assert ours.of(LABELS).own == 1
    assert ours.of(PAGES).own == 0
    world.sleep(READ_EVERY_S + 1)
    assert (ours.of(PAGES).own, ours.of(PAGES).calls) == (1, 2)


def test_sums_are_halved_and_a_template_used_once_is_soon_forgotten(world: World) -> None:
    figures = Figures(world)
    keys = Keys(figures.store.namespace)
    figures.add(LABELS, 10, 20)
    redis = figures.store.client

    assert redis.ttl(keys.model(MODEL)) == TTL_S
    assert redis.ttl(keys.model(MODEL, "calls", LABELS.operation)) == TTL_S
    assert redis.ttl(keys.model(MODEL, "calls", *LABELS)) == TTL_PER_CALL_S
    for _ in range(HALVE_AT):
        figures.add(LABELS, 10, 20)
    world.sleep(READ_EVERY_S + 1)
    assert figures.of(LABELS).calls == HALVE_AT / 2 + 1
    assert redis.ttl(keys.model(MODEL, "calls", *LABELS)) > 100 * TTL_PER_CALL_S


def test_the_seconds_of_a_slot_leave_out_the_wait_for_a_limit(world: World) -> None:
    pace = SlotPace(world.time)

    def answered_after(seconds: float) -> float | None:
        world.sleep(seconds)
        return pace.answered(0.1)

    assert answered_after(1) is None, "there is no answer before"
    assert answered_after(0.02) == pytest.approx(0.02)
    pace.denied(BulkheadFull("pool", 0.1, "it is full"))
    assert answered_after(0.03) == pytest.approx(0.03)
    assert answered_after(60) == 1.0, "the slot did something else meanwhile"
    pace.denied(RateLimited("bucket", 3.0, "it waits"))
    assert answered_after(0.01) is None, "this call was in flight"
    world.sleep(3)
    pace.entered()
    assert answered_after(0.1) is None, "it has waited for a limit"
    assert answered_after(0.02) == pytest.approx(0.02)
