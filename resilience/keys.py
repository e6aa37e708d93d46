"""Every Redis key of the platform, spelled once, with its type beside it.

A key that belongs to one job carries the job's id as its hash tag, so all keys of a job
share one cluster slot and one script may touch them together.
"""

from __future__ import annotations

from typing import NamedTuple


class JobKeys(NamedTuple):
    """The keys of one job, in the order in which every ledger script names them."""

    job: str  # HASH    state, counts, limits, the request itself
    nodes: str  # HASH    node id -> JSON record
    due: str  # ZSET    running or parked node id -> ms at which its lease ends, or it wakes
    waiting: str  # ZSET    queued node id -> ms at which its message was sent
    splits: str  # HASH    split id -> JSON: range and the slot it fills
    pieces: str  # ZSET    "lo:hi" of every partial, scored by lo
    blobs: str  # HASH    "lo:hi" -> packed partial; "output" -> packed answer
    failed: str  # ZSET    index of every failed item, scored by itself
    empty: str  # ZSET    index of every item skipped as empty, scored by itself
    failures: str  # HASH    index -> JSON: type, message, traceback (the first 1,000)
    deaths: (
        str  # HASH    index -> JSON: how often its process died while it ran, of what the last time
    )
    quarantine: str  # HASH    index -> JSON: an item that is not run again, and why
    inflight: str  # HASH    running node id -> "done:failed:skipped" so far
    events: str  # STREAM  the job's bounded log; waiting clients block on it
    items: str  # ZSET    "lo:hi" of every stored block of items, scored by lo
    blocks: str  # HASH    "lo:hi" -> packed block of items


class PressureKeys(NamedTuple):
    """What is known of the platform's load, under one hash tag."""

    hosts: str  # HASH    worker -> ms, and its report as JSON
    cluster: str  # STRING  the monitor's report as JSON, gone when nobody renews it
    forced: str  # STRING  a level that is ordered for a drill
    history: str  # STREAM  the monitor's reports, bounded
    state: str  # STRING  what the monitor must remember from one look to the next
    turn: str  # STRING  who looks; nobody else does in the meantime
    changes: str  # channel on which each level is told


class Keys:
    """Key names under one namespace, so that several platforms can share a Redis."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.due = f"{namespace}:due"  # ZSET    open job -> earliest ms at which it wants a sweep
        self.places = f"{namespace}:due:places"  # ZSET    job that is at work, while their number is bound -> ms since which
        self.jobs = f"{namespace}:jobs"  # ZSET    job -> ms at which it was opened
        self.slots = f"{namespace}:slots"  # HASH    worker -> JSON: total, free, queues, at
        self.quarantined = (
            f"{namespace}:quarantine"  # ZSET    job with quarantined items -> ms of the last one
        )

    def of(self, job: str) -> JobKeys:
        """Return the keys of one job."""
        tagged = f"{self.namespace}:{{{job}}}:"
        return JobKeys(*(tagged + field for field in JobKeys._fields))

    # --- what guards share: a hash tag for each, so that one script may touch all keys of it ---

    def breakers(self) -> str:
        """Return the index of all breakers.  ZSET name -> ms of its last change."""
        return f"{self.namespace}:{{breakers}}:names"

    def breaker(self, name: str) -> tuple[str, str, str]:
        """Return a breaker's state (HASH), its probes (ZSET permit -> ms of expiry), who waits for
        it (ZSET).
        """
        tagged = f"{self.namespace}:{{breakers}}:{name}:"
        return tagged + "state", tagged + "probes", tagged + "waiting"

    def bucket(self, name: str, limit: str) -> str:
        """Return one limit of a bucket.  HASH level, time, hold, the cells of its window."""
        return f"{self.namespace}:{{bucket:{name}}}:{limit}"

    def reservation(self, bucket: str, id: str) -> str:
        """Return what one grant of a bucket took.  HASH, until it is settled or expires."""
        return f"{self.namespace}:{{bucket:{bucket}}}:grant:{id}"

    def bulkhead(self, name: str) -> tuple[str, str, str, str]:
        """Return a bulkhead's permits (ZSET permit -> ms of expiry), use and limit (HASH), use by
        host (HASH), who waits for it (ZSET)."""
        tagged = f"{self.namespace}:{{bulkhead:{name}}}:"
        return tagged + "permits", tagged + "about", tagged + "hosts", tagged + "waiting"

    def flight(self, name: str, key: str) -> tuple[str, ...]:
        """Return who makes a call and how many wait for it (HASH), the last value that was landed
        for those (HASH), its value in the cache (STRING), and what the names of memos are put
        behind (STRING each)."""
        tagged = f"{self.namespace}:{{flight:{name}:{key}}}:"
        return tagged + "made", tagged + "landed", tagged + "cache", tagged + "memo:"

    def pressure(self) -> PressureKeys:
        """Return the keys of the platform's load."""
        return PressureKeys(
            *(f"{self.namespace}:{{pressure}}:{field}" for field in PressureKeys._fields)
        )

    def admission(self, queue: str) -> str:
        """Return who waits to be taken in by a queue.  ZSET "job node" -> ms since which."""
        return f"{self.namespace}:{{admission}}:{queue}"

    def usage(self, operation: str) -> tuple[str, str]:
        """Return the names of all operations that have run (SET), and the counts of one (HASH)."""
        return f"{self.namespace}:{{usage}}:names", f"{self.namespace}:{{usage}}:of:{operation}"

    def snapshots(self, operation: str) -> tuple[str, str]:
        """Return the snapshots of an operation (LIST of JSON, newest first), and which became
        slower (HASH operation -> s).
        """
        return (
            f"{self.namespace}:{{usage}}:snapshots:{operation}",
            f"{self.namespace}:{{usage}}:slower",
        )

    def preemption(self, queue: str) -> tuple[str, str, str]:
        """Return which urgent nodes wait in a queue for a slot (ZSET node -> ms from which somebody
        may yield for it), how many are about to yield (STRING), and which slots are coming (ZSET
        slot -> ms until which that is believed)."""
        tagged = f"{self.namespace}:{{preemption:{queue}}}:"
        return tagged + "waiting", tagged + "won", tagged + "coming"

    def budget(self, service: str) -> str:
        """Return the retry budget of a service.  HASH balance, time."""
        return f"{self.namespace}:{{budget:{service}}}"

    def spending(self, name: str) -> tuple[str, ...]:
        """Return a budget's open accounts (HASH account -> JSON) and folded ones (HASH account ->
        JSON), its charges (HASH id -> JSON), when their leases end (ZSET id -> ms), and what was
        spent by label (HASH label -> JSON)."""
        tagged = f"{self.namespace}:{{spending:{name}}}:"
        return tuple(
            tagged + field for field in ("accounts", "folded", "charges", "leases", "labels")
        )

    def timing(self, operation: str) -> str:
        """Return how long items of an operation have taken.  HASH bucket -> weight."""
        return f"{self.namespace}:{{timing:{operation}}}"

    def model(self, name: str) -> str:
        """Return what calls to a model have taken.  HASH of sums."""
        return f"{self.namespace}:{{models}}:{name}"

    def endpoints(self) -> str:
        """Return how endpoints of models are.  HASH endpoint -> JSON."""
        return f"{self.namespace}:{{models}}:endpoints"

    def endpoints_turn(self) -> str:
        """Return who asks endpoints of models how they are; nobody else does in the meantime.
        STRING worker.
        """
        return f"{self.namespace}:{{models}}:turn"

    def faults(self) -> tuple[str, str]:
        """Return the recurring faults (HASH pattern -> JSON) and when each was last seen (ZSET
        pattern -> ms).
        """
        return f"{self.namespace}:{{faults}}:patterns", f"{self.namespace}:{{faults}}:seen"

    def staged(self, job: str, token: str) -> tuple[str, str]:
        """Return the keys under which one submitter stores items and blocks until the job is
        open.
        """
        tagged = f"{self.namespace}:{{{job}}}:staged:{token}:"
        return tagged + "items", tagged + "blocks"
