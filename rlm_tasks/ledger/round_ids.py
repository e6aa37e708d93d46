"""The ids of a job's rounds, and the rounds that are open.

`engine.rounds` opens rounds under these ids; clients read progress by them.
"""

from __future__ import annotations

import uuid
from typing import Any

from rlm_tasks.ledger.ledger import Ledger

_ROUNDS = uuid.UUID("0b0e1a52-6c1f-5b0e-9f0e-5f1d3a3c7b11")
"""Namespace of the ids of rounds (RFC 4122, name-based)."""


def round_id(job: str, number: int) -> str:
    """Return the id of a job's round; the number of the first is 1."""
    return str(uuid.uuid5(_ROUNDS, f"{job}:{number}"))


def opened_rounds(ledger: Ledger, job: str) -> list[tuple[str, dict[str, str]]]:
    """Return (id, facts) of a job's open and ended rounds, in order.

    The facts of a round that has expired are empty.
    """
    count = int(ledger.facts(job).get("rounds", 0))
    ids = [round_id(job, number) for number in range(1, count + 1)]
    found = [(id, ledger.facts(id)) for id in ids]
    # The last one has no facts if the process that was to open it died before it did.
    return found if not found or found[-1][1] else found[:-1]


def expire_rounds(ledger: Ledger, job: str, ttl_s: int) -> None:
    """Let the keys of a job's rounds live for `ttl_s`: the job has ended.

    Raises StoreUnavailable.
    """
    rounds = [id for id, _ in opened_rounds(ledger, job)]

    def expire(client: Any) -> None:
        pipe = client.pipeline(transaction=False)
        for key in (key for id in rounds for key in ledger.keys.of(id)):
            pipe.expire(key, ttl_s)
        pipe.execute()

    if rounds:
        ledger.call(expire)
