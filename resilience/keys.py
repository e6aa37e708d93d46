"""The names of all Redis keys of the platform, each with its Redis type and content.

All three packages take their keys from here, and no other module builds one (a test checks this).
Begin with `Keys` for one namespace, then `JobKeys` for one job.

The part of a key in braces is its hash tag.  Keys with the same hash tag lie in one cluster slot,
so one script may use them together.  All keys of a job carry the job's id as their hash tag.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

TRACED = "traced"
"""A field of a job's hash.  The process that sets it first reports the trace of the job's end."""


class JobKeys(NamedTuple):
    """The keys of one job, in the order in which every ledger script names them."""

    job: str  # HASH    state, counts, limits, the request itself
    nodes: str  # HASH    node id -> JSON record
    due: str  # ZSET    running or parked node id -> ms at which its lease ends, or it wakes
    waiting: str  # ZSET    queued node id -> ms at which its message was sent
    splits: str  # HASH    split id -> JSON: range and the slot it fills
    pieces: str  # ZSET    "lo:hi" of every partial, scored by lo
    blobs: str  # HASH    "lo:hi" -> packed partial; "output" -> packed answer
    failed: str  # ZSET    index of every failed item, or "lo:hi" of a range, scored by the first
    empty: str  # ZSET    index of every item skipped as empty, scored by itself
    failures: str  # HASH    index -> JSON: type, message, traceback (the first 1,000)
    deaths: str  # HASH    index -> JSON: how often its process died in it, and the last cause
    quarantine: str  # HASH    index -> JSON: an item that is not run again, and the reason
    inflight: str  # HASH    running node id -> "done:failed:skipped" so far
    events: str  # STREAM  the job's bounded log; waiting clients block on it
    items: str  # ZSET    "lo:hi" of every stored block of items, scored by lo
    blocks: str  # HASH    "lo:hi" -> packed block of items
    ended: str  # LIST    id of every ended node whose record is kept, the oldest first


class PressureKeys(NamedTuple):
    """The keys of the platform's load, under one hash tag."""

    hosts: str  # HASH    worker -> ms, and its report as JSON
    cluster: str  # STRING  the monitor's report as JSON; it expires unless it is renewed
    forced: str  # STRING  the level that an operator has ordered for a drill
    history: str  # STREAM  the monitor's reports, bounded
    state: str  # STRING  the memory of the monitor from one sample to the next
    turn: str  # STRING  the worker that takes the next sample; no other worker does meanwhile
    changes: str  # channel on which each level is published


class AlertKeys(NamedTuple):
    """The keys of all alerts, under one hash tag."""

    history: str  # STREAM  the alerts, bounded
    day: str  # ZSET    id of each alert of the last day -> ms at which it was raised
    totals: str  # HASH    severity -> number of alerts since the first one


@functools.lru_cache(maxsize=64)  # a node asks for the keys of its job several times
def _keys_of(namespace: str, job: str) -> JobKeys:
    tagged = f"{namespace}:{{{job}}}:"
    return JobKeys(*(tagged + field for field in JobKeys._fields))


class Keys:
    """The keys of one namespace; several platforms can share a Redis with different namespaces."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.prefix = f"{namespace}:"  # prefix of every key; kombu's keys get it from Celery
        self.redbeat = f"{namespace}:redbeat:"  # prefix of celery-redbeat's keys
        self.due = f"{namespace}:due"  # ZSET    open job -> earliest ms at which it wants a sweep
        # ZSET    active job, while the number of these is limited -> ms at which it became active
        self.places = f"{namespace}:due:places"
        self.jobs = f"{namespace}:jobs"  # ZSET    job -> ms at which it was opened
        self.slots = f"{namespace}:slots"  # HASH    worker -> JSON: total, free, queues, at
        # ZSET    job with quarantined items -> ms of the last one
        self.quarantined = f"{namespace}:quarantine"
        self.events = f"{namespace}:events"  # STREAM  event -> JSON, at -> seconds; bounded
        self.dead = f"{namespace}:dead"  # STREAM  entries of queues that are no messages; bounded
        self.breakers = f"{namespace}:{{breakers}}:names"  # ZSET    name -> ms of its last change
        # HASH    kind of guard -> decisions without Redis; at -> ms of the last report
        self.alone = f"{namespace}:{{guards}}:alone"
        self.probe = f"{namespace}:probe"  # STRING, for a second: Redis takes writes
        self.faults = (
            f"{namespace}:{{faults}}:patterns",  # HASH    recurring fault -> JSON
            f"{namespace}:{{faults}}:seen",  # ZSET    recurring fault -> ms of the last one
        )

    def queue(self, name: str) -> str:
        """Return the key (LIST) of a queue of the platform's own app, as kombu names it."""
        return self.prefix + name

    def of(self, job: str) -> JobKeys:
        """Return the keys of one job."""
        return _keys_of(self.namespace, job)

    def staged(self, job: str, token: str) -> tuple[str, str]:
        """Return the keys of items (ZSET) and blocks (HASH) that one client stores before the job
        is open.
        """
        tagged = f"{self.namespace}:{{{job}}}:staged:{token}:"
        return tagged + "items", tagged + "blocks"

    # --- guards: one hash tag for each, so that one script may use all its keys ----------------

    def breaker(self, name: str) -> tuple[str, str, str]:
        """Return a breaker's keys.

        - its state: HASH
        - its probes: ZSET permit -> ms of expiry
        - its waiters: ZSET waiter -> urgency and ms
        """
        tagged = f"{self.namespace}:{{breakers}}:{name}:"
        return tagged + "state", tagged + "probes", tagged + "waiting"

    def bucket(self, name: str, grant: str, limits: Iterable[tuple[str, str]]) -> tuple[str, ...]:
        """Return a bucket's keys, in the order in which its scripts name them.

        - the amounts of one grant, until it is settled or expires: HASH
        - the processes that take from the bucket: ZSET process -> us
        - the waiters during a pause: ZSET waiter -> urgency
        - each limit: HASH level, time, hold, the cells of its window

        A limit is a unit and a scope; "" is no scope.
        """
        tagged = f"{self.namespace}:{{bucket:{name}}}:"
        named = (f"{unit}:{scope}" if scope else unit for unit, scope in limits)
        return (
            f"{tagged}grant:{grant}",
            tagged + "takers",
            tagged + "line",
            *(tagged + limit for limit in named),
        )

    def bulkhead(self, name: str) -> tuple[str, str, str, str]:
        """Return a bulkhead's keys.

        - its permits: ZSET permit -> ms of expiry
        - its use and limit: HASH
        - its use by host: HASH host -> weight
        - its waiters: ZSET waiter -> urgency and ms
        """
        tagged = f"{self.namespace}:{{bulkhead:{name}}}:"
        return tagged + "permits", tagged + "about", tagged + "hosts", tagged + "waiting"

    def flight(self, name: str, key: str, memo: str = "") -> tuple[str, str, str, str]:
        """Return the keys of one call in a single flight.

        - the caller that makes it, and the number of waiters: HASH
        - the last value that landed for them: HASH
        - its value in the cache: STRING
        - its value in one memo: STRING
        """
        tagged = f"{self.namespace}:{{flight:{name}:{key}}}:"
        return tagged + "made", tagged + "landed", tagged + "cache", f"{tagged}memo:{memo}"

    def budget(self, service: str) -> str:
        """Return the retry budget of a service.  HASH balance, time."""
        return f"{self.namespace}:{{budget:{service}}}"

    def spending(self, name: str) -> tuple[str, ...]:
        """Return a budget's keys.

        - its open accounts: HASH account -> JSON
        - its folded accounts: HASH account -> JSON
        - its charges: HASH id -> JSON
        - the ends of their leases: ZSET id -> ms
        - the amounts spent by label: HASH label -> JSON
        """
        tagged = f"{self.namespace}:{{spending:{name}}}:"
        return tuple(
            tagged + field for field in ("accounts", "folded", "charges", "leases", "labels")
        )

    def timing(self, operation: str) -> str:
        """Return the histogram of an operation's item durations.  HASH bucket -> weight."""
        return f"{self.namespace}:{{timing:{operation}}}"

    # --- scheduling ----------------------------------------------------------------------------

    def pressure(self) -> PressureKeys:
        """Return the keys of the platform's load."""
        return PressureKeys(
            *(f"{self.namespace}:{{pressure}}:{field}" for field in PressureKeys._fields)
        )

    def admission(self, queue: str) -> str:
        """Return the nodes that wait for admission to a queue.  ZSET "job node" -> ms of entry."""
        return f"{self.namespace}:{{admission}}:{queue}"

    def preemption(self, queue: str) -> tuple[str, str, str]:
        """Return the keys of preemption in a queue.

        - the urgent nodes that wait for a slot: ZSET node -> ms from which another node may yield
        - the number of nodes about to yield: STRING
        - the slots about to become free: ZSET slot -> ms until which they are expected
        """
        tagged = f"{self.namespace}:{{preemption:{queue}}}:"
        return tagged + "waiting", tagged + "won", tagged + "coming"

    def usage(self, operation: str) -> tuple[str, str]:
        """Return the keys of an operation's usage.

        - the names of all operations that have run: SET
        - the counts of this one: HASH
        """
        return f"{self.namespace}:{{usage}}:names", f"{self.namespace}:{{usage}}:of:{operation}"

    def snapshots(self, operation: str) -> tuple[str, str]:
        """Return the keys of an operation's history.

        - its snapshots: LIST of JSON, newest first
        - the operations that became slower: HASH operation -> s
        """
        return (
            f"{self.namespace}:{{usage}}:snapshots:{operation}",
            f"{self.namespace}:{{usage}}:slower",
        )

    def alerts(self) -> AlertKeys:
        """Return the keys of all alerts."""
        return AlertKeys(*(f"{self.namespace}:{{alerts}}:{field}" for field in AlertKeys._fields))

    def alert(self, kind: str, subject: str) -> str:
        """Return the record of the last alert of a kind and subject.  HASH ms, rank, held."""
        return f"{self.namespace}:{{alerts}}:last:{kind}:{subject}"

    # --- language models -----------------------------------------------------------------------

    def model(self, name: str, *kind: str) -> str:
        """Return the sums over all calls to a model, or over those of a kind.

        HASH name -> amount.
        """
        return ":".join((f"{self.namespace}:{{models}}", *kind, name))

    def endpoints(self) -> tuple[str, str, str]:
        """Return the keys of the health of endpoints of models.

        - the latest check of each: HASH endpoint -> JSON
        - its latest answer to a call: HASH endpoint -> ms
        - the worker that checks them; no other does meanwhile: STRING worker
        """
        tagged = f"{self.namespace}:{{models}}:"
        return tagged + "endpoints", tagged + "answers", tagged + "turn"
