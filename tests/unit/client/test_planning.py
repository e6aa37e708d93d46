"""Plans: samples of items, and the time, nodes and budget that amounts lead to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_tasks.client.planning import (
    Estimate,
    Flow,
    Plan,
    PlannedRound,
    Stage,
    duration,
    in_waves,
    nodes_of,
    paid_for,
    sufficiency,
)
from rlm_tasks.operations import registry
from rlm_tasks.requests import Adaptive, Binary, JobRequest, NWay
from tests.unit.harness import Platform

registry.import_operations(())


# --- time -------------------------------------------------------------------------------------


def stage(tokens: float, seconds: float, room: float = 20.0) -> Stage:
    """Return a stage with a refill of 10 tokens a second, and at most 40 at once."""
    return Stage(
        seconds, "latency", seconds, "m", {"tokens": tokens}, {"tokens": Flow(10, room, 40)}
    )


def test_the_slowest_limit_gives_the_time() -> None:
    assert duration([stage(100, 3.0)]) == (8.0, "tokens")
    assert duration([stage(100, 9.0)]) == (9.0, "latency")
    assert duration([stage(100, 3.0, room=-50)]) == (15.0, "tokens")  # nothing passes for 5 s
    assert duration([]) == (0.0, "")


def test_a_limit_refills_up_to_its_bound_while_another_is_slower() -> None:
    assert duration([stage(0, 1.0), stage(50, 0.0)]) == (3.0, "tokens")  # 20 + 10 of 50
    assert duration([stage(0, 60.0), stage(50, 0.0)]) == (61.0, "latency")  # 40 of 50
    assert duration([stage(20, 0.0), stage(20, 0.0)]) == (
        2.0,
        "tokens",
    )  # the initial 20 count once


@given(
    st.lists(
        st.tuples(st.floats(0, 500), st.floats(0, 50), st.floats(1, 3), st.floats(1, 3)),
        min_size=1,
        max_size=5,
    )
)
def test_more_tokens_and_slower_answers_never_take_less_time(
    rounds: list[tuple[float, float, float, float]],
) -> None:
    less, _ = duration([stage(tokens, seconds) for tokens, seconds, _, _ in rounds])
    more, _ = duration([stage(tokens * a, seconds * b) for tokens, seconds, a, b in rounds])

    assert more >= less - 1e-6


def test_calls_run_in_waves_of_the_number_in_flight() -> None:
    assert in_waves(100, 2.0, 20) == (10.0, "in flight")
    assert in_waves(3, 2.0, 20) == (2.0, "latency")


# --- nodes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "about",
    [
        {"chunk_size": 10},
        {"strategy": Binary(min_chunk_size=7)},
        {"strategy": NWay(split_factor=3, min_chunk_size=5)},
        {"strategy": NWay(split_factor=2, min_chunk_size=1, max_depth=3)},
        {"strategy": Adaptive(max_chunk_size=30)},
        {"type": "sequential"},
    ],
    ids=str,
)
def test_the_planned_number_of_nodes_of_a_job_with_fixed_sizes_is_exact(
    about: dict[str, Any],
) -> None:
    platform = Platform(1)
    request = JobRequest(**{"operation": "sum", "items": range(500), **about})

    count = nodes_of(request.shape(1000.0), len(request.items), platform.slot_count, 0.0)

    assert count == int(platform.run(platform.submit(request))["nodes"])


def test_the_nodes_of_other_jobs_follow_their_time() -> None:
    shape = JobRequest(operation="sum", items=[], strategy=Adaptive()).shape(1000.0)

    assert nodes_of(shape, 1000, 2, 100.0) == 1
    assert nodes_of(shape, 1000, 2, 900.0) == nodes_of(shape, 1000, 2, None) == 1 + 8
    assert nodes_of(shape, 1000, 2, 60_000.0) == 60


def test_a_million_nodes_are_counted_without_creating_them() -> None:
    shape = JobRequest(operation="sum", items=[], chunk_size=1).shape(1000.0)

    assert nodes_of(shape, 1_000_000, 2, None) == 1 + 1000 + 1_000_000


# --- money ------------------------------------------------------------------------------------


def test_a_budget_keeps_a_share_for_later_rounds() -> None:
    assert paid_for(100, [100], 0.2, goes_on=False) == (1.0, True)
    assert paid_for(100, [100], 0.2, goes_on=True) == (0.8, False)
    assert paid_for(100, [80, 16, 4], 0.2, goes_on=True) == (1.0, True)
    assert paid_for(100, [80, 17, 3], 0.2, goes_on=True) == (1.0, False)
    assert paid_for(100, [0], 0.2, goes_on=True) == (1.0, True)


@given(st.floats(1, 1000), st.lists(st.floats(0, 500), min_size=1, max_size=4), st.booleans())
def test_a_larger_budget_never_pays_for_fewer_items(
    limit: float, needs: list[float], goes_on: bool
) -> None:
    share, enough = paid_for(limit, needs, 0.2, goes_on=goes_on)
    larger, still = paid_for(2 * limit, needs, 0.2, goes_on=goes_on)

    assert 0 <= share <= larger <= 1
    assert still >= enough


def planned(**fields: Any) -> Plan:
    """Return a plan of one round with 10 calls, or 20 at p90."""
    amounts = Estimate(10, 20), Estimate(1000, 3000), Estimate(0.5, 1.5)
    about = {"operation": "llm.map", "items": 10}
    made = {
        **about,
        "nodes": 2,
        "time_s": Estimate(75.0, 7300.0),
        "limited_by": "tokens",
        "models": {"small": "a-model"},
        "rounds": (PlannedRound(0, "llm.map", 10, *amounts),),
        "level": "high",
        "slots": 2,
        "budget": None,
        "based_on": 3,
    }
    return Plan(
        **{**made, **dict(zip(("calls", "tokens", "money"), amounts, strict=True)), **fields}
    )


def test_the_unit_that_pays_for_the_fewest_items_is_named() -> None:
    rounds = planned().rounds

    found = sufficiency(
        {"tokens": 1500.0, "calls": 100.0, "money": 0.9}, rounds, 0.2, goes_on=False
    )

    assert (found.suffices, found.suffices_p90, found.limited_by) == (True, False, "tokens")
    assert found.items_share == Estimate(1.0, 0.5)
    assert sufficiency({"calls": 20.0}, rounds, 0.2, goes_on=False).limited_by == ""


def test_a_plan_as_text_and_as_plain_data() -> None:
    budget = sufficiency({"tokens": 1500.0}, planned().rounds, 0.2, goes_on=False)

    plan = planned(budget=budget, notes=("A note",))

    assert str(plan).splitlines() == [
        "llm.map over 10 items",
        "Calls: 10, at p90 20, in 1 round, to a-model (small tier), pressure is high",
        "Tokens: 1,000, at p90 3,000",
        "Money: 0.5, at p90 1.50",
        "Time: 75 s, at p90 2 h, limited by tokens",
        "Nodes: about 2, slots: 2",
        "Budget: suffices, but not at p90; its tokens pay for this share of the items: "
        "100%, at p90 50%",
        "Based on 3 earlier calls to the model, none with these params: lengths of answers may "
        "differ much",
        "A note",
    ]
    assert json.loads(json.dumps(plan.to_dict()))["rounds"][0]["tokens"] == {
        "p50": 1000,
        "p90": 3000,
    }
    assert "Time: not known, there is no worker" in str(
        planned(time_s=None, limited_by="no worker")
    )
