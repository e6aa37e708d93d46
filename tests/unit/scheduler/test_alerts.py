"""Alerts: the events that raise one, their intervals, their history, and their channels."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.degradation import Level
from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.retry import Retry
from scheduler.alerts import (
    ATTEMPTS,
    RULES,
    Alert,
    AlertChannel,
    Alerts,
    ResourcePressureEvent,
    Webhook,
    sign,
    verify,
)
from scheduler.events import Event, Events, EventSeverity
from scheduler.settings import AlertSettings
from tests.support import wait_until
from tests.unit.world import World, world

__all__ = ["world"]

HOUR, DAY = 3600.0, 86_400.0
SILENT = AlertSettings(channels=())


def alerts(world: World, **settings: Any) -> Alerts:
    """Return the alerts as another process sees them."""
    return Alerts(world.store(), AlertSettings(channels=(), **settings), clock=lambda: world.now)


def pressure(level: str, host: str = "a") -> Event:
    return Event("pressure.changed", f"pressure is {level}", data={"level": level, "host": host})


def opened(breaker: str, *also: str) -> Event:
    return Event(
        "breaker.opened",
        f"breaker {breaker} is open",
        data={"breaker": breaker, "open": [breaker, *also]},
    )


def slow(operation: str = "scan") -> Event:
    return Event("execution.slow", f"{operation} took 31 s", data={"operation": operation})


def measured(level: Level | str | int = Level.NORMAL, **fields: Any) -> ResourcePressureEvent:
    calm = {
        "cpu_percent": 10.0,
        "memory_mb": 1000.0,
        "memory_percent": 10.0,
        "worker_count": 8,
        "active_executors": 5,
    }
    return ResourcePressureEvent(datetime.now(UTC), level, **calm | fields)


# --- conditions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "severity", "minutes", "subject"),
    [
        (Event("memory.high", "", data={"host": "a"}), EventSeverity.WARNING, 5, "a"),
        (Event("cpu.high", "", data={"host": "a"}), EventSeverity.WARNING, 5, "a"),
        (pressure("elevated"), EventSeverity.INFO, 10, "a"),
        (pressure("high"), EventSeverity.WARNING, 7, "a"),
        (pressure("critical"), EventSeverity.ERROR, 4, "a"),
        (pressure("emergency"), EventSeverity.CRITICAL, 2, "a"),
        (pressure("critical", host=""), EventSeverity.ERROR, 4, "cluster"),
        (opened("llm"), EventSeverity.WARNING, 5, "llm"),
        (Event("degradation.started", ""), EventSeverity.INFO, 10, "cluster"),
        (slow("scan"), EventSeverity.WARNING, 5, "scan"),
    ],
    ids=lambda each: each.name if isinstance(each, Event) else None,
)
def test_each_condition_has_its_severity_and_its_interval(
    world: World, event: Event, severity: EventSeverity, minutes: int, subject: str
) -> None:
    here = alerts(world)
    [first] = here.process_event(event)
    world.sleep(minutes * 60 - 0.01)
    too_early = here.process_event(event)
    world.sleep(0.01)
    [second] = here.process_event(event)

    assert (first.kind, first.subject, first.severity) == (event.name, subject, severity)
    assert too_early == []
    assert second.severity == severity
    assert first.id != second.id


@pytest.mark.parametrize(
    "event",
    [
        pressure("normal"),
        Event("pressure.changed", "no level"),
        Event("breaker.closed", "", data={"open": ["a", "b", "c"]}),
        Event("degradation.ended", ""),
        Event("alert.raised", ""),
        Event("scaling.advised", ""),
    ],
    ids=lambda event: event.name,
)
def test_other_events_raise_no_alert_and_cost_no_round_trip(world: World, event: Event) -> None:
    store = world.store()

    assert Alerts(store, SILENT, Events(store)).process_event(event) == []
    assert store.round_trips == 0


@pytest.mark.parametrize(
    ("others", "severities"),
    [(1, ["warning"]), (2, ["warning", "error"]), (5, ["warning", "error"])],
)
def test_three_open_breakers_raise_an_error_beside_the_warning(
    world: World, others: int, severities: list[str]
) -> None:
    raised = alerts(world).process_event(opened("llm", *(f"b{i}" for i in range(others))))

    assert [alert.severity.label for alert in raised] == severities
    assert all("b0" in alert.message for alert in raised[1:])


def test_many_open_breakers_raise_one_error_and_a_warning_each(world: World) -> None:
    here, names = alerts(world), ["a", "b", "c", "d", "e"]

    raised = [
        alert
        for at, name in enumerate(names)
        for alert in here.process_event(opened(name, *names[:at]))
    ]

    assert [alert.subject for alert in raised if alert.kind == "breaker.opened"] == names
    assert [alert.severity for alert in raised if alert.kind == "breakers.open"] == [
        EventSeverity.ERROR
    ]


def test_one_pressure_event_may_raise_several_alerts(world: World) -> None:
    test_event = ResourcePressureEvent(
        timestamp=datetime.now(UTC),
        pressure_level=Level.CRITICAL,
        cpu_percent=90.0,
        memory_mb=3500.0,
        memory_percent=87.5,
        worker_count=8,
        active_executors=5,
        degradation_applied=["use_simplified_methods"],
        circuit_breakers_open=["D3-Q3"],
        message="Test alert",
    )
    raised = alerts(world).process_event(test_event)

    assert [(alert.kind, alert.subject, alert.severity.label) for alert in raised] == [
        ("pressure.changed", "cluster", "error"),
        ("memory.high", "cluster", "warning"),
        ("cpu.high", "cluster", "warning"),
        ("breaker.opened", "D3-Q3", "warning"),
        ("degradation.started", "cluster", "info"),
    ]
    assert (raised[0].message, raised[0].pressure_level) == ("Test alert", "critical")
    assert raised[0].data["active_executors"] == 5


@pytest.mark.parametrize(
    ("event", "kinds"),
    [
        (measured(), []),
        (measured(memory_percent=74.9), []),
        (measured(memory_percent=75.0), ["memory.high"]),
        (measured(cpu_percent=79.9), []),
        (measured(cpu_percent=80.0), ["cpu.high"]),
        (measured("elevated"), ["pressure.changed"]),
        (measured(2), ["pressure.changed"]),
        (measured(circuit_breakers_open=["a", "b"]), ["breaker.opened"] * 2),
        (
            measured(circuit_breakers_open=["a", "b", "c"]),
            ["breaker.opened"] * 3 + ["breakers.open"],
        ),
        (measured(degradation_applied=["reduce_entity_limits"]), ["degradation.started"]),
    ],
)
def test_a_measurement_is_compared_with_the_thresholds(
    world: World, event: ResourcePressureEvent, kinds: list[str]
) -> None:
    assert [alert.kind for alert in alerts(world).process_event(event)] == kinds


def test_the_cpu_threshold_is_a_setting_and_holds_for_each_host(world: World) -> None:
    here = alerts(world, cpu_pct=50)

    [one], [two] = (
        here.process_event(measured(cpu_percent=50.0, host=host)) for host in ("a", "b")
    )

    assert (one.subject, two.subject) == ("a", "b")


def test_an_unknown_level_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="there are normal, elevated"):
        alerts(world).process_event(measured("terrible"))


# --- intervals --------------------------------------------------------------------------------


def test_processes_share_an_interval_and_the_next_alert_counts_the_suppressed_ones(
    world: World,
) -> None:
    ours, theirs = alerts(world), alerts(world)
    [first] = ours.process_event(slow())
    for _ in range(3):
        assert theirs.process_event(slow()) == []
    world.sleep(300)
    [second] = theirs.process_event(slow())
    world.sleep(300)
    [third] = ours.process_event(slow())

    assert [alert.held_back for alert in (first, second, third)] == [0, 3, 0]
    assert second.message == "scan took 31 s (3 more like this were held back)"
    assert "held back" not in third.message


def test_kinds_and_subjects_have_separate_intervals(world: World) -> None:
    here = alerts(world)
    raised = [
        slow("a"),
        slow("b"),
        pressure("high", "a"),
        pressure("high", "b"),
        Event("cpu.high", "", data={"host": "a"}),
    ]

    assert [len(here.process_event(event)) for event in raised * 2] == [1] * 5 + [0] * 5


def test_a_worse_level_raises_an_alert_at_once_and_a_better_one_does_not(world: World) -> None:
    ours, theirs = alerts(world), alerts(world)
    seen = [
        "elevated",
        "high",
        "elevated",
        "critical",
        "high",
        "emergency",
        "critical",
        "emergency",
    ]

    raised = [
        level
        for at, level in enumerate(seen)
        if (ours, theirs)[at % 2].process_event(pressure(level))
    ]

    assert raised == ["elevated", "high", "critical", "emergency"]
    world.sleep(120)
    assert ours.process_event(pressure("critical")) == [], "four minutes have not yet passed"
    [again] = ours.process_event(pressure("emergency"))
    assert again.held_back == 3, "since the last alert"


def test_a_server_clock_set_back_suppresses_no_alert(world: World) -> None:
    here = alerts(world)
    here.process_event(slow())
    world.sleep(-HOUR)

    assert here.process_event(slow())


LEVELS = st.sampled_from(["elevated", "high", "critical", "emergency"])


@given(steps=st.lists(st.tuples(LEVELS, st.floats(0, 400)), max_size=25))
def test_a_level_that_is_worse_or_has_waited_is_never_suppressed(
    steps: list[tuple[str, float]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world = World()
        world.install(patch)
        here, last, rank = alerts(world), -DAY, 0
        for level, wait_s in steps:
            world.sleep(round(wait_s))
            rule = RULES[f"pressure.{level}"]
            raised = here.process_event(pressure(level))

            assert bool(raised) == (rule.severity > rank or world.now - last >= rule.interval_s)
            if raised:
                last, rank = world.now, rule.severity


def test_an_event_is_one_round_trip_however_many_alerts_it_raises(world: World) -> None:
    store = world.store()
    raised = Alerts(store, SILENT).process_event(
        measured("emergency", cpu_percent=99.0, memory_percent=99.0)
    )

    assert len(raised) == 3
    assert store.round_trips == 1


# --- without Redis ----------------------------------------------------------------------------


def test_without_redis_a_process_limits_its_own_alerts(world: World) -> None:
    here = alerts(world)
    [before] = here.process_event(slow())
    here._store.lost = True  # type: ignore[attr-defined]

    assert here.process_event(slow()) == [], "the process remembers the alert before"
    [other] = here.process_event(slow("other"))
    assert here.process_event(slow("other")) == []
    [high], [worse] = here.process_event(pressure("high")), here.process_event(pressure("critical"))
    assert here.process_event(pressure("high")) == []
    world.sleep(300)
    [after] = here.process_event(slow())
    assert after.held_back == 1
    assert [alert.at for alert in (before, other, high, worse)] == pytest.approx(
        [world.now - 300] * 4, abs=1e-5
    )


def test_once_redis_answers_again_intervals_are_shared_again(world: World) -> None:
    here = alerts(world)
    here._store.lost = True  # type: ignore[attr-defined]
    assert here.process_event(slow())
    here._store.lost = False  # type: ignore[attr-defined]
    world.sleep(300)

    assert here.process_event(slow())
    assert alerts(world).process_event(slow()) == []


def test_the_memory_of_a_process_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.alerts.REMEMBERED", 3)
    here = alerts(world)
    here._store.lost = True  # type: ignore[attr-defined]
    for operation in "abcd":
        here.process_event(slow(operation))

    assert [bool(here.process_event(slow(operation))) for operation in "dcba"] == [
        False,
        False,
        False,
        True,
    ]
    world.sleep(300)
    for operation in "dac":
        here.process_event(slow(operation))
    here.process_event(slow("new"))
    assert [bool(here.process_event(slow(operation))) for operation in "acd"] == [
        False,
        False,
        True,
    ], "d was the oldest"


def test_without_redis_history_and_summary_raise_an_error(world: World) -> None:
    here = alerts(world)
    here._store.lost = True  # type: ignore[attr-defined]

    with pytest.raises(StoreUnavailable):
        here.history()
    with pytest.raises(StoreUnavailable):
        here.summary()


# --- the history ------------------------------------------------------------------------------


def test_the_history_has_the_raised_alerts_newest_first(world: World) -> None:
    here = alerts(world)
    raised = [
        alert
        for event in (slow(), pressure("critical"), opened("llm"))
        for alert in here.process_event(event)
    ]
    here.process_event(slow())
    world.sleep(300)
    raised += here.process_event(slow())

    assert alerts(world).history() == raised[::-1]
    assert alerts(world).history(2) == raised[:1:-1]


def test_the_history_is_bounded_and_the_total_is_not(world: World) -> None:
    here = alerts(world, history=10)
    for number in range(15):
        here.process_event(slow(str(number)))

    assert [alert.subject for alert in here.history(100)] == [
        str(number) for number in range(14, 4, -1)
    ]
    summary = here.summary()
    assert (summary["total_alerts"], summary["last_hour"], len(summary["recent_alerts"])) == (
        15,
        15,
        10,
    )


def test_an_empty_summary_has_zeros(world: World) -> None:
    assert alerts(world).summary() == {
        "total_alerts": 0,
        "last_hour": 0,
        "last_24_hours": 0,
        "by_severity": {"info": 0, "warning": 0, "error": 0, "critical": 0},
        "recent_alerts": [],
    }


def test_a_summary_counts_by_severity_and_has_the_latest_alerts_as_json(world: World) -> None:
    here = alerts(world)
    for level in ("elevated", "high", "critical", "emergency", "high"):
        here.process_event(pressure(level))
    here.process_event(slow())
    summary = here.summary()

    assert summary["total_alerts"] == 5
    assert summary["by_severity"] == {"info": 1, "warning": 2, "error": 1, "critical": 1}
    assert json.loads(json.dumps(summary))["recent_alerts"][0] == here.history(1)[0].fields()
    assert sorted(summary["recent_alerts"][0]) == sorted(
        ["id", "at", "kind", "subject", "severity", "message", "held_back", "data"]
    )


@pytest.mark.parametrize(
    ("later_s", "last_hour", "last_24_hours"),
    [
        (0, 1, 1),
        (HOUR - 0.001, 1, 1),
        (HOUR, 0, 1),
        (DAY - 0.001, 0, 1),
        (DAY, 0, 0),
        (8 * DAY, 0, 0),
    ],
)
def test_an_alert_leaves_the_last_hour_and_the_last_day_on_time(
    world: World, later_s: float, last_hour: int, last_24_hours: int
) -> None:
    here = alerts(world)
    here.process_event(slow())
    world.sleep(later_s)
    summary = here.summary()

    assert (summary["last_hour"], summary["last_24_hours"]) == (last_hour, last_24_hours)
    assert (summary["total_alerts"], summary["by_severity"]["warning"]) == (1, 1)


def test_the_index_by_time_is_kept_for_a_day(world: World) -> None:
    here, day = alerts(world), Keys("unit").alerts().day
    for operation in "abc":
        here.process_event(slow(operation))
        world.sleep(DAY / 2)

    assert world.client().zcard(day) == 2


# --- channels ---------------------------------------------------------------------------------


def test_by_default_alerts_are_logged_by_severity_with_their_fields(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    here = Alerts(world.store(), AlertSettings())
    raised = [
        alert for level in ("elevated", "critical") for alert in here.process_event(pressure(level))
    ]
    records = [record for record in caplog.records if record.name == "rlm.alerts"]

    assert here.channels == (AlertChannel.LOG,)
    assert [record.levelno for record in records] == [logging.INFO, logging.ERROR]
    assert records[1].getMessage() == "error pressure.changed [a]: pressure is critical"
    assert [record.__dict__["alert"] for record in records] == [alert.fields() for alert in raised]


def test_a_raised_alert_emits_an_event_and_a_suppressed_one_does_not(world: World) -> None:
    events = Events(world.store())
    here = Alerts(world.store(), SILENT, events)
    [alert] = here.process_event(pressure("critical"))
    here.process_event(pressure("critical"))
    [event] = events.recent()

    assert (event.name, event.severity, event.data) == (
        "alert.raised",
        EventSeverity.ERROR,
        alert.fields(),
    )


def test_a_callback_that_raises_stops_no_other_channel(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    got, out = list[Alert](), io.StringIO()

    def pager(alert: Alert) -> None:
        got.append(alert)
        raise ValueError("mine")

    here = Alerts(
        world.store(), AlertSettings(channels=("stdout", "log")), callback=pager, stream=out
    )
    raised = [*here.process_event(slow("a")), *here.process_event(slow("b"))]

    assert here.channels == (AlertChannel.STDOUT, AlertChannel.LOG, AlertChannel.SIGNAL)
    assert got == raised
    assert out.getvalue().count("\n") == 2
    failed = [record.getMessage() for record in caplog.records if record.exc_info]
    assert len(failed) == 2
    assert all("signal" in message and "pager" in message for message in failed)


def test_a_broken_channel_stops_no_other_channel(world: World) -> None:
    got, out = list[Alert](), io.StringIO()
    out.close()
    here = Alerts(
        world.store(), AlertSettings(channels=("stdout",)), callback=got.append, stream=out
    )

    assert here.process_event(slow()) == got


class Terminal(io.StringIO):
    """A stream that reports itself as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("level", "colour"),
    [("elevated", "36"), ("high", "33"), ("critical", "31"), ("emergency", "1;37;41")],
)
def test_a_terminal_shows_severities_in_colours(world: World, level: str, colour: str) -> None:
    out = Terminal()
    [alert] = Alerts(world.store(), AlertSettings(channels=("stdout",)), stream=out).process_event(
        pressure(level)
    )

    shown = f"{alert.severity.name:<8} pressure.changed [a] pressure is {level}"
    assert out.getvalue() == f"\x1b[{colour}m{shown}\x1b[0m\n"


@pytest.mark.parametrize(
    ("stream", "setting", "coloured"),
    [
        (io.StringIO, None, False),
        (io.StringIO, True, True),
        (Terminal, None, True),
        (Terminal, False, False),
    ],
)
def test_colours_are_a_setting_and_off_for_files(
    world: World, stream: Callable[[], io.StringIO], setting: bool | None, coloured: bool
) -> None:
    out = stream()
    Alerts(
        world.store(), AlertSettings(channels=("stdout",)), stream=out, colour=setting
    ).process_event(slow())

    assert ("\x1b" in out.getvalue()) is coloured


def test_the_name_of_an_operation_cannot_send_terminal_codes(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    Alerts(world.store(), AlertSettings(channels=("stdout",))).process_event(slow("\x1b[2Jscan\n"))

    assert capsys.readouterr().out == "WARNING  execution.slow [[2Jscan] [2Jscan took 31 s\n"


# --- webhooks ---------------------------------------------------------------------------------


class Received(NamedTuple):
    """One request that a receiver has received."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """An HTTP server with given answers; it hangs while `go` is cleared."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.answers: list[int] = []  # every further answer is 200
        self.go = threading.Event()
        self.go.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append(
                    Received(
                        self.path,
                        {name.lower(): value for name, value in self.headers.items()},
                        body,
                    )
                )
                receiver.go.wait(20)
                self.send_response(receiver.answers.pop(0) if receiver.answers else 200)
                self.send_header("Location", receiver.url)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_args: object) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver of webhooks on this machine."""
    monkeypatch.setenv("no_proxy", "*")
    own = Receiver()
    yield own
    own.close()


def alerts_to(world: World, url: str, secret: str = "", waits: list[float] | None = None) -> Alerts:
    settings = AlertSettings(channels=("webhook",), webhook_url=url, webhook_secret=secret)
    return Alerts(
        world.store(),
        settings,
        clock=lambda: world.now,
        sleep=(waits if waits is not None else []).append,
    )


def test_a_webhook_gets_the_alert_signed_with_the_time_and_its_id(
    world: World, receiver: Receiver
) -> None:
    here = alerts_to(world, f"{receiver.url}?team=ops", "s3cret")
    [alert] = here.process_event(slow())
    assert here.close()

    [(path, headers, body)] = receiver.requests
    assert path == "/hook?team=ops"
    assert json.loads(body) == alert.fields()
    assert headers["content-type"] == "application/json"
    assert headers["idempotency-key"] == alert.id
    assert headers["x-rlm-timestamp"] == str(int(world.now))
    assert verify(body, headers["x-rlm-timestamp"], headers["x-rlm-signature"], "s3cret")


def test_without_a_secret_nothing_is_signed(world: World, receiver: Receiver) -> None:
    here = alerts_to(world, receiver.url)
    here.process_event(slow())
    here.close()

    assert "x-rlm-signature" not in receiver.requests[0].headers


@pytest.mark.parametrize(
    ("answers", "tries", "fails"),
    [
        ([500], 2, False),
        ([503, 500], 3, False),
        ([500, 500, 500], 3, True),
        ([404], 1, True),
        ([302], 1, True),
        ([204], 1, False),
    ],
)
def test_a_request_is_retried_twice_after_passing_errors(
    world: World,
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
    answers: list[int],
    tries: int,
    fails: bool,
) -> None:
    waits: list[float] = []
    receiver.answers = answers
    here = alerts_to(world, receiver.url, "s3cret", waits)
    [alert] = here.process_event(slow())
    assert here.close()

    assert [got.headers["idempotency-key"] for got in receiver.requests] == [alert.id] * tries
    assert len(waits) == tries - 1
    assert all(0 <= wait <= 2 for wait in waits)
    assert len(caplog.records) == fails


def test_an_outage_of_the_receiver_is_logged_once_and_so_is_its_end(
    world: World, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    receiver.answers = [404, 404, 200, 200, 410]
    here = alerts_to(world, receiver.url)
    for operation in "abcde":
        here.process_event(slow(operation))
    assert here.close()

    assert [record.getMessage() for record in caplog.records] == [
        (
            f"Webhook at http://127.0.0.1:{receiver.port} fails (HTTP 404); messages that it "
            f"misses are not sent again"
        ),
        f"Webhook at http://127.0.0.1:{receiver.port} answers again",
        (
            f"Webhook at http://127.0.0.1:{receiver.port} fails (HTTP 410); messages that it "
            f"misses are not sent again"
        ),
    ]


def test_a_receiver_that_hangs_delays_no_caller(world: World, receiver: Receiver) -> None:
    receiver.go.clear()
    here = alerts_to(world, receiver.url)
    raised = [alert for operation in "abc" for alert in here.process_event(slow(operation))]
    wait_until(lambda: len(receiver.requests) == 1)

    assert len(raised) == 3, "all were raised while the first is still being sent"
    assert not here.close(timeout_s=0.01), "close reports that some were not sent"
    receiver.go.set()
    wait_until(lambda: len(receiver.requests) == 3)
    assert here.close()


def test_a_request_without_an_answer_times_out(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.go.clear()
    webhook = Webhook(receiver.url, timeout_s=0.05, retry=Retry(ATTEMPTS, sleep=lambda _: None))
    webhook.send("1", {})
    wait_until(lambda: bool(caplog.records))

    assert "fails (TimeoutError)" in caplog.text
    assert len(receiver.requests) == 3
    assert webhook.close()


def test_a_full_queue_drops_alerts_and_logs_it_once(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.go.clear()
    webhook = Webhook(receiver.url, waiting=2)
    webhook.send("0", {})
    wait_until(lambda: len(receiver.requests) == 1)
    for number in range(1, 6):
        webhook.send(str(number), {})

    assert [("queue is full" in record.getMessage()) for record in caplog.records] == [True]
    assert not webhook.close(0.01), "there is no room for the end mark either"
    receiver.go.set()
    assert webhook.close()
    assert [got.headers["idempotency-key"] for got in receiver.requests] == ["0", "1", "2"]


def test_a_closed_webhook_sends_the_next_alert(world: World, receiver: Receiver) -> None:
    here = alerts_to(world, receiver.url)
    assert here.close(), "nothing was to be sent"
    for operation in "ab":
        here.process_event(slow(operation))
        assert here.close()

    assert len(receiver.requests) == 2


def test_secrets_are_sent_and_never_shown(
    world: World,
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.answers = [403]
    here = alerts_to(
        world, f"http://me:p%40ssword@127.0.0.1:{receiver.port}/T0K3N?key=T0K3N", "s3cret"
    )
    here.process_event(slow())
    here.close()

    [got] = receiver.requests
    assert got.path == "/T0K3N?key=T0K3N"
    assert got.headers["authorization"] == "Basic bWU6cEBzc3dvcmQ="
    assert got.headers["host"] == f"127.0.0.1:{receiver.port}"
    shown = caplog.text + "".join(capsys.readouterr()) + here.webhook_url
    assert f"http://127.0.0.1:{receiver.port} fails (HTTP 403)" in shown
    assert not [secret for secret in ("ssword", "T0K3N", "s3cret") if secret in shown]


def test_a_missing_receiver_raises_no_error(
    world: World, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.close()
    here = alerts_to(world, receiver.url)
    here.process_event(slow())

    assert here.close()
    assert "ConnectionRefusedError" in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "alerts.example.com/hook",
        "ftp://me:ssword@alerts.example.com/T0K3N",
        "file:///etc/passwd",
        "http:///hook",
        "https://me:ssword@:80/",
        "http://me:ssword@alerts.example.com:port/",
        "http://[::1/",
        "https://alerts.example.com /",
    ],
)
def test_only_http_urls_are_accepted(world: World, url: str) -> None:
    with pytest.raises(
        InvalidValue, match=r"alerts\.webhook_url=.*begins with http:// or https://"
    ) as raised:
        alerts_to(world, url)

    assert not [secret for secret in ("ssword", "T0K3N") if secret in str(raised.value)]
    assert raised.value.__context__ is None


def test_a_webhook_that_is_not_a_channel_is_not_called(world: World, receiver: Receiver) -> None:
    here = alerts(world, webhook_url=receiver.url)
    here.process_event(slow())

    assert here.close()
    assert (here.channels, here.webhook_url, receiver.requests) == ((), "", [])


@pytest.mark.parametrize(
    ("body", "timestamp", "signature", "secret", "genuine"),
    [
        (b"{}", "1800000000", sign(b"{}", "1800000000", "s"), "s", True),
        (b"{ }", "1800000000", sign(b"{}", "1800000000", "s"), "s", False),
        (b"{}", "1800000001", sign(b"{}", "1800000000", "s"), "s", False),
        (b"{}", "1800000000", sign(b"{}", "1800000000", "s"), "t", False),
        (b"{}", "1800000000", "", "s", False),
        (b"{}", "1800000000", "sha256=é", "s", False),
    ],
)
def test_a_signature_depends_on_body_time_and_secret(
    body: bytes, timestamp: str, signature: str, secret: str, genuine: bool
) -> None:
    assert verify(body, timestamp, signature, secret) is genuine


def test_a_signature_equals_that_of_openssl() -> None:
    # printf '1800000000.{"a":1}' | openssl dgst -sha256 -hmac s3cret
    assert (
        sign(b'{"a":1}', "1800000000", "s3cret")
        == "sha256=476d445fc5d734bcaf69961f0de38cb8c2ec42450829655895ca5e064c0765c9"
    )
