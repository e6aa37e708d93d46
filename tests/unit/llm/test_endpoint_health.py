"""How endpoints are found to be ill and well again, by one worker for all; and what of it is
counted and shown.
"""

from __future__ import annotations

import fakeredis._socket._base as server_keys
import pytest

from rlm_tasks.llm.endpoint_health import EndpointHealth
from rlm_tasks.settings.llm import LlmSettings
from tests.unit.world import World

SETTINGS = LlmSettings()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose keys expire by its own clock, too."""
    own = World()
    own.install(monkeypatch)
    monkeypatch.setattr(server_keys, "time", own)
    monkeypatch.setenv("UNIT_KEY", "sk-unit")
    return own


# --- what is believed -------------------------------------------------------------------------


def test_an_endpoint_is_ill_after_three_checks_in_a_row_and_well_after_one(world: World) -> None:
    health = EndpointHealth(world.store(), SETTINGS)
    for why in ("away", "away", "", "away", "away"):
        health.tell("main", latency_s=0.0 if why else 0.25, why=why)
    assert EndpointHealth(world.store(), SETTINGS).ill() == frozenset()

    assert health.tell("main", why="away").strikes == 3
    assert EndpointHealth(world.store(), SETTINGS).ill() == {"main"}

    assert health.tell("main", latency_s=0.25).latency_ms == 250
    assert EndpointHealth(world.store(), SETTINGS).ill() == frozenset()


def test_word_is_read_once_a_second_and_believed_for_three_intervals(world: World) -> None:
    asks, told = EndpointHealth(world.store(), SETTINGS), EndpointHealth(world.store(), SETTINGS)
    assert asks.ill() == frozenset()
    for _ in range(3):
        told.tell("main", why="away")
    assert asks.ill() == frozenset(), "it was read a moment ago"

    world.sleep(1)
    assert asks.ill() == {"main"}
    world.sleep(3 * SETTINGS.health_every_s)
    assert asks.ill() == frozenset(), "nobody has looked for a while"
