"""What beat is told: when the monitor is due, and where its lock is, without showing a password."""

from __future__ import annotations

import pytest
from celery.app.utils import filter_hidden_settings

from rlm_tasks.celery import beat_configuration
from rlm_tasks.settings.model import Settings
from scheduler.settings import PressureSettings
from tests.unit.messaging.test_transports import VERIFIED, watched

pytest.importorskip("redbeat")


@pytest.mark.parametrize(
    ("url", "told", "password"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0", None),
        ("redis://:s3cret@host:6380/1", "redis://host:6380/1", "s3cret"),
        ("rediss://user:s3%40cret@host/1?ssl_cert_reqs=none", "rediss://user@host/1", "s3@cret"),
        ("redis://user@host/0", "redis://user@host/0", None),
    ],
)
def test_the_lock_is_in_the_ledgers_redis_and_nobody_is_shown_its_password(
    url: str, told: str, password: str | None
) -> None:
    found = beat_configuration(Settings(redis_url=url, broker_url="amqp://elsewhere"))
    assert found["redbeat_redis_url"] == told
    assert found["redbeat_redis_options"].get("password") == password
    assert "s3" not in str(filter_hidden_settings(found)), "as `celery inspect conf` shows it"


def test_the_monitor_is_due_as_often_as_settings_say_and_keys_are_the_platforms_own() -> None:
    found = beat_configuration(
        Settings(namespace="second", pressure=PressureSettings(monitor_s=2.5))
    )
    assert found["beat_schedule"] == {"rlm.monitor": {"task": "rlm.monitor", "schedule": 2.5}}
    assert found["redbeat_key_prefix"].startswith("second:")


def test_beat_has_its_lock_where_the_sentinels_say() -> None:
    pytest.importorskip("redbeat")
    found = beat_configuration(watched(broker_url="amqp://elsewhere"))

    assert found["redbeat_redis_url"] == "redis-sentinel://"
    options = found["redbeat_redis_options"]
    assert (options["sentinels"], options["service_name"]) == (
        [("one", 26380), ("two", 26379)],
        "primary",
    )
    assert (options["db"], options["password"]) == (2, "hush")


def test_beat_verifies_the_certificate_as_everybody_does() -> None:
    pytest.importorskip("redbeat")
    found = beat_configuration(Settings(redis_url="rediss://host", broker_url="amqp://elsewhere"))

    assert found["redbeat_redis_use_ssl"] == VERIFIED
