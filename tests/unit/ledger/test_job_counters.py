"""The progress of a job tells whether a node of it runs, and since when none does."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from rlm_tasks.client.job_reader import progress_of
from rlm_tasks.jobs.endings import shown_progress, shown_rate
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.job_counters import JobReading, read_counters
from rlm_tasks.requests import JobRequest
from rlm_tasks.results import Progress
from tests.unit.harness import Platform


@pytest.fixture
def platform() -> Platform:
    """A platform whose messages are not delivered."""
    return Platform()


@pytest.fixture
def spec(platform: Platform) -> JobSpec:
    """An open job that no worker has begun."""
    return platform.submit(JobRequest(operation="sum", items=list(range(10))))


def progress(platform: Platform, spec: JobSpec) -> Progress:
    [reading] = read_counters(platform.ledger, [spec.job])
    assert isinstance(reading, JobReading)
    return progress_of(reading)


def test_a_job_runs_while_a_live_worker_holds_a_node(platform: Platform, spec: JobSpec) -> None:
    fresh = progress(platform, spec)
    assert (fresh.running, fresh.eta_s) == (0, None)
    platform.store.call(platform.slots.publish("w", 2, 1, [spec.queue]))
    claim = platform.ledger.claim(spec.job, "root", "token", "w")
    platform.ledger.store.call(platform.ledger.pulse(claim, 4, 0, 0))

    at_work = progress(platform, spec)
    assert (at_work.running, at_work.done, at_work.idle_s) == (1, 4, 0.0)
    assert at_work.eta_s is not None

    platform.slots.withdraw("w")  # killed, or stopped; its lease goes on
    lost = progress(platform, spec)
    assert (lost.running, lost.done, lost.eta_s) == (0, 4, None)


def test_a_parked_node_does_not_run(platform: Platform, spec: JobSpec) -> None:
    platform.store.call(platform.slots.publish("w", 2, 1, [spec.queue]))
    claim = platform.ledger.claim(spec.job, "root", "token", "w")
    platform.ledger.park(claim, 60_000, "bucket b: requests")

    assert progress(platform, spec).running == 0


def test_the_idle_time_begins_with_the_last_node(platform: Platform, spec: JobSpec) -> None:
    key = platform.keys.of(spec.job).job
    platform.store.client.hincrby(key, "opened_ms", -90_000)
    assert progress(platform, spec).idle_s == pytest.approx(90, abs=2)

    platform.ledger.claim(spec.job, "root", "token", "w")
    platform.store.client.hincrby(key, "claimed_ms", -30_000)
    at = progress(platform, spec)
    assert at.idle_s == pytest.approx(30, abs=2)
    assert re.fullmatch(r"running, idle (29|30|31) s", shown_progress(at)[0])
    assert shown_progress(replace(at, idle_s=0.0)) == ("running", "active")
    at = replace(at, rate=2.5)
    assert (shown_rate(at), shown_rate(replace(at, idle_s=0.0))) == (0.0, 2.5)


def test_an_ended_job_is_not_idle(platform: Platform, spec: JobSpec) -> None:
    platform.ledger.stop(spec.job, "cancelled")

    ended = progress(platform, spec)
    assert (ended.running, ended.idle_s, ended.eta_s) == (0, 0.0, 0.0)
