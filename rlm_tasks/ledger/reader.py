"""Read the ledger: counters, records, partial answers and failures of jobs.

`Ledger` extends it; clients, reports and Flower read through it.  Begin with `LedgerReader.facts`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast, overload

import msgspec
import redis
import zstandard

from resilience.keys import Keys
from resilience.store import Call, OnOutage, Script, Store
from resilience.validation import readable
from rlm_tasks.errors import JobUnreadable
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.index_ranges import IndexRanges
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.due_index import DueIndex
from rlm_tasks.ledger.job_list import JobList
from rlm_tasks.ledger.quarantine import Quarantine
from rlm_tasks.ledger.records import NodeRecord, Split
from rlm_tasks.ledger.server_clock import ServerClock
from rlm_tasks.results import ItemFailure, JobEvent, Status
from rlm_tasks.settings.sections import LedgerSettings

PIECES_AT_ONCE, PIECES_BYTES = 256, 4 << 20
"""One script reads at most this many partials; it stops when it has this many bytes."""
MEMBERS_AT_ONCE = 5000
"""One command reads at most this many members of a sorted set."""
RECORDS_AT_ONCE = 1000
"""About this many records of nodes are read by one command."""
MAX_FAILURES = 1000
"""Failures of a job that are kept, and shown, in full."""
REASON = "why:"
"""Fields of a job's hash that begin so have the number of nodes parked for a reason."""
_COUNTS = (
    *("n", "done", "failed", "skipped", "pending", "nodes", "splits", "yields"),
    *("depth", "busy_us", "peak_kb", "validated", "fail_limit"),
)
_NUMBERS = frozenset(
    (
        *(*_COUNTS, "parked", "rounds"),
        *("opened_ms", "started_ms", "closed_ms", "stop_ms", "deadline", "start_by"),
    )
)
_UNLIKE = (
    *(ArithmeticError, LookupError, RecursionError, TypeError, ValueError),
    *(msgspec.MsgspecError, zstandard.ZstdError),
)
_PIECES = Script.load("rlm_tasks.ledger", "pieces", prelude="prelude")


class LedgerReader:
    """The methods of the ledger that only read.

    `on_outage` says what its calls do while Redis is away (see `Store.call`).  A client's calls
    raise, because the client retries in its own loop.  A worker's calls wait as long as a lease,
    because its claim is lost after that.
    """

    def __init__(
        self, store: Store, keys: Keys, settings: LedgerSettings, *, on_outage: OnOutage = "raise"
    ) -> None:
        self.store, self.keys, self.settings = store, keys, settings
        self.on_outage: OnOutage = on_outage
        self.clock = ServerClock(store)
        self.due = DueIndex(store, keys.due, on_outage=on_outage)
        self.job_list = JobList(store, keys, on_outage=on_outage)
        self.quarantine = Quarantine(store, keys, on_outage=on_outage)

    @overload
    def call(self, command: Callable[[redis.Redis], Any], /) -> Any: ...
    @overload
    def call(self, *scripts: Call) -> list[Any]: ...
    def call(self, *what: Any) -> Any:
        """Call Redis with this ledger's rule for outages.  Raises StoreUnavailable."""
        return self.store.call(*what, on_outage=self.on_outage)

    # --- a job ---------------------------------------------------------------------------------

    def facts(self, job: str) -> dict[str, str]:
        """Return every counter and state of a job; empty for an unknown one.

        Raises JobUnreadable when a field is missing, or is no number.
        """
        return facts_of(job, self._hash(self.keys.of(job).job))

    def spec(self, job: str) -> JobSpec | None:
        """Return the specification of a job, None for an unknown one.  Raises JobUnreadable."""
        text = self._field(self.keys.of(job).job, "spec")
        return specs.load(text, job) if text else None

    def answer(self, job: str) -> bytes | None:
        """Return the packed answer of a job.

        None: it has not succeeded, or its outputs are kept as pages.
        """
        return self._field(self.keys.of(job).blobs, "output")

    def failures(self, job: str) -> list[ItemFailure]:
        """Return the first 1,000 failed items, in order."""
        found = self._values(self.keys.of(job).failures)
        records = readable(f"a failure of job {job}", found, _failures_of)
        in_order = sorted(filter(None, records), key=lambda each: each[0].index)
        return list(itertools.islice(itertools.chain.from_iterable(in_order), MAX_FAILURES))

    def events(self, job: str, after: str = "") -> list[JobEvent]:
        """Return the events of a job, the oldest first; with an id only those after it."""
        first = f"({after}" if after else "-"
        found: Any = self.call(lambda client: client.xrange(self.keys.of(job).events, first))
        return readable(f"an event of job {job}", found, _event)

    def inflight(self, job: str) -> tuple[int, int, int]:
        """Return the items done, failed and skipped so far by nodes that still run."""
        return inflight_of(job, self._values(self.keys.of(job).inflight))

    def failed_items(self, job: str) -> list[int]:
        """Return the index of every failed item, in order."""
        return list(self.failed_ranges(job))

    def failed_ranges(self, job: str) -> IndexRanges:
        """Return every failed item as ranges.  Raises JobUnreadable."""
        with reading(job, "the list of failed items"):
            return ranges_of(self._members(self.keys.of(job).failed))

    def empty_items(self, job: str) -> list[int]:
        """Return the index of every item skipped as empty, in order.  Raises JobUnreadable."""
        with reading(job, "the list of skipped items"):
            return [int(each) for each in self._members(self.keys.of(job).empty)]

    # --- its nodes and partials ----------------------------------------------------------------

    def records(self, job: str, nodes: Sequence[str]) -> list[NodeRecord]:
        """Return the records of some nodes."""
        if not nodes:
            return []
        texts: Any = self.call(lambda client: client.hmget(self.keys.of(job).nodes, list(nodes)))
        found = [each for each in zip(nodes, texts, strict=True) if each[1]]
        return readable(f"a node of job {job}", found, lambda each: NodeRecord.parse(*each))

    def all_records(self, job: str) -> list[NodeRecord]:
        """Return the record of every node of a job that has one, in no order.

        A job with millions of nodes has as many; `read_tree` reads a bounded number.
        """
        found: Any = self.call(
            lambda client: list(client.hscan_iter(self.keys.of(job).nodes, count=RECORDS_AT_ONCE))
        )
        return readable(
            f"a node of job {job}",
            dict(found).items(),
            lambda each: NodeRecord.parse(each[0].decode(), each[1]),
        )

    def split(self, job: str, split: str) -> Split | None:
        """Return a chord's range and slot, None for an unknown one."""
        text = self._field(self.keys.of(job).splits, split)
        return msgspec.json.decode(text, type=Split) if text else None

    def ranges(self, job: str) -> list[tuple[int, int]]:
        """Return the ranges whose partials are stored, in order.  Raises JobUnreadable."""
        with reading(job, "the list of partials"):
            edges = [name.split(b":") for name in self._members(self.keys.of(job).pieces)]
            return [(int(lo), int(hi)) for lo, hi in edges]

    def pieces(self, job: str, lo: int, hi: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield (lo, hi, packed partial) of a range in item order, a page at a time.

        Raises JobUnreadable.
        """
        at = lo
        while at < hi:
            most = (PIECES_AT_ONCE, PIECES_BYTES)
            [page] = self.call(Call(_PIECES, self.keys.of(job), (at, hi, *most)))
            if not page:
                return
            for name, packed in zip(page[::2], page[1::2], strict=True):
                with reading(job, "the list of partials"):
                    start, at = (int(edge) for edge in name.split(b":"))
                yield start, at, packed

    # --- plain commands ------------------------------------------------------------------------

    def _hash(self, key: str) -> dict[bytes, bytes]:
        return cast(dict[bytes, bytes], self.call(lambda client: client.hgetall(key)))

    def _values(self, key: str) -> list[bytes]:
        return cast(list[bytes], self.call(lambda client: client.hvals(key)))

    def _field(self, key: str, name: str) -> bytes | None:
        return cast(bytes | None, self.call(lambda client: client.hget(key, name)))

    def _members(self, key: str) -> list[bytes]:
        """Return the members of a sorted set of items or ranges, in pages by their first item."""
        found: list[bytes] = []
        after = "-inf"
        while True:
            read = partial(
                redis.Redis.zrange,
                name=key,
                start=after,
                end="+inf",
                byscore=True,
                offset=0,
                num=MEMBERS_AT_ONCE,
            )
            page = cast(list[bytes], self.call(read))
            found += page
            if len(page) < MEMBERS_AT_ONCE:
                return found
            after = f"({page[-1].partition(b':')[0].decode()}"


def facts_of(job: str, found: Mapping[bytes, bytes]) -> dict[str, str]:
    """Return the facts of a job from its hash in Redis.  Raises JobUnreadable."""
    facts = {
        name.decode(errors="replace"): value.decode(errors="replace")
        for name, value in found.items()
    }
    if facts:
        with reading(job, "the record"):
            _check(facts)
    return facts


def inflight_of(job: str, values: Sequence[bytes]) -> tuple[int, int, int]:
    """Return the items done, failed and skipped by running nodes, from their hash in Redis."""
    counts = readable(f"the progress of a node of job {job}", values, _progress)
    done, failed, skipped = map(sum, zip((0, 0, 0), *counts, strict=True))
    return done, failed, skipped


def first_failure(ledger: LedgerReader, job: str) -> ItemFailure | None:
    """Return the failed item with the lowest index; None without one, or if it is not kept.

    Raises JobUnreadable, StoreUnavailable.
    """
    keys = ledger.keys.of(job)
    first: list[bytes] = ledger.call(lambda client: client.zrange(keys.failed, 0, 0))
    if not first:
        return None
    index = first[0].partition(b":")[0]
    text = ledger.call(lambda client: client.hget(keys.failures, index))
    with reading(job, "the first failure"):
        return _failures_of(text)[0] if text else None


def ranges_of(members: Sequence[bytes]) -> IndexRanges:
    """Return failed items from their names in the ledger: an index, or a range "lo:hi"."""
    edges = (member.split(b":") for member in members)
    return IndexRanges(
        (int(each[0]), int(each[1]) if each[1:] else int(each[0]) + 1) for each in edges
    )


@contextlib.contextmanager
def reading(job: str, what: str) -> Iterator[None]:
    """Raise JobUnreadable for any error by which a record of a job is no such record."""
    try:
        yield
    except _UNLIKE as error:
        raise JobUnreadable(job, type(error).__name__, what) from None


def _check(facts: Mapping[str, str]) -> None:
    Status(facts["state"])
    for name in ("queue", "phase", *_COUNTS):
        facts[name]
    for name, value in facts.items():
        if name in _NUMBERS or name.startswith(REASON):
            int(value)
    if error := facts.get("error"):
        msgspec.json.decode(error, type=_JobError)


class _JobError(msgspec.Struct):
    """The fields that an error of a whole job has at least."""

    type: str
    message: str


def _event(found: tuple[bytes, Mapping[bytes, bytes]]) -> JobEvent:
    id, entry = found
    return JobEvent(
        at=int(entry[b"ms"]) / 1000,
        event=entry[b"event"].decode(),
        detail=entry[b"detail"].decode(),
        id=id.decode(),
    )


def _progress(text: bytes) -> tuple[int, int, int]:
    done, failed, skipped = map(int, text.split(b":"))
    return done, failed, skipped


def _failures_of(text: bytes) -> list[ItemFailure]:
    """Return the failures of a record: one, or one for each item of a range."""
    record = msgspec.json.decode(text)
    index = record.pop("index")
    until = min(record.pop("until", index + 1), index + MAX_FAILURES)
    return [msgspec.convert({"index": each, **record}, ItemFailure) for each in range(index, until)]
