"""The jobs of a history: random shapes of work, and the one right end of each.

An output names the run that made it, so an answer of two runs of one range is found.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

from resilience.retry import RetryPolicy
from rlm_tasks import Adaptive, Binary, Conditions, JobRequest, NWay, Options, operation
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.rounds import NextRound, Round
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.partials import flattened, partials
from rlm_tasks.results import Status


class World:
    """The time of a history, and the name of the run that calls an operation."""

    sleep: ClassVar[Callable[[float], None]]
    run = threading.local()
    failed: ClassVar[dict[tuple[str, int], int]]  # how often an item has failed so far


class Flaky(Exception):
    """The failure of an item that succeeds at a later try."""


def _joined(parts: Iterable[list[Any]]) -> list[Any]:
    return [each for part in parts for each in part]


def _work(item: dict[str, Any]) -> list[Any]:
    World.sleep(item["ms"] / 1000)
    if item["fails"]:
        raise ValueError(f"item {item['i']} fails always")
    return [item["i"], item["i"] * 7 + 1, World.run.name]


operation("nemesis_pages")(_work)


@operation("nemesis_batch", batch=True)
def nemesis_batch(items: list[dict[str, Any]]) -> list[list[Any]]:
    """Return an output for each item of a batch."""
    return [_work(item) for item in items]


@operation("nemesis_merged", merge=_joined)
def nemesis_merged(item: dict[str, Any]) -> list[Any]:
    """Return a list of one output; the merge joins the lists in order."""
    return [_work(item)]


RETRY_S = 5.0
"""The longest wait for a further try, with the sweep that ends it."""
_TRIES = RetryPolicy(max_attempts=4, initial_delay_s=2, retry_on=(Flaky,))


@operation("nemesis_flaky", retry=_TRIES)
def nemesis_flaky(item: dict[str, Any], ctx: Any) -> list[Any]:
    """Fail once or twice, then return the output."""
    World.sleep(item["ms"] / 1000)
    if World.failed.setdefault((ctx.job_id, ctx.index), 0) < item["flaky"]:
        World.failed[ctx.job_id, ctx.index] += 1
        raise Flaky(f"item {item['i']} fails for now")
    return _work({**item, "ms": 0})


def _second_round(outputs: list[list[Any]], ended: Round) -> Any:
    if ended.number < 1:
        items = [{"i": each[0], "ms": 40, "fails": False} for each in outputs]
        return NextRound(operation="nemesis_rounds", items=items, params={})
    return list(outputs)


@operation("nemesis_rounds", merge=_joined, then=_second_round)
def nemesis_rounds(item: dict[str, Any]) -> list[Any]:
    """Return a list of one output; the job has two rounds."""
    return [_work(item)]


@dataclass
class HistoryJob:
    """A job, the facts by which it must end, and its state in the history."""

    id: str
    operation: str
    items: list[dict[str, Any] | None]
    request: JobRequest
    cancel_at_s: float | None = None
    spec: JobSpec | None = None
    cancelled: bool = False
    quarantined: set[int] = field(default_factory=set)

    @property
    def failing(self) -> set[int]:
        """The items that fail, or that have met too many deaths."""
        fails = {i for i, item in enumerate(self.items) if item and item["fails"]}
        return fails | self.quarantined

    @property
    def work_s(self) -> float:
        """The seconds that one process may need for all items, with their retries and rounds."""
        items = [item for item in self.items if item]
        tries_s = sum(item["ms"] * (1 + item["flaky"]) / 1000 for item in items)
        waits_s = 15.0 if self.operation == "nemesis_flaky" else 0.0
        if self.request.type == "sequential":  # its items wait one after the other
            waits_s += RETRY_S * sum(item["flaky"] for item in items)
        return 2 * tries_s + waits_s

    @property
    def empty(self) -> set[int]:
        """The items that are skipped because they are empty."""
        return {i for i, item in enumerate(self.items) if item is None}

    @property
    def allowed(self) -> set[str]:
        """The states in which the job may end."""
        states = {Status.SUCCEEDED.value}
        if self.cancelled:
            states.add(Status.CANCELLED.value)
        if self.request.options.timeout_ms:
            states.add(Status.EXPIRED.value)
        if self.quarantined and len(self.failing | self.empty) == len(self.items):
            states.add(Status.FAILED.value)
        return states


def random_job(random: Random) -> HistoryJob:
    """Return a job of random shape."""
    kind = random.choice(["pages", "pages", "batch", "merged", "merged", "flaky", "rounds"])
    n = random.choice([1, 1, 2, 5, 12, 30])
    longest_ms = random.choice([0, 5, 200, 1500])
    failing = random.sample(range(n), n // 8) if kind in ("pages", "merged") else []
    empty = random.sample(range(n), n // 6) if kind == "pages" else []
    items: list[dict[str, Any] | None] = [
        None
        if i in empty
        else {
            "i": i,
            "ms": random.randint(0, longest_ms),
            "fails": i in failing,
            "flaky": random.choice([0, 0, 0, 1, 2]),
        }
        for i in range(n)
    ]
    shape: dict[str, Any] = random.choice(
        [
            {"type": "recursive"},
            {"type": "sequential"},
            {"type": "parallel", "chunk_size": random.randint(1, 8)},
            {"strategy": Binary(min_chunk_size=random.randint(1, 6), max_depth=6)},
            {"strategy": NWay(split_factor=random.randint(2, 5), min_chunk_size=2)},
            {"strategy": Adaptive(min_chunk_size=1)},
        ]
    )
    timeout_ms = random.choice([None, None, None, 20_000])
    request = JobRequest(
        operation=f"nemesis_{kind}",
        items=items,
        options=Options(continue_on_error=True, timeout_ms=timeout_ms),
        conditions=Conditions(skip_if_empty=True),
        **shape,
    )
    return HistoryJob(
        id=str(uuid.UUID(int=random.getrandbits(128))),
        operation=f"nemesis_{kind}",
        items=items,
        request=request,
        cancel_at_s=random.uniform(1, 20) if random.random() < 0.15 else None,
    )


def violations(ledger: Ledger, job: HistoryJob, losses: int) -> list[str]:
    """Return what is wrong with the end of a job; `losses` processes of its nodes were lost.

    As many losses as the limit of deaths may put an item or the merge into quarantine.
    """
    facts = ledger.facts(job.id)
    state = facts.get("state", "unknown")
    unlucky = losses >= ledger.settings.death_limit
    if unlucky and "Quarantined" in facts.get("error", ""):
        return []
    quarantined = {each.index for each in ledger.quarantine.items(job.id)}
    job.quarantined = quarantined if unlucky else set()
    if state not in job.allowed:
        return [
            f"{job.id} is {state}, not {job.allowed}: stop={facts.get('stop')!r} "
            f"error={facts.get('error', '')!r} {ledger.failures(job.id)[:2]}"
        ]
    n = len(job.items)
    done, failed, skipped = (int(facts[name]) for name in ("done", "failed", "skipped"))
    found = []
    if done + failed + skipped != n:
        found.append(f"{job.id}: {done} done + {failed} failed + {skipped} skipped are not {n}")
    failed_items, empty_items = set(ledger.failed_items(job.id)), set(ledger.empty_items(job.id))
    if len(failed_items) != failed or not failed_items <= job.failing:
        found.append(f"{job.id}: items {failed_items} failed, not {job.failing}")
    if not empty_items <= job.empty:
        found.append(f"{job.id}: items {empty_items} were empty, not {job.empty}")
    if quarantined - job.quarantined:
        found.append(f"{job.id}: innocent items {quarantined} are in quarantine")
    pieces = ledger.ranges(job.id)
    if any(a[1] > b[0] for a, b in itertools.pairwise(pieces)):
        found.append(f"{job.id}: the ranges {pieces} overlap")
    if state == Status.SUCCEEDED and not facts["stop"]:
        found += _wrong_in_full(job, failed_items, empty_items, _outputs(ledger, job))
    found += _wrong_pieces(ledger, job)
    return found


def _wrong_in_full(
    job: HistoryJob, failed: set[int], empty: set[int], outputs: list[list[Any]]
) -> list[str]:
    """Return what is wrong with the answer of a job that has succeeded."""
    found = []
    if failed != job.failing or empty != job.empty:
        found.append(f"{job.id}: failed {failed}, not {job.failing}; empty {empty}, {job.empty}")
    expected = [[i, i * 7 + 1] for i in range(len(job.items)) if i not in job.failing | job.empty]
    if [each[:2] for each in outputs] != expected:
        found.append(f"{job.id}: outputs {outputs!r:.300}, not {expected!r:.300}")
    return found


def _wrong_pieces(ledger: Ledger, job: HistoryJob) -> list[str]:
    """Return the pages whose outputs are of more than one run, or outside of their range."""
    if job.operation not in ("nemesis_pages", "nemesis_flaky", "nemesis_batch"):
        return []
    found = []
    for lo, hi, packed in ledger.pieces(job.id, 0, len(job.items)):
        outputs = codec.unpack(packed) if packed else []
        if len({run for _, _, run in outputs}) > 1:
            found.append(f"{job.id}: the outputs of [{lo}, {hi}) are of several holders: {outputs}")
        wanted = [i for i in range(lo, hi) if i not in job.failing | job.empty]
        if [each[0] for each in outputs] != wanted:
            found.append(f"{job.id}: [{lo}, {hi}) has the outputs {outputs}")
    return found


def _outputs(ledger: Ledger, job: HistoryJob) -> list[list[Any]]:
    packed = ledger.answer(job.id)
    if packed is not None:
        answer: list[list[Any]] = codec.unpack(packed)
        return answer
    return list(flattened(partials(ledger, job.id, 0, len(job.items))))
