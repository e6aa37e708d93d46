"""Count the nodes of open jobs by state: queued, running, parked.

It reads the sums that the scripts keep, and records of running nodes for `held_nodes` alone.
`Client.at_work`, and by it Flower, calls `jobs_at_work`; `JobReader.explain` calls `held_nodes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import redis

from resilience.connections import answers_of
from resilience.keys import JobKeys
from resilience.validation import readable
from rlm_tasks.ledger.reader import REASON, LedgerReader
from rlm_tasks.ledger.records import JobNodes, NodesAtWork


def nodes_at_work(ledger: LedgerReader, job: str, facts: Mapping[str, str]) -> NodesAtWork:
    """Return the sums of one job, in one round trip; `facts` are those of the ledger.

    Raises StoreUnavailable.
    """

    def read(client: redis.Redis) -> list[Any]:
        pipe = client.pipeline(transaction=False)
        _count(pipe, ledger.keys.of(job))
        return pipe.execute()

    queued, held = ledger.call(read)
    parked = min(held, int(facts.get("parked", 0)))
    reasons = {
        name.removeprefix(REASON): int(count)
        for name, count in facts.items()
        if name.startswith(REASON)
    }
    return NodesAtWork(queued, held - parked, parked, reasons if parked else {})


HELD_AT_ONCE = 100
"""The holders of this many nodes of a job are read."""


def held_nodes(ledger: LedgerReader, job: str, facts: Mapping[str, str]) -> NodesAtWork:
    """Return the sums of one job, with the workers that hold its running nodes.

    It takes one round trip, and two more if nodes run.  Raises StoreUnavailable.
    """
    sums = nodes_at_work(ledger, job, facts)
    if not sums.running:
        return sums
    first: list[bytes] = ledger.call(
        lambda client: client.zrange(ledger.keys.of(job).due, 0, HELD_AT_ONCE - 1)
    )
    records = ledger.records(job, [each.decode() for each in first])
    return replace(sums, holders=Counter(each.worker for each in records if each.state == "r"))


def jobs_at_work(ledger: LedgerReader, limit: int) -> list[JobNodes]:
    """Return the nodes of open jobs by state, for at most `limit` jobs.

    It takes two round trips for any number of jobs and nodes.  Raises StoreUnavailable.
    """
    jobs = ledger.due.jobs(limit)

    def read(client: redis.Redis) -> list[Any]:
        pipe = client.pipeline(transaction=False)
        for each in map(ledger.keys.of, jobs):
            pipe.hmget(each.job, "queue", "state", "parked")
            _count(pipe, each)
        return answers_of(pipe)

    found = ledger.call(read) if jobs else []
    every = zip(jobs, found[::3], found[1::3], found[2::3], strict=True)
    known = [each for each in every if not isinstance(each[1], list) or each[1][0]]
    return readable("the nodes of an open job", known, _nodes_of)


def _count(pipe: Any, keys: JobKeys) -> None:
    """Add to a pipeline the number of queued nodes, and of running and parked ones."""
    pipe.zcard(keys.waiting)
    pipe.zcard(keys.due)


def _nodes_of(counted: tuple[str, list[bytes], int, int]) -> JobNodes:
    job, facts, queued, held = counted
    queue, state, parked = facts[0], facts[1], min(held, int(facts[2] or 0))
    return JobNodes(
        job=job,
        queue=queue.decode(),
        state=state.decode(),
        queued=queued,
        running=held - parked,
        parked=parked,
    )
