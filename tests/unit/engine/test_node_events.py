"""Events of a node for operators: slow items and large processes, at a limited rate."""

from __future__ import annotations

import msgspec
import pytest
from celery import Celery

from resilience.fault_log import FaultLog
from resilience.faults import TIMEOUT
from rlm_tasks.client.client import Client
from rlm_tasks.engine.node_events import MEMORY_EVERY_S, MOST_SLOW, NodeEvents
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.ledger.records import Closed
from rlm_tasks.settings.model import Settings
from scheduler.events import Events, EventSeverity
from scheduler.settings import AlertSettings
from tests.unit.world import World, world

__all__ = ["world"]


def node_events(world: World, **settings: float) -> tuple[NodeEvents, Events]:
    events = Events(world.store())
    return NodeEvents(events, AlertSettings.model_validate(settings), world.time), events


def test_an_ordinary_node_emits_nothing_and_costs_no_round_trip(world: World) -> None:
    store = world.store()
    emitter = NodeEvents(Events(store), AlertSettings(), world.time)
    emitter.of_node("sum", "job", "w1", slow=[], memory_mb=499.9)
    assert store.round_trips == 0


def test_slow_items_emit_events_with_their_fields(world: World) -> None:
    emitter, events = node_events(world, slow_execution_ms=250)
    assert emitter.slow_s == 0.25

    emitter.of_node("sum", "job", "w1", slow=[(3, 1.5), (7, 0.25)], memory_mb=1)

    [second, first] = events.recent()
    assert (first.name, first.severity) == ("execution.slow", EventSeverity.WARNING)
    assert first.data == {"operation": "sum", "job": "job", "index": 3, "duration_ms": 1500.0}
    assert second.data["index"] == 7


def test_a_slow_job_emits_an_event_with_the_names_of_the_documents(world: World) -> None:
    emitter, events = node_events(world, slow_execution_ms=3000)
    spec = JobSpec("job-1", "sum", RangeSource(0, 1), 10, Shape("flat"), "queue")

    for job, closed in (
        (spec, Closed("succeeded", 2999)),
        (spec, Closed("", 9000)),  # another process has closed it
        (msgspec.structs.replace(spec, parent="lead"), Closed("succeeded", 9000)),
        (spec, Closed("succeeded", 3007)),
    ):
        emitter.of_job(job, closed)

    [event] = events.recent()
    assert event.name == "execution.slow"
    assert event.data == {"operation": "sum", "job": "job-1", "duration_ms": 3007.0}
    assert (event.executionTimeMs, event.taskId, event.task_id) == (3007.0, "job-1", "job-1")
    with pytest.raises(AttributeError, match=r"execution\.slow has no field 'index'"):
        _ = event.index


def test_the_number_of_events_of_one_node_is_bounded(world: World) -> None:
    emitter, events = node_events(world)
    emitter.of_node("sum", "job", "w1", slow=[(index, 60.0) for index in range(1000)], memory_mb=1)
    assert [each.data["index"] for each in reversed(events.recent())] == list(range(MOST_SLOW))


def test_a_large_process_emits_its_size_again_after_a_while(world: World) -> None:
    emitter, events = node_events(world, memory_mb=500)
    for _ in range(3):
        emitter.of_node("sum", "job", "w1", slow=[], memory_mb=500)
    assert [each.name for each in events.recent()] == ["memory.high"]
    world.sleep(MEMORY_EVERY_S - 1)
    emitter.of_node("sum", "job", "w1", slow=[], memory_mb=700)
    assert len(events.recent()) == 1
    world.sleep(1)
    emitter.of_node("sum", "job", "w1", slow=[], memory_mb=700)
    assert [each.data["memory_mb"] for each in events.recent()] == [700.0, 500.0]
    assert events.recent()[0].data["host"] == "w1"


def test_an_outage_of_redis_does_not_fail_the_node(world: World) -> None:
    store = world.store()
    store.lost = True
    NodeEvents(Events(store), AlertSettings(), world.time).of_node(
        "sum", "job", "w1", slow=[(0, 60.0)], memory_mb=1000
    )
    assert store.round_trips == 1, "both events in one round trip"


def test_a_fault_that_recurs_often_is_one_event_without_its_text(world: World) -> None:
    emitter, events = node_events(world)
    log = FaultLog(world.store(), on_escalation=emitter.escalated)
    for _ in range(40):
        log.record("llm", [(TIMEOUT, "the customer Ann has no answer")])

    [event] = events.recent()
    assert (event.name, event.message) == (
        "faults.escalated",
        "llm fails with TIMEOUT again and again; the severity is now HIGH",
    )
    assert event.data == {"service": "llm", "code": "TIMEOUT", "severity": "HIGH"}


def test_nodes_monitor_and_clients_of_a_platform_share_one_stream() -> None:
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


@pytest.mark.parametrize("name", ["execution.slow", "memory.high", "faults.escalated"])
def test_each_event_of_a_node_may_raise_an_alert(name: str) -> None:
    from scheduler.alerts import RULES
    from scheduler.monitor import ALERTING

    assert name in ALERTING
    assert name in RULES
