"""A job's request with all defaults filled in, as the ledger keeps it for workers.

`requests` makes it, the ledger stores it, the engine reads it.  Each job carries the schema number:
a worker reads its own schema and the one before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import StoredItems

SCHEMA = 1


class JobSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One job's request with all defaults filled in."""

    job: str
    operation: str
    source: StoredItems
    n: int
    shape: Shape
    queue: str
    schema: int = SCHEMA
    version: int = 1
    params: dict[str, Any] = {}
    priority: str = "normal"
    kind: str = "recursive"
    continue_on_error: bool = False
    error_threshold: float | None = None
    skip_if_empty: bool = False
    validate: bool = False
    early_termination_threshold: float | None = None
    timeout_ms: float | None = None
    description: str = ""
    complexity: str = ""
    idempotency_key: str = ""
    patient: bool = False  # it waits, already open, while admission refuses its priority
    emits: dict[str, float | str] = {}  # counted when the job has succeeded
    preempts: bool = False  # nodes of less urgent jobs yield their slots to its nodes
    parent: str = ""  # the job whose round it is
    round: int = 0  # the number of that round
    budget: dict[str, float] | None = None
    """Most it may spend, by unit; {}: spending is only counted; None: it spends nothing."""
    cache_ttl_s: float = 0.0  # how long its answers are kept for other jobs; 0: not at all
    trace: str = ""  # the trace it was submitted under, in the form of W3C Trace Context

    @property
    def tree(self) -> str:
        """The id of the job whose budget this one spends: its own, or that of its parent."""
        return self.parent or self.job

    @property
    def empty(self) -> bool:
        """Whether it has no items, and its request skips empty ones."""
        return self.n == 0 and self.skip_if_empty


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(JobSpec)


def dump(spec: JobSpec) -> bytes:
    """Return the spec as JSON."""
    return _encoder.encode(spec)


@lru_cache(maxsize=256)
def load(text: bytes) -> JobSpec:
    """Return the spec of a job from its JSON; each process decodes the same text once."""
    return _decoder.decode(text)
