"""The store: scripts that the server has lost, and URLs without their password."""

from __future__ import annotations

import copy
from pathlib import Path

import fakeredis
import pytest
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from resilience.connections import Refused, refusal
from resilience.errors import InvalidValue, RateLimited, StoreFull, StoreUnavailable
from resilience.store import Call, OnOutage, Script, Store, masked

ROOT = Path(__file__).parents[3]
PACKAGES = ("resilience", "scheduler", "rlm_tasks")


def test_passwords_are_masked_in_every_form_of_url() -> None:
    assert masked("redis://user:secret@host:1/0") == "redis://user:***@host:1/0"
    assert masked("rediss://:secret@host") == "rediss://:***@host"
    assert masked("redis://host:6379/0") == "redis://host:6379/0"


def test_a_script_that_redis_has_lost_is_sent_again_and_errors_are_raised() -> None:
    store = Store("redis://fake", client=fakeredis.FakeRedis())
    double = Script("double", "return tonumber(ARGV[1]) * 2", "0" * 40)
    broken = Script("broken", "return redis.error_reply('TILING no')", "1" * 40)

    assert store.call(Call(double, (), (4,)), Call(double, (), (5,))) == [8, 10]
    with pytest.raises(Exception, match="TILING no"):
        store.call(Call(double, (), (4,)), Call(broken, (), ()))


def test_a_script_gets_the_clock_only_when_its_first_line_says_so() -> None:
    with_clock = Script.load("scheduler", "event").text
    without = Script.load("scheduler", "event_newest").text

    assert with_clock.index("local function now_ms()") < with_clock.index("-- uses: clock\n--")
    assert without == (ROOT / "scheduler/lua/event_newest.lua").read_text()
    assert (
        "local function now_ms()" in Script.load("resilience", "spend_open", prelude="spend").text
    )


def test_no_script_reads_the_time_but_through_the_clock() -> None:
    texts = {
        path: path.read_text()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.lua")
        if path.name != "clock.lua"
    }

    assert [path for path, text in texts.items() if "'TIME'" in text] == []
    for path, text in texts.items():
        uses = any(f"{name}(" in text for name in ("now_ms", "now_us", "in_seconds"))
        assert text.startswith("-- uses: clock\n") is uses, path


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "OOM"),
        (OutOfMemoryError("Command # 1 (HSET k v) of pipeline caused error: command"), "OOM"),
        (ReadOnlyError("You can't write against a read only replica."), "READONLY"),
        (MasterDownError("Link with MASTER is down"), "MASTERDOWN"),
        (ClusterDownError("The cluster is down"), "CLUSTERDOWN"),
        (BusyLoadingError("Redis is loading the dataset in memory"), "LOADING"),
        (ResponseError("BUSY Redis is busy running a script."), "BUSY"),
        (ResponseError("MISCONF Redis is configured to save RDB snapshots"), "MISCONF"),
        (ResponseError("NOREPLICAS Not enough good replicas to write."), "NOREPLICAS"),
        (
            ResponseError("Command # 2 (SET k v) of pipeline caused error: NOREPLICAS Not enough"),
            "NOREPLICAS",
        ),
        (
            ResponseError(
                "Error running script (call to f_1): @user_script:4: @user_script: 4: -OOM command"
            ),
            "OOM",
        ),
        (ResponseError("UNBLOCKED force unblock from blocking operation"), "UNBLOCKED"),
        (ResponseError("BUSYGROUP Consumer Group name already exists"), ""),
        (ResponseError("TILING the parts do not tile; OOM is only a word here"), ""),
        (ResponseError("wrong number of arguments"), ""),
        (ValueError("OOM is not an error of Redis"), ""),
    ],
)
def test_an_error_of_a_redis_that_refuses_is_known_by_class_or_code(
    error: Exception, code: str
) -> None:
    assert refusal(error) == code


@pytest.mark.parametrize("on_outage", ["raise", "answer", "patient", "wait"])
def test_every_kind_of_call_takes_a_refusal_for_an_outage(on_outage: OnOutage) -> None:
    store = Store("redis://fake", client=fakeredis.FakeRedis())
    full = OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")

    def refused(_: object) -> None:
        raise full

    with pytest.raises(StoreFull, match="is full") as raised:
        store.call(refused, on_outage=on_outage)
    assert raised.value.retryable
    assert raised.value.advice.startswith("raise its maxmemory")


def test_a_refused_worker_stays_beyond_its_patience_until_it_drains() -> None:
    now, drains = [0.0], [False]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        drains[0] = now[0] > 100

    store = Store(
        "redis://fake",
        client=fakeredis.FakeRedis(),
        patience_s=30,
        clock=lambda: now[0],
        sleep=sleep,
    )
    store.stays = lambda: not drains[0]

    def refused(_: object) -> None:
        raise ResponseError("BUSY Redis is busy running a script.")

    with pytest.raises(StoreUnavailable, match="is busy with a script"):
        store.call(refused, on_outage="wait")
    assert 100 < now[0] < 102


@pytest.mark.parametrize(
    "error",
    [
        StoreFull("redis://host", "8 of 8 MB"),
        RateLimited("bucket", 1.5, "empty"),
        InvalidValue("field", 1, "advice"),
        Refused("OOM", "command not allowed"),
    ],
)
def test_an_error_keeps_its_data_on_the_way_to_another_process(error: Exception) -> None:
    again = copy.copy(error)  # by the same way as pickle

    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
