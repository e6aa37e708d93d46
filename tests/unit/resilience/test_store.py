"""The store: scripts that the server has lost, and URLs without their password."""

from __future__ import annotations

import fakeredis
import pytest

from resilience.store import Call, Script, Store, masked


def test_the_password_is_masked_in_every_form_of_url() -> None:
    assert masked("redis://user:secret@host:1/0") == "redis://user:***@host:1/0"
    assert masked("rediss://:secret@host") == "rediss://:***@host"
    assert masked("redis://host:6379/0") == "redis://host:6379/0"


def test_a_flushed_script_is_sent_again_and_errors_are_raised() -> None:
    store = Store("redis://fake", client=fakeredis.FakeRedis())
    double = Script("double", "return tonumber(ARGV[1]) * 2", "0" * 40)
    broken = Script("broken", "return redis.error_reply('TILING no')", "1" * 40)

    assert store.call(Call(double, (), (4,)), Call(double, (), (5,))) == [8, 10]
    with pytest.raises(Exception, match="TILING no"):
        store.call(Call(double, (), (4,)), Call(broken, (), ()))
