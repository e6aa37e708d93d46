"""A job that no worker begins within its queue_timeout ends as expired, and says why."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest

from rlm_tasks import InvalidRequest, JobRequest, NWay, Options
from rlm_tasks.jobs.endings import sentence
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.records import ROOT
from rlm_tasks.words import instant
from tests.unit.harness import Platform

WAIT_MS = 10_000


@pytest.fixture
def platform() -> Platform:
    """A platform whose messages are not delivered."""
    return Platform()


def opened(platform: Platform, **more: object) -> JobSpec:
    """Open a job that must be begun within ten seconds."""
    spec = platform.submit(JobRequest(operation="sum", items=range(9), strategy=NWay()))
    spec = msgspec.structs.replace(spec, job="timed", queue_timeout_ms=WAIT_MS, **more)
    assert platform.ledger.open([(spec, "none")], 60) == [True]
    return spec


def pass_time(platform: Platform) -> None:
    """Let the time pass in which a worker should have begun the job."""
    key = platform.keys.of("timed").job
    for field in ("start_by", "opened_ms"):
        platform.store.client.hincrby(key, field, -WAIT_MS)


@pytest.mark.parametrize("who", ["a sweep", "a late worker", "a waiting client"])
def test_a_job_that_nobody_has_begun_in_time_expires_with_a_reason(
    platform: Platform, who: str
) -> None:
    opened(platform)
    assert platform.ledger.sweep("timed").state == "pending", "it has time"
    assert platform.ledger.stop("timed", "expired") == "pending"
    pass_time(platform)

    if who == "a sweep":
        assert platform.ledger.sweep("timed").state == "expired"
    elif who == "a late worker":
        assert platform.ledger.claim("timed", ROOT, "late", "w").answer == "closed"
    else:
        assert platform.ledger.stop("timed", "expired") == "expired"

    facts = platform.ledger.facts("timed")
    assert (facts["state"], facts["skipped"]) == ("expired", "9")
    stop_ms = int(facts["stop_ms"])
    when = instant(stop_ms / 1000, stop_ms / 1000)
    assert sentence(facts, stop_ms) == (
        f"It expired {when} because no worker began it within its queue_timeout of 10 s: "
        "0 of 9 items done, 0 failed, 9 skipped."
    )


def test_a_job_that_was_begun_in_time_does_not_expire(platform: Platform) -> None:
    opened(platform)
    claim = platform.ledger.claim("timed", ROOT, "mine", "w")
    pass_time(platform)

    assert platform.ledger.sweep("timed").state == "running"
    assert platform.ledger.stop("timed", "expired") == "running"
    platform.ledger.park(claim, 1000, "it waits")
    assert platform.ledger.sweep("timed").state == "running"


def test_the_sweep_comes_at_the_time(platform: Platform) -> None:
    opened(platform)
    platform.store.client.hset(platform.keys.of("timed").job, "probed_ms", 10**15)
    swept = platform.ledger.sweep("timed")
    assert swept.again_ms == int(platform.ledger.facts("timed")["start_by"])


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(5, 5.0), (0.5, 0.5), (timedelta(minutes=2), 120.0), ("priority", "priority"), (None, None)],
)
def test_it_is_given_in_seconds_or_by_priority(value: object, seconds: object) -> None:
    assert Options(queue_timeout=value).queue_timeout == seconds  # type: ignore[arg-type]  # is converted
    request = JobRequest.parse({"operation": "sum", "items": [1], "queue_timeout": value})
    assert request.options.queue_timeout == seconds


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "high", [5], 10**9])
def test_another_value_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidRequest, match="queue_timeout"):
        Options(queue_timeout=value)  # type: ignore[arg-type]  # refused
