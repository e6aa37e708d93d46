"""The settings of Celery for broker and result backend, for each kind of URL; none shows a
password.
"""

from __future__ import annotations

import ssl
from typing import Any

import pytest
from celery import Celery
from celery.app.utils import filter_hidden_settings
from celery.backends.redis import RedisBackend, SentinelBackend
from redis.connection import SSLConnection

from rlm_tasks.celery import configuration
from rlm_tasks.messaging.broker_kinds import broker
from rlm_tasks.messaging.transports import ANSWER_S
from rlm_tasks.settings.model import Settings

VERIFIED = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
WATCHED = "sentinel://:hush@one:26380/2;sentinel://two"


def app_of(**settings: Any) -> Celery:
    app = Celery("transports", set_as_current=False)
    app.config_from_object(configuration(Settings(**settings)))
    return app


def watched(**more: str) -> Settings:
    return Settings(
        redis_url=WATCHED, sentinel_master="primary", sentinel_password="hush-too", **more
    )


# --- one URL is enough ------------------------------------------------------------------------


def test_one_url_over_tls_is_enough_for_broker_and_result_backend() -> None:
    app = app_of(redis_url="rediss://:hush@host:6390/1")
    backend: RedisBackend = app.backend

    assert app.conf.broker_use_ssl == app.conf.redis_backend_use_ssl == VERIFIED
    assert app.connection_for_read().transport.driver_type == "redis"
    assert backend.connparams["connection_class"] is SSLConnection
    assert {name: backend.connparams[name] for name in ("host", "port", "db", "password")} == {
        "host": "host",
        "port": 6390,
        "db": 1,
        "password": "hush",
    }


def test_without_tls_celery_gets_no_tls_options() -> None:
    conf = app_of(redis_url="redis://host").conf

    assert not conf.broker_use_ssl
    assert not conf.redis_backend_use_ssl
    assert conf.broker_transport_options["socket_timeout"] == conf.redis_socket_timeout == ANSWER_S


def test_a_unix_socket_is_written_as_celery_expects_it() -> None:
    app = app_of(redis_url="unix:///run/redis.sock?db=3")
    backend: RedisBackend = app.backend

    assert app.conf.broker_url == "redis+socket:///run/redis.sock?virtual_host=3"
    assert app.connection_for_read().transport.driver_type == "redis"
    assert backend.client.connection_pool.make_connection().path == "/run/redis.sock"
    assert backend.connparams["db"] == 3


def test_the_url_of_each_sentinel_has_password_and_database() -> None:
    found = broker(watched())

    assert found["broker_url"] == "sentinel://:hush@one:26380/2;sentinel://:hush@two:26379/2"
    options = found["broker_transport_options"]
    assert options["master_name"] == "primary"
    assert options["sentinel_kwargs"]["password"] == "hush-too"
    assert options["socket_timeout"] == ANSWER_S, "a sentinel that hangs is left for another"


def test_the_result_backend_finds_the_primary_by_the_same_sentinels() -> None:
    app = Celery("watched", set_as_current=False)
    app.config_from_object(configuration(watched()))
    backend: SentinelBackend = app.backend

    pool = backend.client.connection_pool
    assert pool.service_name == "primary"
    assert [
        each.connection_pool.connection_kwargs["host"] for each in pool.sentinel_manager.sentinels
    ] == ["one", "two"]
    assert (pool.connection_kwargs["db"], pool.connection_kwargs["password"]) == (2, "hush")


# --- RabbitMQ ---------------------------------------------------------------------------------


def test_platforms_on_one_rabbitmq_have_separate_exchanges() -> None:
    found = broker(Settings(broker_url="amqp://host//", namespace="second"))

    assert found == {
        "broker_url": "amqp://host//",
        "control_exchange": "second",
        "event_exchange": "second.events",
    }


@pytest.mark.parametrize(
    ("options", "options_of_tls"),
    [
        ("", {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None}),
        ("?ssl_check_hostname=false", {"cert_reqs": ssl.CERT_REQUIRED}),
        ("?ssl_cert_reqs=none", {"cert_reqs": ssl.CERT_NONE}),
    ],
)
def test_tls_options_are_written_as_the_client_of_rabbitmq_expects_them(
    options: str, options_of_tls: dict[str, Any]
) -> None:
    found = broker(Settings(broker_url=f"amqps://host//{options}"))

    assert found["broker_url"] == "amqps://host//"
    assert found["broker_use_ssl"] == options_of_tls


def test_each_queue_is_bound_by_its_own_name() -> None:
    assert {each.name: each.routing_key for each in app_of(namespace="q").conf.task_queues} == {
        name: name for name in ("q.critical", "q.high", "q.normal", "q.low")
    }


# --- passwords --------------------------------------------------------------------------------


def test_celery_shows_no_password() -> None:
    shown = filter_hidden_settings({**configuration(watched()), "deprecated_settings": None})

    assert "hush" not in str(shown), "as `celery report` and `inspect conf` show it"
