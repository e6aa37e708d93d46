"""Redis behind sentinels: a failover during a job, and reports about sentinels.

Clients, workers and Flower find the new primary without a restart."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from rlm_tasks import StoreUnavailable
from rlm_tasks.diagnosis.doctor import Finding, examine
from tests.faults.conftest import Cell, cell
from tests.faults.sentinels import MASTER, SENTINEL_PASSWORD, Watched, asked, watched
from tests.integration.conftest import client_of
from tests.integration.flowers import Flower, flower
from tests.support import wait_until

ADDRESS = {"RLM_SENTINEL_MASTER": MASTER, "RLM_SENTINEL_PASSWORD": SENTINEL_PASSWORD}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("watched")) as own:
        yield own


@pytest.fixture(scope="module")
def platform(redis: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    """A client and a worker that stay up during all tests."""
    folder = tmp_path_factory.mktemp("platform")
    with cell(redis, "watched", folder, folder / "worker.log", **ADDRESS) as own:
        own.worker()
        yield own


@pytest.fixture(scope="module")
def flower_site(platform: Cell) -> Iterator[Flower]:
    with flower(platform.environment, platform.folder / "flower.log") as own:
        yield own


def test_a_primary_that_refuses_writes_is_unavailable(redis: Watched, platform: Cell) -> None:
    client = platform.client
    with asked(redis.primary) as primary:
        # A primary that was replaced refuses writes in this way: its replicas have left it.
        primary.config_set("min-replicas-to-write", 2)
        with pytest.raises(StoreUnavailable, match="too few of its replicas"):
            client.submit(operation="echo", items=[1])
        primary.config_set("min-replicas-to-write", 0)

    assert client.submit(operation="echo", items=[1]).id


def test_client_worker_and_flower_follow_a_failover(
    redis: Watched, platform: Cell, flower_site: Flower
) -> None:
    client, [worker] = platform.client, platform.workers
    client.create_circuit_breaker("service", failure_threshold=1).open()
    job = platform.submit(1200, ms=5)
    wait_until(lambda: job.progress().done > 50)
    redis.settle()
    since = time.time()
    redis.primary.stop(kill=True)

    platform.check(job, since=since, what="kill -9 of a primary, fail-over by sentinels")
    platform.check(platform.submit())
    assert client.breakers.status()["service"]["state"] == "open", (
        "the new primary has the shared state of guards"
    )
    wait_until(lambda: job.id in flower_site.get("/rlm/jobs?json=1")[1])
    assert worker.poll() is None, "the worker keeps its process"


# --- messages ---------------------------------------------------------------------------------


def sentinels_of(environment: dict[str, str], **more: str) -> Finding:
    """Return the doctor's finding about sentinels; assert that no finding shows a password."""
    with client_of({**environment, **more}) as client:
        findings = examine(client, client.app)
    assert not any(
        password in str(findings) for password in (SENTINEL_PASSWORD, "of redis#1", "of%20redis")
    )
    return next(each for each in findings if each.check == "sentinels")


def test_the_doctor_reports_sentinels_and_the_primary_they_watch(platform: Cell) -> None:
    found = sentinels_of(platform.environment)
    assert (found.state, found.found) == (
        "ok",
        f"3 of 3 answer, watch '{MASTER}' and could agree on another",
    )

    found = sentinels_of(platform.environment, RLM_SENTINEL_MASTER="mymaster")
    assert found.state == "fault"
    assert found.found.endswith(
        f"0 of 3 answer, watch 'mymaster' and could agree on another: they watch {MASTER}"
    )
    assert sentinels_of(platform.environment, RLM_SENTINEL_PASSWORD="wrong").state == "fault"


def test_a_client_names_an_unknown_primary(platform: Cell) -> None:
    with (
        client_of({**platform.environment, "RLM_SENTINEL_MASTER": "mymaster"}) as client,
        pytest.raises(StoreUnavailable, match="No master found for 'mymaster'"),
    ):
        client.check()
