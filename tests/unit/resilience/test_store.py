"""The store: scripts that the server has lost, and URLs without their password."""

from __future__ import annotations

from pathlib import Path

import fakeredis
import pytest

from resilience.store import Call, Script, Store, masked

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
