"""The depth and age of queues, read through kombu's own channels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from amqp.exceptions import AccessRefused, ConnectionForced, NotFound
from celery import Celery
from fakeredis import FakeRedisConnection
from kombu.transport import redis as redis_transport
from redis.exceptions import ConnectionError as RedisConnectionError

from rlm_tasks.celery import configuration
from rlm_tasks.messaging.broker_kinds import RABBITMQ
from rlm_tasks.messaging.queue_depths import QueueGauge
from rlm_tasks.settings.model import Settings
from scheduler.queues import QueueReport

NOW = 1_800_000_000.0
NAMES = ["unit.critical", "unit.high", "unit.normal", "unit.low"]


class FakeBroker:
    """A fake server behind kombu's own Redis transport, which counts round trips
    and connections.
    """

    def __init__(self) -> None:
        self.server = fakeredis.FakeServer()
        self.round_trips = self.connections = 0

    def connection_class(self) -> type[FakeRedisConnection]:
        broker = self

        class Connection(FakeRedisConnection):  # type: ignore[misc]  # its base is not typed
            def __init__(self, **options: Any) -> None:
                broker.connections += 1
                super().__init__(server=broker.server, **options)

            def send_packed_command(self, command: Any, check_health: bool = True) -> None:
                broker.round_trips += 1
                super().send_packed_command(command, check_health)

        return Connection


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> FakeBroker:
    own = FakeBroker()
    monkeypatch.setattr(redis_transport.Channel, "connection_class", own.connection_class())
    return own


def app_on(url: str, **transport: Any) -> Celery:
    app = Celery("unit", set_as_current=False)
    app.config_from_object(configuration(Settings(namespace="unit", broker_url=url)))
    app.conf.broker_transport_options.update(transport)
    return app


@pytest.fixture
def app(broker: FakeBroker) -> Iterator[Celery]:
    # fakeredis does not record that a connection is alive, so kombu would send a PING before each
    # command.
    with app_on("redis://fake:1/0", health_check_interval=0) as own:
        yield own


def send(app: Celery, queue: str, headers: dict[str, Any]) -> None:
    with app.connection_for_write() as connection, app.amqp.Producer(connection) as producer:
        app.send_task(
            "rlm.node",
            ["job", "node"],
            queue=queue,
            headers=headers,
            producer=producer,
            ignore_result=True,
        )


def gauge_of(app: Celery, now: float = NOW) -> QueueGauge:
    return QueueGauge(app, clock=lambda: now)


# --- the gauge on Redis -----------------------------------------------------------------------


def test_the_age_of_a_queue_is_that_of_its_next_message(app: Celery) -> None:
    for age_s in (12.5, 3.0, 40.0):
        send(app, "unit.high", {"rlm": {"at": NOW - age_s, "schema": 1}})

    assert gauge_of(app).read(["unit.high"]) == {"unit.high": QueueReport(3, 12.5)}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"rlm": {"schema": 1}},
        {"rlm": {"at": None}},
        {"rlm": "theirs"},
        {"rlm": {"at": "noon"}},
        {"rlm": None},
    ],
)
def test_a_message_without_a_send_time_has_no_age(app: Celery, headers: dict[str, Any]) -> None:
    send(app, "unit.low", headers)

    assert gauge_of(app).read(["unit.low"]) == {"unit.low": QueueReport(1, None)}


def test_a_send_time_in_the_future_counts_as_now(app: Celery) -> None:
    send(app, "unit.low", {"rlm": {"at": NOW + 5}})

    assert gauge_of(app).read(["unit.low"])["unit.low"].oldest_s == 0


def test_data_that_is_no_message_has_no_age(app: Celery, broker: FakeBroker) -> None:
    fakeredis.FakeRedis(server=broker.server).lpush("unit:unit.low", b"\xff")

    assert gauge_of(app).read(["unit.low"]) == {"unit.low": QueueReport(1, None)}


@pytest.mark.parametrize("prefix", ["unit:", ""])
def test_the_global_key_prefix_is_used_for_both_keys(broker: FakeBroker, prefix: str) -> None:
    with app_on("redis://fake:1/0", global_keyprefix=prefix) as app:
        send(app, "unit.low", {"rlm": {"at": NOW - 1}})

        assert fakeredis.FakeRedis(server=broker.server).llen(f"{prefix}unit.low") == 1
        assert gauge_of(app).read(["unit.low"]) == {"unit.low": QueueReport(1, 1.0)}


def test_all_queues_are_one_round_trip_on_one_connection(app: Celery, broker: FakeBroker) -> None:
    gauge = gauge_of(app)
    empty = gauge.read(NAMES)
    broker.round_trips = broker.connections = 0

    assert gauge.read(NAMES) == empty == dict.fromkeys(NAMES, QueueReport(0, None))
    assert (broker.round_trips, broker.connections) == (1, 0)


def test_an_outage_raises_at_once_and_the_gauge_recovers(app: Celery, broker: FakeBroker) -> None:
    gauge = gauge_of(app)
    gauge.read(NAMES)

    broker.server.connected = False
    for _ in range(2):  # with the old connection, and without one
        with pytest.raises(RedisConnectionError):
            gauge.read(NAMES)
    broker.server.connected = True

    assert gauge.read(NAMES)["unit.low"].depth == 0


def test_a_broker_that_was_never_reachable_raises_at_once() -> None:
    began = time.monotonic()
    with app_on("redis://127.0.0.1:1/0") as app, pytest.raises(RedisConnectionError):
        QueueGauge(app).read(NAMES)

    assert time.monotonic() - began < 1, "kombu would wait 2 s between its tries"


# --- the gauge on other brokers ---------------------------------------------------------------


def test_other_brokers_give_the_depth_only() -> None:
    with app_on("memory://") as app:
        for _ in range(3):
            send(app, "unit.high", {"rlm": {"at": NOW}})

        reports = gauge_of(app).read(["unit.high", "unit.never-declared"])

    assert reports == {
        "unit.high": QueueReport(3, None),
        "unit.never-declared": QueueReport(0, None),
    }


class Amqp:
    """A broker that closes a channel after an error, as RabbitMQ does, and sometimes the
    connection.
    """

    transport = SimpleNamespace(driver_type="amqp")
    alt = ()
    opened = attempts = 0
    connected = released = False
    patience_s = 0.0

    def __init__(self, **queues: int | Exception) -> None:
        self._queues = queues
        self.errors: list[Exception] = []  # the errors that the next uses of the connection raise
        self.connection = SimpleNamespace(sock=SimpleNamespace(settimeout=self._wait_at_most))

    def _wait_at_most(self, seconds: float) -> None:
        self.patience_s = seconds

    def connection_for_read(self) -> Amqp:
        self.opened += 1
        return self

    def ensure_connection(self, **_: Any) -> None:
        self.attempts += 1
        self.connected = True

    def collect(self) -> None:
        self.connected = False

    def release(self) -> None:
        self.released = True

    def channel(self) -> AmqpChannel:
        if self.errors:
            raise self.errors.pop(0)
        return AmqpChannel(self._queues)


class AmqpChannel:
    def __init__(self, queues: dict[str, int | Exception]) -> None:
        self._queues, self._open = queues, True

    def __enter__(self) -> AmqpChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False

    def queue_declare(self, *, queue: str, passive: bool) -> Any:
        assert self._open
        assert passive, "the gauge must not create a queue"
        found = self._queues.get(queue, NotFound(f"no queue {queue!r}", reply_code=404))
        if isinstance(found, Exception):
            self._open = False
            raise found
        return SimpleNamespace(message_count=found)


def test_a_missing_queue_does_not_affect_the_others() -> None:
    gauge = QueueGauge(Amqp(low=7))  # type: ignore[arg-type]  # the part of an app that the gauge uses

    assert gauge.read(["high", "low"]) == {
        "high": QueueReport(0, None),
        "low": QueueReport(7, None),
    }


def test_other_errors_of_the_broker_are_raised_and_the_connection_is_released() -> None:
    amqp = Amqp(low=AccessRefused("not yours", reply_code=403))

    with pytest.raises(AccessRefused):
        QueueGauge(amqp).read(["low"])  # type: ignore[arg-type]  # as above
    assert amqp.released


def test_each_process_and_each_thread_has_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    amqp = Amqp(low=7)
    gauge = QueueGauge(amqp)  # type: ignore[arg-type]  # as above

    def opened_by_reading() -> int:
        before = amqp.opened
        for _ in range(3):
            gauge.read(["low"])
        return amqp.opened - before

    assert (opened_by_reading(), opened_by_reading()) == (1, 0)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(opened_by_reading).result() == 1
    monkeypatch.setattr("os.getpid", lambda: 1)  # as after a fork
    assert opened_by_reading() == 1
    assert not amqp.released, "the parent keeps its own connection"


def test_a_closed_gauge_releases_its_connection_and_may_be_read_again() -> None:
    amqp = Amqp(low=7)
    gauge = QueueGauge(amqp)  # type: ignore[arg-type]  # as above
    gauge.read(["low"])

    gauge.close()

    assert amqp.released
    assert gauge.read(["low"]) == {"low": QueueReport(7, None)}
    assert amqp.opened == 2


@pytest.mark.parametrize(
    "error",
    [ConnectionForced("CONNECTION_FORCED"), OSError("Server unexpectedly closed connection")],
)
def test_a_connection_that_the_broker_has_closed_is_opened_again(
    error: Exception,
) -> None:
    amqp = Amqp(low=7)
    gauge = QueueGauge(amqp)  # type: ignore[arg-type]  # as above
    gauge.read(["low"])
    amqp.errors, amqp.attempts = [error], 0

    assert gauge.read(["low"]) == {"low": QueueReport(7, None)}
    assert (amqp.attempts, amqp.released) == (1, False)


@pytest.mark.parametrize(
    "errors", [[ConnectionForced("a"), ConnectionForced("b")], [TimeoutError("no answer")]]
)
def test_a_lost_broker_is_tried_once_more_and_one_that_hangs_is_not(
    errors: list[Exception],
) -> None:
    amqp = Amqp(low=7)
    gauge = QueueGauge(amqp)  # type: ignore[arg-type]  # as above
    gauge.read(["low"])
    last, amqp.errors = errors[-1], errors

    with pytest.raises(type(last), match=str(last)):
        gauge.read(["low"])
    assert amqp.errors == []
    assert amqp.released
    assert amqp.patience_s == RABBITMQ.socket_timeout_s, "the gauge does not wait for ever"
