"""Jobs with several rounds: each round is its own job and is opened once.

Messages and holders may be lost or doubled in between.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from redis.exceptions import ConnectionError

from rlm_tasks.engine.node import run_node
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs.rounds import NextRound, Round
from rlm_tasks.ledger.records import MERGE
from rlm_tasks.ledger.round_ids import opened_rounds, round_id
from rlm_tasks.operations import registry
from rlm_tasks.operations.registry import operation
from rlm_tasks.requests import JobRequest, Options
from rlm_tasks.results import Status
from tests.unit.harness import Platform, host

FAN_IN = 3


def _by_three(outputs: Iterable[Any], round: Round) -> Any:
    found = list(outputs)
    if len(found) <= 1 or round.number >= round.params.get("rounds", 9):
        return {"found": found, "rounds": round.number, "short": round.short, "done": round.done}
    return NextRound(
        "unit_add_three",
        [found[at : at + FAN_IN] for at in range(0, len(found), FAN_IN)],
        {"of": round.number},
    )


@operation("unit_in_rounds", then=_by_three)
def unit_in_rounds(item: int) -> int:
    """Double a number."""
    return 2 * item


@operation("unit_add_three")
def unit_add_three(items: list[int]) -> int:
    """Add up to three numbers; a negative sum is refused."""
    if sum(items) < 0:
        raise ValueError("a sum below zero")
    return sum(items)


def run(platform: Platform, items: list[int], **fields: Any) -> tuple[dict[str, str], str]:
    """Run a job and its rounds until nothing is left to do."""
    spec = platform.submit(JobRequest(operation="unit_in_rounds", items=items, **fields))
    return platform.run(spec), spec.job


@pytest.mark.parametrize("seed", range(8))
def test_the_answers_of_a_round_are_the_items_of_the_next_one(seed: int) -> None:
    platform = Platform(seed)
    n = platform.random.choice([1, 3, 10, 100, 700])

    facts, job = run(platform, list(range(n)))

    answer = platform.output(platform.ledger.spec(job))  # type: ignore[arg-type]  # it exists
    rounds = opened_rounds(platform.ledger, job)
    assert facts["state"] == "succeeded"
    assert answer["found"] == [sum(range(n)) * 2]
    assert len(rounds) == answer["rounds"] == int(facts.get("rounds", 0))
    assert [int(facts["n"]) for _, facts in rounds] == [
        -(-n // FAN_IN**k) for k in range(1, len(rounds) + 1)
    ]
    assert {facts["state"] for _, facts in rounds} <= {"succeeded"}


def test_a_round_is_opened_once_when_its_merge_is_repeated() -> None:
    platform = Platform(1)
    spec = platform.submit(JobRequest(operation="unit_in_rounds", items=[1, 2, 3, 4]))
    while (platform.ledger.facts(spec.job))["state"] != "merging" or not opened_rounds(
        platform.ledger, spec.job
    ):
        platform.step()
    sent = platform.mailbox.sent

    for _ in range(3):  # woken in vain: its round is still at work
        platform.runtime.delivery.wake([f"{spec.job} {MERGE}"])
        platform.mailbox.messages.remove((spec.job, MERGE))
        run_node(platform.runtime, spec.job, MERGE)

    assert platform.mailbox.sent == sent + 3
    assert len(opened_rounds(platform.ledger, spec.job)) == 1
    assert platform.run(spec)["state"] == "succeeded"


def test_a_failed_round_fails_its_job_and_names_the_round_and_the_item() -> None:
    platform = Platform(2)

    facts, job = run(platform, [1, -9, 1, 5, 5, 5])

    assert facts["state"] == "failed"
    assert f"round 1, job {round_id(job, 1)}, failed" in facts["error"]
    assert "a sum below zero" in facts["error"]


def test_a_job_that_tolerates_errors_continues_with_the_done_items_of_a_round() -> None:
    platform = Platform(2)

    facts, job = run(platform, [1, -9, 1, 5, 5, 5], options=Options(continue_on_error=True))

    assert facts["state"] == "succeeded"
    assert platform.output(platform.ledger.spec(job))["found"] == [30]  # type: ignore[arg-type]  # it exists


@pytest.mark.parametrize("params", [None, [1], {1: 2}, "x"])
def test_params_of_a_next_round_are_refused_when_they_are_no_dict_of_texts(params: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"params of NextRound=.*: must be a dict"):
        NextRound("unit_add_three", [], params)


def test_a_next_round_takes_an_operation_or_its_name() -> None:
    assert NextRound(unit_add_three, [], {}).operation == "unit_add_three"  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="operation of NextRound=None: must be an operation"):
        NextRound(None, [], {})  # type: ignore[arg-type]


def _from_another_store(_outputs: Any, _round: Round) -> Any:
    def items() -> Iterator[int]:
        yield 1
        raise ConnectionError("the shop's own Redis is away")

    return NextRound("unit_add_three", items(), {})


@operation("unit_rounds_from_another_store", then=_from_another_store)
def unit_rounds_from_another_store(item: int) -> int:
    """Return the item."""
    return item


def test_a_job_fails_with_what_the_items_of_its_next_round_raise() -> None:
    platform = Platform(2)
    facts = platform.run(
        platform.submit(JobRequest(operation="unit_rounds_from_another_store", items=[1]))
    )
    assert facts["state"] == "failed", "another store is away, not that of the job"
    assert "the shop's own Redis is away" in facts["error"]


def test_the_explanation_names_the_round_at_work() -> None:
    platform = Platform(3)
    spec = platform.submit(JobRequest(operation="unit_in_rounds", items=[1, 2, 3, 4]))
    while not opened_rounds(platform.ledger, spec.job):
        platform.step()

    assert platform.explain(spec.job, host()) == (
        "All of its items are done, failed or skipped; "
        f"its round 1 is at work: job {round_id(spec.job, 1)}."
    )


def test_a_job_cancelled_while_it_opens_a_round_cancels_the_round() -> None:
    platform = Platform(4)
    spec = platform.submit(JobRequest(operation="unit_in_rounds", items=[1, 2, 3, 4]))
    send_root = platform.mailbox.send_root

    def cancelled_meanwhile(some: Any, node: str) -> None:
        platform.ledger.stop(spec.job, "cancelled")
        send_root(some, node)

    platform.mailbox.send_root = cancelled_meanwhile  # type: ignore[method-assign]
    facts = platform.run(spec)

    assert facts["state"] == "cancelled"
    assert platform.ledger.facts(round_id(spec.job, 1))["state"] == "cancelled"
    assert platform.mailbox.messages == []


def test_a_round_stopped_by_a_budget_is_merged_and_marked_as_short() -> None:
    platform = Platform(5)
    spec = platform.submit(
        JobRequest(operation="unit_in_rounds", items=list(range(100)), chunk_size=5)
    )
    while int(platform.ledger.facts(spec.job)["done"]) < 20:
        platform.step()
    platform.ledger.stop(spec.job, "budget", detail="tokens")
    platform.mailbox.resend(spec, [MERGE], merges=False)  # as a sweep does

    facts = platform.run(spec)
    answer = platform.output(spec)

    assert Status(facts["state"]) is Status.SUCCEEDED
    assert facts["stop"] == "budget"
    assert int(facts["done"]) + int(facts["skipped"]) == 100
    assert answer["short"] is True
    assert len(answer["found"]) == 1


def test_a_strict_round_fails_its_job_though_errors_are_tolerated() -> None:
    platform = Platform(6)
    then = registry.get("unit_in_rounds").then
    assert then is not None

    def strictly(outputs: Iterable[Any], round: Round) -> Any:
        found = then(outputs, round)
        return replace(found, strict=True) if isinstance(found, NextRound) else found

    registry.register(registry.Operation("unit_strictly", lambda item: 2 * item, then=strictly))
    spec = platform.submit(
        JobRequest(
            operation="unit_strictly",
            items=[1, -9, 1, 5, 5, 5],
            options=Options(continue_on_error=True),
        )
    )

    facts = platform.run(spec)

    assert facts["state"] == "failed"
    assert "a sum below zero" in facts["error"]


def test_later_rounds_know_that_an_earlier_one_left_items_out() -> None:
    platform = Platform(7)

    _, job = run(platform, [1, -9, 1, *[5] * 24], options=Options(continue_on_error=True))

    assert len(opened_rounds(platform.ledger, job)) == 3
    assert platform.output(platform.ledger.spec(job))["short"] is True  # type: ignore[arg-type]  # it exists


def test_a_job_that_waits_for_a_round_expires_at_its_time() -> None:
    platform = Platform(8)
    spec = platform.submit(JobRequest(operation="unit_in_rounds", items=[1, 2, 3, 4]))
    while not opened_rounds(platform.ledger, spec.job):
        platform.step()
    assert platform.ledger.stop(spec.job, "expired") == "merging"

    platform.store.client.hset(platform.keys.of(spec.job).job, "deadline", "1")  # long ago

    assert platform.ledger.stop(spec.job, "expired") == "expired"


def test_a_round_that_has_expired_is_not_opened_again() -> None:
    platform = Platform(9)
    spec = platform.submit(JobRequest(operation="unit_in_rounds", items=list(range(27))))
    while len(opened_rounds(platform.ledger, spec.job)) < 2:
        platform.step()
    platform.store.client.delete(*platform.keys.of(round_id(spec.job, 1)))

    assert platform.run(spec)["state"] == "succeeded"
    assert platform.output(spec)["found"] == [2 * sum(range(27))]
    assert platform.ledger.facts(round_id(spec.job, 1)) == {}


def test_a_merge_that_has_lost_its_node_opens_no_round() -> None:
    """Redis may have lost its latest writes, so the merge may have read too few outputs."""
    platform = Platform(1)
    lost: list[str] = []

    def loses_its_node(outputs: Iterable[Any], round: Round) -> Any:
        answer = _by_three(outputs, round)
        if not lost:
            nodes = platform.keys.of(spec.job).nodes
            token = json.loads(platform.store.client.hget(nodes, MERGE))["k"]
            platform.ledger.release(spec.job, MERGE, token, -1, "")
            lost.append(token)
        return answer

    operation("unit_loses_its_merge", then=loses_its_node)(lambda item: 2 * item)
    spec = platform.submit(JobRequest(operation="unit_loses_its_merge", items=list(range(9))))
    platform.run(spec)
    assert lost
    assert opened_rounds(platform.ledger, spec.job) == []

    platform.mailbox.resend(spec, [MERGE], merges=False)
    assert platform.run(spec)["state"] == "succeeded"
    assert platform.output(spec)["found"] == [72]


def test_a_round_is_kept_until_its_job_has_ended_and_then_as_long_as_the_result() -> None:
    platform = Platform(5)
    store, kept_s = platform.store.client, platform.settings.result_ttl_s
    spec = platform.submit(JobRequest(operation="unit_in_rounds", items=[1, 2, 3, 4]))

    def lives(job: str) -> list[int]:
        return [store.ttl(key) for key in platform.keys.of(job) if store.exists(key)]

    ended = []
    while platform.mailbox.messages:
        platform.step()
        if platform.ledger.facts(spec.job)["state"] == "merging":
            rounds = opened_rounds(platform.ledger, spec.job)
            ended += [id for id, facts in rounds if facts["state"] == "succeeded"]
            assert all(min(lives(id)) > 2 * kept_s for id in ended), "its job still reads it"

    assert ended, "a round ended before its job"
    for id, _ in opened_rounds(platform.ledger, spec.job):
        assert max(lives(id)) <= kept_s
