"""Work with models, on real workers, against a fake provider that counts: what is asked, what is
paid, what comes out.
"""

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
from tests.integration.conftest import CALM, client_of, environment_of
from tests.integration.llm_ops import Animal, Impossible
from tests.support import wait_until

KEY = "sk-not-to-be-seen-anywhere"
SMALL, MEDIUM = "gpt-4.1-nano", "gpt-4.1-mini"


class World:
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
        """Return how many calls were answered by both."""
        return sum(
            each["answered"]
            for running in (self.main, self.other)
            for each in running.report()["by_model"].values()
        )

    def models(self) -> dict[str, int]:
        """Return how many calls were answered by each model."""
        found: dict[str, int] = {}
        for running in (self.main, self.other):
            for model, told in running.report()["by_model"].items():
                found[model] = found.get(model, 0) + told["answered"]
        return found


@pytest.fixture(scope="module")
def one_world(server: embedded.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
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
            **{name: value for name, value in CALM.items() if "PRESSURE" not in name},
            RLM_OPERATIONS="tests.integration.llm_ops",
            OPENAI_API_KEY=KEY,
            RLM_LLM__ENDPOINTS=json.dumps(endpoints),
            RLM_LLM__TOKENS="10000000",
            RLM_LLM__REQUESTS="100000",
            RLM_LLM__HEALTH_EVERY_S="3600",
        )
        log = tmp_path_factory.mktemp("llm") / "worker.log"
        client = stack.enter_context(client_of(environment))
        client.pressure.force("normal", for_s=3600)
        worker = stack.enter_context(embedded.worker(environment, log=log, slots=2))
        yield World(client, *providers, worker.pid, log)


@pytest.fixture
def world(one_world: World) -> World:
    """The world, with providers that have forgotten what was."""
    for each in (one_world.main, one_world.other):
        each.schedule()
        each.reset()
    return one_world


def vars_of(shaped: Shaped) -> tuple[str, str, int]:
    return shaped.strategy, shaped.level, shaped.items


def sums(n: int) -> dict[str, Any]:
    return {
        "items": [str(i) for i in range(n)],
        "params": {"prompt": "SUM: {item}", "max_tokens": 20},
        "timeout": 60,
    }


def test_a_prompt_for_each_item_is_answered_in_order_by_both_endpoints_and_counted_to_the_token(
    world: World,
) -> None:
    result = world.client.execute(operation="llm.map", **sums(30))

    reports = [each.report() for each in (world.main, world.other)]
    counted = sum(
        told["prompt_tokens"] + told["completion_tokens"]
        for each in reports
        for told in each["by_model"].values()
    )
    assert result.output == [str(i) for i in range(30)]
    assert result.spent is not None
    assert result.spent.spent == pytest.approx(
        {"calls": 30, "tokens": counted, "money": result.spent.spent["money"]}
    )
    assert result.spent.by_label[MEDIUM] == result.spent.spent
    assert result.spent.spent["money"] == pytest.approx(
        sum(
            told["prompt_tokens"] * 0.4e-6 + told["completion_tokens"] * 1.6e-6
            for e in reports
            for told in e["by_model"].values()
        )
    )
    assert (
        min(each["by_model"][MEDIUM]["answered"] for each in reports) >= 10
    )  # in turns, in each process
    assert max(each["most_in_flight"] for each in reports) > 2  # more than there are slots


def test_fields_of_items_go_into_the_prompt_and_nothing_an_item_says_is_a_field(
    world: World,
) -> None:
    items = [{"a": 3, "b": "{a} {item}"}, {"a": 4, "b": "5"}]

    result = world.client.execute(
        operation="llm.map", items=items, params={"prompt": "SUM: {a} {b}"}, timeout=60
    )

    assert result.output == ["3", "9"]


def test_answers_are_merged_by_the_model_until_one_is_left(world: World) -> None:
    result = world.client.execute(
        operation="llm.map_reduce",
        items=[f"n{i:02d}" for i in range(20)],
        params={"prompt": "{item}", "fan_in": 4, "max_tokens": 200},
        timeout=60,
    )

    assert sorted(result.output.split("; ")) == [f"n{i:02d}" for i in range(20)]
    assert result.spent is not None
    assert result.spent.spent["calls"] == world.calls() == 20 + 5 + 2 + 1
    assert result.total == 20


def test_a_question_is_narrowed_until_what_was_found_fits_and_cites_its_items(world: World) -> None:
    texts = [
        f"The {animal} lives in {place}."
        for place in ("Chile", "Japan")
        for animal in ("otter", "lynx", "falcon")
    ] * 30
    about_falcons = [number for number, text in enumerate(texts) if "falcon" in text]

    result = world.client.execute(
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


def test_an_answer_of_the_wrong_form_is_put_right_in_another_call(world: World) -> None:
    result = world.client.execute(
        operation="llm.map",
        items=["otter", "lynx"],
        params={"prompt": "Describe {item}", "output": Animal},
        timeout=60,
    )

    assert [each["legs"] for each in result.output] == [0, 0]
    assert world.calls() == 4


def test_repairs_wait_for_nobody_when_all_calls_in_flight_need_one(world: World) -> None:
    items = [f"animal {number}" for number in range(60)]

    result = world.client.execute(
        operation="llm.map", items=items, params={"prompt": "{item}", "output": Animal}, timeout=30
    )

    assert result.done == 60
    assert world.calls() == 120


def test_a_repair_that_cannot_be_paid_ends_the_items_or_is_done_without(world: World) -> None:
    one = world.client.execute(
        operation="llm.map",
        items=["otter"],
        budget={"calls": 1},
        params={"prompt": "{item}", "output": Animal},
        timeout=30,
    )
    two = world.client.execute(
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


def test_repairs_are_bounded_and_what_cannot_be_put_right_is_the_items_failure(
    world: World,
) -> None:
    with pytest.raises(JobFailed) as failed:
        world.client.execute(
            operation="llm.map",
            items=["otter"],
            params={"prompt": "{item}", "output": Impossible},
            timeout=60,
        )

    assert failed.value.failures[0].type == "Misformed"
    assert "legs: Input should be greater than or equal to 1" in failed.value.failures[0].message
    assert world.calls() == 1 + 2


def test_complexity_chooses_the_tier_and_pressure_lowers_it_which_the_receipt_tells(
    world: World,
) -> None:
    world.client.execute(operation="llm.map", complexity="simple", **sums(3))
    assert world.models() == {SMALL: 3}

    world.client.pressure.force("high", for_s=60)
    try:
        wait_until(
            lambda: bool(
                world.client.execute(operation="llm.map", priority="critical", **sums(1)).receipt
            )
        )
        before = world.models()
        result = world.client.execute(operation="llm.map", priority="critical", **sums(40))
    finally:
        world.client.pressure.force("normal", for_s=3600)

    assert [vars_of(each) for each in result.receipt] == [("use_smaller_model", "high", 40)]
    assert world.models() == {**before, SMALL: before[SMALL] + 40}
    assert result.output == [str(i) for i in range(40)]


def test_identical_calls_in_flight_are_made_once_and_kept_only_where_asked(world: World) -> None:
    same = {
        "items": ["7"] * 12,
        "params": {"prompt": "SUM: {item}", "max_tokens": 20},
        "timeout": 60,
    }
    world.main.schedule({"kind": "slow", "every": 1, "seconds": 0.5})
    world.other.schedule({"kind": "slow", "every": 1, "seconds": 0.5})

    first = world.client.execute(operation="llm.map", **same)
    once = world.calls()
    world.client.execute(operation="llm.map", **same)
    twice = world.calls()
    kept = [
        world.client.execute(operation="llm.map", cache_results=True, cache_ttl_seconds=60, **same)
        for _ in range(2)
    ]

    assert first.output == ["7"] * 12
    assert (once, twice, world.calls()) == (1, 2, 3)
    assert kept[1].spent is not None
    assert kept[1].spent.spent.get("calls", 0) == 0


def test_answers_that_were_cut_are_told_in_the_receipt(world: World) -> None:
    whole = {"prompt": "{item}", "max_tokens": 20}
    items = ["short", "a good deal longer than that"]

    cut = world.client.execute(
        operation="llm.map", items=items, params={**whole, "max_tokens": 3}, timeout=60
    )
    merged = world.client.execute(
        operation="llm.map_reduce",
        items=[f"number {i}" for i in range(12)],
        params={**whole, "fan_in": 12},
        timeout=60,
    )

    assert cut.output[0] == items[0]
    assert [vars_of(each) for each in cut.receipt] == [("cut_answer", "normal", 1)]
    assert [vars_of(each) for each in merged.receipt] == [("cut_answer", "normal", 1)]
    assert (
        world.client.execute(operation="llm.map", items=items, params=whole, timeout=60).receipt
        == ()
    )


def test_another_endpoint_takes_over_while_one_is_down_and_nothing_fails(world: World) -> None:
    world.main.schedule({"kind": "503", "every": 1})

    result = world.client.execute(operation="llm.map", **sums(60))

    world.client.breakers.reset()
    assert result.output == [str(i) for i in range(60)]
    assert world.other.report()["by_model"][MEDIUM]["answered"] == 60


def test_another_tier_takes_over_when_no_endpoint_of_the_model_is_well_and_the_receipt_says_so(
    server: embedded.Server, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        ill, well = (stack.enter_context(fake_provider.running()) for _ in range(2))
        ill.schedule({"kind": "500", "every": 1})
        endpoints = [
            {"name": "ill", "base_url": ill.base_url, "models": {MEDIUM: MEDIUM}},
            {"name": "well", "base_url": well.base_url, "models": {SMALL: "its-own-name"}},
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
        assert well.report()["by_model"]["its-own-name"]["answered"] == 20


def test_a_budget_ends_the_items_and_the_job_merges_what_it_has(world: World) -> None:
    result = world.client.execute(
        operation="llm.map_reduce",
        items=[f"n{i:02d}" for i in range(60)],
        options=Options(budget={"calls": 20}),
        params={"prompt": "{item}", "fan_in": 8, "max_tokens": 200},
        timeout=60,
    )

    merged = result.output.split("; ")
    assert result.stopped == "budget"
    assert result.done + result.skipped == 60
    assert 0 < result.done <= 16  # a fifth is kept for the merges
    assert len(merged) == result.done
    assert result.spent is not None
    assert result.spent.spent["calls"] == world.calls() <= 20


def test_parts_are_put_side_by_side_when_no_merge_can_be_paid_any_more(world: World) -> None:
    result = world.client.execute(
        operation="llm.map_reduce",
        items=["north", "south"],
        options=Options(budget={"calls": 2.4}),
        params={"prompt": "{item}", "fan_in": 8},
        timeout=60,
    )

    assert result.done == 1
    assert result.output in ("north", "south")

    result = world.client.execute(
        operation="llm.map_reduce",
        items=["north", "south"],
        options=Options(budget={"calls": 2.5}),
        params={"prompt": "{item}", "fan_in": 8},
        timeout=60,
    )

    assert result.output == "north\n\nsouth"
    assert [(each.strategy, each.items) for each in result.receipt] == [("merge_without_model", 1)]


def test_what_was_paid_before_a_process_was_killed_is_not_paid_again(world: World) -> None:
    for each in (world.main, world.other):
        each.schedule({"kind": "slow", "every": 1, "seconds": 0.3})
    job = world.client.submit(
        operation="llm.map",
        **{name: value for name, value in sums(80).items() if name != "timeout"},
    )
    wait_until(lambda: world.calls() >= 30)

    victim = psutil.Process(world.worker).children()[0]
    os.kill(victim.pid, signal.SIGKILL)
    result = job.result(timeout=60)

    assert result.output == [str(i) for i in range(80)]
    assert world.calls() <= 80 + 20  # at most what the process had in flight
    assert result.spent is not None
    assert result.spent.spent["calls"] >= world.calls()


@pytest.mark.parametrize(
    ("wrong", "says"),
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
def test_a_mistake_is_told_before_anything_is_enqueued(
    world: World, wrong: dict[str, Any], says: str
) -> None:
    before = len(world.client.jobs())

    with pytest.raises(InvalidRequest, match=says):
        world.client.submit({"operation": "llm.map", "items": ["a"], **wrong})

    assert len(world.client.jobs()) == before


def test_the_key_is_nowhere_but_in_the_environment(world: World) -> None:
    world.main.schedule({"kind": "401", "every": 1})
    world.other.schedule({"kind": "401", "every": 1})
    job = world.client.submit(operation="llm.map", items=["1"], params={"prompt": "SUM: {item}"})
    with pytest.raises(JobFailed) as failed:
        job.result(timeout=60)

    store = world.client.ledger.store.client
    stored = b"".join(store.dump(name) or b"" for name in store.scan_iter("*"))
    assert "OPENAI_API_KEY" in failed.value.failures[0].message
    for text in (
        str(failed.value),
        repr(failed.value.result),
        world.log.read_text(),
        job.explain(),
    ):
        assert KEY not in text
    assert KEY.encode() not in stored
