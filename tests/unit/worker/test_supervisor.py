"""The supervisor of a worker, and pool processes that have died."""

from __future__ import annotations

import json
import os

import pytest

from rlm_tasks.ledger.records import ROOT
from rlm_tasks.requests import JobRequest
from rlm_tasks.worker.lost_nodes import REAPED
from rlm_tasks.worker.supervisor import Supervisor
from tests.unit.harness import Platform

TOKEN = "00112233aabbccdd"
NO_CHILD = os.getppid()
"""A process that is no child of ours, as one that is already reaped."""


@pytest.mark.parametrize(("code", "died_of"), [(-9, "SIGKILL"), (70, "exit code 70")])
def test_a_process_that_billiard_has_reaped_is_known_by_its_exit_code(
    code: int, died_of: str
) -> None:
    platform = Platform()
    spec = platform.submit(JobRequest(operation="sum", items=range(10)))
    platform.ledger.claim(spec.job, ROOT, TOKEN, "unit")
    slot = platform.runtime.page.entry(0)
    slot.hold(NO_CHILD, spec.job, ROOT, TOKEN, 0.0)
    slot.start_item(3)

    Supervisor(platform.runtime, {}, lambda: 1, list, lambda _pid: code)._reap(0.0)

    assert (
        json.loads(platform.store.client.hget(platform.keys.of(spec.job).deaths, "3"))["by"]
        == died_of
    )
    assert list(platform.runtime.page.held()) == []


def test_a_dead_process_is_left_to_celery_for_a_while() -> None:
    platform = Platform()
    spec = platform.submit(JobRequest(operation="sum", items=range(10)))
    platform.ledger.claim(spec.job, ROOT, TOKEN, "unit")
    platform.runtime.page.entry(0).hold(NO_CHILD, spec.job, ROOT, TOKEN, 0.0)
    guard = Supervisor(platform.runtime, {}, lambda: 1, list)

    guard._reap(100.0)
    assert [held.pid for held in platform.runtime.page.held()] == [NO_CHILD]
    guard._reap(103.0)

    [record] = platform.ledger.records(spec.job, [ROOT])
    assert (record.state, record.lost_by) == ("q", REAPED)
