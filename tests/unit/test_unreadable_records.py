"""One record that cannot be read, of another release or damaged, hides no other record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from resilience.degradation import Level
from resilience.fault_log import FaultLog
from resilience.faults import Fault, classify
from resilience.keys import Keys
from resilience.validation import readable, tell_unreadable
from rlm_tasks import JobRequest
from rlm_tasks.jobs.item_failures import failure_of
from rlm_tasks.ledger.records import ROOT, Report
from rlm_tasks.llm.endpoint_health import EndpointHealth
from rlm_tasks.settings.llm import LlmSettings
from scheduler.alerts import Alerts
from scheduler.board import Board, ClusterReport
from scheduler.events import UNREADABLE, Event, Events, EventSeverity
from scheduler.settings import AlertSettings, PressureSettings, SnapshotSettings
from scheduler.slots import SlotBoard
from scheduler.snapshots import Snapshots
from tests.unit.harness import Platform
from tests.unit.scheduler.test_board import host
from tests.unit.world import World

BROKEN = (b"", b"\xff", b"null", b"[]", b'{"level": "high", "at": "now", "severity": 7}')


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest) -> bytes:
    """A record that no reader understands."""
    tell_unreadable.cache_clear()
    record: bytes = request.param
    return record


def test_a_bad_record_is_left_out_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tell_unreadable.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert readable("a number", ["1", "one", "2", "two"], int) == [1, 2]
    assert [record.message for record in caplog.records] == [
        "a number cannot be read and is left out (ValueError): another release wrote it, "
        "or it is damaged"
    ]


def test_reports_on_the_board(broken: bytes) -> None:
    world, keys = World(), Keys("unit")
    store = world.store()
    board, client = Board(store, keys, PressureSettings()), world.client()
    store.call(board.publish(host("a")))
    now_ms = int(store.now_ms())
    client.hset(keys.pressure().hosts, "b", broken)
    client.hset(keys.pressure().hosts, "c", b"%d " % now_ms + broken)
    board.announce(ClusterReport(int(Level.HIGH), "a test", 1.0), b"")
    client.xadd(keys.pressure().history, {"report": broken})

    assert [each.worker for each in board.hosts()] == ["a"]
    assert list(board.clocks()) in ([], ["a"])
    assert [report.level for report in board.history()] == [Level.HIGH]
    assert board.orders().cluster is not None

    client.set(keys.pressure().cluster, broken)
    client.set(keys.pressure().forced, broken)
    orders = board.orders()
    assert (orders.cluster, orders.forced) == (None, None)


def test_a_level_of_a_later_release_is_no_level_of_this_one() -> None:
    world, keys = World(), Keys("unit")
    board = Board(world.store(), keys, PressureSettings())
    board.announce(ClusterReport(7, "a later release", 1.0), b"")

    assert board.orders().cluster is None


def test_free_slots_of_workers(broken: bytes) -> None:
    world, keys = World(), Keys("unit")
    store = world.store()
    slots = SlotBoard(store, keys)
    store.call(slots.publish("a", 4, 2, ["q"]))
    world.client().hset(keys.slots, "b", broken)

    assert store.call(slots.take("q", 9)) == [[2, 4]]


def test_events_and_alerts_keep_their_place(broken: bytes) -> None:
    world = World()
    store, client = world.store(), world.client()
    events = Events(store)
    event = Event("breaker.opened", "b opened", EventSeverity.WARNING, {"breaker": "b"})
    events.emit(event)
    [stream] = [key for key in client.keys("*events*") if client.type(key) == b"stream"]
    client.xadd(stream, {"event": broken, "at": "1"})
    events.emit(event)

    names = [each.name for each in events.read("0")]
    assert names == ["breaker.opened", UNREADABLE, "breaker.opened"]
    assert [each.name for each in events.recent(name="breaker.*")] == ["breaker.opened"] * 2
    assert events.read(events.read("0")[1].id), "a reader goes on behind it"


def test_the_history_of_alerts(broken: bytes) -> None:
    world = World()
    store, client = world.store(), world.client()
    alerts = Alerts(store, AlertSettings(), Events(store))
    alerts.process_event(
        Event("breaker.opened", "b opened", EventSeverity.WARNING, {"breaker": "b"})
    )
    [stream] = [key for key in client.keys("*alerts*") if client.type(key) == b"stream"]
    client.xadd(stream, {"alert": broken, "at": "1", "held": "0"})

    assert [each.kind for each in alerts.history()] == ["breaker.opened"]


def test_snapshots_of_an_operation(broken: bytes) -> None:
    world, keys = World(), Keys("unit")
    client = world.client()
    key = keys.snapshots("sum")[0]
    client.lpush(key, b"[60.0,100,0,1000,1024,1]", broken)

    found = Snapshots(world.store(), keys, SnapshotSettings()).of("sum")

    assert [each.executions for each in found] == [100]


def test_checks_of_endpoints(broken: bytes) -> None:
    world = World()
    store = world.store()
    health = EndpointHealth(store, LlmSettings())
    health.record("a", latency_s=0.1)
    world.client().hset(Keys("unit").endpoints(), "b", broken)

    assert [each.name for each in health.checkups()] == ["a"]


def test_patterns_of_the_fault_log(broken: bytes) -> None:
    world = World()
    store = world.store()
    log = FaultLog(store)
    fault: Fault = classify(TimeoutError("slow"))
    log.record("service", [(fault, "slow")])
    [key] = world.client().keys("*patterns*")
    world.client().hset(key, '["other", "TIMEOUT", "m"]', broken)

    assert [each.service for each in log.patterns()] == ["service"]
    log.record("other", [(fault, "m")])  # a new fault of a pattern repairs its record
    assert {each.service for each in log.patterns()} == {"service", "other"}


@pytest.mark.parametrize(
    ("key", "read"),
    [
        ("failures", lambda ledger, job: [each.index for each in ledger.failures(job)]),
        ("nodes", lambda ledger, job: [each.id for each in ledger.all_records(job)]),
        ("quarantine", lambda ledger, job: [each.index for each in ledger.quarantine.items(job)]),
    ],
)
def test_records_of_a_job(key: str, read: Callable[[Any, str], list[Any]], broken: bytes) -> None:
    platform = Platform()
    spec = platform.submit(JobRequest(operation="sum", items=range(9)))
    claim = platform.ledger.claim(spec.job, ROOT, "mine", "w")
    failure = msgspec.json.encode(failure_of(3, ValueError("no"))).decode()
    platform.ledger.finish(claim, Report(mid=9, done=8, failures=[(3, failure)]), b"x")
    before = read(platform.ledger, spec.job)
    platform.store.client.hset(getattr(platform.keys.of(spec.job), key), "7", broken)

    assert read(platform.ledger, spec.job) == before
