"""A job's request with all defaults filled in, as the ledger keeps it for workers.

`requests` makes it, the ledger stores it, the engine reads it.  Each job carries the schema number:
a worker reads its own schema and the one before.  Schema 1 had `params` as JSON, schema 2 has them
by the codec of items.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from rlm_tasks.errors import JobUnreadable
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import RangeSource, StoredItems

SCHEMA = 2


class JobSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One job's request with all defaults filled in."""

    job: str
    operation: str
    source: StoredItems
    n: int
    shape: Shape
    queue: str
    schema: int = 1  # as schema 1 leaves it out; requests have SCHEMA
    version: int = 1
    params: dict[str, Any] = {}  # shared by all items: `Context.params` is a copy
    packed_params: bytes = b""  # the same by the codec; empty without params
    priority: str = "normal"
    kind: str = "recursive"
    continue_on_error: bool = False
    error_threshold: float | None = None
    skip_if_empty: bool = False
    validate: bool = False
    early_termination_threshold: float | None = None
    timeout_ms: float | None = None
    queue_timeout_ms: float | None = None  # a worker must begin it within this time
    description: str = ""
    complexity: str = ""
    estimate_s: float = 0.0  # expected time of its longest item; 0: unknown
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
    """Return the spec as JSON, in the form of its schema.

    Raises NotStorable for params that cannot be stored.
    """
    if spec.schema == 1:  # a round of an older client's job; older workers read it
        return _encoder.encode(msgspec.structs.replace(spec, packed_params=b""))
    packed = codec.pack(spec.params) if spec.params else b""
    return _encoder.encode(msgspec.structs.replace(spec, params={}, packed_params=packed))


def load(text: bytes, job: str = "") -> JobSpec:
    """Return the spec of a job from its JSON; each process decodes the same text once.

    `job` is its id, for the error.  Raises JobUnreadable.
    """
    try:
        return _load(text)
    except msgspec.MsgspecError as error:  # its text names fields and types, and no values
        raise JobUnreadable(job, str(error)) from None
    except Exception as error:
        raise JobUnreadable(job, type(error).__name__) from None


@lru_cache(maxsize=256)
def _load(text: bytes) -> JobSpec:
    spec = _decoder.decode(text)
    if not spec.packed_params:
        return spec
    packed = codec.decompress(spec.packed_params)
    return msgspec.structs.replace(spec, params=codec.decode(packed), packed_params=packed)


UNREADABLE = "(cannot be read)"
"""The operation of a job whose specification cannot be read, in lists of jobs."""


def operation_of(text: bytes | None) -> str:
    """Return the operation in a specification's JSON; `UNREADABLE` when it cannot be read."""
    try:
        return load(text or b"").operation
    except JobUnreadable:
        return UNREADABLE


def unreadable(error: JobUnreadable, facts: Mapping[str, str]) -> JobSpec:
    """Return a specification that stands for one that cannot be read, with what the ledger knows.

    Raises ValueError when `facts` have no number of items.
    """
    queue = facts.get("queue", "")
    return JobSpec(
        job=error.job_id,
        operation=UNREADABLE,
        source=RangeSource(0, 1),
        n=int(facts.get("n", "")),
        shape=Shape("flat"),
        queue=queue,
        priority=queue.rpartition(".")[2],
        description=error.why,
    )
