"""Operations with guards on a real worker.

A node that must wait holds no slot and uses up no attempt, and no item is lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from resilience.bucket import HOLD_MOST_S
from rlm_tasks import Client, JobExpired, Status
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until


@pytest.fixture(scope="module")
def guarded(server: embedded.Server, logs: Path) -> Iterator[Client]:
    """A client of a worker with the guarded operations."""
    environment = environment_of(
        server.url, "guarded", RLM_OPERATIONS="tests.integration.guarded_ops,tests.integration.ops"
    )
    environment["RLM_GUARD_TIMEOUT_S"] = "1"  # a delay on a busy machine is no outage
    with (
        embedded.worker(environment, log=logs / "guarded.log", slots=2),
        client_of(environment) as own,
    ):
        yield own


def journal(folder: Path) -> list[tuple[str, int, int, float]]:
    """Return the journal of the operations in order of time: event, index, tries, time."""
    lines = [line.split() for line in (folder / "journal").read_text(encoding="utf-8").splitlines()]
    return sorted(
        ((event, int(index), int(tries), float(at)) for event, index, tries, at, _ in lines),
        key=lambda each: each[3],
    )


def test_a_node_that_waits_for_tokens_holds_no_slot(guarded: Client, tmp_path: Path) -> None:
    unlimited = {"operation": "nap", "items": [10.0] * 200, "chunk_size": 10}
    alone = guarded.execute(unlimited).metrics.execution_time_ms
    limited = guarded.submit(
        operation="metered",
        priority="high",
        items=range(60),
        chunk_size=1,
        params={"folder": str(tmp_path)},
    )
    wait_until(lambda: any(node.state == "parked" for node in limited.tree()))

    beside = guarded.execute(unlimited).metrics.execution_time_ms
    assert limited.result(timeout=30).output == list(range(60))

    # 20 calls a second need a claim and a parking each: a few per cent of two slots.
    assert beside <= 1.5 * alone, (alone, beside)
    assert len(journal(tmp_path)) == 60, "a refused node runs no item"
    held_s = limited.result().metrics.busy_ms / 1000
    assert held_s < 1.0, "60 nodes waited for 80 s in total without a slot"


def test_nodes_that_wait_for_tokens_return_at_the_right_time(
    guarded: Client, tmp_path: Path
) -> None:
    """No other job runs: beside other work the nodes would wait for a slot, too."""
    guarded.execute(
        operation="metered",
        items=range(60),
        chunk_size=1,
        params={"folder": str(tmp_path)},
        timeout=30,
    )

    times = [at for _, _, _, at in journal(tmp_path)]
    assert 0.97 * 55 / 20 <= times[-1] - times[0] <= 1.2 * 60 / 20


def test_an_open_breaker_parks_its_nodes_and_costs_no_attempt(
    guarded: Client, tmp_path: Path
) -> None:
    (tmp_path / "down").touch()
    job = guarded.submit(
        operation="fragile", items=range(40), chunk_size=5, params={"folder": str(tmp_path)}
    )
    wait_until(lambda: guarded.breakers.get("fragile").state == "open")
    wait_until(lambda: len(journal(tmp_path)) >= 6)  # two probes have failed
    wait_until(lambda: "circuit is open" in job.explain())

    (tmp_path / "down").unlink()
    result = job.result(timeout=30)

    assert (result.status, result.output) == (Status.SUCCEEDED, list(range(40)))
    assert max(Counter(index for _, index, _, _ in journal(tmp_path)).values()) <= 4, (
        "attempts are counted, refusals are not"
    )
    assert guarded.breakers.get("fragile").state in ("closed", "half-open")


def test_closing_a_breaker_wakes_waiting_nodes(guarded: Client, tmp_path: Path) -> None:
    (tmp_path / "down").touch()
    job = guarded.submit(
        operation="stubborn", items=range(6), chunk_size=1, params={"folder": str(tmp_path)}
    )
    wait_until(lambda: sum(node.state == "parked" for node in job.tree()) >= 5)
    (tmp_path / "down").unlink()

    began = time.monotonic()
    assert guarded.breakers.reset("reset-by-hand") == ["reset-by-hand"]
    assert job.result(timeout=20).output == list(range(6))

    assert time.monotonic() - began < 10, "no node has waited for the 60 s"


@pytest.mark.parametrize("operation", ["busy", "busy_async"])
def test_a_pause_of_a_day_that_a_service_asks_for_is_bounded_and_released(
    guarded: Client, tmp_path: Path, operation: str
) -> None:
    (tmp_path / "busy").touch()
    job = guarded.submit(operation=operation, items=range(20), params={"folder": str(tmp_path)})
    wait_until(lambda: "asked for a pause until" in job.explain())
    wait_until(lambda: not {node.state for node in job.tree()} & {"queued", "running"})
    (tmp_path / "busy").unlink()

    assert HOLD_MOST_S - 60 < guarded.release_limit(operation) <= HOLD_MOST_S
    assert job.result(timeout=20).output == list(range(20))


def test_a_fallback_answers_while_the_breaker_is_open(guarded: Client) -> None:
    result = guarded.execute(
        operation="second_best",
        items=range(1, 11),
        type="sequential",
        continue_on_error=True,
        timeout=30,
    )

    assert (result.failed_count, result.output) == (0, [-item for item in range(1, 11)])
    # A reader may go on with its last state for two seconds when Redis is slow.
    wait_until(lambda: guarded.breakers.get("second_best").failure_count == 2)


@pytest.mark.parametrize("operation", ["at_last", "at_last_async"])
def test_a_fallback_answers_when_the_retries_of_an_item_are_used_up(
    guarded: Client, tmp_path: Path, operation: str
) -> None:
    result = guarded.execute(
        operation=operation,
        items=range(1, 5),
        params={"folder": str(tmp_path)},
        continue_on_error=True,
        timeout=30,
    )

    assert (result.failed_count, result.output) == (0, [1, -2, 3, -4])
    calls = Counter(index for _, index, _, _ in journal(tmp_path))
    assert calls == {0: 1, 1: 2, 2: 1, 3: 2}, "the fallback follows the last attempt"


@pytest.mark.parametrize("operation", ["third_time", "third_time_async"])
def test_an_item_is_retried_without_delaying_its_neighbours(
    guarded: Client, tmp_path: Path, operation: str
) -> None:
    result = guarded.execute(
        operation=operation,
        items=range(40),
        chunk_size=20,
        params={"folder": str(tmp_path)},
        continue_on_error=True,
        timeout=60,
    )

    assert result.output == [item for item in range(40) if item != 15]
    assert [(each.index, each.code) for each in result.failed] == [(15, "TIMEOUT")]
    calls = Counter(index for _, index, _, _ in journal(tmp_path))
    assert {index: count for index, count in calls.items() if count > 1} == {
        0: 3,
        10: 3,
        15: 4,
        20: 3,
        30: 3,
    }
    assert guarded.recovery_success_rate() is not None


def test_a_fallback_answers_for_a_batch_whose_retries_are_used_up(
    guarded: Client, tmp_path: Path
) -> None:
    result = guarded.execute(
        operation="at_last_batch",
        items=range(1, 41),
        params={"folder": str(tmp_path)},
        continue_on_error=True,
        timeout=30,
    )

    assert result.failed_count == 0
    assert [abs(each) for each in result.output] == list(range(1, 41))
    assert -2 in result.output


def test_a_bulkhead_counts_megabytes_over_all_slots(guarded: Client, tmp_path: Path) -> None:
    """400 MB of 2,048 MB: at most five calls are in flight."""
    result = guarded.execute(
        operation="heavy",
        items=[400] * 40,
        chunk_size=20,
        params={"folder": str(tmp_path)},
        timeout=60,
    )

    assert result.output == [400] * 40
    in_flight = accumulate(1 if event == "begin" else -1 for event, _, _, _ in journal(tmp_path))
    assert max(in_flight) == 5


def test_async_items_keep_to_the_rate(guarded: Client, tmp_path: Path) -> None:
    result = guarded.execute(
        operation="metered_async", items=range(100), params={"folder": str(tmp_path)}, timeout=60
    )

    assert result.output == list(range(100))
    times = [at for _, _, _, at in journal(tmp_path)]
    assert len(times) == 100
    assert 0.97 * 95 / 50 <= times[-1] - times[0] <= 1.3 * 95 / 50


def test_a_bulkhead_limits_all_slots_together(guarded: Client, tmp_path: Path) -> None:
    result = guarded.execute(
        operation="narrow",
        items=range(30),
        chunk_size=3,
        params={"folder": str(tmp_path)},
        timeout=60,
    )

    assert result.output == list(range(30))
    events = [event for event, _, _, _ in journal(tmp_path)]
    assert all(before != after for before, after in pairwise(events)), "never two calls at once"


def test_an_async_node_takes_the_permits_that_its_own_items_give_back(
    guarded: Client, tmp_path: Path
) -> None:
    """A node that waited for the next lease to end would run two items at a time, and be parked."""
    result = guarded.execute(
        operation="narrow_async",
        items=range(60),
        chunk_size=60,
        params={"folder": str(tmp_path)},
        timeout=60,
    )

    assert result.output == list(range(60))
    assert result.metrics.nodes <= 5
    events = [event for event, _, _, _ in journal(tmp_path)]
    in_flight = list(accumulate(1 if event == "begin" else -1 for event in events))
    assert max(in_flight) == 2
    assert in_flight.count(2) > in_flight.count(0), "one begins when another ends"


@pytest.mark.parametrize("operation", ["sleepy", "sleepy_async"])
def test_an_item_past_its_limit_is_stopped_and_recorded(guarded: Client, operation: str) -> None:
    result = guarded.execute(
        operation=operation, items=[0.01, 5.0, 0.02, 0.03], continue_on_error=True, timeout=30
    )

    assert result.output == [0.01, 0.02, 0.03]
    assert [(each.index, each.type, each.code) for each in result.failed] == [
        (1, "CallTimeout", "TIMEOUT")
    ]
    assert result.metrics.execution_time_ms < 4000


def test_an_item_stuck_in_c_code_costs_only_its_process(
    guarded: Client,
) -> None:
    result = guarded.execute(
        operation="deaf", items=range(20), chunk_size=5, continue_on_error=True, timeout=60
    )

    assert result.output == [item for item in range(20) if item != 13]
    assert [(each.index, each.code) for each in result.failed] == [(13, "QUARANTINED")]
    assert "0.5 s" in result.failed[0].message


def test_unused_reservations_return_to_the_bucket(guarded: Client) -> None:
    began = time.monotonic()
    assert guarded.execute(operation="accounted", items=range(20), timeout=30).output == list(
        range(20)
    )

    assert time.monotonic() - began < 8, "20 reservations of 500 at 1,000 a second would take 10 s"


def test_repeated_faults_are_counted_by_pattern(guarded: Client) -> None:
    guarded.execute(operation="fail_odd", items=range(40), continue_on_error=True, timeout=30)

    wait_until(lambda: any(each.service == "fail_odd" for each in guarded.fault_patterns()))
    [pattern] = [each for each in guarded.fault_patterns() if each.service == "fail_odd"]
    assert (pattern.count, pattern.code, pattern.message) == (20, "OPERATION_FAILED", "# is odd")
    assert pattern.escalated
    wait_until(
        lambda: any(
            each.data["service"] == "fail_odd"
            for each in guarded.events.recent(name="faults.escalated")
        )
    )


def test_execute_with_retry_opens_a_new_job_for_each_attempt_despite_a_key(guarded: Client) -> None:
    request = {"operation": "nap", "items": [400.0] * 4, "options": {"timeoutMs": 100}}
    before = len(guarded.jobs(100))
    for _ in range(2):  # the second call finds the jobs of the first one
        with pytest.raises(JobExpired):
            guarded.execute_with_retry(
                request, {"maxRetries": 1, "initialDelayMs": 1}, idempotency_key="k"
            )
    assert len(guarded.jobs(100)) == before + 2


def test_execute_with_retry_accepts_a_policy_in_camel_case(guarded: Client) -> None:
    policy = {
        "maxRetries": 2,
        "backoffMultiplier": 2,
        "initialDelayMs": 10,
        "maxDelayMs": 30,
        "retryableErrors": ["TIMEOUT"],
    }
    with pytest.raises(Exception, match="expired"):
        guarded.execute_with_retry(
            {"operation": "nap", "items": [400.0] * 4, "options": {"timeoutMs": 100}}, policy
        )

    assert [job.state for job in guarded.jobs(3)] == ["FAILURE"] * 3
