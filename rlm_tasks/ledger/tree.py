"""Read the records of a job's nodes: all of a small tree, a bounded part of a large one.

`JobReader.tree` calls `read_tree`.
"""

from __future__ import annotations

from typing import Any

import redis

from resilience.keys import JobKeys
from resilience.validation import readable
from rlm_tasks.ledger.reader import RECORDS_AT_ONCE, LedgerReader
from rlm_tasks.ledger.records import ROOT, NodeRecord


def read_tree(ledger: LedgerReader, job: str, limit: int) -> tuple[list[NodeRecord], int]:
    """Return at most `limit` records of a job's nodes, and the number of all its nodes so far.

    The part of a larger tree begins with the root.  Then come nodes at work or parked, queued ones,
    and the last that ended.  Raises StoreUnavailable.
    """
    keys = ledger.keys.of(job)

    def sizes(client: redis.Redis) -> list[Any]:
        pipe = client.pipeline(transaction=False)
        pipe.hlen(keys.nodes)
        pipe.hmget(keys.job, "nodes", "nodes_skipped", "pending")
        return pipe.execute()

    stored, counts = ledger.call(sizes)
    total = max(stored, sum(readable("a number of nodes", filter(None, counts), int)))
    if stored <= limit:
        return ledger.all_records(job), total
    chosen = _newest(ledger, keys, limit)
    return [
        record
        for at in range(0, len(chosen), RECORDS_AT_ONCE)
        for record in ledger.records(job, chosen[at : at + RECORDS_AT_ONCE])
    ], total


def _newest(ledger: LedgerReader, keys: JobKeys, limit: int) -> list[str]:
    """Return the ids of at most `limit` nodes, the most interesting first."""

    def read(client: redis.Redis) -> list[Any]:
        pipe = client.pipeline(transaction=False)
        pipe.zrange(keys.due, 0, limit - 1)
        pipe.zrange(keys.waiting, 0, limit - 1)
        pipe.lrange(keys.ended, -limit, -1)
        return pipe.execute()

    held, queued, ended = ledger.call(read)
    every = (each.decode(errors="replace") for each in (*held, *queued, *reversed(ended)))
    return list(dict.fromkeys((ROOT, *every)))[:limit]
