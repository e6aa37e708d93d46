"""Bad code of a user on a real worker: what hangs is ended, and its slot comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlm_tasks import Client, JobFailed, Lines, NWay
from rlm_tasks.client.job import Job
from rlm_tasks.results import Status
from rlm_tasks.testing import embedded
from tests.integration.bad_ops import HANGS, OPERATIONS, RAISED
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

GRACE_S, STEP_LIMIT_S, TIMEOUT_S = 0.5, 3.0, 1.5
STEPS = {
    "merge": "the merge",
    "fold": "the merge",
    "finalize": "finalize",
    "then": "then",
    "items": "then",  # the items of its next round
    "reading": "the reading of items",
}
SLOTS = len(OPERATIONS) + 2  # the parts of the chord need some


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which processes that hang leave their numbers."""
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def bad(server: embedded.Server, folder: Path) -> Iterator[Client]:
    """The client of a worker with a slot for each place that hangs, and with short graces."""
    environment = environment_of(
        server.url,
        "bad",
        BAD_OPS_FOLDER=str(folder),
        RLM_OPERATIONS="tests.integration.bad_ops",
        RLM_LEDGER__STOP_GRACE_S=str(GRACE_S),
        RLM_NODE__STEP_LIMIT_S=str(STEP_LIMIT_S),
    )
    with (
        embedded.worker(environment, log=folder / "worker.log", slots=SLOTS),
        client_of(environment) as client,
    ):
        yield client


def _submit(client: Client, folder: Path, place: str, **options: Any) -> Job:
    """Submit the job that hangs in one place."""
    items: Any = [1, f"{HANGS} {place}"]
    if place == "reading":
        path = folder / "on-a-dead-disk.txt"
        path.write_text("1\n2\n")
        items = Lines(path)
    if place == "chord":
        options["strategy"] = NWay(split_factor=3, min_chunk_size=5)
        items = range(90)
        options["timeout"] = 10
    if place == "validate":
        options["validate_before_process"] = True
    if place == "fallback":
        options["continue_on_error"] = True
    return client.submit(operation=f"hang_{place}", items=items, **options)


def _hanging(folder: Path, place: str) -> list[int]:
    return [int(path.suffix[1:]) for path in folder.glob(f"{place}.*")]


def _slots_are_back(folder: Path) -> bool:
    return not any(
        psutil.pid_exists(pid) for place in OPERATIONS for pid in _hanging(folder, place)
    )


def _clear(folder: Path) -> None:
    for place in OPERATIONS:
        for path in folder.glob(f"{place}.*"):
            path.unlink()


def test_a_deadline_ends_a_job_that_hangs_and_its_slot_comes_back(
    bad: Client, folder: Path
) -> None:
    _clear(folder)
    began = time.monotonic()
    # The limit of a step is longer than the deadline, so the deadline ends these jobs.
    jobs = {place: _submit(bad, folder, place, timeout=TIMEOUT_S) for place in OPERATIONS}
    wait_until(lambda: {place for place in OPERATIONS if not _hanging(folder, place)} == set())
    ended = {place: job.wait(timeout=20) for place, job in jobs.items()}
    took_s = time.monotonic() - began

    # The root merge does the work of a chord's body, so its job succeeds.
    assert ended == {**dict.fromkeys(OPERATIONS, Status.EXPIRED), "chord": Status.SUCCEEDED}
    assert took_s < TIMEOUT_S + GRACE_S + 5
    wait_until(lambda: _slots_are_back(folder), within_s=10)
    assert bad.submit(operation="raise_item", items=range(5)).get(timeout=20) == [0, 1, 2, 3, 4]


def test_a_step_that_exceeds_its_limit_fails_the_job_and_is_named(
    bad: Client, folder: Path
) -> None:
    _clear(folder)
    jobs = {place: _submit(bad, folder, place) for place in STEPS}
    for place, words in STEPS.items():
        with pytest.raises(JobFailed) as caught:
            jobs[place].result(timeout=20)
        error = caught.value.result.error
        assert error is not None
        assert (error.type, error.code) == ("CallTimeout", "TIMEOUT"), place
        assert error.message.startswith(f"{words} ran longer than its limit of 3 s")
    wait_until(lambda: _slots_are_back(folder), within_s=10)


def test_a_cancelled_job_gives_its_slot_back(bad: Client, folder: Path) -> None:
    _clear(folder)
    job = _submit(bad, folder, "item")
    wait_until(lambda: bool(_hanging(folder, "item")))
    job.cancel()
    assert job.wait(timeout=10) is Status.CANCELLED
    wait_until(lambda: _slots_are_back(folder), within_s=10)


@pytest.fixture
def small_values(bad: Client) -> Iterator[None]:
    """A server that takes values of 2 MB at most."""
    redis = bad.ledger.store.client
    redis.config_set("proto-max-bulk-len", 2 << 20)
    yield
    redis.config_set("proto-max-bulk-len", 512 << 20)


@pytest.mark.usefixtures("small_values")
def test_an_output_that_redis_does_not_take_fails_its_item_alone(bad: Client) -> None:
    sizes = [900_000, 3_000_000, 900_000, 900_000, 2_500_000, 900_000]
    result = bad.execute(operation="big_output", items=sizes, continue_on_error=True, timeout=30)
    assert [len(output) for output in result.output] == [900_000] * 4
    assert [(each.index, each.code) for each in result.failed] == [
        (1, "OUTPUT_TOO_LARGE"),
        (4, "OUTPUT_TOO_LARGE"),
    ]
    assert "the output of item 1 has 30000" in result.failed[0].message
    assert "more than the limit of 2097152" in result.failed[0].message
    assert result.metrics.nodes < 12, "no node has run again"


@pytest.mark.usefixtures("small_values")
@pytest.mark.parametrize("name", ["big_merge", "big_answer"])
def test_a_merge_that_redis_does_not_take_fails_the_job_once(bad: Client, name: str) -> None:
    job = bad.submit(operation=name, items=[900_000] * 3)
    with pytest.raises(JobFailed, match="more than the limit of 2097152; store it as a file"):
        job.result(timeout=20)
    assert all(event.event not in ("released", "lease lost") for event in job.events())


@pytest.mark.parametrize("kind", ["item", "guarded", "batch", "async", "task"])
def test_any_exception_fails_its_item_at_once_and_kills_no_process(bad: Client, kind: str) -> None:
    items: list[Any] = [*range(40)]
    for place, name in enumerate(RAISED):
        items[3 + 5 * place] = name
    items[30:33] = [-6, -17, -30]  # hostile exceptions
    job = bad.submit(operation=f"raise_{kind}", items=items, continue_on_error=True)
    result = job.result(timeout=20)
    assert (result.done, result.failed_count) == (32, 8)
    assert {each.index: each.type for each in result.failed} == {
        **{3 + 5 * place: name for place, name in enumerate(RAISED)},
        30: "Hostile6",
        31: "Hostile17",
        32: "Hostile30",
    }
    assert bad.quarantine() == []
    assert all(event.event != "released" for event in job.events()), "no process was lost"
