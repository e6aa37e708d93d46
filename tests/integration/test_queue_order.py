"""The order of queues on a real server and worker: shares by weight, and no starvation.

Also the gauge that reads depth and age of queues."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from rlm_tasks import Client
from rlm_tasks.celery import configuration
from rlm_tasks.messaging.queue_depths import QueueGauge
from rlm_tasks.settings.model import Settings
from rlm_tasks.testing import embedded
from rlm_tasks.worker.queue_order import QueueOrder
from scheduler.queues import QueueReport
from scheduler.stride import WEIGHTS, Facts
from tests.integration.conftest import SLOTS, client_of, environment_of
from tests.integration.ordered_ops import note
from tests.support import wait_until

NOW = 1_800_000_000.0
DEEP = 30
"""The depth of a flooded queue; a worker needs at least 0.15 s for that many messages."""


def app_on(url: str, namespace: str) -> Celery:
    """Return an app of the platform without its tasks, to send messages and read queues."""
    app = Celery(f"{namespace}-queues", set_as_current=False)
    app.config_from_object(configuration(Settings(redis_url=url, namespace=namespace)))
    return app


# --- a worker ---------------------------------------------------------------------------------


class Turns:
    """Jobs of one item each, and the order in which a worker began them."""

    def __init__(self, client: Client, journal: Path) -> None:
        self._client, self._journal = client, journal
        journal.touch()

    def submit(self, priority: str, *names: str) -> None:
        params = {"journal": str(self._journal)}
        self._client.batch_submit(
            {
                "operation": "take_turns",
                "items": [name],
                "params": params,
                "options": {"priority": priority},
            }
            for name in names
        )

    def note(self, word: str) -> None:
        note(self._journal, word)

    def begun(self) -> list[str]:
        return self._journal.read_text(encoding="utf-8").split()

    @contextmanager
    def flood(self, priority: str) -> Iterator[None]:
        """Keep the queue of a priority full for the length of a block, and leave it empty."""
        queue, gauge = (
            f"ordered.{priority}",
            QueueGauge(app_on(self._client.settings.redis_url, "ordered")),
        )
        over, sent = threading.Event(), Counter[str]()

        def feed() -> None:
            while not over.wait(0.01):
                if (missing := DEEP - gauge.read([queue])[queue].depth) > 0:
                    self.submit(priority, *[priority] * missing)
                    sent[priority] += missing

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            wait_until(lambda: self.begun().count(priority) >= DEEP)
            yield
            assert feeder.is_alive()
        finally:
            over.set()
            feeder.join()
        wait_until(lambda: self.begun().count(priority) == sent[priority])


@pytest.fixture(scope="module")
def ordered(server: embedded.Server, logs: Path) -> Iterator[Client]:
    """A client of a worker for these tests."""
    environment = environment_of(
        server.url,
        "ordered",
        RLM_OPERATIONS="tests.integration.ordered_ops",
        RLM_BATCH__WAIT_S="0",  # a batch fills its queue at once
    )
    worker = embedded.worker(environment, log=logs / "ordered.log", slots=SLOTS)
    with worker, client_of(environment) as own:
        yield own


@pytest.fixture
def turns(ordered: Client, tmp_path: Path) -> Turns:
    return Turns(ordered, tmp_path / "journal")


def between(begun: list[str], word: str, *, after: int) -> Counter[str]:
    """Return the items that began between the `after`th and the last occurrence of `word`.

    Occurrences count from 0."""
    at = [index for index, each in enumerate(begun) if each == word]
    return Counter(begun[at[after] + 1 : at[-1]])


def test_low_work_under_a_flood_of_high_work_begins_after_a_few_others(turns: Turns) -> None:
    """A low message waits at most for the messages of its weight ratio, and one more for a tie."""
    with turns.flood("high"):
        for each in range(20):
            turns.submit("low", f"low-{each}")
            turns.note(f"sent-{each}")
            wait_until(lambda each=each: f"low-{each}" in turns.begun())  # type: ignore[misc]  # a default binds the value
    begun = turns.begun()

    passed_over = [
        begun[begun.index(f"sent-{each}") : begun.index(f"low-{each}") + 1].count("high")
        for each in range(20)
    ]

    taken_before = SLOTS  # messages that processes had taken but not begun
    assert sum(passed_over) > len(passed_over), "the queue of high work was really full"
    assert max(passed_over) <= WEIGHTS["high"] / WEIGHTS["low"] + 1 + taken_before


def test_full_queues_of_high_and_low_work_are_served_four_to_one(turns: Turns) -> None:
    turns.submit("high", *["high"] * 250)
    turns.submit("low", *["low"] * 30)
    wait_until(lambda: turns.begun().count("high") == 250)

    # The first low message used the credit of a queue that was idle.
    served = between(turns.begun(), "low", after=1)

    assert turns.begun()[-1] == "high", "both queues were full until the last low message"
    assert abs(served["high"] - 4 * (served["low"] + 1)) <= SLOTS


def test_critical_work_has_one_of_two_slots_and_shares_the_other(turns: Turns) -> None:
    """With one slot, critical work competes for the other by 8 to 1; without one it comes first."""
    turns.submit("critical", *["critical"] * 300)
    turns.submit("low", *["low"] * 20)
    wait_until(lambda: turns.begun().count("critical") == 300)

    served = between(turns.begun(), "low", after=1)

    assert turns.begun()[-1] == "critical", "both queues were full until the last low message"
    assert served["critical"] >= 9 * (served["low"] + 1) - SLOTS, (
        "eight by weight, and one in the reserved slot"
    )


def test_a_kombu_channel_takes_8_4_2_1(
    server: embedded.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QueueOrder, "facts", Facts())
    app = app_on(server.url, "channel")
    app.conf.broker_transport_options["queue_order_strategy"] = (
        "rlm_tasks.worker.queue_order:QueueOrder"
    )
    names, taken = [f"channel.{priority}" for priority in WEIGHTS], list[str]()

    def took(message: Any) -> None:
        taken.append(message.delivery_info["routing_key"])
        message.ack()

    with app, app.connection_for_read() as connection:
        for name in names:
            send(app, name, *[{}] * 80)
        with app.amqp.TaskConsumer(connection.default_channel, on_message=took) as consumer:
            consumer.qos(prefetch_count=1)
            while len(taken) < 150:
                connection.drain_events(timeout=5)
            consumer.purge()

    assert Counter(taken[:150]) == {
        "channel.critical": 80,
        "channel.high": 40,
        "channel.normal": 20,
        "channel.low": 10,
    }


# --- the gauge --------------------------------------------------------------------------------


def send(app: Celery, queue: str, *headers: dict[str, Any]) -> None:
    """Send messages without a worker."""
    with app.connection_for_write() as connection, app.amqp.Producer(connection) as producer:
        for each in headers:
            app.send_task(
                "rlm.node",
                ["job", "node"],
                queue=queue,
                headers=each,
                producer=producer,
                ignore_result=True,
            )


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app with a private server."""
    with embedded.server() as server, app_on(server.url, "my-team_1") as own:
        own.server = server
        yield own


def test_the_gauge_reads_depth_and_age_from_the_server(app: Celery) -> None:
    send(app, "my-team_1.high", *[{"rlm": {"at": NOW - age_s}} for age_s in (20.25, 5.0, 30.0)])
    send(app, "my-team_1.low", {})

    reports = QueueGauge(app, clock=lambda: NOW).read(
        [f"my-team_1.{priority}" for priority in WEIGHTS]
    )

    assert reports == {
        "my-team_1.critical": QueueReport(0, None),
        "my-team_1.high": QueueReport(3, 20.25),
        "my-team_1.normal": QueueReport(0, None),
        "my-team_1.low": QueueReport(1, None),
    }
    assert redis.Redis.from_url(app.server.url).llen("my-team_1:my-team_1.high") == 3


def test_reading_all_queues_takes_one_round_trip(app: Celery) -> None:
    gauge, names, client = (
        QueueGauge(app),
        [f"my-team_1.{priority}" for priority in WEIGHTS],
        redis.Redis.from_url(app.server.url),
    )
    gauge.read(names)
    before = (
        client.info("stats")["total_commands_processed"],
        client.info("clients")["connected_clients"],
    )

    gauge.read(names)

    expected = 2 * len(names) + len(("MULTI", "EXEC"))
    after = (
        client.info("stats")["total_commands_processed"],
        client.info("clients")["connected_clients"],
    )
    assert (after[0] - before[0] - len(("INFO", "INFO")), after[1] - before[1]) == (expected, 0)


def test_the_gauge_survives_a_restart_of_the_server(app: Celery) -> None:
    gauge = QueueGauge(app)
    gauge.read(["my-team_1.low"])

    app.server.stop()
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            gauge.read(["my-team_1.low"])
    app.server.start()
    send(app, "my-team_1.low", {})

    assert gauge.read(["my-team_1.low"])["my-team_1.low"].depth == 1


def test_forked_process_and_thread_use_separate_connections(app: Celery) -> None:
    gauge, wrong = QueueGauge(app), list[int]()
    send(app, "my-team_1.low", *[{}] * 3)
    send(app, "my-team_1.high", {})

    def reads(queue: str, depth: int) -> None:
        for _ in range(100):
            if (found := gauge.read([queue])[queue].depth) != depth:
                wrong.append(found)

    reads("my-team_1.low", 3)
    pid = os.fork()
    if not pid:
        try:
            reads("my-team_1.high", 1)
        finally:
            os._exit(bool(wrong))
    thread = threading.Thread(target=reads, args=("my-team_1.high", 1))
    thread.start()
    reads("my-team_1.low", 3)
    thread.join()
    _, status = os.waitpid(pid, 0)

    assert (wrong, os.waitstatus_to_exitcode(status)) == ([], 0)


def test_a_client_whose_clock_is_an_hour_wrong_changes_no_age(
    server: embedded.Server, client_without_worker: Client
) -> None:
    name = client_without_worker.settings.namespace
    for wrong_s in (-3600, 3600):
        submit = (
            f"import time; real = time.time; time.time = lambda: real() + {wrong_s}\n"
            "from rlm_tasks import Client\n"
            "Client().submit(operation='sum', items=range(3))"
        )
        environment = {**os.environ, **environment_of(server.url, name)}
        subprocess.run([sys.executable, "-c", submit], check=True, env=environment, timeout=30)
        queue = client_without_worker.queues()[f"{name}.normal"]
        assert queue.oldest_s is not None
        assert 0 <= queue.oldest_s < 60
        client_without_worker.ledger.store.client.delete(f"{name}:{name}.normal")
