"""The endpoints of one process: their limits, their order, and what they learn from a provider."""

from __future__ import annotations

import pytest

from rlm_tasks.engine.guards import ProcessGuards
from rlm_tasks.llm.endpoint_pool import EndpointPool, protections
from rlm_tasks.llm.wire.rate_limit_headers import LimitState, RateLimitHeaders
from rlm_tasks.operations import registry
from rlm_tasks.settings.llm import EndpointSettings, LlmSettings, ModelSettings
from rlm_tasks.settings.model import Settings
from tests.unit.llm.test_endpoint_checks import CLOSED, SETTINGS, settings_of
from tests.unit.world import World, world

__all__ = ["world"]

MINI = "gpt-4.1-mini"
MAIN = EndpointSettings(name="main", key_env="MAIN_KEY")
SPARE = EndpointSettings(name="spare", key_env="SPARE_KEY", models={MINI: "mini"})
NOTHING = LimitState()


def pool_of(world: World, **llm: object) -> EndpointPool:
    settings = LlmSettings(**{"endpoints": (MAIN, SPARE), **llm})  # type: ignore[arg-type]  # fields by their names
    return EndpointPool(ProcessGuards(world.store(), Settings(llm=settings), lambda waiters: None))


def test_limits_belong_to_a_model_and_a_key_and_those_of_the_model_count_first(
    world: World,
) -> None:
    pool = pool_of(
        world,
        models={MINI: ModelSettings(tokens=200_000)},
        endpoints=(MAIN, SPARE, MAIN.model_copy(update={"name": "twin"})),
    )

    assert pool.bucket(MAIN, MINI) is pool.bucket(pool.endpoints["twin"], MINI)
    assert pool.bucket(MAIN, MINI) is not pool.bucket(SPARE, MINI)
    assert {
        name: (rate.limit, rate.per_s) for name, rate in pool.bucket(MAIN, MINI).rates.items()
    } == {
        "requests": (3500, 60),
        "tokens": (200_000, 60),
        "bytes": (10e6, 1),
    }
    assert pool.bucket(MAIN, "gpt-4.1").rates["tokens"].limit == 90_000


def test_a_call_goes_to_endpoints_that_have_the_model(world: World) -> None:
    pool = pool_of(world)

    assert sorted(each.name for each in pool.order(MINI, "key")) == ["main", "spare"]
    assert [each.name for each in pool.order("gpt-4.1", "key")] == ["main"]


def test_a_failing_endpoint_gets_no_calls_until_it_recovers(world: World) -> None:
    pool = pool_of(world)
    for _ in range(3):
        pool.health.record("main", why="does not answer", failed=True)
    world.sleep(1.5)
    assert [each.name for each in pool.order(MINI, "key")] == ["spare"]

    pool.health.record("main", latency_s=0.1)
    world.sleep(1.5)
    assert len(pool.order(MINI, "key")) == 2


@pytest.mark.parametrize(
    ("said", "holds"),
    [(20_000, 20_000), (90_000, 90_000), (500_000, 90_000), (0, 90_000), (None, 90_000)],
)
def test_a_limit_is_lowered_to_that_of_the_provider_and_never_raised(
    world: World, said: float | None, holds: float
) -> None:
    pool = pool_of(world)

    pool.learn(
        MAIN, MINI, RateLimitHeaders(NOTHING, LimitState(limit=said, remaining=5, reset_s=1))
    )

    assert pool.bucket(MAIN, MINI).rates["tokens"].limit == holds
    assert pool.bucket(MAIN, MINI).rates["requests"].limit == 3500
    assert pool.bucket(SPARE, MINI).rates["tokens"].limit == 90_000


def test_consecutive_429_answers_double_the_pause_until_a_call_succeeds(
    world: World,
) -> None:
    pool, other = pool_of(world), pool_of(world)

    def held() -> float:
        return round(other.bucket(MAIN, MINI).status()["requests"]["hold_s"], 3)

    found = []
    for wait_s in (2.0, 2.0, 2.0):
        pool.hold(MAIN, MINI, wait_s)
        pool.hold(MAIN, MINI, wait_s)  # this call was in flight together with the first
        found.append(held())
        world.sleep(held() + 0.1)
    pool.learn(MAIN, MINI, RateLimitHeaders(NOTHING, NOTHING))
    pool.hold(MAIN, MINI, 2.0)

    assert [*found, held()] == [2.0, 4.0, 8.0, 2.0]


def test_a_released_pause_does_not_lengthen_the_next_one(world: World) -> None:
    pool, other = pool_of(world), pool_of(world)
    bucket = pool.bucket(MAIN, MINI)
    for _ in range(3):
        pool.hold(MAIN, MINI, 10.0)
        world.sleep(bucket.status()["requests"]["hold_s"] + 0.1)
    pool.passed(bucket)
    pool.hold(MAIN, MINI, 10.0)
    before = bucket.status()["requests"]["hold_s"]
    other.bucket(MAIN, MINI).release()
    pool.passed(bucket)
    pool.hold(MAIN, MINI, 10.0)

    assert [before, bucket.status()["requests"]["hold_s"]] == pytest.approx([80.0, 10.0])


def test_a_process_is_full_when_its_pool_or_every_endpoint_is_full(world: World) -> None:
    pool = pool_of(world, pool=3, per_host=2)
    for name, full in (("main", False), ("main", False), ("spare", True)):
        pool.router.began(name)
        assert pool.is_full is full

    pool.router.ended("main")
    assert pool.is_full is False


def test_the_protections_of_calls_can_be_listed_without_a_call(world: World) -> None:
    names = [each.service for each in protections(LlmSettings(endpoints=(MAIN, SPARE)))]

    assert names == [
        "llm:main",
        "llm:MAIN_KEY:gpt-4.1-nano",
        "llm:MAIN_KEY:gpt-4.1-mini",
        "llm:MAIN_KEY:gpt-4.1",
        "llm:spare",
        "llm:SPARE_KEY:gpt-4.1-mini",
    ]


def test_models_are_protected_when_an_endpoint_is_configured(
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
