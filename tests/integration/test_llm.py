"""Jobs with models on real workers: their calls, costs and results.

The fake providers count all calls and tokens."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlm_tasks.client.client import Client
from rlm_tasks.errors import InvalidRequest, JobFailed
from rlm_tasks.requests import Options
from rlm_tasks.results import Shaped
from rlm_tasks.testing import embedded, fake_provider
from tests.integration.conftest import NO_PRESSURE, client_of, environment_of
from tests.integration.llm_ops import Animal, Impossible
from tests.support import wait_until

KEY = "sk-not-to-be-seen-anywhere"
SMALL, MEDIUM = "gpt-4.1-nano", "gpt-4.1-mini"


class Platform:
    """Two providers of the same models, a worker with two slots, and its client."""

    def __init__(
        self,
        client: Client,
        main: fake_provider.Running,
        other: fake_provider.Running,
        worker: int,
        log: Path,
    ) -> None:
        self.client, self.main, self.other, self.worker, self.log = client, main, other, worker, log

    def calls(self) -> int:
        """Return the number of calls that both providers answered."""
        return sum(
            each["answered"]
            for running in (self.main, self.other)
            for each in running.report()["by_model"].values()
        )

    def models(self) -> dict[str, int]:
        """Return the number of answered calls by model."""
        found: dict[str, int] = {}
        for running in (self.main, self.other):
            for model, counts in running.report()["by_model"].items():
                found[model] = found.get(model, 0) + counts["answered"]
        return found


@pytest.fixture(scope="module")
def shared_platform(
    server: embedded.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    with ExitStack() as stack:
        providers = [stack.enter_context(fake_provider.running(latency=0.02)) for _ in range(2)]
        endpoints = [
            {"name": name, "base_url": each.base_url}
            for name, each in zip(("main", "other"), providers, strict=True)
        ]
        environment = environment_of(
            server.url,
            "llm",
            pressed=True,
            **{name: value for name, value in NO_PRESSURE.items() if "PRESSURE" not in name},
            RLM_OPERATIONS="tests.integration.llm_ops",
            OPENAI_API_KEY=KEY,
            RLM_LLM__ENDPOINTS=json.dumps(endpoints),
            RLM_LLM__TOKENS="10000000",
            RLM_LLM__REQUESTS="100000",
            RLM_LLM__HEALTH_EVERY_S="3600",
            RLM_LEDGER__STOP_GRACE_S="0.3",
        )
        log = tmp_path_factory.mktemp("llm") / "worker.log"
        client = stack.enter_context(client_of(environment))
        client.pressure.force("normal", for_s=3600)
        worker = stack.enter_context(embedded.worker(environment, log=log, slots=2))
        yield Platform(client, *providers, worker.pid, log)


@pytest.fixture
def platform(shared_platform: Platform) -> Platform:
    """The shared platform, with providers without faults and with counts of 0."""
    for each in (shared_platform.main, shared_platform.other):
        each.schedule()
        each.reset()
    return shared_platform


def as_tuple(shaped: Shaped) -> tuple[str, str, int]:
    return shaped.strategy, shaped.level, shaped.items


def sums(n: int) -> dict[str, Any]:
    return {
        "items": [str(i) for i in range(n)],
        "params": {"prompt": "SUM: {item}", "max_tokens": 20},
        "timeout": 60,
    }


def test_prompts_are_answered_in_order_by_both_endpoints(platform: Platform) -> None:
    """Calls, tokens and money of each item are counted exactly."""
    for each in (platform.main, platform.other):
        each.schedule({"kind": "slow", "to": 3})  # so that more calls come while these wait

    result = platform.client.execute(operation="llm.map", **sums(30))

    reports = [each.report() for each in (platform.main, platform.other)]
    counted = sum(
        counts["prompt_tokens"] + counts["completion_tokens"]
        for each in reports
        for counts in each["by_model"].values()
    )
    assert result.output == [str(i) for i in range(30)]
    assert result.spent is not None
    assert result.spent.spent == pytest.approx(
        {"calls": 30, "tokens": counted, "money": result.spent.spent["money"]}
    )
    assert result.spent.by_label[MEDIUM] == result.spent.spent
    assert result.spent.spent["money"] == pytest.approx(
        sum(
            counts["prompt_tokens"] * 0.4e-6 + counts["completion_tokens"] * 1.6e-6
            for each in reports
            for counts in each["by_model"].values()
        )
    )
    # Each process uses the endpoints in turns.
    assert min(each["by_model"][MEDIUM]["answered"] for each in reports) >= 10
    assert max(each["most_in_flight"] for each in reports) > 2  # more than the number of slots


def test_item_fields_fill_the_prompt(platform: Platform) -> None:
    """Braces in the text of an item are not fields."""
    items = [{"a": 3, "b": "{a} {item}"}, {"a": 4, "b": "5"}]

    result = platform.client.execute(
        operation="llm.map", items=items, params={"prompt": "SUM: {a} {b}"}, timeout=60
    )

    assert result.output == ["3", "9"]


def test_answers_are_merged_by_the_model_until_one_is_left(platform: Platform) -> None:
    result = platform.client.execute(
        operation="llm.map_reduce",
        items=[f"n{i:02d}" for i in range(20)],
        params={"prompt": "{item}", "fan_in": 4, "max_tokens": 200},
        timeout=60,
    )

    assert sorted(result.output.split("; ")) == [f"n{i:02d}" for i in range(20)]
    assert result.spent is not None
    assert result.spent.spent["calls"] == platform.calls() == 20 + 5 + 2 + 1
    assert result.total == 20


def test_a_question_is_answered_in_rounds_and_cites_its_items(platform: Platform) -> None:
    texts = [
        f"The {animal} lives in {place}."
        for place in ("Chile", "Japan")
        for animal in ("otter", "lynx", "falcon")
    ] * 30
    about_falcons = [number for number, text in enumerate(texts) if "falcon" in text]

    result = platform.client.execute(
        operation="llm.ask",
        items=texts,
        params={"question": "Where falcon lives now", "group_tokens": 150, "max_tokens": 60},
        timeout=60,
    )

    cited = [number for lo, hi in result.output["citations"] for number in range(lo, hi)]
    assert result.output["answer"].startswith("The falcon lives in")
    assert cited
    assert set(cited) <= set(about_falcons)
    assert result.output["read"] == len(texts)
    assert result.output["rounds"] >= 2
    assert result.output["complete"] is True


def test_a_malformed_answer_is_repaired_in_another_call(platform: Platform) -> None:
    result = platform.client.execute(
        operation="llm.map",
        items=["otter", "lynx"],
        params={"prompt": "Describe {item}", "output": Animal},
        timeout=60,
    )

    assert [each["legs"] for each in result.output] == [0, 0]
    assert platform.calls() == 4
    assert [as_tuple(each) for each in result.receipt] == [("repaired_answer", "normal", 2)]
    assert result.spent is not None
    assert (result.spent.spent["calls"], result.spent.spent["repairs"]) == (4, 2)
    assert "4 calls" in str(result.spent)
    assert "2 repairs" in str(result.spent)


def test_repairs_do_not_block_each_other(platform: Platform) -> None:
    items = [f"animal {number}" for number in range(60)]

    result = platform.client.execute(
        operation="llm.map", items=items, params={"prompt": "{item}", "output": Animal}, timeout=30
    )

    assert result.done == 60
    assert platform.calls() == 120


def test_a_repair_without_budget_ends_the_items_or_skips_the_model(platform: Platform) -> None:
    one = platform.client.execute(
        operation="llm.map",
        items=["otter"],
        budget={"calls": 1},
        params={"prompt": "{item}", "output": Animal},
        timeout=30,
    )
    two = platform.client.execute(
        operation="llm.map_reduce",
        items=[f'{{"name": "{name}", "legs": 4}}' for name in ("otter", "lynx")],
        budget={"calls": 3},
        timeout=30,
        params={"prompt": "{item}", "output": Animal},
    )

    assert (one.stopped, one.done, one.output) == ("budget", 0, [])
    assert (two.stopped, two.done, [each.strategy for each in two.receipt]) == (
        "",
        2,
        ["merge_without_model"],
    )
    assert [json.loads(part)["name"] for part in two.output.split("\n\n")] == ["otter", "lynx"]
    assert two.spent is not None
    assert two.spent.spent["calls"] == 3


def test_an_item_fails_after_its_last_repair(
    platform: Platform,
) -> None:
    with pytest.raises(JobFailed) as failed:
        platform.client.execute(
            operation="llm.map",
            items=["otter"],
            params={"prompt": "{item}", "output": Impossible},
            timeout=60,
        )

    assert failed.value.failures[0].type == "Misformed"
    assert "legs: Input should be greater than or equal to 1" in failed.value.failures[0].message
    assert platform.calls() == 1 + 2


def test_a_form_that_max_tokens_cuts_fails_after_one_call(platform: Platform) -> None:
    """A repair of the same length would be cut, too."""
    with pytest.raises(JobFailed) as failed:
        platform.client.execute(
            operation="llm.map",
            items=['{"name": "a very long name", "legs": 4}'],
            params={"prompt": "{item}", "output": Animal, "max_tokens": 5},
            timeout=60,
        )

    failure = failed.value.failures[0]
    assert failure.code == "MISFORMED_ANSWER"
    assert "max_tokens cut it at 5; set a larger max_tokens" in failure.message
    assert platform.calls() == 1


def test_complexity_selects_the_tier_and_pressure_lowers_it(platform: Platform) -> None:
    """The receipt names the lower tier."""
    platform.client.execute(operation="llm.map", complexity="simple", **sums(3))
    assert platform.models() == {SMALL: 3}

    platform.client.pressure.force("high", for_s=60)
    try:
        wait_until(
            lambda: bool(
                platform.client.execute(operation="llm.map", priority="critical", **sums(1)).receipt
            )
        )
        before = platform.models()
        result = platform.client.execute(operation="llm.map", priority="critical", **sums(40))
    finally:
        platform.client.pressure.force("normal", for_s=3600)

    assert [as_tuple(each) for each in result.receipt] == [("use_smaller_model", "high", 40)]
    assert platform.models() == {**before, SMALL: before[SMALL] + 40}
    assert result.output == [str(i) for i in range(40)]


def test_identical_calls_are_made_once_and_cached_on_request(platform: Platform) -> None:
    same = {
        "items": ["7"] * 12,
        "params": {"prompt": "SUM: {item}", "max_tokens": 20, "temperature": 0},
        "timeout": 60,
    }
    platform.main.schedule({"kind": "slow", "every": 1, "seconds": 0.5})
    platform.other.schedule({"kind": "slow", "every": 1, "seconds": 0.5})

    first = platform.client.execute(operation="llm.map", **same)
    once = platform.calls()
    platform.client.execute(operation="llm.map", **same)
    twice = platform.calls()
    kept = [
        platform.client.execute(
            operation="llm.map", cache_results=True, cache_ttl_seconds=60, **same
        )
        for _ in range(2)
    ]

    assert first.output == ["7"] * 12
    assert (once, twice, platform.calls()) == (1, 2, 3)
    assert kept[1].spent is not None
    assert kept[1].spent.spent.get("calls", 0) == 0


def test_above_temperature_0_each_item_has_an_answer_of_its_own(platform: Platform) -> None:
    asked = {"prompt": "SUM: {item}", "max_tokens": 20}

    result = platform.client.execute(operation="llm.map", items=["7"] * 5, params=asked, timeout=60)
    assert (result.output, platform.calls()) == (["7"] * 5, 5)

    result = platform.client.execute(
        operation="llm.map",
        items=["7", "8"],
        params={**asked, "samples": 3},
        options={"budget": {"calls": 100}},
        timeout=60,
    )
    assert (result.output, platform.calls()) == ([["7"] * 3, ["8"] * 3], 11)
    assert result.spent is not None
    assert result.spent.spent["calls"] == 6


def test_refused_items_fail_once_and_hinder_nobody(platform: Platform) -> None:
    items = [f"{i} ODD-ANSWER: refused" if i % 3 == 0 else f"{i} words" for i in range(201)]
    asked = {"prompt": "{item}", "max_tokens": 20}

    job = platform.client.submit(
        operation="llm.map", items=items, params=asked, continue_on_error=True
    )
    beside = platform.client.execute(operation="llm.map", **sums(9))
    result = job.result(timeout=60, propagate=False)

    assert beside.output == [str(i) for i in range(9)]
    assert (result.done, result.failed_count) == (134, 67)
    assert {each.code for each in result.failed} == {"REFUSED"}
    assert result.output == [each for each in items if "ODD" not in each]
    assert platform.calls() == 201 + 9, "one call for each item"
    states = platform.client.breakers.status()
    assert {
        (states[f"llm:{name}"]["state"], states[f"llm:{name}"]["failure_count"])
        for name in ("main", "other")
    } == {("closed", 0)}


def test_a_text_that_a_filter_cut_is_in_the_receipt_or_fails_on_request(
    platform: Platform,
) -> None:
    items = ["a long enough text ODD-ANSWER: filtered-part", "another text"]
    asked = {"prompt": "{item}", "max_tokens": 20}

    kept = platform.client.execute(operation="llm.map", items=items, params=asked, timeout=60)
    failed = platform.client.execute(
        operation="llm.map",
        items=items,
        params={**asked, "filtered_answers": "fail"},
        continue_on_error=True,
        timeout=60,
    )
    merged = platform.client.execute(
        operation="llm.map_reduce", items=items, params=asked, timeout=60
    )

    assert kept.output == ["a long", "another text"]
    for whole in (kept, merged):
        assert [as_tuple(each) for each in whole.receipt] == [("filtered_answer", "normal", 1)]
    assert [(each.index, each.code) for each in failed.failed] == [(0, "CONTENT_FILTERED")]
    assert failed.output == ["another text"]


def test_the_receipt_lists_answers_that_were_cut(platform: Platform) -> None:
    whole = {"prompt": "{item}", "max_tokens": 20}
    items = ["short", "a good deal longer than that"]

    cut = platform.client.execute(
        operation="llm.map", items=items, params={**whole, "max_tokens": 3}, timeout=60
    )
    merged = platform.client.execute(
        operation="llm.map_reduce",
        items=[f"number {i}" for i in range(12)],
        params={**whole, "fan_in": 12},
        timeout=60,
    )

    assert cut.output[0] == items[0]
    assert [as_tuple(each) for each in cut.receipt] == [("cut_answer", "normal", 1)]
    assert [as_tuple(each) for each in merged.receipt] == [("cut_answer", "normal", 1)]
    assert (
        platform.client.execute(operation="llm.map", items=items, params=whole, timeout=60).receipt
        == ()
    )


def test_another_endpoint_takes_over_while_one_is_down_and_nothing_fails(
    platform: Platform,
) -> None:
    platform.main.schedule({"kind": "503", "every": 1})

    result = platform.client.execute(operation="llm.map", **sums(60))

    platform.client.breakers.reset()
    assert result.output == [str(i) for i in range(60)]
    assert platform.other.report()["by_model"][MEDIUM]["answered"] == 60


def test_another_tier_takes_over_when_all_endpoints_of_a_model_fail(
    server: embedded.Server, tmp_path: Path
) -> None:
    """The receipt names the items that the other model answered."""
    with ExitStack() as stack:
        failing, working = (stack.enter_context(fake_provider.running()) for _ in range(2))
        failing.schedule({"kind": "500", "every": 1})
        endpoints = [
            {"name": "failing", "base_url": failing.base_url, "models": {MEDIUM: MEDIUM}},
            {"name": "working", "base_url": working.base_url, "models": {SMALL: "its-own-name"}},
        ]
        environment = environment_of(
            server.url,
            "llmtiers",
            OPENAI_API_KEY=KEY,
            RLM_LLM__ENDPOINTS=json.dumps(endpoints),
            RLM_LLM__TOKENS="10000000",
            RLM_OPERATIONS="",
            RLM_LLM__HEALTH_EVERY_S="3600",
            RLM_LLM__ATTEMPTS="8",
        )
        stack.enter_context(embedded.worker(environment, log=tmp_path / "log", slots=1))
        client = stack.enter_context(client_of(environment))

        result = client.execute(operation="llm.map", **sums(20))

        assert result.output == [str(i) for i in range(20)]
        assert [(each.strategy, each.items) for each in result.receipt] == [("use_other_model", 20)]
        assert working.report()["by_model"]["its-own-name"]["answered"] == 20


def test_a_spent_budget_ends_the_items_and_done_ones_are_merged(platform: Platform) -> None:
    result = platform.client.execute(
        operation="llm.map_reduce",
        items=[f"n{i:02d}" for i in range(60)],
        options=Options(budget={"calls": 20}),
        params={"prompt": "{item}", "fan_in": 8, "max_tokens": 200},
        timeout=60,
    )

    merged = result.output.split("; ")
    assert result.stopped == "budget"
    assert result.done + result.skipped == 60
    assert 0 < result.done <= 16  # a fifth of the budget is reserved for the merges
    assert len(merged) == result.done
    assert result.spent is not None
    assert result.spent.spent["calls"] == platform.calls() <= 20


def test_a_spent_budget_waits_for_calls_in_flight_and_keeps_their_answers(
    platform: Platform,
) -> None:
    """The answers are paid for, so they are not thrown away after the grace of a stopped job."""
    for each in (platform.main, platform.other):
        each.schedule({"kind": "slow", "to": 1, "seconds": 2.0})
    too_large = "word " * 500  # the rest of the budget does not pay for it, so it ends the job

    result = platform.client.execute(
        operation="llm.map",
        items=[*(f"tree {i}" for i in range(5)), too_large],
        params={"prompt": "{item}", "max_tokens": 10},
        options=Options(budget={"tokens": 200}),
        timeout=60,
    )

    assert (result.stopped, result.done) == ("budget", 5)
    assert result.output == [f"tree {i}" for i in range(5)]
    assert platform.calls() == 5
    assert result.spent is not None
    assert result.spent.spent["calls"] == 5


def test_parts_are_joined_without_the_model_when_the_budget_is_spent(platform: Platform) -> None:
    result = platform.client.execute(
        operation="llm.map_reduce",
        items=["north", "south"],
        options=Options(budget={"calls": 2.4}),
        params={"prompt": "{item}", "fan_in": 8},
        timeout=60,
    )

    assert result.done == 1
    assert result.output in ("north", "south")

    result = platform.client.execute(
        operation="llm.map_reduce",
        items=["north", "south"],
        options=Options(budget={"calls": 2.5}),
        params={"prompt": "{item}", "fan_in": 8},
        timeout=60,
    )

    assert result.output == "north\n\nsouth"
    assert [(each.strategy, each.items) for each in result.receipt] == [("merge_without_model", 1)]


def test_answers_paid_before_a_kill_are_not_paid_again(platform: Platform) -> None:
    for each in (platform.main, platform.other):
        each.schedule({"kind": "slow", "every": 1, "seconds": 0.3})
    job = platform.client.submit(
        operation="llm.map",
        **{name: value for name, value in sums(80).items() if name != "timeout"},
    )
    wait_until(lambda: platform.calls() >= 30)

    victim = psutil.Process(platform.worker).children()[0]
    os.kill(victim.pid, signal.SIGKILL)
    result = job.result(timeout=60)

    assert result.output == [str(i) for i in range(80)]
    assert platform.calls() <= 80 + 20  # at most the 20 calls that the process had in flight
    assert result.spent is not None
    assert result.spent.spent["calls"] >= platform.calls()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"params": {}}, "prompt"),
        ({"params": {"prompt": "x", "tiers": "small"}}, "unknown field"),
        ({"params": {"prompt": "x", "tier": "huge"}}, "tier"),
        (
            {"params": {"prompt": "x", "max_tokens": 10**6}},
            "max_tokens=1000000: model gpt-4.1-mini answers with 32768",
        ),
        ({"params": {"prompt": "x", "output": "os:path"}}, "must be a pydantic model"),
        ({"params": {"prompt": "x"}, "budget": {"tokens": -1}}, "tokens=-1"),
        ({"operation": "sum", "budget": {"tokens": 5}}, "calls no models"),
        ({"operation": "llm.ask", "params": {"question": "why?"}, "items": "a text"}, "items"),
        (
            {
                "operation": "llm.ask",
                "params": {"question": "why?", "max_tokens": 32_768, "group_tokens": 10},
            },
            "group_tokens",
        ),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_enqueued(
    platform: Platform, fields: dict[str, Any], message: str
) -> None:
    before = len(platform.client.jobs())

    with pytest.raises(InvalidRequest, match=message):
        platform.client.submit({"operation": "llm.map", "items": ["a"], **fields})

    assert len(platform.client.jobs()) == before


def test_the_key_is_only_in_the_environment(platform: Platform) -> None:
    platform.main.schedule({"kind": "401", "every": 1})
    platform.other.schedule({"kind": "401", "every": 1})
    job = platform.client.submit(operation="llm.map", items=["1"], params={"prompt": "SUM: {item}"})
    with pytest.raises(JobFailed) as failed:
        job.result(timeout=60)

    store = platform.client.ledger.store.client
    stored = b"".join(store.dump(name) or b"" for name in store.scan_iter("*"))
    assert "OPENAI_API_KEY" in failed.value.failures[0].message
    for text in (
        str(failed.value),
        repr(failed.value.result),
        platform.log.read_text(),
        job.explain(),
    ):
        assert KEY not in text
    assert KEY.encode() not in stored
