"""The configuration of beat: the schedule of the monitor, and its lock; no password is shown."""

from __future__ import annotations

import pytest
from celery.app.utils import filter_hidden_settings

from rlm_tasks.celery import beat_configuration
from rlm_tasks.settings.model import Settings
from scheduler.settings import PressureSettings
from tests.unit.messaging.test_transports import VERIFIED, watched

pytest.importorskip("redbeat")


@pytest.mark.parametrize(
    ("url", "shown_url", "password"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0", None),
        ("redis://:s3cret@host:6380/1", "redis://host:6380/1", "s3cret"),
        ("rediss://user:s3%40cret@host/1?ssl_cert_reqs=none", "rediss://user@host/1", "s3@cret"),
        ("redis://user@host/0", "redis://user@host/0", None),
    ],
)
def test_the_lock_is_in_the_redis_of_the_ledger_and_its_password_is_hidden(
    url: str, shown_url: str, password: str | None
) -> None:
    found = beat_configuration(Settings(redis_url=url, broker_url="amqp://elsewhere"))
    assert found["redbeat_redis_url"] == shown_url
    assert found["redbeat_redis_options"].get("password") == password
    assert "s3" not in str(filter_hidden_settings(found)), "as `celery inspect conf` shows it"


def test_the_schedule_of_the_monitor_and_the_prefix_of_keys() -> None:
    found = beat_configuration(
        Settings(namespace="second", pressure=PressureSettings(monitor_s=2.5))
    )
    assert found["beat_schedule"] == {"rlm.monitor": {"task": "rlm.monitor", "schedule": 2.5}}
    assert found["redbeat_key_prefix"].startswith("second:")


def test_beat_finds_its_lock_by_the_sentinels() -> None:
    pytest.importorskip("redbeat")
    found = beat_configuration(watched(broker_url="amqp://elsewhere"))

    assert found["redbeat_redis_url"] == "redis-sentinel://"
    options = found["redbeat_redis_options"]
    assert (options["sentinels"], options["service_name"]) == (
        [("one", 26380), ("two", 26379)],
        "primary",
    )
    assert (options["db"], options["password"]) == (2, "hush")


def test_beat_verifies_the_certificate() -> None:
    pytest.importorskip("redbeat")
    found = beat_configuration(Settings(redis_url="rediss://host", broker_url="amqp://elsewhere"))

    assert found["redbeat_redis_use_ssl"] == VERIFIED
