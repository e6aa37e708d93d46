"""What a node tells those who operate the platform: slow items and large processes, and not too
often.
"""

from __future__ import annotations

import pytest
from celery import Celery

from rlm_tasks.client.client import Client
from rlm_tasks.engine.node_events import MEMORY_EVERY_S, MOST_SLOW, NodeEvents
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.settings.model import Settings
from scheduler.events import Events, EventSeverity
from scheduler.settings import AlertSettings
from tests.unit.world import World, world

__all__ = ["world"]


def notices(world: World, **settings: float) -> tuple[NodeEvents, Events]:
    events = Events(world.store())
    return NodeEvents(events, AlertSettings.model_validate(settings), world.time), events


def test_an_ordinary_node_tells_nothing_and_pays_no_round_trip(world: World) -> None:
    store = world.store()
    told = NodeEvents(Events(store), AlertSettings(), world.time)
    told.of_node("sum", "job", "w1", slow=[], memory_mb=499.9)
    assert store.round_trips == 0


def test_slow_items_are_told_with_what_is_known_of_them(world: World) -> None:
    told, events = notices(world, slow_execution_ms=250)
    assert told.slow_s == 0.25

    told.of_node("sum", "job", "w1", slow=[(3, 1.5), (7, 0.25)], memory_mb=1)

    [second, first] = events.recent()
    assert (first.name, first.severity) == ("execution.slow", EventSeverity.WARNING)
    assert first.data == {"operation": "sum", "job": "job", "index": 3, "duration_ms": 1500.0}
    assert second.data["index"] == 7


def test_a_node_of_nothing_but_slow_items_does_not_flood_the_stream(world: World) -> None:
    told, events = notices(world)
    told.of_node("sum", "job", "w1", slow=[(index, 60.0) for index in range(1000)], memory_mb=1)
    assert [each.data["index"] for each in reversed(events.recent())] == list(range(MOST_SLOW))


def test_a_large_process_tells_of_its_size_again_after_a_while(world: World) -> None:
    told, events = notices(world, memory_mb=500)
    for _ in range(3):
        told.of_node("sum", "job", "w1", slow=[], memory_mb=500)
    assert [each.name for each in events.recent()] == ["memory.high"]
    world.sleep(MEMORY_EVERY_S - 1)
    told.of_node("sum", "job", "w1", slow=[], memory_mb=700)
    assert len(events.recent()) == 1
    world.sleep(1)
    told.of_node("sum", "job", "w1", slow=[], memory_mb=700)
    assert [each.data["memory_mb"] for each in events.recent()] == [700.0, 500.0]
    assert events.recent()[0].data["host"] == "w1"


def test_a_lost_redis_does_not_fail_the_node(world: World) -> None:
    store = world.store()
    store.lost = True
    NodeEvents(Events(store), AlertSettings(), world.time).of_node(
        "sum", "job", "w1", slow=[(0, 60.0)], memory_mb=1000
    )
    assert store.round_trips == 1, "both in one"


def test_what_nodes_tell_is_heard_by_the_monitor_and_the_clients_of_the_same_platform_alone() -> (
    None
):
    settings = Settings(namespace="second")
    app = Celery("unit", set_as_current=False)
    app.rlm_settings = settings
    runtime, client = Runtime.of(app, settings), Client(app)
    keys = {
        events._key
        for events in (runtime.node_events._events, Events(runtime.ledger.store), client.events)
    }
    assert keys == {"second:events"}
    assert client.alerts._store.namespace == "second"


@pytest.mark.parametrize("name", ["execution.slow", "memory.high"])
def test_what_is_noticed_may_be_alerted(name: str) -> None:
    from scheduler.alerts import RULES
    from scheduler.monitor import ALERTING

    assert name in ALERTING
    assert name in RULES
