"""What the doctor finds on a real server, with and without a worker, and while Redis is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from resilience.degradation import Level
from rlm_tasks import Client, __version__
from rlm_tasks.diagnosis.doctor import Finding, examine
from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.ledger.records import ROOT, Report
from rlm_tasks.results import QuarantinedItem
from rlm_tasks.testing import embedded
from scheduler.board import Board, ClusterReport, HostReport
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until


def examined(client: Client, **options: Any) -> dict[str, Finding]:
    """Return the worst finding of each check, after a look at all of them."""
    found = examine(client, client.app, **options)
    assert all((each.state == "ok") == (not each.advice) for each in found), found
    order = {"ok": 0, "warning": 1, "fault": 2}
    return {each.check: each for each in sorted(found, key=lambda each: order[each.state])}


@pytest.fixture
def publish(lonely_client: Client) -> Callable[..., None]:
    """Publish what a worker would tell of its host."""
    store = lonely_client.ledger.store
    board = Board(store, lonely_client.ledger.keys, lonely_client.settings.pressure)
    every = tuple(lonely_client.queues())

    def publish(
        worker: str = "w1", *, queues: tuple[str, ...] = every, ahead_s: float = 0.0, **more: Any
    ) -> None:
        told = {"version": __version__, "schema": SCHEMA, **more}
        at = store.now_ms() / 1000 + ahead_s
        store.call(
            board.publish(
                HostReport(worker, Level.NORMAL, 0.0, "", 2, 0, queues, {}, at=at, **told)
            )
        )

    return publish


def test_a_platform_with_a_worker_is_well_but_for_its_disk_and_beat(client: Client) -> None:
    wait_until(lambda: any(host.queues for host in client.status().hosts))
    wait_until(
        lambda: examined(client)["clock"].state == "ok"
    )  # a report may have been late, on a busy machine
    found = examined(client)

    assert {check for check, each in found.items() if each.state == "fault"} == set()
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
    assert found["beat"].advice == "Type: celery -A rlm_tasks beat"
    assert "RLM_OPERATIONS=tests.integration.ops" in found["operations"].found


def test_without_a_worker_the_rest_is_told_and_what_waits_is_a_fault(lonely_client: Client) -> None:
    assert "queues" not in examined(lonely_client), (
        "nothing waits, and that there is no worker is said once"
    )
    lonely_client.submit(operation="sum", items=[1])

    found = examined(lonely_client)

    assert found["workers"].state == "fault"
    assert (
        found["queues"].found
        == f"messages wait that nobody consumes: 1 in {lonely_client.settings.namespace}.normal"
    )
    assert found["beat"].state == "warning"
    assert (
        found["redis"].state
        == found["broker"].state
        == found["quarantine"].state
        == found["breakers"].state
        == "ok"
    )


def test_a_queue_without_a_worker_is_named(
    lonely_client: Client, publish: Callable[..., None]
) -> None:
    urgent = tuple(name for name in lonely_client.queues() if not name.endswith(".low"))
    publish(queues=urgent)

    found = examined(lonely_client)["queues"]
    assert (found.state, found.found) == (
        "warning",
        f"no worker consumes {lonely_client.settings.namespace}.low",
    )
    assert found.advice.endswith(f"-Q {lonely_client.settings.namespace}.low")
    publish("w2")
    assert examined(lonely_client)["queues"].state == "ok"


@pytest.mark.parametrize(
    ("told", "state", "words"),
    [
        ({}, "ok", f"all workers run RLM Tasks {__version__}"),
        ({"version": "0.0.9"}, "warning", "others on w1 (0.0.9)"),
        ({"version": "", "schema": 0}, "warning", "w1 (an older release)"),
    ],
)
def test_workers_of_another_release_are_named(
    lonely_client: Client,
    publish: Callable[..., None],
    told: dict[str, Any],
    state: str,
    words: str,
) -> None:
    publish(**told)

    found = examined(lonely_client)["releases"]
    assert found.state == state
    assert words in found.found


def test_workers_that_cannot_read_new_jobs_are_a_fault(
    lonely_client: Client, publish: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    monkeypatch.setattr("rlm_tasks.diagnosis.doctor.SCHEMA", SCHEMA + 1)

    assert examined(lonely_client)["releases"].state == "fault"


@pytest.mark.parametrize(("ahead_s", "state"), [(0.0, "ok"), (-2.0, "warning"), (60.0, "fault")])
def test_clocks_are_compared_with_that_of_redis(
    lonely_client: Client, publish: Callable[..., None], ahead_s: float, state: str
) -> None:
    assert examined(lonely_client, clock=lambda: time.time() + ahead_s)["clock"].state == state
    publish("fine")
    publish("wrong", ahead_s=ahead_s)

    found = examined(lonely_client)["clock"]
    assert found.state == state
    if state != "ok":
        assert "the worst of the workers' clocks, wrong's," in found.found


def test_beat_is_known_by_what_it_does_and_a_drill_is_not_forgotten(
    lonely_client: Client, publish: Callable[..., None]
) -> None:
    publish()
    assert "beat" in examined(lonely_client)["beat"].advice
    board = Board(
        lonely_client.ledger.store, lonely_client.ledger.keys, lonely_client.settings.pressure
    )
    board.announce(ClusterReport(0, "", 0.0), b"")
    lonely_client.pressure.force("high", 60)

    found = examined(lonely_client)

    assert found["beat"].state == "ok"
    assert "a drill holds level high" in found["pressure"].found


def test_quarantine_and_open_breakers_are_told_with_their_commands(lonely_client: Client) -> None:
    lonely_client.create_circuit_breaker("llm").open()
    job, ledger = (
        lonely_client.submit(operation="echo", items=["confidential"]),
        lonely_client.ledger,
    )
    record = msgspec.json.encode(
        QuarantinedItem(job.id, 0, "echo", "stored item 0", 3, "SIGKILL")
    ).decode()
    ledger.finish(
        ledger.claim(job.id, ROOT, "token", "w1"),
        Report(1, failed=[0], quarantined=[(0, record)]),
        b"",
    )

    found = examined(lonely_client)

    assert found["breakers"].found == "calls are held back: llm (open)"
    assert found["breakers"].advice == "Type: celery -A rlm_tasks rlm breakers"
    assert found["quarantine"].found == "items that are not run again: 1, in jobs: 1"
    assert found["quarantine"].advice == "Type: celery -A rlm_tasks rlm quarantine list"


def test_settings_of_an_app_of_ones_own_are_told(lonely_client: Client) -> None:
    lonely_client.app.conf.worker_prefetch_multiplier = 4
    lonely_client.app.conf.accept_content = ["json", "pickle"]

    found = [each for each in examine(lonely_client, lonely_client.app) if each.check == "celery"]

    assert {each.state for each in found} == {"warning"}
    assert any("pickle" in each.found for each in found)
    assert any("worker_prefetch_multiplier=4" in each.found and each.advice for each in found)


@pytest.fixture
def nowhere() -> str:
    """The URL of a Redis that is not there."""
    return f"redis://:s3cret@127.0.0.1:{embedded.free_port()}/0"


def test_a_redis_that_is_away_is_one_fault_and_the_rest_is_looked_at(nowhere: str) -> None:
    with client_of(environment_of(nowhere, "away")) as client:
        found = examine(client, client.app)

    assert [each.check for each in found if each.state == "fault"] == ["redis"]
    assert {"packages", "versions", "operations", "celery"} <= {each.check for each in found}
    assert "s3cret" not in repr(found)


def test_a_broker_of_its_own_is_looked_at_by_itself(server: embedded.Server, nowhere: str) -> None:
    with client_of(environment_of(nowhere, "away", RLM_BROKER_URL=server.url)) as client:
        found = examined(client)
        assert (found["redis"].state, found["broker"].state) == ("fault", "ok")
    with client_of(environment_of(server.url, "away", RLM_BROKER_URL=nowhere)) as client:
        found = examined(client)
        assert (found["redis"].state, found["broker"].state) == ("ok", "fault")
        assert "s3cret" not in repr(found)
        assert "workers" in found


def test_a_url_that_cannot_be_read_is_told_without_its_password(server: embedded.Server) -> None:
    found = examined(
        client_of(environment_of("redis://:s3cret@host:port/0", "away", RLM_BROKER_URL=server.url))
    )

    assert "that is no URL of a Redis" in found["redis"].found
    assert "s3cret" not in repr(found)


def test_a_redis_that_refuses_is_told(server: embedded.Server, lonely_client: Client) -> None:
    """A user that may write nothing: the scripts of the board are refused, and INFO is."""
    admin = lonely_client.ledger.store.client
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

    assert "refuses what is asked" in found["redis"].found
    assert "s3cret" not in repr(found)
