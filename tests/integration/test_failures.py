"""Items that fail, jobs that end early, and merges that raise.

Every such job reaches a final state with exact counts."""

from __future__ import annotations

import copy
import json
import re
import traceback
from pathlib import Path
from typing import Any

import pytest

from resilience import InvalidValue
from rlm_tasks import (
    Binary,
    Client,
    Files,
    InvalidRequest,
    ItemError,
    JobCancelled,
    JobExpired,
    JobFailed,
    Lines,
    NWay,
    Status,
)
from rlm_tasks.diagnosis.bundle import collect
from rlm_tasks.ledger.records import ROOT
from rlm_tasks.settings.environment import own_name
from tests.integration.test_cli import rlm
from tests.support import wait_until

DEEP: dict[str, Any] = {"strategy": Binary(min_chunk_size=4)}


def test_failures_are_returned_and_their_rate_is_exact(client: Client) -> None:
    result = client.execute(
        operation="fail_odd", items=range(101), continue_on_error=True, timeout=30, **DEEP
    )

    assert result.output == sum(range(0, 101, 2))
    assert [failure.index for failure in result.failed] == list(range(1, 101, 2))
    assert (result.failed[0].type, result.failed[0].message) == ("ValueError", "1 is odd")
    assert "fail_odd" in result.failed[0].traceback
    assert "node.py" not in result.failed[0].traceback
    assert result.failure_rate == 50 / 101
    assert list(result.successful) == list(range(0, 101, 2))


def test_a_failed_line_has_its_place_in_the_file(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "payments.csv").write_bytes(b"1\n2\ncaf\xe9\n4\n")
    monkeypatch.chdir(tmp_path)

    result = client.execute(
        operation="echo", items=Lines("payments.csv"), continue_on_error=True, timeout=30
    )

    [failure] = result.failed
    assert (failure.index, failure.where) == (2, "payments.csv, line 3")
    assert result.output.failed == [failure]
    assert json.loads(json.dumps(result.to_dict()["failed"]))[0]["where"] == failure.where
    stored = client.ledger.failures(result.job_id)
    assert [each.where for each in stored] == [""], "nothing more is stored"


def test_a_failed_file_has_its_path_and_other_items_have_no_place(
    client: Client, tmp_path: Path
) -> None:
    for name in ("good", "bad.pdf"):
        (tmp_path / name).touch()

    files, plain = (
        client.submit(operation=name, items=items, continue_on_error=True, timeout=30).result(
            propagate=False
        )
        for name, items in (("spin_each", Files(f"{tmp_path}/*")), ("fail_odd", [0, 1]))
    )

    assert [each.where for each in files.failed] == [f"{tmp_path}/bad.pdf", f"{tmp_path}/good"]
    again = client.job(files.job_id).retry_failed().result(timeout=30, propagate=False)
    assert [each.where for each in again.failed] == [each.where for each in files.failed]
    assert [each.where for each in plain.failed] == [""]


def test_the_error_names_item_place_and_exception(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = ["2026-01-01"] * 838 + ["day"] + ["2026-01-01"] * 161
    (tmp_path / "payments.csv").write_text("\n".join(days))
    monkeypatch.chdir(tmp_path)
    job = client.submit(operation="parse_day", items=Lines("payments.csv"))

    with pytest.raises(JobFailed) as caught:
        job.get(timeout=30)

    said = "ValueError: Invalid isoformat string: 'day'"
    text = f"job {job.id} failed at item 838 (payments.csv, line 839): {said}; "
    assert str(caught.value) == f"{text}1 of 1,000 items failed"
    cause = caught.value.__cause__
    assert isinstance(cause, ItemError)
    assert (cause.type, cause.message) == tuple(said.split(": ", 1))
    assert (cause.index, cause.where) == (838, "payments.csv, line 839")
    assert (cause.code, str(cause)) == ("OPERATION_FAILED", said)
    printed = "".join(traceback.format_exception(caught.value))
    first, second = printed.split("The above exception was the direct cause", 1)
    lines = first.splitlines()
    assert lines[0] == f"rlm_tasks.errors.ItemError: {said}"
    assert lines[1] == "Traceback in the worker (most recent call last):"
    assert lines[2].endswith("in parse_day")
    assert text in second


MERGE = "ZeroDivisionError: division by zero"
ENDS: list[tuple[str, Any, str, str, int]] = [
    ("bad_merge", range(40), f"failed: {MERGE}; 0 of 40 items failed", MERGE, -1),
    (
        "fail_odd_round",
        ["a"],
        "failed in round 1 at item 2: ValueError: 3 is odd; 1 of 3 items of the round failed",
        "ValueError: 3 is odd",
        2,
    ),
]


@pytest.mark.parametrize(("operation", "items", "ends", "cause", "index"), ENDS)
def test_the_error_of_a_merge_or_a_round_names_its_exception(
    client: Client, operation: str, items: Any, ends: str, cause: str, index: int
) -> None:
    job = client.submit(operation=operation, items=items, timeout=30)

    with pytest.raises(JobFailed) as caught:
        job.get(timeout=30)

    assert str(caught.value) == f"job {job.id} {ends}"
    found = caught.value.__cause__
    assert isinstance(found, ItemError)
    assert (str(found), found.index) == (cause, index)
    assert "ops.py" in found.traceback.splitlines()[0]
    hidden = str(caught.value).replace(found.message, f"({len(found.message)} characters)")
    assert caught.value.outline == hidden
    kept = copy.copy(caught.value)  # as pickle makes it
    assert (str(kept), kept.outline) == (str(caught.value), hidden)
    assert copy.copy(found).traceback == found.traceback


def test_a_job_that_was_cancelled_or_expired_names_its_first_failure(client: Client) -> None:
    items = [{"i": i, "ms": 20, "fails": i == 3} for i in range(500)]
    cancelled, expired = (
        client.submit(operation="spin_each", items=items, continue_on_error=True, timeout=timeout)
        for timeout in (60, 1.5)
    )
    wait_until(lambda: cancelled.progress().failed == 1)
    cancelled.cancel()

    for job, kind in ((cancelled, JobCancelled), (expired, JobExpired)):
        with pytest.raises(kind, match=r"; its first failure, item 3: ValueError: ") as caught:
            job.get(timeout=20)
        assert isinstance(caught.value.__cause__, ItemError)


def test_rows_pair_each_output_with_the_index_of_its_item(client: Client) -> None:
    items = [{"i": i, "ms": 0, "fails": i % 7 == 3} for i in range(50)] + [None]
    good = [i for i in range(50) if i % 7 != 3]

    job = client.submit(
        operation="spin_each",
        items=items,
        continue_on_error=True,
        skip_if_empty=True,
        timeout=30,
        **DEEP,
    )
    result = job.result()

    assert list(result.rows()) == [(i, i) for i in good]
    assert list(job.rows()) == [(i, i) for i in good]
    assert result.output == good
    assert result.output.successful == good
    assert [failure.index for failure in result.output.failed] == list(range(3, 50, 7))
    assert result.output.failureRate == result.failure_rate == 7 / 51


def test_rows_of_a_job_that_failed_are_those_that_succeeded(client: Client) -> None:
    items = [{"i": i, "ms": 0, "fails": i == 20} for i in range(40)]
    job = client.submit(operation="spin_each", items=items, timeout=30, **DEEP)

    result = job.result(propagate=False)

    assert (result.status, result.output) == (Status.FAILED, None)
    rows = list(job.rows())
    assert rows == [(i, i) for i in result.successful]
    assert len(rows) == result.done > 0
    with pytest.raises(InvalidValue, match="did not succeed"):
        result.rows()


def test_rows_of_a_job_with_a_merge_are_refused(client: Client) -> None:
    job = client.submit(operation="sum", items=range(9))
    result = job.result(timeout=30)

    for rows in (result.rows, job.rows):
        with pytest.raises(InvalidValue, match="merge"):
            rows()


def test_batch_execute_returns_the_results_of_failed_jobs_too(client: Client) -> None:
    bad = {"operation": "fail_odd", "items": [1]}
    late = {"operation": "nap", "items": [3000], "options": {"timeoutMs": 300}}
    merged = {"operation": "bad_merge", "items": [1, 2]}
    good = {"operation": "sum", "items": [1, 2]}

    results = client.batch_execute([bad, good, late, merged, good], timeout=40)

    assert [each.status for each in results] == [
        Status.FAILED,
        Status.SUCCEEDED,
        Status.EXPIRED,
        Status.FAILED,
        Status.SUCCEEDED,
    ]
    assert [each.output for each in results] == [None, 3, None, None, 3]
    assert results[0].failed[0].message == "1 is odd"
    assert results[3].error is not None


def test_batch_execute_says_which_jobs_still_run_when_its_time_is_over(client: Client) -> None:
    requests = [{"operation": "sum", "items": [1, 2]}, {"operation": "nap", "items": [3000] * 9}]

    added, slow = client.batch_execute(requests, timeout=5)

    assert (added.output, slow.output) == (3, None)
    assert not slow.status.final
    assert slow.metrics.waited_ms >= 0
    client.job(slow.job_id).cancel()


def test_without_continue_on_error_the_first_failure_fails_the_job(client: Client) -> None:
    items = [{"i": i, "ms": 2, "fails": i == 60} for i in range(500)]

    with pytest.raises(JobFailed, match="item") as caught:
        client.execute(operation="spin_then_collect", items=items, timeout=30)

    result = caught.value.result
    assert [failure.index for failure in caught.value.failures] == [60]
    assert (result.failed_count, result.done + result.skipped) == (1, 499)


@pytest.mark.parametrize(
    ("threshold", "status"), [(0.1, Status.SUCCEEDED), (0.09, Status.FAILED), (0.0, Status.FAILED)]
)
def test_a_job_fails_when_more_than_the_threshold_fails(
    client: Client, threshold: float, status: Status
) -> None:
    items = [{"i": i, "ms": 1, "fails": i % 10 == 9} for i in range(300)]
    job = client.submit(
        operation="spin_then_collect",
        items=items,
        continue_on_error=True,
        error_threshold=threshold,
        strategy=NWay(min_chunk_size=20),
    )

    assert job.wait(30) is status
    facts = client.ledger.facts(job.id)
    assert int(facts["done"]) + int(facts["failed"]) + int(facts["skipped"]) == 300
    assert (int(facts["failed"]) > threshold * 300) == (status is Status.FAILED)


def test_a_failed_job_stops_its_running_nodes(client: Client) -> None:
    items = [{"i": i, "ms": 20, "fails": i < 40} for i in range(600)]
    job = client.submit(
        operation="spin_then_collect", items=items, continue_on_error=True, error_threshold=0.02
    )

    with pytest.raises(JobFailed):
        job.result(timeout=30)

    assert job.progress().skipped > 400


def test_failures_beyond_a_thousand_are_counted_and_not_stored(client: Client) -> None:
    result = client.execute(
        operation="fail_odd", items=range(5000), continue_on_error=True, timeout=60
    )

    assert (result.failed_count, len(result.failed)) == (2500, 1000)
    assert len(result.successful) == 2500


def test_failed_items_can_be_retried_alone(client: Client) -> None:
    first = client.submit(operation="fail_odd", items=[2, 3, 4, 5, 7], continue_on_error=True)
    first.result(timeout=30)

    again = first.retry_failed()

    result = again.result(timeout=30, propagate=False)
    assert (result.status, result.failed_count) == (Status.FAILED, 3)
    assert [failure.message for failure in result.failed] == [
        "3 is odd",
        "5 is odd",
        "7 is odd",
    ]
    good = client.submit(operation="sum", items=[1])
    good.result(timeout=30)
    with pytest.raises(InvalidRequest, match="has no failed items"):
        good.retry_failed()


def test_outputs_that_cannot_be_stored_fail_their_items(client: Client) -> None:
    result = client.execute(
        operation="not_storable", items=range(50), continue_on_error=True, timeout=30, **DEEP
    )

    assert [failure.index for failure in result.failed] == [3, 13, 23, 33, 43]
    assert "cannot be stored" in result.failed[0].message
    assert result.output == [i for i in range(50) if i % 10 != 3]


@pytest.mark.parametrize("operation", ["bad_merge", "not_storable_merged"])
@pytest.mark.parametrize("shape", [{}, DEEP], ids=["one node", "deep"])
def test_a_merge_that_raises_fails_the_job(
    client: Client, operation: str, shape: dict[str, Any]
) -> None:
    with pytest.raises(JobFailed) as caught:
        client.execute(operation=operation, items=range(40), timeout=30, **shape)

    error = caught.value.result.error
    assert error is not None
    assert error.type in ("ZeroDivisionError", "NotStorable")


def test_cancel_stops_the_whole_tree(client: Client) -> None:
    job = client.submit(
        operation="spin_then_collect", items=[{"i": i, "ms": 10} for i in range(3000)]
    )
    wait_until(lambda: job.progress().done > 50)

    job.cancel()

    with pytest.raises(JobCancelled, match=f"job {job.id} was cancelled"):
        job.result(timeout=5)
    progress = job.progress()
    assert progress.done + progress.skipped == 3000
    assert progress.pending == 0
    assert job.partial().output == [i for lo, hi in job.partial().ranges for i in range(lo, hi)]


DATE = r"at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
WHEN = r"[0-9.]+ m?s ago \(\d\d:\d\d:\d\d UTC\)"


def test_a_cancelled_job_says_when_and_by_whom(client: Client, environment: dict[str, str]) -> None:
    me = own_name()
    named, typed, twice = (client.submit(operation="nap", items=[50.0] * 500) for _ in range(3))
    assert "@" in me

    twice.cancel()
    twice.cancel(by="another")
    named.cancel(by="anna\x1b[2J, for the audit")
    rlm(environment, "cancel", typed.id)

    for job, by in ((twice, me), (named, "anna?[2J, for the audit"), (typed, me)):
        with pytest.raises(JobCancelled, match=rf"was cancelled {DATE} by {re.escape(by)}: "):
            job.get(timeout=20)
        said = rf"It was cancelled {WHEN} by {re.escape(by)}: \d+ of 500 items done, 0 failed, "
        assert re.match(said, job.explain()), job.explain()
        assert by not in json.dumps(collect(client, client.app, job.id)["job"])


def test_a_job_that_is_being_cancelled_says_by_whom(client_without_worker: Client) -> None:
    ledger = client_without_worker.ledger
    job = client_without_worker.submit(operation="sum", items=range(9))
    ledger.claim(job=job.id, node=ROOT, token="held", worker="celery@one")  # no secret
    job.cancel()

    said = rf"It is stopping because it was cancelled {WHEN} by {re.escape(own_name())}; "
    assert re.match(said, job.explain()), job.explain()


def test_a_round_is_cancelled_by_the_canceller_of_its_job(client: Client) -> None:
    job = client.submit(operation="slow_round", items=[1])
    wait_until(lambda: bool(job.rounds()) and job.rounds()[0].progress().done > 0)

    job.cancel(by="anna")

    [round_] = job.rounds()
    wait_until(round_.ready)
    assert " by anna: " in round_.explain()
    with pytest.raises(JobCancelled, match=" by anna: "):
        job.get(timeout=20)


def test_an_expired_job_says_when_and_an_old_record_says_what_it_knows(client: Client) -> None:
    job = client.submit(operation="nap", items=[50.0] * 200, timeout=0.5)
    with pytest.raises(JobExpired, match=r"expired at [-0-9: ]+ UTC because its timeout passed: "):
        job.get(timeout=20)
    assert re.match(rf"It expired {WHEN} because its timeout passed: ", job.explain())

    client.ledger.store.client.hdel(client.ledger.keys.of(job.id).job, "stop_ms", "closed_ms")

    assert job.explain().startswith("It expired because its timeout passed: ")


def test_cancelling_an_ended_job_changes_nothing(client: Client) -> None:
    job = client.submit(operation="sum", items=range(5))
    job.result(timeout=30)

    assert job.cancel() is Status.SUCCEEDED


def test_a_job_past_its_timeout_is_expired_with_its_partial_answer(client: Client) -> None:
    job = client.submit(
        operation="spin_then_collect",
        items=[{"i": i, "ms": 10} for i in range(1000)],
        timeout_ms=800,
    )

    with pytest.raises(JobExpired, match="timeout"):
        job.result(timeout=10)

    partial = job.partial()
    assert 0 < partial.coverage < 1
    assert job.progress().elapsed_s < 3


def test_a_job_expires_without_a_worker(client_without_worker: Client) -> None:
    job = client_without_worker.submit(operation="sum", items=range(10), timeout=0.3)

    with pytest.raises(JobExpired):
        job.result(timeout=5)

    assert job.progress().skipped == 10


def test_early_termination_skips_the_rest_and_reports_it(client: Client) -> None:
    items = [{"i": i, "ms": 5} for i in range(400)]

    result = client.execute(
        operation="spin_then_collect", items=items, early_termination_threshold=0.5, timeout=30
    )

    assert result.status is Status.SUCCEEDED
    assert 200 <= result.done < 400
    assert (result.stopped, result.skipped) == ("early", 400 - result.done)
    assert result.output == list(result.successful)


def test_validation_runs_over_every_item_first(client: Client) -> None:
    good = client.execute(
        operation="checked", items=range(1, 60), validate_before_process=True, timeout=30, **DEEP
    )
    assert good.output == list(range(1, 60))

    with pytest.raises(JobFailed) as caught:
        client.execute(
            operation="checked", items=range(60), validate_before_process=True, timeout=30, **DEEP
        )
    assert caught.value.failures[0].message == "0 is not positive"
    assert caught.value.result.done == 0

    tolerant = client.execute(
        operation="checked",
        items=range(-3, 60),
        validate_before_process=True,
        continue_on_error=True,
        timeout=30,
        **DEEP,
    )
    assert tolerant.output == list(range(1, 60))
    assert [failure.index for failure in tolerant.failed] == [0, 1, 2, 3]


def test_empty_items_are_skipped_on_request(client: Client) -> None:
    result = client.execute(
        operation="echo",
        items=["a", "", None, 0, [], "b", (), set(), frozenset(), b"", bytearray(), {}, False],
        skip_if_empty=True,
        timeout=30,
    )
    assert (result.output, result.done, result.skipped) == (["a", 0, "b", False], 4, 9)
    assert list(result.successful) == [0, 3, 5, 12]


def test_an_empty_job_is_skipped_on_request_without_a_message(
    client_without_worker: Client,
) -> None:
    result = client_without_worker.execute(
        operation="echo", items=[], skip_if_empty=True, timeout=5
    )

    assert (result.status, result.output, result.total) == (Status.SUCCEEDED, [], 0)
    assert (list(result.rows()), result.output.successful) == ([], [])
    merged = client_without_worker.execute(
        operation="fail_odd", items=[], skip_if_empty=True, timeout=5
    )
    assert (merged.status, merged.output) == (Status.SUCCEEDED, None)


def test_a_job_with_a_merge_has_no_outputs_of_its_items(client: Client) -> None:
    job = client.submit(operation="fail_odd", items=[2, 4], timeout=20)
    assert job.get(timeout=20) == 6
    for read in (job.outputs, job.rows):
        with pytest.raises(InvalidRequest, match="has a merge, so no output for each item"):
            read()


def test_a_job_without_a_worker_expires_at_its_queue_timeout(client_without_worker: Client) -> None:
    job = client_without_worker.submit(operation="sum", items=range(9), queue_timeout=0.3)

    with pytest.raises(JobExpired, match=r"no worker began it within its queue_timeout of 0.3 s"):
        job.result(timeout=20)
    assert job.status == "expired"
