"""Redis behind sentinels: its primary is replaced on purpose, and killed, in the middle of a job; everybody follows by himself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlm_tasks import StoreUnavailable
from rlm_tasks.doctor import Finding, examine
from tests.faults.conftest import Cell, cell
from tests.faults.sentinels import MASTER, SENTINEL_PASSWORD, Watched, watched
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
    """A client and a worker that live through all of it."""
    folder = tmp_path_factory.mktemp("platform")
    with cell(redis, "watched", folder, folder / "worker.log", **ADDRESS) as own:
        own.worker()
        yield own


@pytest.fixture(scope="module")
def shown(platform: Cell) -> Iterator[Flower]:
    with flower(platform.environment, platform.folder / "flower.log") as own:
        yield own


@pytest.mark.parametrize("how", ["replaced on purpose", "killed"])
def test_a_primary_is_followed_by_workers_clients_guards_and_flower(
    redis: Watched, platform: Cell, shown: Flower, how: str
) -> None:
    client, [worker] = platform.client, platform.workers
    client.create_circuit_breaker(how, failure_threshold=1).open()
    job = platform.submit(400, ms=5)
    wait_until(lambda: job.progress().done > 50)
    since, old = time.time(), redis.primary
    redis.settle()
    if how == "killed":
        old.stop(kill=True)
    else:
        redis.fail_over()

    platform.check(job, since=since, what=f"fail-over by sentinels, the primary {how}")
    assert redis.primary is not old
    platform.check(platform.submit())
    assert client.breakers.status()[how]["state"] == "open", "what guards share has come along"
    wait_until(lambda: job.id in shown.get("/rlm/jobs?json=1")[1])
    assert worker.poll() is None, "the worker keeps its process"


# --- what the doctor says ----------------------------------------------------------------------------


def sentinels_of(environment: dict[str, str], **more: str) -> Finding:
    """Return what the doctor finds of the sentinels, and see that it says no password."""
    with client_of({**environment, **more}) as client:
        findings = examine(client, client.app)
    assert not any(password in str(findings) for password in (SENTINEL_PASSWORD, "of redis#1", "of%20redis"))
    return next(each for each in findings if each.check == "sentinels")


def test_the_doctor_knows_whether_sentinels_answer_and_whom_they_watch(platform: Cell) -> None:
    found = sentinels_of(platform.environment)
    assert (found.state, found.found) == ("ok", f"3 of 3 answer, watch '{MASTER}' and could agree on another")

    found = sentinels_of(platform.environment, RLM_SENTINEL_MASTER="mymaster")
    assert found.state == "fault"
    assert found.found.endswith(f"0 of 3 answer, watch 'mymaster' and could agree on another: they watch {MASTER}")
    assert sentinels_of(platform.environment, RLM_SENTINEL_PASSWORD="wrong").state == "fault"


def test_a_client_says_which_name_is_not_known(platform: Cell) -> None:
    with (
        client_of({**platform.environment, "RLM_SENTINEL_MASTER": "mymaster"}) as client,
        pytest.raises(StoreUnavailable, match="No master found for 'mymaster'"),
    ):
        client.check()
