"""The operations that call models: their prompts, merges and rounds; no model is called."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs.rounds import NextRound, Round
from rlm_tasks.llm.operations import (
    Found,
    _best,
    _in_groups,
    _merge_next,
    _narrow,
    _packed,
    _ranges,
    _read,
)
from rlm_tasks.llm.params import Map
from rlm_tasks.llm.wire.answers import estimated_tokens
from rlm_tasks.operations import registry
from rlm_tasks.requests import Budget, JobRequest, Options
from rlm_tasks.settings.llm import LlmSettings
from rlm_tasks.settings.model import Settings

registry.import_operations(())
ROOM = 100


def ended(number: int = 0, *, done: int = 1, short: bool = False, **params: Any) -> Round:
    return Round(number, params, done, done, "", short)


def prepared(
    operation: str, items: Any, params: dict[str, Any], budget: Budget | None = None, **llm: Any
) -> JobRequest:
    prepare = registry.get(operation).prepare
    assert prepare is not None
    request = JobRequest(
        operation=operation, items=items, params=params, options=Options(budget=budget)
    )
    return prepare(request, Settings(llm=LlmSettings(**llm)))


@pytest.mark.parametrize(
    ("budget", "llm", "why"),
    [
        (
            Budget(tokens=1000),
            {},
            "one answer may take 1024 tokens; set a larger budget or a smaller max_tokens",
        ),
        (
            Budget(money=1),
            {"medium": "own"},
            "model own has no price; set it in RLM_LLM__MODELS, to 0 if it costs nothing",
        ),
    ],
)
def test_a_wrong_budget_is_refused(budget: Budget, llm: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        prepared("llm.map", ["a"], {"prompt": "{item}"}, budget, **llm)


# --- prompts ----------------------------------------------------------------------------------


def test_placeholders_are_replaced_once_and_text_of_items_is_never_a_placeholder() -> None:
    item = {"a": "{b} {item}", "b": "{a}", "c": 3}

    assert Map(prompt="{a}|{b}|{c}|{d}|{a}").filled(item) == "{b} {item}|{a}|3|{d}|{b} {item}"
    assert Map(prompt="<{item}>").filled("{item} {a}") == "<{item} {a}>"


def test_a_prompt_without_a_placeholder_gets_the_item_at_its_end() -> None:
    assert Map(prompt="Shorten this.").filled("{item}") == "Shorten this.\n\n{item}"
    assert (
        Map(prompt="Shorten this.").filled({"a": date(2026, 1, 2)})
        == 'Shorten this.\n\n{"a": "2026-01-02"}'
    )


# --- merging ----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 400), max_size=30), st.integers(2, 8))
def test_groups_of_answers_are_in_order_within_their_bounds_and_at_least_two(
    sizes: list[int], most: int
) -> None:
    parts = ["x" * size for size in sizes]

    groups = list(_in_groups(iter(parts), most, ROOM))

    assert [part for group in groups for part in group] == parts
    assert all(len(group) <= most for group in groups)
    assert all(len(group) >= 2 for group in groups[:-1])
    for group in groups:
        assert len(group) <= 2 or sum(estimated_tokens(part) + 1 for part in group) <= ROOM


def test_one_answer_needs_no_merge() -> None:
    assert _merge_next(iter(["only"]), ended(prompt="x")) == "only"
    assert _merge_next(iter([]), ended(prompt="x")) is None
    merged = _merge_next(iter("abc"), ended(done=3, prompt="x", group_tokens=ROOM))
    assert isinstance(merged, NextRound)
    assert (merged.operation, list(merged.items), merged.last, merged.strict) == (
        "llm.merge",
        [["a", "b", "c"]],
        True,
        True,
    )


def test_answers_too_long_to_be_merged_are_refused_before_any_call() -> None:
    with pytest.raises(
        InvalidRequest, match="max_tokens=80: two answers of this length do not fit into one merge"
    ):
        prepared("llm.map_reduce", ["a"], {"prompt": "x", "max_tokens": 80}, tokens=650)

    assert (
        prepared("llm.map_reduce", ["a"], {"prompt": "x", "max_tokens": 20}, tokens=700).params[
            "group_tokens"
        ]
        > 40
    )


def test_a_tier_without_an_endpoint_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no endpoint of RLM_LLM__ENDPOINTS has its model gpt"):
        prepared(
            "llm.map", ["a"], {"prompt": "x"}, endpoints=[{"name": "a", "models": {"other": "o"}}]
        )


# --- questions --------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=900), max_size=12))
def test_passages_are_packed_whole_or_cut_between_characters(
    texts: list[str],
) -> None:
    groups = list(_packed(([number, text] for number, text in enumerate(texts)), ROOM))

    back: dict[int, str] = {}
    for number, text in (passage for group in groups for passage in group):
        back[number] = back.get(number, "") + text
    assert back == {
        number: text.encode(errors="replace").decode() for number, text in enumerate(texts)
    }
    assert all(sum(estimated_tokens(text) + 3 for _, text in group) <= ROOM for group in groups)


def test_found_passages_are_among_those_read_and_listed_once() -> None:
    item = {"passages": [[3, "c"], [4, "d"], [4, "D"]]}

    assert _read(item, Found(found=[4, 9, 4, 3], answer="so")) == {
        "kept": [[4, "d"], [4, "D"], [3, "c"]],
        "note": "so",
        "read": [3, 5],
    }


def test_found_passages_are_answered_if_they_fit_and_read_again_if_not() -> None:
    found = [{"kept": [[n, "x" * 100]], "note": f"n{n}", "read": [n, n + 1]} for n in range(3)]

    answer = _narrow(found, ended(question="why?", group_tokens=ROOM))
    more = [{"kept": [[n, "x" * 100]], "note": f"n{n}", "read": [n, n + 1]} for n in range(9)]
    again = _narrow(more, ended(question="why?", group_tokens=ROOM))

    assert (answer.operation, answer.last, answer.strict) == ("llm.answer", True, True)
    assert next(iter(answer.items))["about"] == {
        "read": 3,
        "found": 3,
        "rounds": 1,
        "complete": True,
    }
    assert again.operation == "llm.ask"
    assert [group["read"] for group in again.items] == [9, 9, 9]


def test_the_last_round_takes_the_best_passages_that_fit_and_reports_it() -> None:
    found = [
        {"kept": [[n, "x" * 100], [n + 10, "y" * 600]], "note": "", "read": 9} for n in range(3)
    ]

    answer = _narrow(found, ended(3, question="why?", group_tokens=ROOM, max_rounds=4))

    [item] = answer.items
    assert [number for number, _ in item["passages"]] == [0, 1, 2]
    assert item["about"]["complete"] is False
    assert _best([{"kept": [[1, "z" * 1000], [2, "short"]]}], ROOM) == [[2, "short"]]


@pytest.mark.parametrize("short", [False, True])
def test_an_empty_answer_reports_whether_all_items_were_read(short: bool) -> None:
    found = [{"kept": [], "note": "", "read": [0, 40]}, {"kept": [], "note": "", "read": [39, 60]}]

    assert _narrow(found, ended(short=short, question="why?")) == {
        "read": 60,
        "found": 0,
        "rounds": 1,
        "complete": not short,
        "answer": "",
        "citations": [],
    }


def test_citations_are_half_open_ranges() -> None:
    assert _ranges([7, 3, 4, 9, 8]) == [[3, 5], [7, 10]]
    assert _ranges([]) == []


def test_items_of_any_type_can_be_asked_and_a_single_text_is_refused() -> None:
    request = prepared(
        "llm.ask", ["a", 7, {"b": date(2026, 1, 2)}, {(1, 2): "t"}], {"question": "why?"}
    )

    [group] = request.items
    assert group["passages"] == [
        [0, "a"],
        [1, "7"],
        [2, '{"b": "2026-01-02"}'],
        [3, "{(1, 2): 't'}"],
    ]
    for wrong in ("a text", b"bytes", 5):
        with pytest.raises(InvalidRequest, match="items"):
            prepared("llm.ask", wrong, {"question": "why?"})


def test_a_question_that_is_too_long_is_refused_and_not_repeated_in_the_error() -> None:
    with pytest.raises(InvalidRequest) as refused:
        prepared(
            "llm.ask",
            ["a"],
            {"question": "secret " * 500, "max_tokens": 100},
            models={"gpt-4.1-mini": {"context_tokens": 1200}},
        )

    assert "max_tokens=100" in str(refused.value)
    assert "secret" not in str(refused.value)
