"""Count the nodes of all open jobs by state: queued, running, parked.

`Client.at_work`, and by it Flower, calls `jobs_at_work`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import redis

from resilience.keys import Keys
from rlm_tasks.ledger.reader import LedgerReader
from rlm_tasks.ledger.records import JobNodes, NodeRecord

NODES_COUNTED = 1000
"""At most this many running and parked nodes of a job are counted."""


def jobs_at_work(ledger: LedgerReader, limit: int) -> list[JobNodes]:
    """Return the nodes of open jobs by state, for at most `limit` jobs.

    It takes three round trips for any number of jobs.  Raises StoreUnavailable.
    """
    jobs, keys = ledger.due.jobs(limit), ledger.keys
    first: list[Any] = ledger.call(lambda client: _facts(client, keys, jobs))
    held = first[2::3]
    nodes: list[Any] = ledger.call(lambda client: _records(client, keys, jobs, held))
    found = zip(jobs, first[::3], first[1::3], nodes, strict=True)
    return [
        _nodes_of(job, facts, queued, records) for job, facts, queued, records in found if facts[0]
    ]


def _facts(client: redis.Redis, keys: Keys, jobs: Sequence[str]) -> list[Any]:
    pipe = client.pipeline(transaction=False)
    for each in map(keys.of, jobs):
        pipe.hmget(each.job, "queue", "state")
        pipe.zcard(each.waiting)
        pipe.zrange(each.due, 0, NODES_COUNTED - 1)
    return pipe.execute()


def _records(
    client: redis.Redis, keys: Keys, jobs: Sequence[str], held: Sequence[list[bytes]]
) -> list[Any]:
    pipe = client.pipeline(transaction=False)
    for each, names in zip(map(keys.of, jobs), held, strict=True):
        pipe.hmget(each.nodes, names or ["none"])
    return pipe.execute()


def _nodes_of(
    job: str, facts: Sequence[bytes], queued: int, records: Sequence[bytes | None]
) -> JobNodes:
    states = Counter(NodeRecord.parse("", text).state for text in records if text)
    queue, state = facts
    return JobNodes(
        job=job,
        queue=queue.decode(),
        state=state.decode(),
        queued=queued,
        running=states["r"],
        parked=states["p"],
    )
