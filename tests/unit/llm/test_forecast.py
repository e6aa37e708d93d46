"""Forecasts of the rounds of model operations."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_tasks.jobs.items import SAMPLED, source_of
from rlm_tasks.llm.forecast import Z90, Outlook, mean_and_error
from rlm_tasks.llm.learned import CallKind, CallStatistics, PromptLine
from rlm_tasks.llm.operations import _reading
from rlm_tasks.llm.wire.answers import estimated_prompt
from rlm_tasks.operations import registry
from rlm_tasks.operations.ports import RoundForecast
from rlm_tasks.requests import JobRequest
from rlm_tasks.settings.model import Settings

SETTLED = CallStatistics(
    calls=400,
    own=400,
    prompt=PromptLine(0.0, 1.2),
    share=0.4,
    share_sd=0.2,
    seconds=3.0,
    seconds_sd=1.0,
)


knowns = st.builds(
    CallStatistics,
    calls=st.sampled_from([0.0, 1.0, 30.0, 700.0]),
    own=st.sampled_from([0.0, 1.0, 30.0, 700.0]),
    prompt=st.builds(PromptLine, st.floats(0, 100), st.floats(0.5, 2)),
    answer=st.one_of(st.none(), st.floats(0, 500)),
    repairs=st.floats(0, 2),
    formed=st.sampled_from([0.0, 1.0, 30.0]),
    share=st.floats(0, 1),
    share_sd=st.floats(0, 0.5),
    seconds=st.floats(0, 60),
    seconds_sd=st.floats(0, 60),
)


def forecast(
    operation: str, items: Any, params: dict[str, Any], known: CallStatistics = SETTLED
) -> tuple[list[RoundForecast], ...]:
    """Return the rounds of a request at p50 and at p90."""
    about = registry.get(operation)
    asked = JobRequest(operation=operation, items=items, params=params)
    assert about.forecast is not None
    assert about.prepare is not None
    rounds = about.forecast(about.prepare(asked, Settings()), source_of(items).sample(Random(1)))
    return tuple(rounds(Outlook(lambda _, __: known, z)) for z in (0.0, Z90))


def test_each_item_has_a_call_with_the_prompt_of_the_operation() -> None:
    params = {"prompt": "Say it again: {item}", "system": "You are an echo.", "max_tokens": 100}

    [likely], _ = forecast("llm.map", items := ["a", "bb" * 20, "ccc" * 50], params)

    prompts = [
        [{"content": "You are an echo."}, {"content": f"Say it again: {item}"}] for item in items
    ]
    assert (likely.operation, likely.tier, likely.calls) == ("llm.map", "medium", 3)
    assert likely.prompt_tokens == pytest.approx(sum(map(estimated_prompt, prompts)) * 1.2)
    assert likely.answer_tokens == pytest.approx(3 * 100 * 0.4)


@given(st.integers(1, 3000), st.integers(2, 100))
def test_answers_are_merged_until_one_is_left(n: int, fan_in: int) -> None:
    likely, bad = forecast(
        "llm.map_reduce", range(n), {"prompt": "{item}", "fan_in": fan_in, "max_tokens": 16}
    )

    expected = [n]
    while expected[-1] > 1:
        expected.append(-(-expected[-1] // fan_in))
    assert [each.calls for each in likely] == [each.calls for each in bad] == expected
    assert [each.operation for each in likely] == ["llm.map_reduce"] + ["llm.merge"] * (
        len(expected) - 1
    )


def test_a_merge_reads_the_answers_of_the_round_before() -> None:
    params = {"prompt": "{item}", "fan_in": 4, "max_tokens": 1000}

    likely, _ = forecast("llm.map_reduce", range(64), params)

    answers = [each.answer_tokens for each in likely]
    assert [each.prompt_tokens for each in likely[1:]] == [
        pytest.approx(1.2 * tokens, rel=0.1) for tokens in answers[:-1]
    ]


@pytest.mark.parametrize(
    ("n", "length"),
    [
        (5, 3),
        (5, 60_000),
        (900, 3),
        (900, 60),
        (900, 900),
        (900, 9000),
        (30_000, 3),
        (30_000, 60),
        (9000, 900),
    ],
)
def test_a_question_needs_one_call_for_each_group_of_passages(n: int, length: int) -> None:
    random = Random(n + length)
    texts = ["x" * random.randrange(length // 2, 2 * length) for _ in range(n)]
    about = registry.get("llm.ask")
    assert about.prepare is not None
    params = {"question": "Who?", "group_tokens": 4000}

    (first, *_, last), bad = forecast("llm.ask", texts, params)
    groups = list(
        about.prepare(JobRequest(operation="llm.ask", items=texts, params=params), Settings()).items
    )

    assert (
        first.calls == first.items == pytest.approx(len(groups), rel=0.06 if n > SAMPLED else 0.001)
    )
    assert (last.operation, last.calls) == ("llm.answer", 1)
    prompts = sum(_reading(group, params, "").estimated for group in groups)
    assert first.prompt_tokens == pytest.approx(SETTLED.prompt.slope * prompts, rel=0.06)
    calls = sum(each.calls for each in bad)
    assert calls <= (first.items * 4 + 1) * 3, "an answer has a form, so it may be repaired twice"


@given(
    known=knowns,
    n=st.integers(1, 300),
    operation=st.sampled_from(["llm.map", "llm.map_reduce", "llm.ask"]),
)
def test_p90_is_never_below_p50_and_answers_are_within_max_tokens(
    known: CallStatistics, n: int, operation: str
) -> None:
    asks = (
        {"question": "Who?", "group_tokens": 200}
        if operation == "llm.ask"
        else {"prompt": "Say {item}"}
    )

    likely, bad = forecast(
        operation,
        [f"{at} is " + "many words " * (at % 9) for at in range(n)],
        {**asks, "max_tokens": 100},
        known,
    )

    for what in ("calls", "prompt_tokens", "answer_tokens"):
        assert sum(getattr(each, what) for each in bad) >= sum(
            getattr(each, what) for each in likely
        ) * (1 - 1e-9)
    for each in (*likely, *bad):
        assert each.answer_tokens <= each.calls * 100
    assert (
        known.calls
        or sum(each.answer_tokens for each in bad) == sum(each.calls for each in bad) * 100
    )
    assert [Outlook(lambda _, __: known, Z90).seconds("small", CallKind(), n)] >= [
        Outlook(lambda _, __: known).seconds("small", CallKind(), n)
    ]


def test_ten_times_the_items_are_ten_times_the_tokens() -> None:
    items = [f"{at} " + "words " * (at % 9) for at in range(900)]

    few, many = (
        forecast("llm.map", part, {"prompt": "Say {item}"})[0][0] for part in (items, items * 10)
    )

    assert many.calls == 10 * few.calls
    assert many.prompt_tokens == pytest.approx(10 * few.prompt_tokens, rel=0.06)
    assert many.answer_tokens == pytest.approx(10 * few.answer_tokens)


def test_nine_of_ten_sums_are_below_p90() -> None:
    random = Random(5)
    known = CallStatistics(calls=2000, own=2000, share=0.5, share_sd=0.2)
    [_], [bad] = forecast("llm.map", range(100), {"prompt": "{item}", "max_tokens": 1000}, known)

    sums = [sum(random.gauss(500, 200) for _ in range(100)) for _ in range(2000)]

    assert 0.88 < sum(each < bad.answer_tokens for each in sums) / len(sums) < 0.95


def test_a_larger_sample_gives_a_smaller_error_of_the_mean() -> None:
    sizes = [1.0, 2.0, 3.0, 4.0]

    assert mean_and_error(sizes, 4) == (2.5, 0.0)
    assert (
        mean_and_error(sizes, 8)[1]
        < mean_and_error(sizes, 1000)[1]
        == pytest.approx((5 / 3 / 4) ** 0.5, rel=0.01)
    )
