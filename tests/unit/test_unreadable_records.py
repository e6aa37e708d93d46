"""One record that cannot be read, of another release or damaged, hides no other record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from resilience.breaker import CircuitBreaker
from resilience.bulkhead import Aimd, Bulkhead
from resilience.degradation import Level
from resilience.errors import StoreUnavailable
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
from scheduler.preemption import Preemption
from scheduler.settings import AlertSettings, PressureSettings, SnapshotSettings
from scheduler.slots import SlotBoard
from scheduler.snapshots import Snapshots
from scheduler.usage import Usage
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
    world.client().hset(Keys("unit").endpoints()[0], "b", broken)

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


@pytest.mark.parametrize("field", ["busy_us", "lately_kb", "done"])
def test_the_usage_of_an_operation(field: str, broken: bytes) -> None:
    world, keys = World(), Keys("unit")
    store, client = world.store(), world.client()
    usage = Usage(store, keys)
    for name in ("bad", "good"):
        store.call(usage.tally(name, done=3, failed=1, busy_us=8, memory_kb=9))
    client.hset(keys.usage("bad")[1], field, broken)
    client.sadd(keys.usage("bad")[0], b"\xff")

    store.call(usage.tally("bad", done=3, failed=1, busy_us=8, memory_kb=9))
    found = {each.executor_id: each.total_executions for each in usage.all()}
    assert (set(found), found["good"]) == ({"bad", "good"}, 4)
    assert usage.totals()[0] >= 1
    assert len(Snapshots(store, keys, SnapshotSettings()).trends(["bad", "good"])) == 2


DAMAGED: dict[str, Callable[[Keys], str]] = {
    "usage": lambda keys: keys.usage("sum")[1],
    "names of operations": lambda keys: keys.usage("sum")[0],
    "slots": lambda keys: keys.slots,
    "hosts": lambda keys: keys.pressure().hosts,
    "orders": lambda keys: keys.pressure().cluster,
    "tokens": lambda keys: keys.preemption("q")[0],
    "snapshots": lambda keys: keys.snapshots("sum")[0],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_statistic_of_another_type_costs_no_other_call(kind: str) -> None:
    world, keys = World(), Keys("unit")
    store, client = world.store(), world.client()
    client.rpush(DAMAGED[kind](keys), "x")
    slots = SlotBoard(store, keys)
    board = Board(store, keys, PressureSettings())
    preemption = Preemption(store, keys, slots)

    store.call(
        Usage(store, keys).tally("sum", done=3, failed=1, busy_us=8, memory_kb=9),
        slots.publish("a", 4, 2, ["q"]),
        board.publish(host("a")),
        preemption.open("q"),
    )
    assert store.call(slots.take("q", 9)) == [(0, 0) if kind == "slots" else [2, 4]]
    assert [each.worker for each in board.hosts()] == ([] if kind == "hosts" else ["a"])
    assert board.orders().cluster is None
    assert Snapshots(store, keys, SnapshotSettings()).of("sum") == []
    assert len(Usage(store, keys).all()) == (kind != "names of operations")


def test_a_guard_decides_alone_where_its_record_is_damaged() -> None:
    world, keys = World(), Keys("unit")
    store, client = world.store(), world.client()
    for key in (keys.bulkhead("b")[1], keys.breaker("c")[0], keys.budget("d"), keys.faults[0]):
        client.rpush(key, "x")

    with Bulkhead("b", limit=2, store=store).permit():
        pass
    assert CircuitBreaker("c", store=store).call(lambda: 3) == 3
    FaultLog(store).record("d", [(classify(TimeoutError("slow")), "slow")])
    assert not store.is_away, "Redis is well"
    with pytest.raises(StoreUnavailable, match=r"a record that cannot be used \(.*WRONGTYPE"):
        Bulkhead("b", limit=Aimd(2), store=store).status()


@pytest.mark.parametrize("used", ["99999999999", "{", "-3", "nan"])
def test_a_damaged_sum_of_permits_is_counted_anew_when_none_is_out(used: str) -> None:
    world, keys = World(), Keys("unit")
    store, client = world.store(), world.client()
    bulkhead = Bulkhead("b", limit=2, store=store)
    client.hset(keys.bulkhead("b")[1], "used", used)
    client.hset(keys.bulkhead("b")[2], "a host", used)

    assert [bool(bulkhead.acquire()) for _ in range(3)] == [True, True, False]


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
