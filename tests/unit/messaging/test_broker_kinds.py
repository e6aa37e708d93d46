"""Each kind of broker is found by its URL and by kombu's name of its client."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.backends.redis import RedisBackend

from rlm_tasks.messaging.broker_kinds import (
    KINDS,
    OTHER,
    RABBITMQ,
    REDIS,
    BrokerKind,
    broker_kind,
    kind_of_backend,
    kind_of_connection,
)

WATCHED = "sentinel://a:26379;sentinel://b:26379"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://h", REDIS),
        ("rediss://h", REDIS),
        ("valkey://h", REDIS),
        (WATCHED, REDIS),
        (["redis://h", "amqp://h"], REDIS),
        ("amqp://h", RABBITMQ),
        ("amqps://h", RABBITMQ),
        ("sqs://h", OTHER),
        ("", OTHER),
        (None, OTHER),
        ([], OTHER),
    ],
)
def test_a_url_names_the_kind_of_its_server(url: Any, kind: BrokerKind) -> None:
    assert broker_kind(url) is kind


@pytest.mark.parametrize(
    ("driver", "kind"), [("redis", REDIS), ("py-amqp", RABBITMQ), ("sql", OTHER)]
)
def test_a_connection_names_the_kind_of_its_server(driver: str, kind: BrokerKind) -> None:
    connection = SimpleNamespace(transport=SimpleNamespace(driver_type=driver))

    assert kind_of_connection(connection) is kind


class OwnBackend(RedisBackend):
    """A result backend of a user, named by its class instead of a URL."""


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("redis://h", REDIS),
        ("sentinel://h:26379", REDIS),
        (OwnBackend, REDIS),
        ("celery.backends.redis:RedisBackend+redis://h/0", REDIS),
        ("rpc://", OTHER),
        ("cache+memory://", OTHER),
        (None, OTHER),
    ],
)
def test_the_class_of_a_result_backend_names_its_server(backend: Any, kind: BrokerKind) -> None:
    app = Celery("backend", backend=backend, set_as_current=False)

    assert kind_of_backend(app.backend) is kind


def test_no_url_and_no_client_belongs_to_two_kinds() -> None:
    schemes = [scheme for kind in KINDS for scheme in kind.schemes]
    drivers = [driver for kind in KINDS for driver in kind.drivers]

    assert len(schemes) == len(set(schemes))
    assert len(drivers) == len(set(drivers))
