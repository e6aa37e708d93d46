"""The order of endpoints for a call: by turns, by calls in flight, or by key, and without those
that are away.
"""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import InvalidValue
from scheduler.routing import Router, RoutingAlgorithm

ALGORITHMS = get_args(RoutingAlgorithm)
NAMES = ["a", "b", "c", "d", "e"]
WEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(
    lambda each: dict(zip(NAMES, each, strict=False))
)


def firsts(router: Router, turns: int, without: str = "") -> list[str]:
    """Return the endpoints of the next calls, while one is away."""
    return [next(name for name in router.order() if name != without) for _ in range(turns)]


@given(
    WEIGHTS,
    st.sampled_from(ALGORITHMS),
    st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=9),
)
def test_every_order_has_each_endpoint_once(
    weights: dict[str, int], algorithm: RoutingAlgorithm, keys: list[str]
) -> None:
    router = Router(weights, algorithm)

    for key in keys:
        order = router.order(key)
        assert sorted(order) == sorted(weights)
        router.began(order[0])


def test_round_robin_ignores_the_weights() -> None:
    router = Router({"a": 9, "b": 1, "c": 0.5}, "round_robin")

    assert firsts(router, 6) == ["a", "b", "c", "a", "b", "c"]


def test_the_turns_of_a_missing_endpoint_are_shared_by_the_others() -> None:
    alike, weighted = (
        Router(dict.fromkeys("abc", 1), "round_robin"),
        Router({"a": 2, "b": 1, "c": 3}, "weighted"),
    )

    assert Counter(firsts(alike, 6, without="b")) == {"a": 3, "c": 3}
    assert Counter(firsts(weighted, 6 * 5, without="b")) == {"a": 12, "c": 18}


# --- by weight --------------------------------------------------------------------------------


def test_turns_by_weight_equal_those_of_nginx() -> None:
    assert "".join(firsts(Router({"a": 5, "b": 1, "c": 1}, "weighted"), 7)) == "aabacaa"


@given(WEIGHTS, st.sampled_from([1, 10, 0.01]))
def test_shares_are_exact_and_turns_repeat(weights: dict[str, int], unit: float) -> None:
    """In any unit: tenths are as exact as whole numbers."""
    common = math.gcd(*weights.values())
    period = sum(weights.values()) // common
    turns = firsts(
        Router({name: weight / unit for name, weight in weights.items()}, "weighted"), 3 * period
    )

    assert turns == 3 * turns[:period] == firsts(Router(weights, "weighted"), 3 * period)
    assert Counter(turns[:period]) == {name: weight // common for name, weight in weights.items()}


@given(WEIGHTS)
def test_no_endpoint_is_a_turn_ahead_of_its_share_or_far_behind(weights: dict[str, int]) -> None:
    n, whole = len(weights), sum(weights.values())
    behind = sum(Fraction(1, each) for each in range(2, n + 1))
    had, router = Counter(dict.fromkeys(weights, 0)), Router(weights, "weighted")

    for turn in range(1, 2 * whole + 1):
        had.update(firsts(router, 1))
        for name, weight in weights.items():
            share = Fraction(turn * weight, whole)
            assert share - behind <= had[name] <= share + 1 - Fraction(1, n)


@given(WEIGHTS)
def test_the_time_between_two_turns_is_bounded(weights: dict[str, int]) -> None:
    """An endpoint due every x turns comes within x turns, and a part of x that grows with the
    logarithm of their number.
    """
    whole, late = sum(weights.values()), sum(1 / each for each in range(1, len(weights)))
    turns = firsts(Router(weights, "weighted"), 3 * whole)

    for name, weight in weights.items():
        at = [turn for turn, first in enumerate(turns) if first == name]
        gaps = [after - before for before, after in pairwise(at)]
        assert max(gaps) <= 1 + late * whole / weight


# --- by calls in flight -----------------------------------------------------------------------


@given(
    WEIGHTS,
    st.lists(st.sampled_from([True, True, False]), max_size=60),
    st.randoms(use_true_random=False),
)
def test_calls_go_to_the_endpoint_with_least_in_flight_for_its_weight(
    weights: dict[str, int], began: list[bool], random: Any
) -> None:
    router, flying = (
        Router({name: weight / 10 for name, weight in weights.items()}, "least_connections"),
        Counter[str](),
    )

    for begins in began:
        if begins:
            order = router.order()
            loads = [Fraction(flying[name], weights[name]) for name in order]
            assert loads == sorted(loads)
            router.began(order[0])
            flying[order[0]] += 1
        elif flying.total():
            router.ended(ended := random.choice(list(flying.elements())))
            flying[ended] -= 1
        assert router.in_flight == {name: flying[name] for name in weights}


@given(WEIGHTS, st.integers(1, 60))
def test_calls_in_flight_are_balanced(weights: dict[str, int], calls: int) -> None:
    router = Router(weights, "least_connections")
    for _ in range(calls):
        router.began(router.order()[0])

    load = {name: Fraction(count, weights[name]) for name, count in router.in_flight.items()}
    assert all(load[name] <= min(load.values()) + Fraction(1, weights[name]) for name in weights), (
        "they differ by one call at most"
    )


def test_ties_are_broken_by_turns() -> None:
    router = Router({"a": 2, "b": 1}, "least_connections")

    assert Counter(firsts(router, 6)) == {"a": 4, "b": 2}, "all are idle at each call"


# --- by key -----------------------------------------------------------------------------------

KEYS = [str(number) for number in range(2000)]


def owners(weights: dict[str, float]) -> dict[str, str]:
    router = Router(weights, "consistent_hash")
    return {key: router.order(key)[0] for key in KEYS}


def test_a_key_has_the_same_order_in_every_process_and_version() -> None:
    router = Router(dict.fromkeys("abcd", 1), "consistent_hash")

    assert ["".join(router.order(key)) for key in ("", "one", "two", "three")] == [
        "abcd",
        "dcba",
        "acdb",
        "dbca",
    ]
    assert router.order("one") == router.order("one")


@settings(max_examples=30)
@given(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=2, max_size=5), st.data())
def test_without_one_endpoint_the_order_of_the_others_stays(
    weights: list[float], data: st.DataObject
) -> None:
    every = dict(zip(NAMES, weights, strict=False))
    gone = data.draw(
        st.sampled_from([name for name in every if sorted(weights)[-1] != every[name]] or ["a"])
    )
    before = Router(every, "consistent_hash")
    after = Router(
        {name: weight for name, weight in every.items() if name != gone}, "consistent_hash"
    )

    for key in KEYS[:20]:
        assert after.order(key) == [name for name in before.order(key) if name != gone]


def test_only_the_keys_of_a_missing_endpoint_move_to_the_others() -> None:
    every = dict.fromkeys(NAMES, 1.0)
    before, after = owners(every), owners(dict.fromkeys("abde", 1.0))
    moved = Counter(after[key] for key in KEYS if before[key] != after[key])

    assert moved.total() == Counter(before.values())["c"] <= 1.2 * len(KEYS) / 5
    assert set(moved) == set("abde")
    assert max(moved.values()) <= moved.total() / 2


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_keys_are_shared_by_weight_in_any_unit(scale: float) -> None:
    weights = {"a": 1.0 * scale, "b": 2.0 * scale, "c": 5.0 * scale}
    found = Counter(owners(weights).values())

    for name, weight in weights.items():
        assert found[name] == pytest.approx(len(KEYS) * weight / sum(weights.values()), rel=0.2)


# --- refused arguments ------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_wrong_weight_is_refused(algorithm: RoutingAlgorithm, weight: float) -> None:
    with pytest.raises(InvalidValue, match=r"weights\[b\]=.*: must be a number above 0"):
        Router({"a": 1, "b": weight}, algorithm)


def test_a_router_without_endpoints_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"weights=\{\}: must name one endpoint at least"):
        Router({}, "weighted")


def test_an_unknown_algorithm_is_refused() -> None:
    wrong: Any = "random"
    with pytest.raises(
        InvalidValue,
        match="algorithm='random': must be one of round_robin, least_connections, weighted, consi",
    ):
        Router({"a": 1}, wrong)
