"""A limit on the number of open jobs, with a real worker and several clients.

The unit tests have the races of clients at one moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rlm_tasks import Client
from rlm_tasks.errors import QueueFull
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

MOST = 2


@pytest.fixture(scope="module")
def environment(server: embedded.Server) -> dict[str, str]:
    return environment_of(
        server.url,
        "places",
        WORKFLOW_MAX_CONCURRENT_WORKFLOWS=str(MOST),
        RLM_PRESSURE__MONITOR_S="0.1",
        RLM_OPERATIONS="tests.integration.windows_ops",
    )


@pytest.fixture(scope="module")
def clients(environment: dict[str, str], logs: Path) -> Iterator[list[Client]]:
    with ExitStack() as stack:
        stack.enter_context(embedded.worker(environment, log=logs / "places.log", slots=4))
        yield [stack.enter_context(client_of(environment)) for _ in range(4)]


def all_free(client: Client) -> None:
    """Wait until a worker has removed ended jobs from the index, shortly after their result."""
    wait_until(lambda: client.session.waiting_room.places() == MOST)


def test_a_job_over_the_limit_is_refused_until_another_ends(
    clients: list[Client],
) -> None:
    client = clients[0]
    running = [client.submit(operation="stamped", items=[0.6]) for _ in range(MOST)]

    with pytest.raises(QueueFull) as raised:
        clients[1].submit(operation="stamped", items=[0.0])
    assert raised.value.code == "QUEUE_FULL"
    assert (
        clients[1].execute(operation="stamped", items=[0.0], priority="critical", timeout=30).done
        == 1
    )
    with pytest.raises(QueueFull):
        clients[1].batch_submit([{"operation": "stamped", "items": [0.0]}] * MOST)
    for job in running:
        job.get(timeout=30)
    all_free(client)
    assert clients[1].execute(operation="stamped", items=[0.0], timeout=30).done == 1


def test_a_refused_batch_or_unstorable_items_free_their_places(
    clients: list[Client],
) -> None:
    client = clients[0]
    all_free(client)
    with pytest.raises(QueueFull):
        client.batch_submit([{"operation": "stamped", "items": [0.0]}] * (MOST + 1))
    for _ in range(MOST + 1):
        with pytest.raises(ZeroDivisionError):
            client.submit(operation="stamped", items=(1 / 0 for _ in range(1)))

    assert [
        each.done
        for each in client.batch_execute(
            [{"operation": "stamped", "items": [0.0]}] * MOST, timeout=30
        )
    ] == [1] * MOST


def test_the_limit_holds_at_every_moment_and_all_jobs_are_done(clients: list[Client]) -> None:
    jobs = [
        client.submit(operation="stamped", items=[0.05], overload="delay")
        for _ in range(3)
        for client in clients
    ]

    def all_done() -> bool:
        clients[0].app.control.broadcast("rlm_monitor")  # as beat does
        return all(job.ready() for job in jobs)

    wait_until(all_done, within_s=60)
    spans = [job.get(timeout=30)[0] for job in jobs]
    assert max(sum(began <= at < ended for began, ended in spans) for at, _ in spans) <= MOST
