"""What a call must pass, and what is given back when one of its guards says no, or the call ends
otherwise than well.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from resilience.degradation import Strategy
from resilience.errors import BulkheadFull, CallTimeout, Denied, RateLimited
from rlm_tasks.engine.guards import Guards, Postponed
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.llm.endpoint import Allowance, Answer, ProviderDown, Told, UnusableAnswer
from rlm_tasks.llm.gate import BudgetSpent, Gate, Pass
from rlm_tasks.operations import registry
from rlm_tasks.operations.context import Context
from rlm_tasks.settings.llm import EndpointSettings, LlmSettings
from rlm_tasks.settings.model import Settings
from tests.unit.world import World, world

__all__ = ["world"]

registry.import_operations(())
MODEL = "gpt-4.1-mini"
ANSWER = Answer(MODEL, "so", 10, 5, "stop", Told(Allowance(), Allowance()), 0.5)


class Door:
    """The gate of one job, and what it keeps."""

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
        self.guards = Guards(
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
        found = registry.get("llm.map").gate(self.guards, registry.get("llm.map"), spec)  # type: ignore[misc]  # it has one
        assert isinstance(found, Gate)
        self.gate, self.params = found, {"prompt": "Say {item}", "max_tokens": 100}
        self.provider = found._provider

    def enter(self, index: int = 0, item: str = "") -> Pass:
        entry = self.gate.enter(
            item or f"item {index}", Context("job", self.params, index=index), ""
        )
        assert isinstance(entry, Pass)
        return entry

    def answered(self, entry: Pass, answer: Answer = ANSWER) -> None:
        entry.answer = answer
        self.gate.leave(entry)

    @property
    def nothing_is_held(self) -> bool:
        place = self.provider.places["one"]
        used = self.provider.bucket(place, MODEL).status()
        held = self.guards.budgets.budget("job").status().held
        return (
            not any(self.provider.router.in_flight.values())
            and not any(held.values())
            and all(used[name]["used"] == 0 for name in ("requests", "tokens"))
        )


def spent(door: Door) -> dict[str, float]:
    return door.guards.budgets.budget("job").status().spent


def test_a_call_reserves_what_it_may_cost_and_is_settled_to_what_it_did(world: World) -> None:
    door = Door(world, {"tokens": 1000})
    entry = door.enter()
    held = door.guards.budgets.budget("job").status().held

    assert held["calls"] == 1
    assert 100 < held["tokens"] < 110
    door.answered(entry)
    assert spent(door) == pytest.approx(
        {"calls": 1, "tokens": 15, "money": (10 * 0.4 + 5 * 1.6) / 1e6}
    )
    assert door.provider.bucket(door.provider.places["one"], MODEL).status()["tokens"]["used"] == 15
    door.answered(entry)  # once
    assert spent(door)["calls"] == 1


def test_who_finds_no_room_gives_back_what_it_has_taken(world: World) -> None:
    door = Door(world, {"tokens": 10_000}, requests=6.0, tokens=700.0)
    first = door.enter(0)
    with pytest.raises(RateLimited):  # a sixth of the window goes at once
        door.enter(1)
    door.gate.leave(first, ProviderDown("one", "answers 500"))
    first.grant.settle(requests=0, tokens=0)  # type: ignore[union-attr]  # it was granted

    assert door.nothing_is_held
    world.sleep(60)
    assert door.enter(1).flight.state == "mine"  # and no flight was left behind


@pytest.mark.parametrize(("keys", "turn_s"), [(["A"], 10.0), (["A", "A"], 10.0), (["A", "B"], 5.0)])
def test_who_finds_no_room_stands_in_one_line_however_many_endpoints_there_are(
    world: World, monkeypatch: pytest.MonkeyPatch, keys: list[str], turn_s: float
) -> None:
    for key in keys:
        monkeypatch.setenv(key, "any")
    places = tuple(
        EndpointSettings(name=f"at-{number}", key_env=key) for number, key in enumerate(keys)
    )
    door = Door(world, {}, endpoints=places, requests=6.0, tokens=1e6)
    for index in range(len(set(keys))):
        door.enter(index)

    waits = []
    for index in range(10, 18):
        with pytest.raises(RateLimited) as refused:
            door.enter(index)
        waits.append(refused.value.retry_after_s)

    assert (max(waits) - min(waits)) / 7 == pytest.approx(turn_s, rel=0.2), (
        "a call takes 10 s of a limit of 6 in a minute"
    )


def test_a_process_takes_no_more_than_its_pool(world: World) -> None:
    door = Door(world, {}, per_host=2)
    for index in (0, 1):
        door.enter(index)

    with pytest.raises(BulkheadFull):
        door.enter(2)


def test_a_budget_that_is_spent_ends_the_items_once_nothing_in_flight_may_leave_enough(
    world: World,
) -> None:
    door = Door(world, {"calls": 1})
    entry = door.enter(0)
    with pytest.raises(BudgetSpent) as waits:
        door.enter(1)
    assert (waits.value.final, door.stopped) == (False, [])

    door.answered(entry)
    with pytest.raises(BudgetSpent) as ends:
        door.enter(1)
    assert (ends.value.final, door.stopped) == (True, [("job", "budget")])


@pytest.mark.parametrize(("model", "found"), [(MODEL, "cache"), ("another", "")])
def test_who_waits_for_anothers_call_keeps_its_answer_for_those_who_ask_for_that_and_only_of_the_model_it_asked(
    world: World, model: str, found: str
) -> None:
    makes, waits = Door(world, {}), Door(world, {}, cache_ttl_s=60)
    first = makes.enter(0, "the same")
    second = waits.enter(1, "the same")
    assert second.flight.state == "others"

    makes.answered(first, replace(ANSWER, model=model))
    context = Context("job", {}, entry=second)
    assert asyncio.run(waits.gate.reply(context)) == "so"

    assert (Strategy.OTHER_MODEL in context.degradation.shaped) == (model != MODEL)
    assert waits.enter(2, "the same").flight.source == found


def test_an_outage_does_not_end_a_job_that_could_not_pay_a_dearer_model(world: World) -> None:
    one_call = (20 * 0.4 + 100 * 1.6) / 1e6
    models = {"gpt-4.1-nano": {"context_tokens": 50}}
    door = Door(world, {"money": 2 * one_call}, models=models)
    breaker = door.provider.breaker("one")
    assert breaker is not None
    breaker.open()

    with pytest.raises(Denied) as refused:
        door.enter()

    assert refused.value.code == "CIRCUIT_OPEN"
    assert door.stopped == []
    assert door.nothing_is_held


@pytest.mark.parametrize(
    ("error", "tokens"),
    [
        (CallTimeout("endpoint one", 60), 104),  # it may have been answered unheard: as reserved
        (UnusableAnswer("one", "it is empty"), 4),  # the prompt was read
        (ProviderDown("one", "answers 500"), 0),
        (RateLimited("endpoint one", 1.0, "the provider answered 429"), 0),
    ],
)
def test_what_a_call_that_ended_badly_costs(world: World, error: Exception, tokens: float) -> None:
    door = Door(world, {"tokens": 1000})

    door.gate.leave(door.enter(), error)

    assert spent(door).get("tokens", 0) == pytest.approx(tokens, abs=1)
    assert not any(door.guards.budgets.budget("job").status().held.values())
    assert not any(door.provider.router.in_flight.values())


def test_what_cannot_be_counted_is_not_spent(world: World) -> None:
    door = Door(world, {"tokens": 1000})
    door.store.lost = True

    with pytest.raises(Denied, match="Redis does not answer"):
        door.enter()

    assert not any(door.provider.router.in_flight.values())


def test_a_paid_answer_is_found_again_by_its_item_until_its_node_has_ended(world: World) -> None:
    door, again = Door(world, {"calls": 9}), Door(world, {"calls": 9})
    entry = door.enter(3, "same")
    door.answered(entry)

    assert again.enter(3, "same").flight.source == "memo"
    assert again.enter(4, "same").flight.state == "mine"
    door.store.call(*door.gate.forgetting(3))
    assert again.enter(3, "same").flight.state == "landed"
    door.store.call(*door.gate.forgetting(4))
    assert again.enter(3, "same").flight.state != "landed"


def test_garbage_is_asked_again_and_costs_an_attempt_but_not_for_ever(world: World) -> None:
    gate = Door(world, {}, attempts=3).gate

    first = gate._again(UnusableAnswer("one", "it is empty"), 0)
    assert isinstance(first, Postponed)
    assert first.tries == 1
    assert isinstance(gate._again(UnusableAnswer("one", "it is empty"), 2), UnusableAnswer)


def test_a_call_whose_settling_goes_wrong_is_left_once(world: World) -> None:
    door = Door(world, {"tokens": 1000})
    entry = door.enter()
    entry.answer = replace(ANSWER, text="\ud83d")  # half of a character cannot be stored

    for _ in range(2):
        with suppress(TypeError):
            door.gate.leave(entry)

    assert dict(door.provider.router.in_flight) == {"one": 0}


def test_critical_calls_find_what_others_must_leave(world: World) -> None:
    limits = {
        "requests": 120.0,
        "tokens": 1e6,
    }  # ten at once, of which normal work leaves one and a half
    normal, critical = Door(world, {}, **limits), Door(world, {}, priority="critical", **limits)
    for index in range(8):
        normal.enter(index)

    with pytest.raises(RateLimited):
        normal.enter(8)
    assert critical.enter(8).endpoint == "one"
