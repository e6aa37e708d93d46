"""Which rounds a job has."""

from __future__ import annotations

import uuid

from rlm_tasks.ledger.ledger import Ledger

_ROUNDS = uuid.UUID("0b0e1a52-6c1f-5b0e-9f0e-5f1d3a3c7b11")
"""Namespace of the ids of rounds (RFC 4122, name-based)."""


def round_id(job: str, number: int) -> str:
    """Return the id of a job's round, from 1."""
    return str(uuid.uuid5(_ROUNDS, f"{job}:{number}"))


def opened(ledger: Ledger, job: str) -> list[tuple[str, dict[str, str]]]:
    """Return the rounds of a job that there are, in order: id and facts, which are empty for one
    that has expired.
    """
    count = int(ledger.facts(job).get("rounds", 0))
    found = [
        (id, ledger.facts(id)) for id in (round_id(job, number) for number in range(1, count + 1))
    ]
    return (
        found if not found or found[-1][1] else found[:-1]
    )  # whoever was to open the last one has died before
