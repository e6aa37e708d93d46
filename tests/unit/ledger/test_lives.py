"""How long keys live: those of an open job, those of an ended one, and those that jobs share."""

from __future__ import annotations

import msgspec
import pytest
from pydantic import ValidationError

from rlm_tasks import JobRequest, NWay
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.job_list import OPENING_MS
from rlm_tasks.ledger.records import MERGE, ROOT, Child, Report
from rlm_tasks.settings.model import Settings
from tests.unit.harness import Platform

SHORT_S, MONTH_S = 60, 30 * 86_400


@pytest.fixture
def platform() -> Platform:
    """A platform whose messages are not delivered."""
    return Platform()


def opened(platform: Platform, job: str, ttl_s: int = SHORT_S) -> JobSpec:
    """Open a job of a hundred items with the time that its client keeps results."""
    spec = msgspec.structs.replace(platform.submit(request()), job=job, continue_on_error=True)
    assert platform.ledger.open([(spec, "none")], ttl_s) == [True]
    return spec


def request() -> JobRequest:
    """Return a request of a hundred items."""
    return JobRequest(operation="sum", items=range(100), strategy=NWay())


def lives(platform: Platform, job: str) -> list[int]:
    """Return the seconds that each key of a job will live."""
    store = platform.store.client
    return [store.ttl(key) for key in platform.keys.of(job) if store.exists(key)]


def outlive(platform: Platform, job: str) -> None:
    """Leave all keys of a job a second, as if nothing had renewed them for a month."""
    for key in platform.keys.of(job):
        platform.store.client.expire(key, 1)


def report(lo: int, hi: int, *kids: Child) -> Report:
    """Return the report of a node that ran a range with every kind of outcome."""
    return Report(
        mid=hi,
        done=hi - lo - 2,
        failed=[lo],
        failures=[(lo, "{}")],
        skipped=[lo + 1],
        quarantined=[(lo, "{}")],
        kids=list(kids),
    )


@pytest.mark.parametrize("state", ["queued", "running", "parked", "lost", "merging"])
def test_an_open_job_outlives_the_time_of_results_in_every_state(
    platform: Platform, state: str
) -> None:
    spec = opened(platform, "mine")
    if state != "queued":
        claim = platform.ledger.claim(spec.job, ROOT, "mine", "w")
        platform.store.call(platform.ledger.pulse(claim, 1, 0, 0))
    if state == "parked":
        platform.ledger.park(claim, 10 * SHORT_S * 1000, "it waits")
    if state == "lost":
        platform.ledger.release(spec.job, ROOT, "mine", 0, "SIGKILL")
    if state == "merging":
        assert platform.ledger.finish(claim, report(0, 100), b"x").outcome == MERGE

    assert min(lives(platform, spec.job)) > MONTH_S - 60
    outlive(platform, spec.job)
    platform.ledger.sweep(spec.job)
    assert min(lives(platform, spec.job)) > MONTH_S - 60, "the sweep renews all keys"


def test_the_life_of_a_result_begins_at_the_end_of_the_job(platform: Platform) -> None:
    spec = opened(platform, "mine")
    claim = platform.ledger.claim(spec.job, ROOT, "mine", "w")
    platform.ledger.finish(claim, report(0, 50, Child("kid", 50, 100, 0, "", 0, "t", "")), b"x")
    claim = platform.ledger.claim(spec.job, "kid", "mine", "w")
    platform.ledger.finish(claim, report(50, 100), b"x")
    assert platform.ledger.close(spec.job, "mine", "succeeded", b"answer").state == "succeeded"

    assert {0 < each <= SHORT_S for each in lives(platform, spec.job)} == {True}


def test_a_cancelled_job_lives_as_long_as_a_result(platform: Platform) -> None:
    spec = opened(platform, "mine")
    platform.ledger.stop(spec.job, "cancelled")

    assert {0 < each <= SHORT_S for each in lives(platform, spec.job)} == {True}


def test_a_client_with_a_short_time_deletes_no_index_of_others(platform: Platform) -> None:
    store, keys = platform.store.client, platform.keys
    opened(platform, "long", 7 * 86_400)
    opened(platform, "short", SHORT_S)
    assert (store.ttl(keys.due), store.ttl(keys.jobs)) == (-1, -1)

    for key in (keys.due, keys.jobs):
        store.expire(key, 5)  # as an older release does
    platform.ledger.due.take(10, 1000)
    opened(platform, "third")
    assert (store.ttl(keys.due), store.ttl(keys.jobs)) == (-1, -1)
    assert {"long", "short", "third"} <= {job for job, _ in platform.ledger.job_list.newest(10)}


def test_expired_jobs_leave_the_list_and_all_others_stay(platform: Platform) -> None:
    store, keys, ledger = platform.store.client, platform.keys, platform.ledger
    for name in ("first", "second", "third"):
        opened(platform, name)
    store.zadd(keys.jobs, {"not open yet": ledger.store.now_ms()})
    store.zadd(keys.jobs, {"second": ledger.store.now_ms() - 2 * OPENING_MS})
    store.delete(*keys.of("second"))

    assert "second" not in {job for job, _ in ledger.job_list.newest(10)}
    assert ledger.job_list.newest(2) == ledger.job_list.newest(10)[:2], (
        "the number asked for, without expired ones"
    )
    assert ledger.job_list.trim() == 1
    listed = {each.decode() for each in store.zrange(keys.jobs, 0, -1)}
    assert {"first", "third", "not open yet"} <= listed
    assert "second" not in listed


def test_a_life_below_a_minute_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="result_ttl_s"):
        Settings(result_ttl_s=59)
