"""Events: a bounded stream that all processes share, a log line each, and
listeners that miss none.
"""

from __future__ import annotations

import ast
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

import scheduler.events
from docs.generate import events_page
from resilience.degradation import Level
from resilience.errors import InvalidValue, StoreUnavailable
from resilience.retry import RetryPolicy
from scheduler.alerts import RULES
from scheduler.events import (
    BREAKER_OPENED,
    KINDS,
    PRESSURE_CHANGED,
    Event,
    EventKind,
    Events,
    EventSeverity,
    Listener,
)
from scheduler.monitor import ALERTING
from tests.support import wait_until
from tests.unit.world import CountingStore, World, world

__all__ = ["world"]

SOON = RetryPolicy(initial_delay_s=0.01, max_delay_s=0.01)


def slow(operation: str = "scan", **data: Any) -> Event:
    return Event(
        "execution.slow",
        f"{operation} took 31 s",
        EventSeverity.WARNING,
        {"operation": operation, **data},
    )


def numbered(*numbers: int) -> list[Event]:
    return [
        Event("scaling.advised", f"number {number}", data={"number": number}) for number in numbers
    ]


def numbers(events: list[Event]) -> list[int]:
    return [event.data["number"] for event in events]


# --- the stream -------------------------------------------------------------------------------


def test_one_process_emits_and_another_reads_with_the_time_of_the_server(world: World) -> None:
    world.now += 0.25
    Events(world.store()).emit(slow(ms=31_000, nested={"a": [1, None]}))

    [event] = Events(world.store()).recent()

    assert (event.name, event.message, event.severity) == (
        "execution.slow",
        "scan took 31 s",
        EventSeverity.WARNING,
    )
    assert event.data == {"operation": "scan", "ms": 31_000, "nested": {"a": [1, None]}}
    assert event.at == pytest.approx(world.now, abs=1e-5)
    assert event.id


def test_platforms_of_other_names_do_not_receive_them(world: World) -> None:
    other = CountingStore(
        "redis://fake", namespace="other", client=world.client(), clock=lambda: world.now
    )
    Events(other).emit(slow())

    assert Events(world.store()).recent() == []


def test_several_events_are_one_round_trip_and_no_event_is_none(world: World) -> None:
    store = world.store()
    Events(store).emit()
    Events(store).emit(*numbered(1, 2, 3))

    assert store.round_trips == 1
    assert numbers(Events(world.store()).recent()) == [3, 2, 1], "newest first"


def test_the_stream_is_bounded(world: World) -> None:
    events = Events(world.store(), history=10)
    for number in range(25):
        events.emit(*numbered(number))

    assert numbers(events.recent(100)) == list(range(24, 14, -1))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (None, ["breaker.closed", "breakers.open", "breaker.opened", "execution.slow"]),
        ("breaker.opened", ["breaker.opened"]),
        ("breaker.*", ["breaker.closed", "breaker.opened"]),
        ("breaker", []),
        ("memory.high", []),
    ],
)
def test_recent_events_are_found_by_name(world: World, name: str | None, found: list[str]) -> None:
    events = Events(world.store())
    events.emit(
        *(
            Event(each, "")
            for each in ("execution.slow", "breaker.opened", "breakers.open", "breaker.closed")
        )
    )

    assert [event.name for event in events.recent(name=name)] == found


def test_a_limit_counts_only_events_of_the_name(world: World) -> None:
    events = Events(world.store())
    events.emit(*numbered(1, 2), slow(), slow(), slow())

    assert numbers(events.recent(1, name="scaling.advised")) == [2]
    assert len(events.recent(2)) == 2


def test_reading_continues_after_a_given_event(world: World) -> None:
    events = Events(world.store())
    events.emit(*numbered(1, 2))
    first = events.read("0-0")
    events.emit(*numbered(3))

    assert numbers(first) == [1, 2], "oldest first"
    assert numbers(events.read(first[-1].id)) == [3]
    assert events.read(events.recent(1)[0].id) == [], "there is no newer event"


class ReadingClient:
    """A client that notes the time for which a read would block."""

    def __init__(self, timeout_s: float | None) -> None:
        self.connection_pool = self
        self.connection_kwargs = {"socket_timeout": timeout_s}
        self.block: int | None = -1

    def xread(self, _streams: object, *, count: int, block: int | None) -> list[object]:
        self.block = block
        return []


@pytest.mark.parametrize(
    ("timeout_s", "asked", "waited"),
    [
        (5.0, 1000, 1000),
        (1.2, 1000, 700),
        (0.5, 1000, None),
        (0.1, 1000, None),
        (None, 1000, 1000),
        (5.0, 0, None),
    ],
)
def test_a_read_blocks_for_less_than_the_socket_timeout(
    timeout_s: float | None, asked: int, waited: int | None
) -> None:
    client = ReadingClient(timeout_s)
    store = CountingStore("redis://fake", client=client)  # type: ignore[arg-type]

    assert Events(store).read("0-0", asked) == []
    assert client.block == waited


# --- without Redis ----------------------------------------------------------------------------


def test_without_redis_events_are_logged_and_nothing_is_raised(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = world.store()
    store.lost = True
    events = Events(store)
    events.emit(slow("a"))
    events.emit(slow("b"))
    with pytest.raises(StoreUnavailable):
        events.recent()

    assert len([each for each in caplog.records if each.name == "rlm.events"]) == 2
    assert len([each for each in caplog.records if each.name == "scheduler.events"]) == 1, (
        "an outage is logged once"
    )
    store.lost = False
    world.sleep(5)
    events.emit(slow("c"))
    assert [event.data["operation"] for event in events.recent()] == ["c"]
    store.lost = True
    events.emit(slow("d"))
    assert len([each for each in caplog.records if each.name == "scheduler.events"]) == 2, (
        "the next outage is logged again"
    )


# --- the log ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("severity", "level"),
    [
        (EventSeverity.INFO, logging.INFO),
        (EventSeverity.WARNING, logging.WARNING),
        (EventSeverity.ERROR, logging.ERROR),
        (EventSeverity.CRITICAL, logging.CRITICAL),
    ],
)
def test_every_event_is_a_log_line(
    world: World, caplog: pytest.LogCaptureFixture, severity: EventSeverity, level: int
) -> None:
    caplog.set_level(logging.INFO)
    Events(world.store()).emit(
        Event(
            "cpu.high", "CPU is 91 % in use", severity, {"host": "a", "message": "b", "name": "c"}
        )
    )

    [record] = [each for each in caplog.records if each.name == "rlm.events"]
    assert record.levelno == level
    assert record.getMessage() == f"{severity.label} cpu.high: CPU is 91 % in use"
    event = record.__dict__["event"]
    assert (event["name"], event["severity"], event["data"]["host"]) == (
        "cpu.high",
        severity.label,
        "a",
    )


def test_a_message_stays_one_line_without_control_characters() -> None:
    event = Event("execution.slow", "scan\nCRITICAL all is lost\x1b[31m\r" + "x" * 1000)

    assert event.message.startswith("scan CRITICAL all is lost [31m xxx")
    assert len(event.message) <= 500


# --- listeners --------------------------------------------------------------------------------


Listening = Callable[[Events], Listener]


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    """Make listeners that poll often, and close them at the end of the test."""
    monkeypatch.setattr("scheduler.events.BLOCK_MS", 20)
    monkeypatch.setattr("scheduler.events.PAUSE_S", 0.001)
    made: list[Listener] = []

    def make(events: Events) -> Listener:
        made.append(Listener(events, back_off=SOON))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_listener_receives_later_events_of_its_names_in_order(
    world: World, listening: Listening
) -> None:
    events, all_slow, breakers = Events(world.store()), list[Event](), list[str]()
    events.emit(slow("before"))
    listener = listening(Events(world.store())).on("execution.slow", all_slow.append)
    listener.on("breaker.*", lambda event: breakers.append(event.name)).start()

    events.emit(slow("a"), Event("breaker.opened", ""), Event("cpu.high", ""), slow("b"))
    events.emit(Event("breaker.closed", ""))
    wait_until(lambda: len(breakers) == 2)

    assert [event.data["operation"] for event in all_slow] == ["a", "b"]
    assert breakers == ["breaker.opened", "breaker.closed"]


def test_a_listener_of_an_empty_stream_receives_the_first_event(
    world: World, listening: Listening
) -> None:
    received: list[Event] = []
    listening(Events(world.store())).on("scaling.advised", received.append).start()

    Events(world.store()).emit(*numbered(1))

    wait_until(lambda: numbers(received) == [1])


def test_a_callback_that_raises_is_logged_and_stops_no_other(
    world: World, listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[Event] = []

    def broken(event: Event) -> None:
        raise ValueError("mine")

    listening(Events(world.store())).on("scaling.advised", broken).on(
        "scaling.advised", received.append
    ).start()
    Events(world.store()).emit(*numbered(1))
    Events(world.store()).emit(*numbered(2))
    wait_until(lambda: numbers(received) == [1, 2])

    failed = [each.getMessage() for each in caplog.records if each.exc_info]
    assert len(failed) == 2
    assert all("broken failed on scaling.advised" in each for each in failed)


def test_callbacks_run_in_the_thread_of_the_listener_and_may_close_it(
    world: World, listening: Listening
) -> None:
    received: list[tuple[int, str]] = []
    listener = listening(Events(world.store()))

    def last(event: Event) -> None:
        listener.close()
        received.append((event.data["number"], threading.current_thread().name))

    listener.on("scaling.advised", last).start()
    Events(world.store()).emit(*numbered(1, 2))
    wait_until(lambda: all(each.name != "rlm-events" for each in threading.enumerate()))

    assert received == [(1, "rlm-events")]


def test_after_an_outage_a_listener_receives_missed_events_once(
    world: World,
    listening: Listening,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    received: list[Event] = []
    store, asked, lost = world.store(), threading.Event(), threading.Event()
    xread = store.client.xread

    def cut(*args: Any, **kwargs: Any) -> Any:
        if lost.is_set():
            asked.set()
            raise RedisConnectionError("cut off by the test")
        return xread(*args, **kwargs)

    monkeypatch.setattr(store.client, "xread", cut)
    listening(Events(store)).on("scaling.advised", received.append).start()
    Events(world.store()).emit(*numbered(1))
    wait_until(lambda: numbers(received) == [1])

    lost.set()
    wait_until(asked.is_set)
    Events(world.store()).emit(*numbered(2, 3))
    asked.clear()
    wait_until(asked.is_set)
    assert numbers(received) == [1]
    lost.clear()

    wait_until(lambda: numbers(received) == [1, 2, 3])
    assert (
        len([each for each in caplog.records if "No events are received" in each.getMessage()]) == 1
    )


def test_a_listener_may_start_without_redis(world: World, listening: Listening) -> None:
    received: list[Event] = []
    store = world.store()
    store.lost = True
    listening(Events(store)).on("scaling.advised", received.append).start()
    store.lost = False
    world.sleep(5)

    def has_received() -> bool:
        Events(world.store()).emit(*numbered(1))
        return bool(received)

    wait_until(has_received)


@pytest.mark.parametrize("name", ["", "*", "exec*", "*.slow", "execution.*.slow"])
def test_a_name_that_can_never_match_is_refused(world: World, name: str) -> None:
    with pytest.raises(InvalidValue, match=r"breaker\.\*"):
        Listener(Events(world.store())).on(name, print)


def test_a_listener_that_never_started_can_be_closed(world: World) -> None:
    Listener(Events(world.store())).close()


# --- the list of kinds ------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]
LIST = ROOT / "scheduler/events.py"


def modules() -> dict[str, ast.Module]:
    """Return the code of the three packages without the list itself, by path."""
    return {
        file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for package in ("rlm_tasks", "scheduler", "resilience")
        for file in sorted((ROOT / package).rglob("*.py"))
        if file != LIST
    }


def imported(module: ast.Module) -> dict[str, str]:
    """Return the names that a module imports from the list: local name -> name in the list."""
    return {
        alias.asname or alias.name: alias.name
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.module == "scheduler.events"
        for alias in node.names
    }


def emitted(folder: str = "") -> set[str]:
    """Return the names of the constants whose method `event` is called in a folder."""
    return {
        names[node.func.value.id]
        for path, module in modules().items()
        if path.startswith(folder)
        for names in [imported(module)]
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "event"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in names
    }


CONSTANTS = {
    name: value for name, value in vars(scheduler.events).items() if isinstance(value, EventKind)
}


def test_each_kind_is_in_the_list_once_under_its_name() -> None:
    assert list(KINDS.values()) == list(CONSTANTS.values())
    assert list(KINDS) == [kind.name for kind in KINDS.values()]
    assert [name.lower().replace("_", ".") for name in CONSTANTS] == list(KINDS)


def test_each_emitted_event_is_in_the_list_and_each_listed_one_is_emitted() -> None:
    assert sorted(emitted()) == sorted(CONSTANTS)


def test_events_are_made_only_by_their_kinds() -> None:
    """An `Event` that is made by its own name could have a name that the list does not have."""
    direct = [
        f"{path}:{node.lineno}"
        for path, module in modules().items()
        for names in [imported(module)]
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and names.get(node.func.id) == "Event"
    ]

    assert direct == []


def test_each_rule_of_an_alert_belongs_to_a_listed_event() -> None:
    levels = {f"pressure.{level.label}" for level in Level}

    assert [name for name in RULES if name not in KINDS and name not in levels] == []


def test_the_monitor_alerts_each_event_of_workers_that_has_a_rule() -> None:
    of_workers = {CONSTANTS[name].name for name in emitted("rlm_tasks/")}

    assert of_workers & RULES.keys() == ALERTING


@pytest.mark.parametrize("emit", [Events.emit, Events.keep])
def test_an_event_with_an_unknown_name_is_neither_logged_nor_stored(
    world: World, caplog: pytest.LogCaptureFixture, emit: Callable[..., None]
) -> None:
    caplog.set_level(logging.INFO)
    store = world.store()
    with pytest.raises(InvalidValue, match=r"name='job\.lost': must be one of pressure\."):
        emit(Events(store), slow(), Event("job.lost", ""))

    assert (store.round_trips, caplog.records) == (0, [])


def test_a_stored_event_of_another_release_can_be_read(world: World) -> None:
    events = Events(world.store())
    events.emit(slow())
    [(_, entry)] = world.client().xrange("unit:events")
    world.client().xadd(
        "unit:events", {**entry, b"event": entry[b"event"].replace(b"execution.slow", b"job.lost")}
    )

    assert [event.name for event in events.recent()] == ["job.lost", "execution.slow"]


def test_an_event_has_the_severity_and_only_the_data_of_its_kind() -> None:
    event = BREAKER_OPENED.event("breaker llm has opened", {"breaker": "llm"})

    assert event == Event(
        "breaker.opened", "breaker llm has opened", EventSeverity.WARNING, {"breaker": "llm"}
    )
    with pytest.raises(InvalidValue, match=r"data=\['service'\]: breaker\.opened has the fields"):
        BREAKER_OPENED.event("", {"breaker": "llm", "service": "llm"})


def test_a_kind_whose_severity_varies_needs_it_for_each_event() -> None:
    event = PRESSURE_CHANGED.event("", {"level": "high"}, EventSeverity.WARNING)

    assert event.severity is EventSeverity.WARNING
    with pytest.raises(InvalidValue, match=r"severity=None: must be given for pressure\."):
        PRESSURE_CHANGED.event("", {"level": "high"})


def test_the_page_of_events_has_each_name_and_field() -> None:
    page = (ROOT / "docs/reference/events.md").read_text(encoding="utf-8")

    assert page == events_page(), "make docs ARGS=--write"
    for kind in KINDS.values():
        section = page.partition(f"## `{kind.name}`\n")[2].partition("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(kind.fields)
