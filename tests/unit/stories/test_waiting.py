"""Items that wait or are retried, at random: each counts once, in order.

No attempt is lost or counted twice.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

import pytest

from resilience.bucket import Rate
from resilience.bulkhead import Bulkhead
from resilience.errors import RateLimited
from resilience.retry import RetryPolicy
from rlm_tasks import Adaptive, Binary, Conditions, Context, JobRequest, NWay, Options, operation
from rlm_tasks.engine.guards import ProcessGuards
from rlm_tasks.engine.outcome import NodeOutcome
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.operations import registry
from rlm_tasks.results import Status
from tests.unit.harness import Platform

ATTEMPTS = 4
QUICK = RetryPolicy(max_attempts=ATTEMPTS, initial_delay_s=0.002, max_delay_s=0.004)
NEVER_ENDS = 99


class Busy(ConnectionError):
    """HTTP 503 with a retry time longer than a slice: the item sleeps, or leaves its node."""

    status_code = 503
    headers = {"retry-after": "0.08"}  # as HTTP clients keep it


class Outcomes:
    """The denials and failures of each item of one job, and the number of its runs."""

    def __init__(self, seed: int, n: int, hopeless: frozenset[int] = frozenset()) -> None:
        self.random = Random(seed)
        share = self.random.choice([0.0, 0.1, 0.4])
        self.refusals = [
            self.random.choice([1, 1, 2, 5]) if self.random.random() < share else 0
            for _ in range(n)
        ]
        self.failures = [
            self.random.choice([1, 2, 3]) if self.random.random() < share / 2 else 0
            for _ in range(n)
        ]
        for index in hopeless:
            self.failures[index] = NEVER_ENDS
        self.hopeless, self.slow = hopeless, seed % 8 == 0
        self.runs: Counter[int] = Counter()
        self.wrong_tries: list[tuple[int, int, int]] = []

    def answer(self, index: int, tries: int) -> list[int]:
        """Deny, fail or answer."""
        if self.refusals[index]:
            self.refusals[index] -= 1
            raise RateLimited("x", self.random.choice([0.0, 0.001, 0.005, 0.03]), "not yet")
        if tries != self.runs[index]:
            self.wrong_tries.append((index, tries, self.runs[index]))
        self.runs[index] += 1
        if self.failures[index]:
            self.failures[index] -= 1
            raise Busy(f"item {index}") if self.slow else ConnectionError(f"item {index}")
        return [index]


_outcomes: list[Outcomes] = []


def _concatenated(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def _valid(item: Any) -> None:
    """Check that validation sees each item once and never waits."""
    assert item is None or item >= 0


@operation("unit_waits", merge=_concatenated, retry=QUICK, validate=_valid)
def unit_waits(item: int, ctx: Context) -> list[int]:
    """Answer as the outcomes say."""
    return _outcomes[-1].answer(item, ctx.tries)


@operation("unit_waits_batch", merge=_concatenated, batch=True, retry=QUICK)
def unit_waits_batch(items: list[int], ctx: Context) -> list[int]:
    """Answer for several items, or for none."""
    return [index for item in items for index in _outcomes[-1].answer(item, ctx.tries)]


@operation("unit_waits_async", merge=_concatenated, concurrency=5, retry=QUICK)
async def unit_waits_async(item: int, ctx: Context) -> list[int]:
    """Answer among other items."""
    return _outcomes[-1].answer(item, ctx.tries)


@operation("unit_waits_bare", merge=_concatenated, concurrency=5)
async def unit_waits_bare(item: int, ctx: Context) -> list[int]:
    """Answer among other items, without guards."""
    return _outcomes[-1].answer(item, ctx.tries)


class WaitingPlatform(Platform):
    """A platform that wakes parked nodes by time or by name, at random."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.runtime.guards = ProcessGuards(self.store, self.settings, self.runtime.delivery.wake)
        self.parked = 0

    def run_all(self, spec: JobSpec) -> dict[str, str]:
        """Run until the job is final; fail when there is neither a message nor a parked node."""
        while not Status((facts := self.run(spec))["state"]).final:
            waiting = [
                record.id for record in self.ledger.all_records(spec.job) if record.state == "p"
            ]
            assert waiting, ("neither a message nor a parked node is left", facts)
            self.parked += len(waiting)
            self._wake_some(
                spec.job, self.random.sample(waiting, self.random.randint(1, len(waiting)))
            )
        return facts

    def _wake_some(self, job: str, nodes: list[str]) -> None:
        """Wake nodes by name or by time; a second time must not matter."""
        if self.random.random() < 0.5:
            self.runtime.delivery.wake([f"{job} {node}" for node in (*nodes, *nodes[:1])])
            return
        self.store.client.zadd(self.keys.of(job).due, dict.fromkeys(nodes, 1))
        for _ in range(2):
            sent = self.ledger.sweep(job).send
            self.runtime.delivery.resend(job, sent)


SHAPES: list[dict[str, Any]] = [
    {"type": "sequential"},
    {"type": "parallel", "chunk_size": 1},
    {"type": "parallel", "chunk_size": 7},
    {"type": "recursive"},
    {"strategy": Binary(min_chunk_size=3, max_depth=3)},
    {"strategy": Binary(min_chunk_size=1, max_depth=1)},
    {"strategy": NWay(split_factor=5, min_chunk_size=2)},
    {"strategy": Adaptive(min_chunk_size=2, max_chunk_size=9)},
]


def _job(seed: int, name: str) -> tuple[WaitingPlatform, JobSpec, Outcomes, list[int | None]]:
    random = Random(seed)
    n = random.choice([1, 2, 9, 40, 70])
    hopeless = frozenset(random.sample(range(n), min(n, random.choice([0, 0, 2]))))
    outcomes = Outcomes(seed, n, hopeless)
    _outcomes.append(outcomes)
    holes = {
        i for i in range(n) if i not in hopeless and random.random() < random.choice([0.0, 0.2])
    }
    items = [None if i in holes else i for i in range(n)]
    conditions = Conditions(
        skip_if_empty=True, validate_before_process=name == "unit_waits" and seed % 3 == 0
    )
    platform = WaitingPlatform(seed)
    shape = SHAPES[seed % len(SHAPES)]
    request = JobRequest(
        operation=name,
        items=items,
        options=Options(continue_on_error=True, error_threshold=1),  # all items may fail
        conditions=conditions,
        **shape,
    )
    return platform, platform.submit(request), outcomes, items


def _is_exact(
    platform: WaitingPlatform, spec: JobSpec, outcomes: Outcomes, items: list[int | None]
) -> None:
    facts = platform.run_all(spec)
    good = [item for item in items if item is not None and item not in outcomes.hopeless]
    assert facts["state"] == Status.SUCCEEDED, facts
    assert platform.output(spec) == (good or None) or not good
    counts = tuple(int(facts[name]) for name in ("done", "failed", "skipped"))
    assert counts == (len(good), len(outcomes.hopeless), items.count(None))
    assert platform.ledger.failed_items(spec.job) == sorted(outcomes.hopeless)


@pytest.mark.parametrize("seed", range(40))
def test_waiting_items_count_once_and_are_tried_as_often_as_allowed(
    seed: int,
) -> None:
    platform, spec, outcomes, items = _job(seed, "unit_waits")

    _is_exact(platform, spec, outcomes, items)

    assert outcomes.wrong_tries == [], "index, tries passed, tries made"
    assert all(outcomes.runs[index] == ATTEMPTS for index in outcomes.hopeless)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["unit_waits_batch", "unit_waits_async"])
def test_items_that_wait_among_others_count_once_and_in_order(seed: int, name: str) -> None:
    platform, spec, outcomes, items = _job(seed, name)

    _is_exact(platform, spec, outcomes, items)


def test_most_of_these_jobs_have_waited() -> None:
    waited = 0
    for seed in range(20):
        platform, spec, _, _ = _job(seed, "unit_waits")
        platform.run_all(spec)
        waited += platform.parked > 0

    assert waited >= 10


# --- single cases that are rare at random -----------------------------------------------------


def _run(name: str, items: list[Any], **fields: Any) -> tuple[dict[str, str], Any]:
    platform = WaitingPlatform(1)
    spec = platform.submit(
        JobRequest(operation=name, items=items, options=Options(continue_on_error=True), **fields)
    )
    facts = platform.run_all(spec)
    return facts, platform.output(spec)


def _no_errors(n: int) -> Outcomes:
    """Return outcomes without random denials or failures."""
    outcomes = Outcomes(0, n)
    outcomes.refusals, outcomes.failures, outcomes.slow = [0] * n, [0] * n, False
    _outcomes.append(outcomes)
    return outcomes


@pytest.mark.parametrize("name", ["unit_waits_batch", "unit_waits_bare"])
def test_an_empty_item_behind_one_that_waits_is_skipped_once(name: str) -> None:
    outcomes = _no_errors(30)
    outcomes.refusals[5] = 1

    facts, output = _run(
        name,
        [None if i in (6, 7) else i for i in range(30)],
        type="sequential",
        conditions=Conditions(skip_if_empty=True),
    )

    assert (facts["state"], facts["done"], facts["skipped"]) == (Status.SUCCEEDED, "28", "2"), (
        facts.get("error")
    )
    assert output == [i for i in range(30) if i not in (6, 7)]


def test_a_batch_of_one_that_fails_is_one_attempt() -> None:
    outcomes = _no_errors(1)
    outcomes.failures[0] = NEVER_ENDS

    facts, _ = _run("unit_waits_batch", [0], type="sequential")

    assert facts["failed"] == "1"
    assert outcomes.runs[0] == ATTEMPTS


def test_async_items_that_wait_when_a_node_ends_keep_their_tries() -> None:
    outcomes = _no_errors(5)
    outcomes.failures, outcomes.slow = [NEVER_ENDS] * 5, True

    facts, _ = _run(
        "unit_waits_async", list(range(5)), strategy=Binary(min_chunk_size=5, max_depth=64)
    )

    assert facts["failed"] == "5"
    assert outcomes.runs == dict.fromkeys(range(5), ATTEMPTS)


@operation(
    "unit_dear",
    merge=_concatenated,
    rate_limit=Rate(10, per_s=1),
    cost=lambda item: {"requests": item},
)
def unit_dear(item: int) -> list[int]:
    """Cost the amount that the item gives."""
    return [item]


@operation(
    "unit_dear_async",
    merge=_concatenated,
    concurrency=4,
    rate_limit=Rate(10, per_s=1),
    cost=lambda item: {"requests": item},
)
async def unit_dear_async(item: int) -> list[int]:
    """Cost the amount that the item gives, among other items."""
    return [item]


@pytest.mark.parametrize("name", ["unit_dear", "unit_dear_async"])
def test_an_item_that_costs_more_than_a_bucket_ever_grants_fails_alone(name: str) -> None:
    facts, output = _run(name, [0, 0, 11, 0])

    assert (facts["state"], facts["done"], facts["failed"]) == (Status.SUCCEEDED, "3", "1"), (
        facts.get("error")
    )
    assert output == [0, 0, 0]


@operation("unit_limited", merge=_concatenated, service="unit_limited", bulkhead=1, timeout_s=0.3)
def unit_limited(item: float) -> list[float]:
    """Take the seconds that the item gives, within a limit."""
    time.sleep(item)
    return [item]


def _limited(
    items: list[float], prepare: Callable[[WaitingPlatform], None] = lambda _: None
) -> dict[str, str]:
    platform = WaitingPlatform(6)
    platform.runtime.clock = time.perf_counter
    spec = platform.submit(JobRequest(operation="unit_limited", items=items, type="sequential"))
    prepare(platform)
    facts = platform.run_all(spec)
    bulkhead = platform.runtime.guards.bulkhead(registry.get("unit_limited").protection)
    assert bulkhead is not None
    assert bulkhead.status()["used"] == 0, "every permit was given back"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0), "no alarm is left armed"
    return facts


def test_each_item_has_its_full_limit_in_a_slice_of_any_length() -> None:
    assert _limited([0.1] * 5)["done"] == "5"


def test_an_item_after_a_slow_read_has_its_full_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare(platform: WaitingPlatform) -> None:
        read = platform.runtime.items.read
        monkeypatch.setattr(
            platform.runtime.items, "read", lambda **about: (time.sleep(0.4), read(**about))[1]
        )

    assert _limited([0.02] * 3, prepare)["done"] == "3"


@pytest.mark.parametrize("verb", ["acquire", "give_back"])
def test_an_item_limit_never_interrupts_a_guard(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    stock = getattr(Bulkhead, verb)

    def slow(*args: Any, **more: Any) -> Any:
        """Call the original while Redis is slow to answer."""
        done = stock(*args, **more)
        time.sleep(0.4)
        return done

    monkeypatch.setattr(Bulkhead, verb, slow)

    assert _limited([0.001] * 3)["done"] == "3"


def test_an_item_limit_never_interrupts_the_recording_of_an_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = NodeOutcome.add
    monkeypatch.setattr(
        NodeOutcome, "add", lambda outcome, output: (stock(outcome, output), time.sleep(0.4))[0]
    )

    facts = _limited([0.001] * 3)

    assert (facts["state"], facts["done"]) == (Status.SUCCEEDED, "3"), facts.get("error")


def test_an_item_past_its_limit_fails_and_gives_its_permit_back() -> None:
    platform = WaitingPlatform(7)
    spec = platform.submit(
        JobRequest(
            operation="unit_limited",
            items=[0.0, 5.0, 0.0],
            type="sequential",
            options=Options(continue_on_error=True),
        )
    )
    facts = platform.run_all(spec)

    assert (facts["done"], platform.ledger.failed_items(spec.job)) == ("2", [1])


@operation("unit_narrow", merge=_concatenated, bulkhead=1)
def unit_narrow(item: int) -> list[int]:
    """Allow one call at a time."""
    return [item]


def _parked_at_a_full_bulkhead(
    platform: WaitingPlatform, jobs: int
) -> tuple[Any, Any, list[JobSpec]]:
    bulkhead = platform.runtime.guards.bulkhead(registry.get("unit_narrow").protection)
    assert bulkhead is not None
    permit = bulkhead.acquire()
    specs = []
    for _ in range(jobs):
        specs.append(
            platform.submit(JobRequest(operation="unit_narrow", items=[1, 2], type="sequential"))
        )
        platform.run(specs[-1])
        assert [record.state for record in platform.ledger.all_records(specs[-1].job)] == ["p"]
    return bulkhead, permit, specs


def test_a_released_permit_wakes_the_first_waiting_node() -> None:
    platform = WaitingPlatform(2)
    _, permit, [spec] = _parked_at_a_full_bulkhead(platform, 1)

    permit.release()

    assert platform.run(spec)["state"] == Status.SUCCEEDED, (
        "it was woken without any passing of time"
    )


def test_a_waiter_of_a_cancelled_job_does_not_block_the_next() -> None:
    platform = WaitingPlatform(3)
    _, permit, [first, second] = _parked_at_a_full_bulkhead(platform, 2)
    assert platform.ledger.stop(first.job, "cancelled") == Status.CANCELLED

    permit.release()

    assert platform.run(second)["state"] == Status.SUCCEEDED, (
        "it was woken, although a cancelled waiter was before it"
    )


def test_a_node_that_parks_after_its_job_was_stopped_is_skipped_at_once() -> None:
    platform = WaitingPlatform(4)
    spec = platform.submit(JobRequest(operation="unit_waits", items=[0], type="sequential"))
    claim = platform.ledger.claim(spec.job, "root", "00" * 8, "somebody")
    platform.ledger.stop(spec.job, "cancelled")

    platform.ledger.park(claim, 60_000, "a test says so")

    assert platform.ledger.facts(spec.job)["state"] == Status.CANCELLED


def test_a_node_at_a_worker_without_its_operation_keeps_its_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    platform, outcomes = WaitingPlatform(5), _no_errors(1)
    outcomes.failures[0] = NEVER_ENDS
    spec = platform.submit(JobRequest(operation="unit_waits", items=[0], type="sequential"))
    platform.run(spec)
    node = platform.store.client.hget(platform.keys.of(spec.job).nodes, "root")
    assert json.loads(node)["tr"] == 1
    platform.runtime.delivery.wake([f"{spec.job} root"])
    with monkeypatch.context() as patch:
        patch.delitem(registry._registry, "unit_waits")
        platform.run(spec)

    node = platform.store.client.hget(platform.keys.of(spec.job).nodes, "root")
    assert (json.loads(node)["s"], json.loads(node).get("tr")) == ("p", 1)
