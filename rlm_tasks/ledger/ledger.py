"""The truth about every job: which ranges are done, who holds the rest, what the answer is.

Decides how the ledger's scripts are called and what their answers mean.  Each call is one script in
one round trip, idempotent, on the server's clock.  Refuses to know how work is moved and how items
are computed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, TypeVar, cast

import msgspec

from resilience.keys import Keys
from resilience.store import LOST, Argument, Call, Script, Store
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.records import (
    PROCESS,
    ROOT,
    SWEEP_AT_ONCE,
    Claim,
    Finished,
    JobNodes,
    NodeRecord,
    Report,
    Split,
    Suspect,
    Swept,
)
from rlm_tasks.results import ItemFailure, JobEvent, QuarantinedItem
from rlm_tasks.settings.sections import LedgerSettings

PIECES_AT_ONCE = 256
NODES_LOOKED_AT = 1000
"""So many running and parked nodes of a job are counted, to tell how it stands."""
QUARANTINE_TTL_S = 30 * 86_400

_SCRIPTS = {
    name: Script.load("rlm_tasks.ledger", name, prelude="prelude")
    for name in [
        "open",
        "claim",
        "pulse",
        "finish",
        "pieces",
        "compact",
        "close",
        "stop",
        "release",
        "park",
        "unpark",
        "beat",
        "sweep",
    ]
}
_TAKE_DUE, _LOOK_AGAIN, _WAKE, _NEXT = (
    Script.load("rlm_tasks.ledger", n) for n in ("take_due", "look_again", "wake", "next")
)
_json = msgspec.json.Encoder()
_Answer = TypeVar("_Answer")


def _standing(
    job: str, queue: bytes, state: bytes, queued: int, records: Sequence[bytes | None]
) -> JobNodes:
    states = Counter(NodeRecord.parse("", text).state for text in records if text)
    return JobNodes(
        job=job,
        queue=queue.decode(),
        state=state.decode(),
        queued=queued,
        running=states["r"],
        parked=states["p"],
    )


class Ledger:
    """One platform's jobs.

    `patience_s` is how long a call keeps trying while Redis is away: nothing for clients, who wait
    in their own loops; the length of a lease for workers, whose claim is lost after that anyway.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        settings: LedgerSettings,
        *,
        patience_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        random: Random | None = None,
    ) -> None:
        self.store, self.keys, self.settings = store, keys, settings
        self._patience_s, self._clock, self._sleep = patience_s, clock, sleep
        self._random = random or Random()
        self._lease_ms = int(settings.lease_s * 1000)
        self._grace_ms = int(settings.grace * 1000)

    # --- how calls are made --------------------------------------------------------------------

    def patiently(self, attempt: Callable[[], _Answer]) -> _Answer:
        """Run an idempotent attempt until Redis answers or patience ends; raise StoreUnavailable
        then.
        """
        until, wait = self._clock() + self._patience_s, 0.05
        while True:
            try:
                return attempt()
            except LOST as error:
                if self._clock() + wait > until:
                    raise self.store.unavailable(error) from None
                self._sleep(wait * self._random.uniform(0.5, 1.0))
                wait = min(wait * 2, 1.0)

    def hasty(self) -> Ledger:
        """Return the same ledger without patience, for callers that must not block."""
        return Ledger(self.store, self.keys, self.settings)

    def _call(self, name: str, job: str, *args: Argument) -> Call:
        return Call(_SCRIPTS[name], self.keys.of(job), args)

    def _ask(self, name: str, job: str, *args: Argument) -> Any:
        call = self._call(name, job, *args)
        return self.patiently(lambda: self.store.run(call)[0])

    # --- the life of a job ---------------------------------------------------------------------

    def open(
        self,
        new: Sequence[tuple[JobSpec, str]],
        ttl_s: int,
        waits: Mapping[str, tuple[int, str]] | None = None,
    ) -> list[bool]:
        """Open jobs whose items are stored under a token; say of each whether it is new.

        `waits` says by job how many ms its first node is parked for, and why.  The index of due
        jobs is written first: nothing is forgotten."""
        return self.patiently(lambda: self._open(new, ttl_s, waits or {}))

    def _open(
        self, new: Sequence[tuple[JobSpec, str]], ttl_s: int, waits: Mapping[str, tuple[int, str]]
    ) -> list[bool]:
        now_ms = self.store.now_ms()
        pipe = self.store.client.pipeline(transaction=False)
        pipe.zadd(
            self.keys.due,
            {spec.job: now_ms + self._first_look_ms(spec) for spec, _ in new},
            lt=True,
        )
        if listed := {
            spec.job: now_ms for spec, _ in new if not spec.parent
        }:  # rounds are found by their jobs
            pipe.zadd(self.keys.jobs, listed, nx=True)
        pipe.zremrangebyscore(self.keys.jobs, "-inf", now_ms - ttl_s * 1000)
        pipe.expire(self.keys.due, ttl_s)
        pipe.expire(self.keys.jobs, ttl_s)
        pipe.execute()
        opened = self.store.run(
            *(
                self._opening(spec, ttl_s, staged, *waits.get(spec.job, (0, "")))
                for spec, staged in new
            )
        )
        return [bool(each) for each in opened]

    def _first_look_ms(self, spec: JobSpec) -> int:
        return min(self._grace_ms, int(spec.timeout_ms or self._grace_ms))

    def _opening(self, spec: JobSpec, ttl_s: int, staged: str, wait_ms: int, why: str) -> Call:
        if not spec.continue_on_error:
            fail_limit: float = 0
        else:
            fail_limit = -1 if spec.error_threshold is None else spec.error_threshold * spec.n
        share = spec.early_termination_threshold
        early = max(1, -int(-spec.n * share // 1)) if share else 0
        return Call(
            _SCRIPTS["open"],
            (*self.keys.of(spec.job), *self.keys.staged(spec.job, staged)),
            (
                specs.dump(spec),
                spec.n,
                spec.queue,
                fail_limit,
                early,
                int(spec.timeout_ms or 0),
                ttl_s,
                "validate" if spec.validate else PROCESS,
                ROOT,
                spec.job,
                spec.schema,
                wait_ms,
                why,
            ),
        )

    def claim(self, job: str, node: str, token: str, worker: str, message: int = 0) -> Claim:
        """Take a node, or learn why not.  `message` is the number of the message that asks for
        it.
        """
        a = self._ask(
            "claim",
            job,
            node,
            token,
            self._lease_ms,
            worker,
            self.settings.death_limit,
            specs.SCHEMA,
            message,
        )
        answer = a[0].decode()
        if answer != "run":
            return Claim(
                answer, job, node, token, waiting=tuple(each.decode() for each in a[1:] if each)
            )
        r = NodeRecord.parse(node, a[2])
        return Claim(
            answer="run",
            job=job,
            node=node,
            token=token,
            epoch=int(a[1]),
            lo=r.lo,
            hi=r.hi,
            depth=r.depth,
            slot=r.slot,
            phase=a[3].decode(),
            tries=r.tries,
            waited=r.waited,
            spec=specs.load(a[4]),
            losses=r.losses,
            lost_by=r.lost_by,
            one_by_one=r.one_by_one,
            suspects=tuple(Suspect(*each) for each in msgspec.json.decode(a[5])),
            known_failed=frozenset(map(int, a[6])),
            remaining_ms=int(a[7]),
            parent=r.parent,
        )

    def pulse(self, claim: Claim, done: int, failed: int, skipped: int) -> Call:
        """Return the call that reports a running node and asks whether to go on."""
        return self._call("pulse", claim.job, claim.node, claim.token, done, failed, skipped)

    def finish(self, claim: Claim, report: Report, partial: bytes, *beside: Call) -> Finished:
        """Close a node: its partial, its children and its counts become true at once, or not at
        all.

        What is to be told `beside` shares the round trip.
        """
        if report.quarantined:
            self.patiently(lambda: self._index_quarantine(claim.job))
        finish = self._call(
            "finish",
            claim.job,
            claim.node,
            claim.token,
            _json.encode(report),
            partial,
            self._lease_ms,
        )
        waits = [kid.wait_ms for kid in report.kids if kid.wait_ms >= 0]
        wake = [self._wake(claim.job, min(waits))] if waits else []
        a = self.patiently(lambda: self.store.run(*wake, finish, *wake, *beside)[len(wake)])
        return Finished(a[0].decode(), bool(a[1]), a[2].decode(), a[3].decode())

    def _index_quarantine(self, job: str) -> None:
        # Before FINISH, as with the index of due jobs: an entry without records is dropped when it
        # is read.
        pipe = self.store.client.pipeline(transaction=False)
        now_ms = self.store.now_ms()
        pipe.zadd(self.keys.quarantined, {job: now_ms})
        pipe.zremrangebyscore(self.keys.quarantined, "-inf", now_ms - QUARANTINE_TTL_S * 1000)
        pipe.expire(self.keys.quarantined, QUARANTINE_TTL_S)
        pipe.execute()

    def park(self, claim: Claim, wait_ms: int, why: str, tries: int = 0) -> str:
        """Let a claimed node wait; whoever sweeps sends it again when its time has come.

        Return the node that waits for its message instead, when the job was ending and this was its
        last node."""
        call = self._call("park", claim.job, claim.node, claim.token, wait_ms, why, tries)
        return cast(bytes, self._waking(claim.job, call, wait_ms)).decode()

    def unpark(self, job: str, node: str) -> bool:
        """Let a parked node wait no longer; say whether it now waits for a message."""
        return bool(self._ask("unpark", job, node))

    def _waking(self, job: str, call: Call, wait_ms: int) -> Any:
        """Run a call that parks, and see to it that the job is looked at in time."""
        wake = self._wake(job, wait_ms)
        # Before it, so that a crash forgets nothing; after it, for a sweep that looked in between.
        return self.patiently(lambda: self.store.run(wake, call, wake)[1])

    def _wake(self, job: str, wait_ms: int) -> Call:
        return Call(_WAKE, (self.keys.due,), (job, wait_ms))

    def next_look(self) -> Call:
        """Return the call that answers in how many ms the first job wants a sweep (-1: none
        does).
        """
        return Call(_NEXT, (self.keys.due,), ())

    def release(
        self, job: str, node: str, token: str, item: int, died_of: str, *, condemned: bool = False
    ) -> bool:
        """Give back a node whose process is gone; say whether it now waits for a message.

        What the process died of is counted for the item in flight (as the page tells it); '' counts
        for nothing."""
        return bool(self._ask("release", job, node, token, item, died_of, int(condemned)))

    def beat(self, held: Sequence[tuple[str, str, str]]) -> None:
        """Keep the leases of (job, node, token), all in one round trip."""
        if held:
            self.store.run(
                *(self._call("beat", job, node, token, self._lease_ms) for job, node, token in held)
            )

    def stop(
        self,
        job: str,
        reason: str,
        *,
        detail: str = "",
        error: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> str:
        """End a job early and return its state; call again while nodes are left."""
        packed = _json.encode(error) if error else b""
        left = -1
        while True:
            state, _, still = self._ask("stop", job, reason, detail, packed, int(force))
            if int(still) in (0, left):
                break
            left = int(still)
        if left > 0:
            # Nodes that are still in an item are fenced when their time is over.
            self.patiently(
                lambda: self.store.run(self._wake(job, int(self.settings.stop_grace_s * 1000)))
            )
        return cast(bytes, state).decode()

    # --- partials and the answer ---------------------------------------------------------------

    def pieces(self, job: str, lo: int, hi: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield (lo, hi, packed partial) of a range in item order, a page at a time."""
        at = lo
        while at < hi:
            page = self._ask("pieces", job, at, hi, PIECES_AT_ONCE)
            for name, packed in zip(page[::2], page[1::2], strict=True):
                start, at = (int(edge) for edge in name.split(b":"))
                yield start, at, packed
            if len(page) < 2 * PIECES_AT_ONCE:
                return

    def compact(self, job: str, ranges: Sequence[tuple[int, int]], merged: bytes) -> bool:
        """Replace adjacent partials by one, if they are all still there."""
        return bool(self._ask("compact", job, merged, *(f"{lo}:{hi}" for lo, hi in ranges)))

    def close(
        self,
        job: str,
        token: str,
        state: str,
        answer: bytes = b"",
        error: Mapping[str, Any] | None = None,
    ) -> str:
        """End a job from its root merge; return its final state, or '' when the merge is held no
        longer.
        """
        ended = self._ask("close", job, token, state, answer, _json.encode(error) if error else b"")
        if ended:
            self.patiently(lambda: self.store.client.zrem(self.keys.due, job))
        return cast(bytes, ended).decode()

    # --- recovery ------------------------------------------------------------------------------

    def take_due(self) -> list[str]:
        """Return jobs that want a sweep now; for as long as a sweep may take, no other worker gets
        them.
        """
        take = Call(_TAKE_DUE, (self.keys.due,), (int(self.settings.sweep_s * 1000), SWEEP_AT_ONCE))
        [found] = self.store.run(take)
        return [each.decode() for each in found]

    def sweep(self, job: str) -> Swept:
        """Recover one job's overdue nodes and note when to look again."""
        stop_grace_ms = int(self.settings.stop_grace_s * 1000)
        a = self._ask(
            "sweep", job, self._grace_ms, self._lease_ms, stop_grace_ms, SWEEP_AT_ONCE, specs.SCHEMA
        )
        swept = Swept(a[0].decode(), int(a[1]), tuple(each.decode() for each in a[2:]))
        look = Call(_LOOK_AGAIN, (self.keys.due,), (job, swept.again_ms))
        self.patiently(lambda: self.store.run(look))
        return swept

    # --- reading -------------------------------------------------------------------------------

    def facts(self, job: str) -> dict[str, str]:
        """Return every counter and state of a job; empty for an unknown one."""
        found = self.patiently(lambda: self.store.client.hgetall(self.keys.of(job).job))
        return {k.decode(): v.decode() for k, v in cast(dict[bytes, bytes], found).items()}

    def told_round(self, job: str, number: int) -> None:
        """Note that a job has so many rounds, for those who want to know how far it is."""
        self.patiently(lambda: self.store.client.hset(self.keys.of(job).job, "rounds", str(number)))

    def answer(self, job: str) -> bytes | None:
        """Return the packed answer of a job, None where its outputs stay pages, or there is
        none.
        """
        return cast(
            bytes | None,
            self.patiently(lambda: self.store.client.hget(self.keys.of(job).blobs, "output")),
        )

    def failures(self, job: str) -> list[ItemFailure]:
        """Return the first 1,000 failed items, in order."""
        found = self.patiently(lambda: self.store.client.hvals(self.keys.of(job).failures))
        decoded = [msgspec.json.decode(each, type=ItemFailure) for each in cast(list[bytes], found)]
        return sorted(decoded, key=lambda failure: failure.index)

    def events(self, job: str) -> list[JobEvent]:
        """Return what has happened to a job, the oldest first."""
        found = self.patiently(lambda: self.store.client.xrange(self.keys.of(job).events))
        return [
            JobEvent(int(told[b"ms"]) / 1000, told[b"event"].decode(), told[b"detail"].decode())
            for _, told in cast(list[tuple[bytes, dict[bytes, bytes]]], found)
        ]

    def inflight(self, job: str) -> tuple[int, int, int]:
        """Return what running nodes have done, failed and skipped so far."""
        values = self.patiently(lambda: self.store.client.hvals(self.keys.of(job).inflight))
        counts = [tuple(map(int, each.split(b":"))) for each in cast(list[bytes], values)]
        return cast(
            tuple[int, int, int],
            tuple(map(sum, zip(*counts, strict=True))) if counts else (0, 0, 0),
        )

    def spec(self, job: str) -> JobSpec | None:
        """Return what was asked for."""
        text = self.patiently(lambda: self.store.client.hget(self.keys.of(job).job, "spec"))
        return specs.load(cast(bytes, text)) if text else None

    def records(self, job: str, nodes: Sequence[str]) -> list[NodeRecord]:
        """Return the records of some nodes."""
        texts = (
            self.patiently(lambda: self.store.client.hmget(self.keys.of(job).nodes, list(nodes)))
            if nodes
            else []
        )
        return [
            NodeRecord.parse(id, text)
            for id, text in zip(nodes, cast(list[bytes | None], texts), strict=True)
            if text
        ]

    def all_records(self, job: str) -> list[NodeRecord]:
        """Return every node of a job's tree."""
        found = self.patiently(lambda: self.store.client.hgetall(self.keys.of(job).nodes))
        return [NodeRecord.parse(k.decode(), v) for k, v in cast(dict[bytes, bytes], found).items()]

    def split(self, job: str, split: str) -> Split | None:
        """Return a chord's range and slot."""
        text = self.patiently(lambda: self.store.client.hget(self.keys.of(job).splits, split))
        return msgspec.json.decode(cast(bytes, text), type=Split) if text else None

    def ranges(self, job: str) -> list[tuple[int, int]]:
        """Return the ranges whose partials are stored, in order."""
        names = self.patiently(lambda: self.store.client.zrange(self.keys.of(job).pieces, 0, -1))
        edges = [name.split(b":") for name in cast(list[bytes], names)]
        return [(int(lo), int(hi)) for lo, hi in edges]

    def failed_items(self, job: str) -> list[int]:
        """Return the index of every failed item, in order."""
        return self._indexes(self.keys.of(job).failed)

    def empty_items(self, job: str) -> list[int]:
        """Return the index of every item skipped as empty, in order."""
        return self._indexes(self.keys.of(job).empty)

    def _indexes(self, key: str) -> list[int]:
        found = self.patiently(lambda: self.store.client.zrange(key, 0, -1))
        return [int(each) for each in cast(list[bytes], found)]

    def quarantined_jobs(self) -> list[str]:
        """Return the jobs that have, or had, quarantined items, the newest first."""
        found = self.patiently(
            lambda: self.store.client.zrange(self.keys.quarantined, 0, -1, desc=True)
        )
        return [each.decode() for each in cast(list[bytes], found)]

    def quarantined(self, job: str) -> list[QuarantinedItem]:
        """Return a job's quarantined items, in order."""
        found = self.patiently(lambda: self.store.client.hvals(self.keys.of(job).quarantine))
        decoded = [
            msgspec.json.decode(each, type=QuarantinedItem) for each in cast(list[bytes], found)
        ]
        return sorted(decoded, key=lambda item: item.index)

    def drop_quarantined(self, job: str, indexes: Sequence[int]) -> None:
        """Forget quarantined items; a job without any leaves the list."""
        self.patiently(
            lambda: self.store.client.hdel(self.keys.of(job).quarantine, *map(str, indexes))
        )
        if not self.quarantined(job):
            self.patiently(lambda: self.store.client.zrem(self.keys.quarantined, job))

    def at_work(self, limit: int) -> list[JobNodes]:
        """Return how the nodes of open jobs stand, of so many jobs at most; two round trips for all
        of them.
        """
        client = self.store.client
        jobs = [
            each.decode()
            for each in cast(
                list[bytes], self.patiently(lambda: client.zrange(self.keys.due, 0, limit - 1))
            )
        ]
        keys = [self.keys.of(job) for job in jobs]
        pipe = client.pipeline(transaction=False)
        for each in keys:
            pipe.hmget(each.job, "queue", "state")
            pipe.zcard(each.waiting)
            pipe.zrange(each.due, 0, NODES_LOOKED_AT - 1)
        first = pipe.execute()
        pipe = client.pipeline(transaction=False)
        for each, held in zip(keys, first[2::3], strict=True):
            pipe.hmget(each.nodes, held or ["none"])
        found = zip(jobs, first[::3], first[1::3], pipe.execute(), strict=True)
        return [
            _standing(job=job, queue=facts[0], state=facts[1], queued=queued, records=records)
            for job, facts, queued, records in found
            if facts[0]
        ]

    def jobs(self, limit: int) -> list[tuple[str, int]]:
        """Return (job, ms opened), the newest first."""
        found = self.patiently(
            lambda: self.store.client.zrange(
                self.keys.jobs, 0, limit - 1, desc=True, withscores=True
            )
        )
        return [(job.decode(), int(ms)) for job, ms in cast(list[tuple[bytes, float]], found)]
