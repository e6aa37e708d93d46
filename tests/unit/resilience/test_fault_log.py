"""The log of recurring faults: fingerprints, patterns, escalation, and the bound on its size."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience import fault_log
from resilience.errors import Category, InvalidValue, Severity, StoreUnavailable
from resilience.fault_log import LENGTH, FaultLog, FaultLogSettings, Pattern, fingerprint
from resilience.faults import OPERATION, RESOURCE, TIMEOUT, TRANSIENT, UNAUTHORISED, Fault
from resilience.keys import Keys
from resilience.store import Store

START_MS = 1_700_000_040_000  # a window of 60 s begins here


class Clock:
    """The clock of fakeredis: it stands in place of the module `time`."""

    def __init__(self) -> None:
        self.ms = START_MS

    def time(self) -> float:
        return self.ms / 1000


class CountingRedis(fakeredis.FakeRedis):
    """A client that counts its round trips."""

    trips = 0

    def pipeline(self, *args: Any, **options: Any) -> Any:
        self.trips += 1
        return super().pipeline(*args, **options)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self.trips += 1
        return super().execute_command(*args, **options)


@contextmanager
def server_clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patched:
        clock = Clock()
        patched.setattr("fakeredis.commands_mixins.server_mixin.time", clock)
        yield clock


@pytest.fixture
def clock() -> Iterator[Clock]:
    with server_clock() as clock:
        yield clock


def log_of(namespace: str = "rlm", **chosen: Any) -> FaultLog:
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    return FaultLog(
        Store("redis://fake", namespace=namespace, client=client), FaultLogSettings(**chosen)
    )


def only(log: FaultLog) -> Pattern:
    (found,) = log.patterns()
    return found


# --- fingerprints -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("item 17 of 4,000 took -1.5e-3 s", "item # of # took # s"),
        ("node 550e8400-e29b-41d4-a716-446655440000 is gone", "node # is gone"),
        ("<Connection object at 0x7f1c2ab> closed", "<Connection object at #> closed"),
        ("commit 3fa9c41 has a facade", "commit # has a facade"),
        ("no field 'name' in \"a record\"", "no field # in #"),
        ("item 'don't do it' is bad", "item # is bad"),
        ("can't read b'abc' now", "can't read # now"),
        ("field='it was cut before the qu...: advice", "field=#"),
        ("field \u201cname\u201d is \u2018odd\u2019, isn't it", "field # is #, isn't it"),
        (
            "GET https://api.example.com/v1/jobs?key=abc&page=2 failed",
            "GET https://api.example.com/v#/jobs?# failed",
        ),
        ("see https://example.com/a#part", "see https://example.com/a#"),
        ("redis://user:pass@host:6379/0 is away", "redis://#@host:# is away"),
        ("/data/2024/part-00017.csv, line 5", "/data/#/part#.csv, line #"),
        ("mail jane.doe+x@example.com bounced", "mail # bounced"),
        ("wrong key sk-proj-abcDEF123456ghi", "wrong key #"),
        ("wrong key abcdefghijklmnopqrstuvwxyz", "wrong key #"),
        ("Authorization: Bearer abc.def refused", "Authorization: Bearer # refused"),
        ("login with password=hunter refused", "login with password=# refused"),
        ("not numbers: [1, 'two', 3.0]", "not numbers: [#]"),
        ("first\r\n\tsecond \x1b[0m", "first second [#m"),
        ("the service is overloaded", "the service is overloaded"),
        ("", ""),
    ],
)
def test_a_fingerprint_leaves_out_what_varies_or_may_be_secret(message: str, kept: str) -> None:
    assert fingerprint(message) == kept


@given(st.text(max_size=300))
def test_a_fingerprint_contains_nothing_of_a_quoted_item(item: str) -> None:
    assert fingerprint(f"item {item!r} is bad") == "item # is bad"


@given(st.text())
def test_a_fingerprint_is_one_short_line_without_numbers(message: str) -> None:
    found = fingerprint(message)

    assert len(found) <= LENGTH
    assert not any(each.isdecimal() or each in "\r\n\t\0" for each in found)


@pytest.mark.parametrize(
    "part", ["a", "'", "\\", "'\\", "a-", "a@", "://", "1,", "#", "?", "bearer "]
)
def test_only_the_beginning_of_a_huge_message_is_read(part: str) -> None:
    huge = part * 1_000_000

    assert fingerprint(huge) == fingerprint(huge[:2000])


# --- counting ---------------------------------------------------------------------------------


def test_the_same_fault_of_other_items_is_one_pattern(clock: Clock) -> None:
    log = log_of()
    log.record("llm", [(TIMEOUT, "item 1 took 30 s"), (TIMEOUT, "item 2 took 31 s")])
    clock.ms += 1500
    log.record("llm", [(TIMEOUT, "item 3 took 30 s")])

    assert log.patterns() == [
        Pattern(
            service="llm",
            code="TIMEOUT",
            category=Category.TIMEOUT,
            message="item # took # s",
            count=3,
            severity=Severity.MEDIUM,
            escalated=False,
            per_minute=3.0,
            first_seen_ms=START_MS,
            last_seen_ms=START_MS + 1500,
        )
    ]


def test_patterns_differ_by_service_code_and_fingerprint_the_latest_first(
    clock: Clock,
) -> None:
    log = log_of()
    for service, fault, message in [
        ("llm", TIMEOUT, "slow"),
        ("db", TIMEOUT, "slow"),
        ("db", TRANSIENT, "slow"),
        ("db", TRANSIENT, "ümläut \ud800"),
    ]:
        clock.ms += 1
        log.record(service, [(fault, message)])
    clock.ms += 1
    log.record("llm", [(TIMEOUT, "slow")])

    assert [(each.service, each.code, each.message, each.count) for each in log.patterns()] == [
        ("llm", "TIMEOUT", "slow", 2),
        ("db", "SERVICE_UNAVAILABLE", "ümläut \ud800", 1),
        ("db", "SERVICE_UNAVAILABLE", "slow", 1),
        ("db", "TIMEOUT", "slow", 1),
    ]


def test_a_pattern_has_the_severity_of_its_latest_fault(clock: Clock) -> None:
    log = log_of()
    log.record("llm", [(OPERATION, "odd")])
    log.record(
        "llm", [(replace(OPERATION, category=Category.POISON, severity=Severity.HIGH), "odd")]
    )

    assert (only(log).category, only(log).severity, only(log).count) == (
        Category.POISON,
        Severity.HIGH,
        2,
    )


def test_beyond_its_size_the_log_drops_the_pattern_seen_longest_ago(clock: Clock) -> None:
    log = log_of(size=2)
    for message in ("a", "b", "a", "c"):
        clock.ms += 1
        log.record("llm", [(TIMEOUT, message)])

    assert [(each.message, each.count) for each in log.patterns()] == [("c", 1), ("a", 2)]


def test_the_size_in_redis_is_bounded_within_one_record_and_over_many(clock: Clock) -> None:
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    log = FaultLog(Store("redis://fake", client=client))
    for service in "abc":
        clock.ms += 1
        log.record(service, [(TIMEOUT, "x" * length) for length in range(1, 20)] * 5)
    log.record("d", [(replace(TIMEOUT, code=f"ODD_{number}"), "odd") for number in range(200)])

    patterns, seen = Keys("rlm").faults
    assert (client.hlen(patterns), client.zcard(seen), len(log.patterns())) == (52, 50, 50)


def test_old_patterns_are_forgotten_and_the_keys_expire(clock: Clock) -> None:
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    log = FaultLog(Store("redis://fake", client=client), FaultLogSettings(keep_s=100))
    log.record("llm", [(TIMEOUT, "old")])
    clock.ms += 100_000
    log.record("llm", [(TIMEOUT, "new")])

    assert only(log).message == "new"
    keys = client.keys()
    assert len(keys) == 2
    assert all(99_000 < client.pttl(key) <= 100_000 for key in keys)


def test_a_record_is_one_round_trip_and_an_empty_one_is_none() -> None:
    client = CountingRedis(server=fakeredis.FakeServer())
    log = FaultLog(Store("redis://fake", client=client))
    log.record("llm", [(TIMEOUT, "the first time, the script is sent after its digest")])

    client.trips = 0
    log.record(
        "llm", [(TIMEOUT, "slow"), (TRANSIENT, "away"), (TIMEOUT, "slow")], recovered=2, given_up=1
    )
    assert client.trips == 1
    log.record("llm", [])
    assert client.trips == 1


def test_namespaces_are_separate() -> None:
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    ours, theirs = (
        FaultLog(Store("redis://fake", namespace=name, client=client))
        for name in ("ours", "theirs")
    )
    ours.record("llm", [(TIMEOUT, "slow")], recovered=1)

    assert (theirs.patterns(), theirs.recovery_success_rate()) == ([], None)


# --- retries ----------------------------------------------------------------------------------


def test_the_recovery_success_rate_is_unknown_before_the_first_retry_ends() -> None:
    log = log_of()
    assert log.recovery_success_rate() is None
    log.record("llm", [(TIMEOUT, "slow")])
    assert log.recovery_success_rate() is None

    log.record("llm", [], given_up=1)
    assert log.recovery_success_rate() == 0.0
    log.record("db", [(TIMEOUT, "slow")], recovered=3)
    assert log.recovery_success_rate() == 0.75
    assert len(log.patterns()) == 2


# --- escalation -------------------------------------------------------------------------------


def test_a_pattern_above_the_rate_is_escalated_until_a_whole_window_is_below_it(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_of(rate=3)
    with caplog.at_level(logging.WARNING, "resilience.fault_log"):
        log.record("llm", [(TIMEOUT, "slow")] * 3)
        assert (only(log).escalated, only(log).severity, caplog.messages) == (
            False,
            Severity.MEDIUM,
            [],
        )

        log.record("llm", [(TIMEOUT, "slow")])
        assert (only(log).escalated, only(log).severity, only(log).per_minute) == (
            True,
            Severity.HIGH,
            4.0,
        )
        log.record("llm", [(TIMEOUT, "slow")] * 5)
        clock.ms += 60_000
        log.record("llm", [(TIMEOUT, "slow")] * 3)
        assert (only(log).escalated, only(log).per_minute) == (True, 9.0)
        clock.ms += 60_000
        assert (only(log).escalated, only(log).severity, only(log).per_minute) == (
            False,
            Severity.MEDIUM,
            3.0,
        )

    assert caplog.messages == [
        "llm fails with TIMEOUT more than 3 times within 60 s; its severity is now HIGH"
    ]


def test_an_escalation_is_logged_once_and_a_new_one_again(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_of(rate=1)
    with caplog.at_level(logging.WARNING, "resilience.fault_log"):
        for _ in range(5):
            log.record("llm", [(TIMEOUT, "slow")] * 2)
            clock.ms += 60_000
        assert len(caplog.messages) == 1
        clock.ms += 60_000
        log.record("llm", [(TIMEOUT, "slow")] * 2)
    assert len(caplog.messages) == 2


def test_only_the_process_that_caused_an_escalation_logs_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, logger = fakeredis.FakeServer(), Mock()
    monkeypatch.setattr(fault_log, "logger", logger)
    first, second, third = (
        FaultLog(Store("redis://fake", client=fakeredis.FakeRedis(server=server))) for _ in range(3)
    )

    first.record("llm", [(TIMEOUT, "slow"), (RESOURCE, "full")] * 10)
    assert logger.warning.call_count == 0
    second.record("llm", [(TRANSIENT, "away"), (RESOURCE, "full")])
    code = RESOURCE.code
    assert [call.args[2] for call in logger.warning.call_args_list] == [code]
    third.record("llm", [(RESOURCE, "full")])
    assert logger.warning.call_count == 1


def test_an_escalation_never_goes_beyond_critical(clock: Clock) -> None:
    log = log_of(rate=1)
    log.record("llm", [(UNAUTHORISED, "wrong key")] * 2)

    assert (only(log).escalated, only(log).severity) == (True, Severity.CRITICAL)


def test_a_shorter_window_still_reports_faults_per_minute(clock: Clock) -> None:
    log = log_of(window_s=15)
    log.record("llm", [(TIMEOUT, "slow")] * 4)

    assert only(log).per_minute == 16.0


# --- without Redis ----------------------------------------------------------------------------


def test_without_redis_nothing_is_kept_and_reading_raises_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, now = fakeredis.FakeServer(), [0.0]
    log = FaultLog(
        Store("redis://fake", client=fakeredis.FakeRedis(server=server), clock=lambda: now[0])
    )
    server.connected = False

    with caplog.at_level(logging.WARNING, "resilience.fault_log"):
        log.record("llm", [(TIMEOUT, "slow")] * 50, recovered=1)
    for read in (log.patterns, log.recovery_success_rate):
        with pytest.raises(StoreUnavailable):
            read()

    server.connected, now[0] = True, 10.0
    assert (log.patterns(), log.recovery_success_rate()) == ([], None)
    assert "resilience.fault_log" not in {each.name for each in caplog.records}


# --- settings ---------------------------------------------------------------------------------


def test_settings_are_in_seconds() -> None:
    other_house: dict[str, Any] = {
        "size": 50,
        "windowMs": 60_000,
        "rate": 10,
        "keep_seconds": 7 * 86400,
    }

    assert FaultLogSettings() == FaultLogSettings(**other_house)


@pytest.mark.parametrize("wrong", ["size", "window_s", "rate", "keep_s"])
def test_a_setting_out_of_range_is_refused_by_its_name(wrong: str) -> None:
    nothing: dict[str, Any] = {wrong: -1}

    with pytest.raises(InvalidValue, match=f"{wrong}=-1"):
        FaultLogSettings(**nothing)


# --- against a plain model --------------------------------------------------------------------


class Model:
    """The rules of the log in plain Python: the whole history of at most `size` patterns."""

    def __init__(self, size: int, rate: int, window_ms: int, keep_ms: int) -> None:
        self.size, self.rate, self.window_ms, self.keep_ms = size, rate, window_ms, keep_ms
        self.seen: dict[str, list[int]] = {}
        self.crossings = 0

    def record(self, messages: list[str], now: int) -> None:
        self.seen = {
            each: times for each, times in self.seen.items() if times[-1] > now - self.keep_ms
        }
        for each in set(messages):
            calm = self.most(each, now) <= self.rate
            self.seen.setdefault(each, []).extend([now] * messages.count(each))
            self.crossings += calm and self.most(each, now) > self.rate
        for each in sorted(self.seen, key=lambda each: (self.seen[each][-1], each))[: -self.size]:
            del self.seen[each]

    def most(self, message: str, now: int) -> int:
        windows = [at // self.window_ms for at in self.seen.get(message, [])]
        return max(windows.count(now // self.window_ms), windows.count(now // self.window_ms - 1))

    def patterns(self, now: int) -> dict[str, tuple[int, bool, float, int, int]]:
        return {
            each: (
                len(times),
                self.most(each, now) > self.rate,
                self.most(each, now) * 60_000 / self.window_ms,
                times[0],
                times[-1],
            )
            for each, times in self.seen.items()
        }


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 4000, 30_000, 45_000, 60_000, 3_600_000]),
        st.lists(st.sampled_from("abcdef"), max_size=8),
        st.integers(0, 2),
        st.integers(0, 2),
    ),
    max_size=25,
)


@given(STEPS)
def test_the_log_keeps_what_a_plain_model_keeps(
    steps: list[tuple[int, list[str], int, int]],
) -> None:
    fault = Fault("ODD", Category.OPERATION, Severity.LOW, retryable=False)
    log, model = log_of(size=4, rate=2, window_s=30, keep_s=3600), Model(4, 2, 30_000, 3_600_000)
    recovered = given_up = 0
    with server_clock() as clock, pytest.MonkeyPatch.context() as patched:
        patched.setattr(fault_log, "logger", logger := Mock())
        for later_ms, messages, won, lost in steps:
            clock.ms += later_ms
            log.record("llm", [(fault, each) for each in messages], recovered=won, given_up=lost)
            if messages or won or lost:
                model.record(messages, clock.ms)
            recovered, given_up = recovered + won, given_up + lost

            found = log.patterns()
            assert {
                each.message: (
                    each.count,
                    each.escalated,
                    each.per_minute,
                    each.first_seen_ms,
                    each.last_seen_ms,
                )
                for each in found
            } == model.patterns(clock.ms)
            assert all(
                each.severity == (Severity.MEDIUM if each.escalated else Severity.LOW)
                for each in found
            )
            assert [each.last_seen_ms for each in found] == sorted(
                (each.last_seen_ms for each in found), reverse=True
            )
            assert logger.warning.call_count == model.crossings
        assert log.recovery_success_rate() == (
            recovered / (recovered + given_up) if recovered + given_up else None
        )
