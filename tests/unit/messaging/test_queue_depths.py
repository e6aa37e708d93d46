"""How deep and how old queues are, through kombu's own channels; and where the order of queues gets
its facts.
"""

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
    """A fake server behind kombu's own Redis transport, and how often it was spoken to."""

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
    # fakeredis does not note that a connection was alive: each command would be preceded by a PING.
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


def test_a_queue_is_as_old_as_the_message_that_is_taken_next(app: Celery) -> None:
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
def test_a_message_that_does_not_say_when_it_was_sent_has_no_age(
    app: Celery, headers: dict[str, Any]
) -> None:
    send(app, "unit.low", headers)

    assert gauge_of(app).read(["unit.low"]) == {"unit.low": QueueReport(1, None)}


def test_a_sender_whose_clock_is_ahead_has_sent_just_now(app: Celery) -> None:
    send(app, "unit.low", {"rlm": {"at": NOW + 5}})

    assert gauge_of(app).read(["unit.low"])["unit.low"].oldest_s == 0


def test_what_is_no_message_has_no_age(app: Celery, broker: FakeBroker) -> None:
    fakeredis.FakeRedis(server=broker.server).lpush("unit:unit.low", b"\xff")

    assert gauge_of(app).read(["unit.low"]) == {"unit.low": QueueReport(1, None)}


@pytest.mark.parametrize("prefix", ["unit:", ""])
def test_the_platforms_prefix_is_before_both_keys(broker: FakeBroker, prefix: str) -> None:
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


def test_an_outage_is_told_at_once_and_over_when_it_is_over(
    app: Celery, broker: FakeBroker
) -> None:
    gauge = gauge_of(app)
    gauge.read(NAMES)

    broker.server.connected = False
    for _ in range(2):  # on the connection it had, and on none
        with pytest.raises(RedisConnectionError):
            gauge.read(NAMES)
    broker.server.connected = True

    assert gauge.read(NAMES)["unit.low"].depth == 0


def test_a_broker_that_was_never_there_is_told_of_at_once() -> None:
    began = time.monotonic()
    with app_on("redis://127.0.0.1:1/0") as app, pytest.raises(RedisConnectionError):
        QueueGauge(app).read(NAMES)

    assert time.monotonic() - began < 1, "kombu would wait 2 s between its tries"


# --- the gauge elsewhere ----------------------------------------------------------------------


def test_other_brokers_tell_the_depth_alone() -> None:
    with app_on("memory://") as app:
        for _ in range(3):
            send(app, "unit.high", {"rlm": {"at": NOW}})

        reports = gauge_of(app).read(["unit.high", "unit.never-declared"])

    assert reports == {
        "unit.high": QueueReport(3, None),
        "unit.never-declared": QueueReport(0, None),
    }


class Amqp:
    """A broker that closes a channel on which something was wrong, as RabbitMQ does, and now and
    then the connection.
    """

    transport = SimpleNamespace(driver_type="amqp")
    alt = ()
    opened = attempts = 0
    connected = released = False
    patience_s = 0.0

    def __init__(self, **queues: int | Exception) -> None:
        self._queues = queues
        self.errors: list[Exception] = []  # what the next uses of the connection end with
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
        assert passive, "asking must not make a queue"
        found = self._queues.get(queue, NotFound(f"no queue {queue!r}", reply_code=404))
        if isinstance(found, Exception):
            self._open = False
            raise found
        return SimpleNamespace(message_count=found)


def test_a_queue_that_does_not_exist_spoils_no_other() -> None:
    gauge = QueueGauge(Amqp(low=7))  # type: ignore[arg-type]  # as much of an app as the gauge uses

    assert gauge.read(["high", "low"]) == {
        "high": QueueReport(0, None),
        "low": QueueReport(7, None),
    }


def test_what_else_a_broker_says_is_raised_and_the_connection_given_back() -> None:
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
    assert not amqp.released, "the parent goes on with its own"


def test_a_gauge_that_is_closed_gives_its_connection_back_and_may_be_read_again() -> None:
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
def test_a_connection_that_the_broker_has_closed_meanwhile_is_opened_again(
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
def test_a_broker_that_is_away_is_tried_once_more_and_one_that_hangs_is_not(
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
    assert amqp.patience_s == RABBITMQ.socket_timeout_s, "who hangs is not waited for without end"
