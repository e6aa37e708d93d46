"""Faults of single processes: kills, poisonous items, long items, lack of memory, shutdown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlm_tasks import Binary, JobFailed
from rlm_tasks.testing import embedded
from tests.faults.conftest import LEASE_S, Cell, cell
from tests.support import wait_until

OUTLASTS = {"RLM_LEDGER__LEASE_S": "90"}
"""A lease that outlasts its test: a busy machine cannot end it before the death is found."""


def test_a_killed_pool_process_is_redone_within_six_seconds_at_default_settings(
    server: embedded.Server, tmp_path: Path
) -> None:
    with cell(server, "defaults", tmp_path, tmp_path / "worker.log") as own:
        for name in ("LEASE_S", "SWEEP_S"):
            del own.environment[f"RLM_LEDGER__{name}"]
        own.worker(fault=("before finish", "kill_process"), nth=3, options=["-c", "1"])
        job = own.submit()

        assert (
            own.check(
                job, since=own.wait_for_fault(), what="SIGKILL of the only pool process, defaults"
            )
            < 6.0
        )


def test_poison_is_named_and_quarantined_after_three_deaths(on_shared: Cell) -> None:
    on_shared.environment |= OUTLASTS
    on_shared.worker()
    job = on_shared.client.submit(
        operation="poison",
        items=range(300),
        params={"poison": [17, 200]},
        continue_on_error=True,
        type="parallel",
    )

    result = job.result(timeout=60)

    assert [failure.index for failure in result.failed] == [17, 200]
    assert {failure.type for failure in result.failed} == {"Quarantined"}
    assert result.output == [i for i in range(300) if i not in (17, 200)]
    [first, second] = job.quarantined()
    assert (first.index, first.item, first.attempts, first.last_signal) == (
        17,
        "17 of a range",
        3,
        "SIGKILL",
    )
    assert (second.index, second.attempts) == (200, 3)
    on_shared.check_keys(job)


@pytest.mark.parametrize("operation", ["poison_batch", "poison_async"])
def test_poison_among_several_items_in_flight_is_found_within_three_deaths(
    on_shared: Cell, operation: str
) -> None:
    on_shared.worker()
    job = on_shared.client.submit(
        operation=operation,
        items=range(400),
        params={"poison": [170]},
        continue_on_error=True,
        type="parallel",
    )

    result = job.result(timeout=60)

    assert result.output == [i for i in range(400) if i != 170]
    assert [(item.index, item.attempts) for item in job.quarantined()] == [(170, 3)]


def test_a_batch_item_that_ignores_signals_is_quarantined_alone(
    on_shared: Cell,
) -> None:
    on_shared.environment["RLM_NODE__ITEM_LIMIT_S"] = "1"
    on_shared.worker()
    job = on_shared.client.submit(
        operation="poison_batch", items=range(400), params={"deaf": [170]}, continue_on_error=True
    )

    result = job.result(timeout=60)

    assert result.output == [i for i in range(400) if i != 170]
    assert [(item.index, item.last_signal) for item in job.quarantined()] == [
        (170, "its item limit of 1 s")
    ]


def test_a_slow_item_of_a_batch_is_found_and_fails_alone(on_shared: Cell) -> None:
    on_shared.environment["RLM_NODE__ITEM_LIMIT_S"] = "1"
    on_shared.worker()
    job = on_shared.client.submit(
        operation="poison_batch", items=range(400), params={"slow": [170]}, continue_on_error=True
    )

    result = job.result(timeout=60)

    assert result.output == [i for i in range(400) if i != 170]
    assert [(each.index, each.code) for each in result.failed] == [(170, "TIMEOUT")]
    assert job.quarantined() == []


def test_poison_without_tolerance_fails_the_job_and_names_the_item(on_shared: Cell) -> None:
    on_shared.worker()
    job = on_shared.client.submit(operation="poison", items=range(40), params={"poison": [11]})

    with pytest.raises(JobFailed) as raised:
        job.result(timeout=60)

    assert [(each.index, each.type) for each in raised.value.failures] == [(11, "Quarantined")]


def test_poison_in_a_sequential_job_keeps_the_order(on_shared: Cell) -> None:
    on_shared.worker()
    job = on_shared.client.submit(
        operation="poison",
        items=range(30),
        params={"poison": [7]},
        type="sequential",
        continue_on_error=True,
    )

    result = job.result(timeout=60)

    assert result.output == [i for i in range(30) if i != 7]
    assert result.metrics.splits == 0, "one node at a time"


def test_poison_that_kills_whole_workers_is_found_by_halving(on_shared: Cell) -> None:
    # The halves wait for a lease after each of seven deaths.
    environment = on_shared.environment | {
        "RLM_LEDGER__LEASE_S": "1",
        "RLM_LEDGER__SWEEP_S": "0.2",
    }
    job = on_shared.client.submit(
        operation="poison",
        items=range(16),
        params={"poison": [5], "worker": True},
        continue_on_error=True,
        strategy=Binary(min_chunk_size=16),
    )
    deaths = 0
    while not job.ready():
        with embedded.worker(environment, log=on_shared.log) as process:
            wait_until(lambda process=process: process.poll() is not None or job.ready(), 30)
            deaths += process.poll() is not None

    assert job.result(timeout=5).output == [i for i in range(16) if i != 5]
    assert [item.index for item in job.quarantined()] == [5]
    assert deaths <= 4 + 3, "four halvings of sixteen items, then three deaths of the one"
    assert job.quarantined()[0].last_signal == "the loss of its worker"


def test_a_merge_that_kills_its_process_fails_its_job(on_shared: Cell) -> None:
    on_shared.worker()
    job = on_shared.client.submit(
        operation="deadly_merge", items=range(10), strategy=Binary(min_chunk_size=5)
    )

    with pytest.raises(
        JobFailed,
        match="the merge: its process died 3 times while it ran, the last time of SIGKILL",
    ):
        job.result(timeout=60)
    on_shared.check_keys(job)


def test_the_command_line_lists_shows_replays_and_drops(on_shared: Cell, tmp_path: Path) -> None:
    on_shared.environment |= OUTLASTS
    on_shared.worker()
    cured = tmp_path / "cured"
    job = on_shared.client.submit(
        operation="poison",
        items=range(20),
        params={"poison": [3, 4, 9], "cured": str(cured)},
        continue_on_error=True,
    )
    job.result(timeout=60)

    def rlm(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "rlm_tasks",
            "rlm",
            "quarantine",
            *arguments,
        ]
        return subprocess.run(
            command,
            env={**os.environ, **on_shared.environment},
            capture_output=True,
            text=True,
            check=False,
        )

    listed = json.loads(rlm("list", "--json").stdout)
    assert [(each["job_id"], each["index"], each["last_signal"]) for each in listed] == [
        (job.id, i, "SIGKILL") for i in (3, 4, 9)
    ]
    assert "3 of a range" in rlm("list").stdout
    assert "attempts     3" in rlm("show", job.id, "9").stdout
    missing = rlm("show", job.id, "5")
    assert (missing.returncode, "is not in quarantine" in missing.stderr) == (2, True)
    assert rlm("drop", job.id, "9").stdout == "1 item dropped\n"
    cured.touch()
    again = rlm("replay", job.id).stdout.strip()
    assert on_shared.client.job(again).result(timeout=30).output == [3, 4]
    assert rlm("list").stdout == "Nothing is in quarantine.\n"
    assert rlm("drop", job.id).returncode == 2


def test_a_replay_before_the_jobs_end_is_refused_with_a_reason(on_shared: Cell) -> None:
    job = on_shared.submit()

    with pytest.raises(ValueError, match="has no items in quarantine"):
        job.replay_quarantined()


def test_an_item_of_three_leases_that_never_yields_runs_once(on_shared: Cell) -> None:
    on_shared.worker()
    on_shared.worker()
    seconds = int(3 * LEASE_S)
    journal = str(on_shared.folder / "long")
    job = on_shared.client.submit(
        operation="holds_the_interpreter",
        items=[0, 1],
        params={"seconds": seconds, "journal": journal},
    )

    result = job.result(timeout=6 * seconds)

    assert result.output == [0, 1]
    assert sorted(Path(f"{journal}.{job.id}").read_text().split()) == ["0", "1"]
    assert {node.attempts for node in job.tree()} == {1}


def test_an_item_that_needs_too_much_memory_fails_alone(on_shared: Cell) -> None:
    on_shared.worker()

    result = on_shared.client.execute(
        operation="eats_memory",
        items=range(20),
        params={"at": 8},
        continue_on_error=True,
        timeout=30,
    )

    assert [(each.index, each.type) for each in result.failed] == [(8, "MemoryError")]
    assert result.done == 19


def test_remote_shutdown_drains_as_a_signal_does(on_shared: Cell) -> None:
    worker = on_shared.worker()
    job = on_shared.submit(3000, ms=2)
    wait_until(lambda: job.progress().done > 100)

    began = time.monotonic()
    on_shared.client.app.control.shutdown()
    assert worker.wait(5) == 0
    took = time.monotonic() - began

    assert took < 2.0
    assert not job.ready()
    on_shared.worker()
    on_shared.check(job, within_s=60)
    ran = on_shared.journal(job)
    assert len(ran) == len(set(ran)), "no item runs again"


@pytest.mark.parametrize("items", [600, 60_000])
@pytest.mark.parametrize("group", [False, True], ids=["main process", "process group"])
def test_a_worker_ends_within_two_seconds_of_sigterm(
    on_shared: Cell, items: int, group: bool
) -> None:
    worker = on_shared.worker(options=["-c", "4"])
    job = on_shared.submit(items, ms=5)
    wait_until(lambda: job.progress().done > 60)

    began = time.monotonic()
    os.killpg(worker.pid, signal.SIGTERM) if group else worker.send_signal(signal.SIGTERM)
    assert worker.wait(5) == 0

    assert time.monotonic() - began < 2.0
    progress = job.progress()
    ran = on_shared.journal(job)
    assert len(ran) == len(set(ran)) == progress.done, (
        "every item that ran is counted: none will run again"
    )
    job.cancel()


def test_a_cold_shutdown_does_not_wait_for_items(on_shared: Cell) -> None:
    worker = on_shared.worker()
    job = on_shared.client.submit(operation="nap", items=[4000.0] * 2)
    wait_until(lambda: any(node.state == "running" for node in job.tree()))

    began = time.monotonic()
    worker.send_signal(signal.SIGQUIT)
    worker.wait(5)

    assert time.monotonic() - began < 3.0
    on_shared.worker()
    assert job.get(timeout=30) == [4000.0] * 2


def test_a_worker_warns_once_of_a_server_without_persistence(on_shared: Cell) -> None:
    on_shared.worker()
    on_shared.check(on_shared.submit())

    assert on_shared.log.read_text().count("keeps nothing on disk: a restart loses every job") == 1


def test_a_revoked_and_terminated_node_ends_its_job_and_nothing_else(on_shared: Cell) -> None:
    worker = on_shared.worker()
    job = on_shared.client.submit(operation="nap", items=[30_000.0])
    wait_until(lambda: job.progress().pending == 1 and job.tree()[0].state == "running")

    on_shared.client.app.control.revoke(job.id, terminate=True)

    wait_until(job.ready)
    assert job.status == "cancelled"
    on_shared.check(on_shared.submit())
    assert worker.poll() is None
