"""The doctor's findings on a real server: with a worker, without one, and without Redis."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from resilience.degradation import Level
from rlm_tasks import Client, __version__
from rlm_tasks.diagnosis.doctor import Finding, examine
from rlm_tasks.installation import command_of
from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.ledger.records import ROOT, Report
from rlm_tasks.results import QuarantinedItem
from rlm_tasks.testing import embedded
from scheduler.board import Board, ClusterReport, HostReport
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until


def examined(client: Client, **options: Any) -> dict[str, Finding]:
    """Return the worst finding of each check; assert that every finding but "ok" has advice."""
    found = examine(client, client.app, **options)
    assert all((each.state == "ok") == (not each.advice) for each in found), found
    order = {"ok": 0, "warning": 1, "fault": 2}
    return {each.check: each for each in sorted(found, key=lambda each: order[each.state])}


@pytest.fixture
def publish(client_without_worker: Client) -> Callable[..., None]:
    """A function that publishes a worker's report of its host."""
    store = client_without_worker.ledger.store
    board = Board(store, client_without_worker.ledger.keys, client_without_worker.settings.pressure)
    every = tuple(client_without_worker.queues())

    def publish(
        worker: str = "w1", *, queues: tuple[str, ...] = every, ahead_s: float = 0.0, **more: Any
    ) -> None:
        fields = {"version": __version__, "schema": SCHEMA, **more}
        at = store.now_ms() / 1000 + ahead_s
        store.call(
            board.publish(
                HostReport(worker, Level.NORMAL, 0.0, "", 2, 0, queues, {}, at=at, **fields)
            )
        )

    return publish


def test_with_a_worker_only_persistence_and_beat_are_warnings(client: Client) -> None:
    wait_until(lambda: any(host.queues for host in client.status().hosts))
    # On a busy machine a report may be late at first.
    wait_until(lambda: examined(client)["clock"].state == "ok")
    found = examined(client)

    # Modules of other tests declare operations in this process, which the worker does not know.
    faults = {check for check, each in found.items() if each.state == "fault"}
    assert faults <= {"operations"}
    assert found["workers"].found == "1 reporting, with 2 slots"
    for check in (
        "redis",
        "eviction",
        "memory",
        "broker",
        "releases",
        "queues",
        "packages",
        "versions",
        "celery",
    ):
        assert found[check].state == "ok", found[check]
    assert found["persistence"].state == "warning"
    assert found["beat"].advice == f"Type: {command_of(client.app)} beat"
    known = [each.found for each in examine(client, client.app) if each.check == "operations"]
    assert "RLM_OPERATIONS=tests.integration.ops" in known[0]


def test_without_a_worker_waiting_messages_are_a_fault(client_without_worker: Client) -> None:
    assert "queues" not in examined(client_without_worker), (
        "the missing worker is reported only once"
    )
    client_without_worker.submit(operation="sum", items=[1])

    found = examined(client_without_worker)

    queue = f"{client_without_worker.settings.namespace}.normal"
    assert found["workers"].state == "fault"
    assert found["queues"].found == f"messages wait that no worker consumes: 1 in {queue}"
    assert found["beat"].state == "warning"
    assert (
        found["redis"].state
        == found["broker"].state
        == found["quarantine"].state
        == found["breakers"].state
        == "ok"
    )


def test_a_queue_without_a_worker_is_named(
    client_without_worker: Client, publish: Callable[..., None]
) -> None:
    urgent = tuple(name for name in client_without_worker.queues() if not name.endswith(".low"))
    publish(queues=urgent)

    found = examined(client_without_worker)["queues"]
    assert (found.state, found.found) == (
        "warning",
        f"no worker consumes {client_without_worker.settings.namespace}.low",
    )
    assert found.advice.endswith(f"-Q {client_without_worker.settings.namespace}.low")
    publish("w2")
    assert examined(client_without_worker)["queues"].state == "ok"


@pytest.mark.parametrize(
    ("published", "state", "text"),
    [
        ({}, "ok", f"all workers run RLM Tasks {__version__}"),
        ({"version": "0.0.9"}, "warning", "others on w1 (0.0.9)"),
        ({"version": "", "schema": 0}, "warning", "w1 (an older release)"),
    ],
)
def test_workers_of_another_release_are_named(
    client_without_worker: Client,
    publish: Callable[..., None],
    published: dict[str, Any],
    state: str,
    text: str,
) -> None:
    publish(**published)

    found = examined(client_without_worker)["releases"]
    assert found.state == state
    assert text in found.found


def test_workers_that_cannot_read_new_jobs_are_a_fault(
    client_without_worker: Client, publish: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    monkeypatch.setattr("rlm_tasks.diagnosis.comparisons.SCHEMA", SCHEMA + 1)

    assert examined(client_without_worker)["releases"].state == "fault"


@pytest.mark.parametrize(("ahead_s", "state"), [(0.0, "ok"), (-2.0, "warning"), (60.0, "fault")])
def test_clocks_are_compared_with_the_clock_of_redis(
    client_without_worker: Client, publish: Callable[..., None], ahead_s: float, state: str
) -> None:
    assert (
        examined(client_without_worker, clock=lambda: time.time() + ahead_s)["clock"].state == state
    )
    publish("fine")
    publish("wrong", ahead_s=ahead_s)

    found = examined(client_without_worker)["clock"]
    assert found.state == state
    if state != "ok":
        assert "the worst of the workers' clocks, wrong's," in found.found


def test_beat_is_detected_by_its_measurement_and_a_drill_is_reported(
    client_without_worker: Client, publish: Callable[..., None]
) -> None:
    publish()
    assert "beat" in examined(client_without_worker)["beat"].advice
    board = Board(
        client_without_worker.ledger.store,
        client_without_worker.ledger.keys,
        client_without_worker.settings.pressure,
    )
    board.announce(ClusterReport(0, "", 0.0), b"")
    client_without_worker.pressure.force("high", 60)

    found = examined(client_without_worker)

    assert found["beat"].state == "ok"
    assert "a drill holds level high" in found["pressure"].found


def test_quarantine_and_open_breakers_come_with_a_command(client_without_worker: Client) -> None:
    client_without_worker.create_circuit_breaker("llm").open()
    job, ledger = (
        client_without_worker.submit(operation="echo", items=["confidential"]),
        client_without_worker.ledger,
    )
    record = msgspec.json.encode(
        QuarantinedItem(job.id, 0, "echo", "stored item 0", 3, "SIGKILL")
    ).decode()
    ledger.finish(
        ledger.claim(job.id, ROOT, "token", "w1"),
        Report(1, failed=[0], quarantined=[(0, record)]),
        b"",
    )

    found = examined(client_without_worker)

    assert found["breakers"].found == "breakers refuse calls: llm (open)"
    assert found["breakers"].advice == f"Type: {command_of(client_without_worker.app)} rlm breakers"
    assert found["quarantine"].found == "items that do not run again: 1, in jobs: 1"
    assert (
        found["quarantine"].advice
        == f"Type: {command_of(client_without_worker.app)} rlm quarantine list"
    )


def test_unsuitable_settings_of_a_users_app_are_warnings(client_without_worker: Client) -> None:
    client_without_worker.app.conf.worker_prefetch_multiplier = 4
    client_without_worker.app.conf.accept_content = ["json", "pickle"]

    found = [
        each
        for each in examine(client_without_worker, client_without_worker.app)
        if each.check == "celery"
    ]

    assert {each.state for each in found} == {"warning"}
    assert any("pickle" in each.found for each in found)
    assert any("worker_prefetch_multiplier=4" in each.found and each.advice for each in found)


@pytest.fixture
def nowhere() -> str:
    """The URL of a Redis that does not exist."""
    return f"redis://:s3cret@127.0.0.1:{embedded.free_port()}/0"


def test_an_unreachable_redis_is_one_fault_and_other_checks_still_run(nowhere: str) -> None:
    with client_of(environment_of(nowhere, "away")) as client:
        found = examine(client, client.app)

    assert [each.check for each in found if each.state == "fault"] == ["redis"]
    assert {"packages", "versions", "operations", "celery"} <= {each.check for each in found}
    assert "s3cret" not in repr(found)


def test_a_separate_broker_is_checked_separately(server: embedded.Server, nowhere: str) -> None:
    with client_of(environment_of(nowhere, "away", RLM_BROKER_URL=server.url)) as client:
        found = examined(client)
        assert (found["redis"].state, found["broker"].state) == ("fault", "ok")
    with client_of(environment_of(server.url, "away", RLM_BROKER_URL=nowhere)) as client:
        found = examined(client)
        assert (found["redis"].state, found["broker"].state) == ("ok", "fault")
        assert "s3cret" not in repr(found)
        assert "workers" in found


def test_an_invalid_url_is_refused_without_its_password(server: embedded.Server) -> None:
    with pytest.raises(ValidationError, match="a port and a database are numbers") as raised:
        client_of(environment_of("redis://:s3cret@host:port/0", "away", RLM_BROKER_URL=server.url))

    assert "s3cret" not in str(raised.value)


def test_a_redis_that_refuses_commands_is_reported(
    server: embedded.Server, client_without_worker: Client
) -> None:
    """The Redis user may not write: scripts of the board are refused, and so is INFO."""
    admin = client_without_worker.ledger.store.client
    admin.acl_setuser(
        "reader",
        enabled=True,
        passwords=["+s3cret"],
        commands=["+ping", "+time"],
        keys=["*"],
        reset=True,
    )
    url = server.url.replace("://", "://reader:s3cret@")
    try:
        with client_of(environment_of(url, "refused")) as client:
            found = examined(client)
    finally:
        admin.acl_deluser("reader")

    assert "refuses a call" in found["redis"].found
    assert "s3cret" not in repr(found)
