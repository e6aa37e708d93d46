"""Pressure levels: their constraints, and the record of the strategies that were used."""

from __future__ import annotations

import contextvars
import json
import operator
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.degradation import (
    CONSTRAINTS,
    IN_FORCE,
    THRESHOLDS,
    Degradation,
    Level,
    ResourceConstraints,
    Strategy,
    as_level,
    level_of,
)
from resilience.errors import short_repr
from rlm_tasks.operations.context import Context

LIMITS, OPTIONAL, EXPENSIVE, SIMPLIFIED, EMBEDDINGS, *_ = Strategy
ALL = {LIMITS, OPTIONAL, EXPENSIVE, SIMPLIFIED, EMBEDDINGS}

QUESTIONS: dict[str, tuple[Strategy, Callable[[Any], Any]]] = {
    "limit": (LIMITS, lambda asked: asked.limit(1000)),
    "skip_optional": (OPTIONAL, lambda asked: asked.skip_optional),
    "skip_expensive": (EXPENSIVE, lambda asked: asked.skip_expensive),
    "simplified": (SIMPLIFIED, lambda asked: asked.simplified),
    "embedding_dimensions": (EMBEDDINGS, lambda asked: asked.embedding_dimensions(768)),
}
"""Questions to a Degradation or to an operation's ctx; the strategy behind each, and a call."""
SAME_BY_RESOURCE_CONSTRAINTS: dict[str, Callable[[Any], Any]] = {
    "limit": ResourceConstraints.get_entity_limit,
    "skip_optional": ResourceConstraints.should_skip_optional_analysis,
    "skip_expensive": ResourceConstraints.should_skip_expensive_computation,
    "simplified": ResourceConstraints.should_use_simplified_methods,
    "embedding_dimensions": ResourceConstraints.get_embedding_dimensions,
}
ANSWERS: list[tuple[Level, tuple[int, bool, bool, bool, int]]] = [
    (Level.NORMAL, (1000, False, False, False, 768)),
    (Level.ELEVATED, (800, False, False, False, 768)),
    (Level.HIGH, (800, True, True, False, 768)),
    (Level.CRITICAL, (500, True, True, True, 384)),
    (Level.EMERGENCY, (300, True, True, True, 384)),
]
"""The answers to QUESTIONS at each level, in the same order."""


# --- levels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "level"),
    [
        (0, Level.NORMAL),
        (64.9, Level.NORMAL),
        (65, Level.ELEVATED),
        (74.9, Level.ELEVATED),
        (75, Level.HIGH),
        (84.9, Level.HIGH),
        (85, Level.CRITICAL),
        (94.9, Level.CRITICAL),
        (95.1, Level.EMERGENCY),
        (250, Level.EMERGENCY),
    ],
)
def test_a_percentage_belongs_to_a_level(percent: float, level: Level) -> None:
    assert level_of(percent) is level


def test_thresholds_may_be_given() -> None:
    assert THRESHOLDS == (65.0, 75.0, 85.0, 95.0)
    assert [level_of(percent, (10, 20, 30, 40)) for percent in (9, 10, 25, 39, 40)] == [
        Level.NORMAL,
        Level.ELEVATED,
        Level.HIGH,
        Level.CRITICAL,
        Level.EMERGENCY,
    ]


@pytest.mark.parametrize("level", Level)
def test_a_level_may_be_given_by_name_or_number(level: Level) -> None:
    assert [
        as_level(each) for each in (level, level.label, level.name, level.label.title(), int(level))
    ] == [level] * 5


@pytest.mark.parametrize("wrong", ["severe", "", "3", 5, -1, 1.5, None, [], "high "])
def test_an_unknown_level_is_refused_with_a_list_of_all_levels(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"there are normal, elevated, high, critical, emergency$"
    ) as caught:
        as_level(wrong)
    assert str(caught.value).startswith(f"level={short_repr(wrong)}: is no pressure level")


# --- the constraints of each level ------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "strategies"),
    [
        (Level.NORMAL, set()),
        (Level.ELEVATED, {"reduce_entity_limits"}),
        (
            Level.HIGH,
            {"reduce_entity_limits", "skip_optional_analysis", "disable_expensive_computations"},
        ),
        (
            Level.CRITICAL,
            {
                "reduce_entity_limits",
                "skip_optional_analysis",
                "disable_expensive_computations",
                "use_simplified_methods",
                "reduce_embedding_dimensions",
            },
        ),
        (Level.EMERGENCY, ALL),
    ],
)
def test_the_strategies_of_each_level(level: Level, strategies: set[str]) -> None:
    assert set(CONSTRAINTS[level].strategies) == strategies


@pytest.mark.parametrize(
    ("level", "factor", "of_1000", "of_1", "of_2", "of_3", "of_10"),
    [
        (Level.NORMAL, 1.0, 1000, 1, 2, 3, 10),
        (Level.ELEVATED, 0.8, 800, 1, 1, 2, 8),
        (Level.HIGH, 0.8, 800, 1, 1, 2, 8),
        (Level.CRITICAL, 0.5, 500, 1, 1, 1, 5),
        (Level.EMERGENCY, 0.3, 300, 1, 1, 1, 3),
    ],
)
def test_entity_limits_shrink_by_the_factor_of_the_level_and_stay_above_zero(
    level: Level, factor: float, of_1000: int, of_1: int, of_2: int, of_3: int, of_10: int
) -> None:
    asked = Degradation(level)

    assert asked.constraints.entity_limit_factor == factor
    assert [asked.limit(most) for most in (1000, 1, 2, 3, 10, 0)] == [
        of_1000,
        of_1,
        of_2,
        of_3,
        of_10,
        0,
    ]


@pytest.mark.parametrize(("level", "answers"), ANSWERS)
def test_the_answers_at_each_level(level: Level, answers: tuple[Any, ...]) -> None:
    assert tuple(ask(Degradation(level)) for _, ask in QUESTIONS.values()) == answers


@given(full=st.integers(0, 10**9), level=st.sampled_from(Level))
def test_a_limit_falls_as_the_level_rises_and_stays_at_least_one(full: int, level: Level) -> None:
    limits = [Degradation(each).limit(full) for each in Level]

    assert limits == sorted(limits, reverse=True)
    assert all(min(full, 1) <= limit <= full for limit in limits)
    assert Degradation(level).limit(full) <= max(
        min(full, 1), full * CONSTRAINTS[level].entity_limit_factor + 1e-6
    )


@given(level=st.sampled_from(Level), wholes=st.integers(1, 10**6))
def test_a_limit_that_is_a_whole_number_is_not_rounded_down(level: Level, wholes: int) -> None:
    tenths = round(CONSTRAINTS[level].entity_limit_factor * 10)

    assert Degradation(level).limit(10 * wholes) == tenths * wholes


def test_constraints_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        CONSTRAINTS[Level.NORMAL].entity_limit_factor = 0.1  # type: ignore[misc]  # tested here


# --- the record of strategies -----------------------------------------------------------------


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_strategy_is_recorded_when_it_is_asked_for_and_in_force(
    question: str, level: Level
) -> None:
    strategy, ask = QUESTIONS[question]
    asked = Degradation(level)
    assert asked.shaped == set()

    for _ in range(2):
        ask(asked)

    assert asked.shaped == {strategy} & set(CONSTRAINTS[level].strategies)


@pytest.mark.parametrize("most", [0, 1])
def test_a_limit_that_cannot_be_lower_is_not_recorded(most: int) -> None:
    asked = Degradation(Level.EMERGENCY)

    assert (asked.limit(most), asked.embedding_dimensions(most), asked.shaped) == (
        most,
        most,
        set(),
    )


_QUESTIONS = st.lists(
    st.one_of(
        st.sampled_from([ask for _, ask in QUESTIONS.values()]),
        st.integers(-5, 10**6).map(
            lambda most: lambda asked: (asked.limit(most), asked.embedding_dimensions(most))
        ),
    ),
    max_size=20,
)


@given(questions=_QUESTIONS)
def test_at_normal_nothing_is_recorded(
    questions: list[Callable[[Any], Any]],
) -> None:
    asked = Degradation()

    for ask in questions:
        ask(asked)

    assert (asked.level, asked.shaped) == (Level.NORMAL, set())


@given(questions=_QUESTIONS, level=st.sampled_from(Level))
def test_only_strategies_in_force_are_recorded(
    questions: list[Callable[[Any], Any]], level: Level
) -> None:
    asked = Degradation(level)

    for ask in questions:
        ask(asked)

    assert asked.shaped <= set(CONSTRAINTS[level].strategies)


# --- the fingerprint in cache keys ------------------------------------------------------------


def test_a_fingerprint_is_empty_at_normal_and_different_at_each_other_level() -> None:
    prints = {level: CONSTRAINTS[level].fingerprint for level in Level}

    assert prints[Level.NORMAL] == ""
    assert len(set(prints.values())) == len({CONSTRAINTS[level] for level in Level}) == len(Level)


# --- the functions of ResourceConstraints -----------------------------------------------------


@pytest.fixture(
    params=["ctx", "dict", "nothing", "a dict without a level", "an object of one's own"]
)
def context_of(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[Level], tuple[Any, Degradation | None]]]:
    """Return a function from a level to a context and the record that its questions leave traces
    in; a dict has no record.
    """
    token = IN_FORCE.set(None)

    def context(level: Level) -> tuple[Any, Degradation | None]:
        record = Degradation(level)
        if request.param == "ctx":
            return Context("job", {}, degradation=record), record
        if request.param == "dict":
            return {"pressure_level": level, "document_text": "..."}, None
        IN_FORCE.set(record)
        return {"nothing": None, "a dict without a level": {"tables": []}}.get(
            request.param, object()
        ), record

    yield context
    IN_FORCE.reset(token)


@pytest.mark.parametrize(("level", "answers"), ANSWERS)
def test_the_functions_give_the_same_answers(
    context_of: Any, level: Level, answers: tuple[Any, ...]
) -> None:
    context, record = context_of(level)

    assert tuple(ask(context) for ask in SAME_BY_RESOURCE_CONSTRAINTS.values()) == answers
    assert record is None or record.shaped == set(CONSTRAINTS[level].strategies)


@pytest.mark.parametrize("level", Level)
def test_get_constraints_returns_a_dict_and_records_what_is_read(
    context_of: Any, level: Level
) -> None:
    context, record = context_of(level)
    factor, skip, expensive, simplified, embeddings = {
        Level.NORMAL: (1.0, False, False, False, 1.0),
        Level.ELEVATED: (0.8, False, False, False, 1.0),
        Level.HIGH: (0.8, True, True, False, 1.0),
        Level.CRITICAL: (0.5, True, True, True, 0.5),
        Level.EMERGENCY: (0.3, True, True, True, 0.5),
    }[level]

    constraints = ResourceConstraints.get_constraints(context)
    assert constraints == {
        "pressure_level": level.label,
        "entity_limit_factor": factor,
        "skip_optional_analysis": skip,
        "skip_expensive_computation": expensive,
        "use_simplified_methods": simplified,
        "embedding_dimensions_factor": embeddings,
    }
    assert record is None or record.shaped == set(), "nothing was read"
    # The snippet of the documents: its answers depend on these two.
    assert (constraints["use_simplified_methods"], constraints.get("skip_optional_analysis")) == (
        simplified,
        skip,
    )
    read = {Strategy.SIMPLIFIED: simplified, Strategy.OPTIONAL: skip}
    assert record is None or record.shaped == {each for each in read if read[each]}


@pytest.mark.parametrize(
    "read",
    [
        lambda found: {**found},
        dict,
        json.dumps,
        lambda found: [*found.values()],
        lambda found: found.copy(),
    ],
)
def test_a_copy_of_all_constraints_records_those_in_force(read: Callable[[Any], Any]) -> None:
    degradation = Degradation(Level.CRITICAL)
    context = Context("job", {}, degradation=degradation)
    read(ResourceConstraints.get_constraints(context))
    assert degradation.shaped == set(degradation.constraints.strategies)


@pytest.mark.parametrize(
    "read",
    [
        lambda found: found.pop("use_simplified_methods"),
        lambda found: found.setdefault("use_simplified_methods", False),
        operator.itemgetter("use_simplified_methods"),
        "{use_simplified_methods}".format_map,
    ],
)
def test_each_way_to_read_one_constraint_records_it(read: Callable[[Any], Any]) -> None:
    degradation = Degradation(Level.CRITICAL)
    context = Context("job", {}, degradation=degradation)
    assert str(read(ResourceConstraints.get_constraints(context))) == "True"
    assert degradation.shaped == {Strategy.SIMPLIFIED}


def test_constraints_that_are_handed_on_still_record_what_is_read() -> None:
    degradation = Degradation(Level.HIGH)
    handed_on = ResourceConstraints.get_constraints(Context("job", {}, degradation=degradation))
    assert ResourceConstraints.should_skip_optional_analysis(handed_on)
    assert degradation.shaped == {Strategy.OPTIONAL}


@pytest.mark.parametrize("level", [Level.CRITICAL, "critical", "CRITICAL", 3])
def test_the_level_in_a_dict_counts_before_the_level_in_force(level: Any) -> None:
    def ask() -> tuple[int, set[Strategy]]:
        running = Degradation(Level.EMERGENCY)
        IN_FORCE.set(running)
        return ResourceConstraints.get_entity_limit(
            {"pressure_level": level}, default=10
        ), running.shaped

    assert contextvars.copy_context().run(ask) == (5, set())


def test_a_dict_with_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level='severe': is no pressure level"):
        ResourceConstraints.should_skip_optional_analysis({"pressure_level": "severe"})


def test_the_dict_of_get_constraints_may_be_used_as_a_context() -> None:
    handed_on = ResourceConstraints.get_constraints({"pressure_level": "high"})

    assert ResourceConstraints.get_constraints(handed_on) == handed_on


def test_outside_of_an_item_the_answers_are_those_of_normal() -> None:
    def ask() -> tuple[Any, ...]:
        return tuple(ask(None) for ask in SAME_BY_RESOURCE_CONSTRAINTS.values())

    assert contextvars.Context().run(ask) == ANSWERS[0][1]


def test_the_caller_gives_the_full_values() -> None:
    context = {"pressure_level": "emergency"}

    assert ResourceConstraints.get_entity_limit(context, default=10) == 3
    assert ResourceConstraints.get_embedding_dimensions(context, default=100) == 50
