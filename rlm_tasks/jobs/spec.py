"""What a worker must know of a job: the request, settled, as the ledger keeps it.

A record, no decisions.  Its schema number travels with every job: a worker reads its own and the
one before."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import StoredItems

SCHEMA = 1


class JobSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One job, settled."""

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
    patient: bool = False  # it waits while work of its priority is not taken in
    emits: dict[str, float | str] = {}  # counted when the job has succeeded
    preempts: bool = False  # less urgent nodes make room for its nodes
    parent: str = ""  # the job whose round it is
    round: int = 0  # which
    budget: dict[str, float] | None = (
        None  # what it may spend in all, by unit; {}: it is only counted; None: it spends nothing
    )
    cache_ttl_s: float = 0.0  # results are kept, and found, for so long; 0: they are not
    trace: str = ""  # the trace it was submitted under, as W3C Trace Context writes it

    @property
    def tree(self) -> str:
        """The job whose budget this one spends: itself, or the one it is a round of."""
        return self.parent or self.job

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do, and that was asked to be left out."""
        return self.n == 0 and self.skip_if_empty


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(JobSpec)


def dump(spec: JobSpec) -> bytes:
    """Return the spec as JSON."""
    return _encoder.encode(spec)


@lru_cache(maxsize=256)
def load(text: bytes) -> JobSpec:
    """Return the spec of a job; the same text is decoded once per process."""
    return _decoder.decode(text)
