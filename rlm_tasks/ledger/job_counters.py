"""Read the counters of one job or of many, with at most three round trips for a page of jobs.

One is for the jobs, one for their rounds, and one for the slots of the queues that jobs run in.
`JobReader.progress` reads one job, `Client.listed` a list.  Begin with `read_counters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from resilience.connections import answers_of, unreadable
from resilience.errors import RlmError
from rlm_tasks.ledger.reader import LedgerReader, facts_of, inflight_of
from rlm_tasks.ledger.round_ids import round_id
from scheduler.slots import SlotBoard

AT_ONCE = 500
"""One pipeline reads at most this many jobs."""


@dataclass(frozen=True, slots=True)
class JobCounters:
    """The facts of a job or a round, and the items of its running nodes."""

    job: str
    facts: dict[str, str]  # every counter and state; empty for an unknown job
    inflight: tuple[int, int, int]  # items done, failed and skipped by nodes that still run
    leased: int = 0  # nodes whose lease has not ended, parked ones left out


@dataclass(frozen=True, slots=True)
class JobReading:
    """The counters of a job, then of its rounds in order; and the server's time in ms."""

    parts: Sequence[JobCounters]
    now_ms: int
    served: bool = True  # live workers have slots for its queue

    @property
    def running(self) -> int:
        """The number of nodes that run: a node of a lost worker does not."""
        return sum(each.leased for each in self.parts) if self.served else 0


def read_counters(ledger: LedgerReader, jobs: Sequence[str]) -> list[JobReading | RlmError]:
    """Return for each job its counters, or the error of a record of it.

    An unknown job has empty facts.  Raises StoreUnavailable.
    """
    return [
        reading
        for at in range(0, len(jobs), AT_ONCE)
        for reading in _served(ledger, _page(ledger, jobs[at : at + AT_ONCE]))
    ]


def _served(
    ledger: LedgerReader, page: Sequence[JobReading | RlmError]
) -> list[JobReading | RlmError]:
    """Return the readings with the knowledge whether workers serve the queues of running jobs."""
    held = [each for each in page if isinstance(each, JobReading) and each.running]
    queues = sorted({each.parts[0].facts["queue"] for each in held})
    if not queues:
        return [*page]
    slots = SlotBoard(ledger.store, ledger.keys)
    answers = ledger.call(*(slots.take(each, 0) for each in queues))
    served = {queue for queue, (_, total) in zip(queues, answers, strict=True) if total}
    return [
        replace(each, served=each.parts[0].facts["queue"] in served)
        if isinstance(each, JobReading) and each.running
        else each
        for each in page
    ]


def _page(ledger: LedgerReader, jobs: Sequence[str]) -> list[JobReading | RlmError]:
    found, now_ms = _read(ledger, jobs)
    rounds = [round for each in found for round in _rounds_of(each)]
    parts = dict(zip(rounds, _read(ledger, rounds)[0], strict=True)) if rounds else {}
    return [_reading(each, [parts[id] for id in _rounds_of(each)], now_ms) for each in found]


def _reading(
    job: JobCounters | RlmError, rounds: Sequence[JobCounters | RlmError], now_ms: int
) -> JobReading | RlmError:
    parts: list[JobCounters] = []
    for each in (job, *rounds):
        if isinstance(each, RlmError):
            return each
        if each is job or each.facts:  # a round without facts has expired, or is not open yet
            parts.append(each)
    return JobReading(parts, now_ms)


def _rounds_of(job: JobCounters | RlmError) -> list[str]:
    if isinstance(job, RlmError):
        return []
    return [round_id(job.job, number + 1) for number in range(int(job.facts.get("rounds", 0)))]


def _read(ledger: LedgerReader, jobs: Sequence[str]) -> tuple[list[JobCounters | RlmError], int]:
    """Return the counters of jobs, and the server's time in ms, in one round trip."""

    now_ms = ledger.clock.now_ms()

    def read(client: Any) -> list[Any]:
        pipe = client.pipeline(transaction=False)
        for keys in map(ledger.keys.of, jobs):
            pipe.hgetall(keys.job)
            pipe.hvals(keys.inflight)
            pipe.zcount(keys.due, now_ms, "+inf")
        pipe.time()
        return answers_of(pipe)

    *answers, (seconds, micros) = ledger.call(read)
    every = zip(jobs, answers[::3], answers[1::3], answers[2::3], strict=True)
    return [_counters(ledger, *each) for each in every], seconds * 1000 + micros // 1000


def _counters(
    ledger: LedgerReader, job: str, record: Any, nodes: Any, held: Any
) -> JobCounters | RlmError:
    for answer in (record, nodes, held):
        if isinstance(answer, Exception):
            return unreadable(ledger.store.url, answer)
    try:
        facts = facts_of(job, record)
        leased = max(0, held - int(facts.get("parked", 0)))  # a parked node has its time there
        return JobCounters(job, facts, inflight_of(job, nodes), leased)
    except RlmError as error:
        return error
