"""What one process knows of its providers: which limit is whose, what a provider's words change,
who has a model.
"""

from __future__ import annotations

import pytest

from rlm_tasks.engine.guards import Guards
from rlm_tasks.llm.endpoint import (
    Allowance,
    Told,
)
from rlm_tasks.llm.endpoint_pool import EndpointPool, protections
from rlm_tasks.operations import registry
from rlm_tasks.settings.llm import EndpointSettings, LlmSettings, ModelSettings
from rlm_tasks.settings.model import Settings
from tests.unit.llm.test_endpoint_checks import CLOSED, SETTINGS, settings_of
from tests.unit.world import World, world

__all__ = ["world"]

MINI = "gpt-4.1-mini"
MAIN = EndpointSettings(name="main", key_env="MAIN_KEY")
SPARE = EndpointSettings(name="spare", key_env="SPARE_KEY", models={MINI: "mini"})
NOTHING = Allowance()


def provider(world: World, **llm: object) -> EndpointPool:
    settings = LlmSettings(**{"endpoints": (MAIN, SPARE), **llm})  # type: ignore[arg-type]  # fields by their names
    return EndpointPool(Guards(world.store(), Settings(llm=settings), lambda waiters: None))


def test_limits_are_of_each_model_and_key_and_those_of_a_model_come_first(world: World) -> None:
    its = provider(
        world,
        models={MINI: ModelSettings(tokens=200_000)},
        endpoints=(MAIN, SPARE, MAIN.model_copy(update={"name": "twin"})),
    )

    assert its.bucket(MAIN, MINI) is its.bucket(its.places["twin"], MINI)
    assert its.bucket(MAIN, MINI) is not its.bucket(SPARE, MINI)
    assert {
        name: (rate.limit, rate.per_s) for name, rate in its.bucket(MAIN, MINI).rates.items()
    } == {
        "requests": (3500, 60),
        "tokens": (200_000, 60),
        "bytes": (10e6, 1),
    }
    assert its.bucket(MAIN, "gpt-4.1").rates["tokens"].limit == 90_000


def test_a_call_goes_to_those_that_have_the_model(world: World) -> None:
    its = provider(world)

    assert sorted(each.name for each in its.order(MINI, "key")) == ["main", "spare"]
    assert [each.name for each in its.order("gpt-4.1", "key")] == ["main"]


def test_an_ill_endpoint_gets_no_calls_until_it_is_well(world: World) -> None:
    its = provider(world)
    for _ in range(3):
        its.health.tell("main", why="does not answer")
    world.sleep(1.5)
    assert [each.name for each in its.order(MINI, "key")] == ["spare"]

    its.health.tell("main", latency_s=0.1)
    world.sleep(1.5)
    assert len(its.order(MINI, "key")) == 2


@pytest.mark.parametrize(
    ("said", "holds"),
    [(20_000, 20_000), (90_000, 90_000), (500_000, 90_000), (0, 90_000), (None, 90_000)],
)
def test_a_limit_is_lowered_to_what_the_provider_says_and_never_raised(
    world: World, said: float | None, holds: float
) -> None:
    its = provider(world)

    its.learn(MAIN, MINI, Told(NOTHING, Allowance(limit=said, remaining=5, reset_s=1)))

    assert its.bucket(MAIN, MINI).rates["tokens"].limit == holds
    assert its.bucket(MAIN, MINI).rates["requests"].limit == 3500
    assert its.bucket(SPARE, MINI).rates["tokens"].limit == 90_000


def test_each_429_that_follows_another_at_once_holds_twice_as_long_until_a_call_goes_well(
    world: World,
) -> None:
    its, other = provider(world), provider(world)

    def held() -> float:
        return round(other.bucket(MAIN, MINI).status()["requests"]["hold_s"], 3)

    found = []
    for wait_s in (2.0, 2.0, 2.0):
        its.hold(MAIN, MINI, wait_s)
        its.hold(MAIN, MINI, wait_s)  # it was in flight with the other
        found.append(held())
        world.sleep(held() + 0.1)
    its.learn(MAIN, MINI, Told(NOTHING, NOTHING))
    its.hold(MAIN, MINI, 2.0)

    assert [*found, held()] == [2.0, 4.0, 8.0, 2.0]


def test_a_process_is_full_when_its_pool_is_or_every_endpoint(world: World) -> None:
    its = provider(world, pool=3, per_host=2)
    for name, full in (("main", False), ("main", False), ("spare", True)):
        its.router.began(name)
        assert its.is_full is full

    its.router.ended("main")
    assert its.is_full is False


def test_what_protects_calls_can_be_shown_without_making_one(world: World) -> None:
    names = [each.service for each in protections(LlmSettings(endpoints=(MAIN, SPARE)))]

    assert names == [
        "llm:main",
        "llm:MAIN_KEY:gpt-4.1-nano",
        "llm:MAIN_KEY:gpt-4.1-mini",
        "llm:MAIN_KEY:gpt-4.1",
        "llm:spare",
        "llm:SPARE_KEY:gpt-4.1-mini",
    ]


def test_models_are_protected_where_an_endpoint_is_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def services(settings: LlmSettings) -> set[str]:
        return {
            each.service
            for each in registry.protections(Settings(llm=settings))
            if each.service.startswith("llm:")
        }

    models = {SETTINGS.small, SETTINGS.medium, SETTINGS.large}
    assert services(SETTINGS) == set()
    assert services(settings_of(CLOSED)) == {"llm:e0", *(f"llm:UNIT_KEY:{each}" for each in models)}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-unit")
    assert services(SETTINGS) == {"llm:default", *(f"llm:OPENAI_API_KEY:{each}" for each in models)}
