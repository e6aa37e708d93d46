"""The health of endpoints, shared by all workers."""

from __future__ import annotations

import fakeredis._socket._base as server_keys
import pytest

from rlm_tasks.llm.endpoint_health import EndpointHealth
from rlm_tasks.settings.llm import LlmSettings
from tests.unit.world import World

SETTINGS = LlmSettings()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose keys expire by its own clock."""
    own = World()
    own.install(monkeypatch)
    monkeypatch.setattr(server_keys, "time", own)
    monkeypatch.setenv("UNIT_KEY", "sk-unit")
    return own


# --- the state of an endpoint -----------------------------------------------------------------


def test_three_failed_checks_mark_an_endpoint_and_one_success_clears_it(world: World) -> None:
    health = EndpointHealth(world.store(), SETTINGS)
    for why in ("away", "away", "", "away", "away"):
        health.record("main", latency_s=0.0 if why else 0.25, why=why, failed=bool(why))
    assert EndpointHealth(world.store(), SETTINGS).unhealthy() == frozenset()

    assert health.record("main", why="away", failed=True).strikes == 3
    assert EndpointHealth(world.store(), SETTINGS).unhealthy() == {"main"}

    assert health.record("main", latency_s=0.25).latency_ms == 250
    assert EndpointHealth(world.store(), SETTINGS).unhealthy() == frozenset()


def test_the_state_is_read_once_a_second_and_holds_for_three_intervals(world: World) -> None:
    reader, reporter = (
        EndpointHealth(world.store(), SETTINGS),
        EndpointHealth(world.store(), SETTINGS),
    )
    assert reader.unhealthy() == frozenset()
    for _ in range(3):
        reporter.record("main", why="away", failed=True)
    assert reader.unhealthy() == frozenset(), "the state was read a moment ago"

    world.sleep(1)
    assert reader.unhealthy() == {"main"}
    world.sleep(3 * SETTINGS.health_every_s)
    assert reader.unhealthy() == frozenset(), "there was no check for a while"


def test_an_answer_to_a_call_overrules_failed_checks_for_one_interval(world: World) -> None:
    health = EndpointHealth(world.store(), SETTINGS)
    for _ in range(3):
        health.record("main", why="answers 500", failed=True)
    world.store().call(*health.answered("main"))
    assert health.answered("main") == [], "once in a quarter of the interval is enough"

    assert EndpointHealth(world.store(), SETTINGS).unhealthy() == frozenset()
    world.sleep(SETTINGS.health_every_s + 1)
    health.record("main", why="answers 500", failed=True)
    assert EndpointHealth(world.store(), SETTINGS).unhealthy() == {"main"}
    assert len(health.answered("main")) == 1


def test_a_note_on_the_key_is_no_strike(world: World) -> None:
    health = EndpointHealth(world.store(), SETTINGS)
    for _ in range(4):
        checkup = health.record("main", latency_s=0.1, why="it does not accept its key (401)")

    assert (checkup.strikes, checkup.why) == (0, "it does not accept its key (401)")
    assert health.unhealthy() == frozenset()
