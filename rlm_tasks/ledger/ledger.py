"""The ledger: the changes of jobs, which record done ranges, holders of nodes, and answers.

The engine, the worker and the client change jobs through it.  Each change is one script in `lua/`:
idempotent, in one round trip, on the server's clock.  `records` has the arguments and answers of
the scripts.  Begin with `Ledger.open` and `Ledger.claim`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, cast

import msgspec

from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Argument, Call, OnOutage, Script, Store
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.ledger.reader import LedgerReader, ranges_of
from rlm_tasks.ledger.records import (
    KNOWN_AT_ONCE,
    PROCESS,
    ROOT,
    SWEEP_AT_ONCE,
    Child,
    Claim,
    Closed,
    Finished,
    NodeRecord,
    Report,
    Suspect,
    Swept,
)
from rlm_tasks.settings.sections import LedgerSettings

_SCRIPTS = {
    name: Script.load("rlm_tasks.ledger", name, prelude="prelude")
    for name in (
        *("open", "claim", "pulse", "finish", "compact", "close", "stop", "release"),
        *("park", "unpark", "beat", "sweep", "sending"),
    )
}
_json = msgspec.json.Encoder()
BY_CHARS = 200
"""The largest number of characters of the name of a job's canceller."""
SENDING_AT_ONCE = 1000
"""One script begins the grace of at most this many nodes anew."""


class Ledger(LedgerReader):
    """The jobs of one platform, and every change to them."""

    def __init__(
        self, store: Store, keys: Keys, settings: LedgerSettings, *, on_outage: OnOutage = "raise"
    ) -> None:
        super().__init__(store, keys, settings, on_outage=on_outage)
        # It gets a job that has ended, and the ids of its splits.
        self.after_close: Callable[[str, Sequence[str]], None] = lambda _job, _splits: None
        self._lease_ms = int(settings.lease_s * 1000)
        self._grace_ms = int(settings.grace * 1000)

    def fail_fast(self) -> Ledger:
        """Return this ledger with calls that raise at once, for callers that must not block."""
        return Ledger(self.store, self.keys, self.settings)

    def _script(self, name: str, job: str, *args: Argument) -> Call:
        return Call(_SCRIPTS[name], self.keys.of(job), args)

    def _run(self, name: str, job: str, *args: Argument) -> Any:
        return self.call(self._script(name, job, *args))[0]

    # --- the life of a job ---------------------------------------------------------------------

    def open(
        self,
        new: Sequence[tuple[JobSpec, str]],
        ttl_s: int,
        waits: Mapping[str, tuple[int, str]] | None = None,
    ) -> list[bool]:
        """Open jobs whose items are stored under a token; return for each whether it is new.

        `waits` has, by job, the ms that its first node is parked, and the reason.  The script also
        writes the index of due jobs, so a sweep finds each open job.  Raises StoreUnavailable.
        """
        opened: list[int] = self.call(lambda _: self._open(new, ttl_s, waits or {}))
        if -1 in opened:
            raise StoreUnavailable(
                self.store.url, "it has lost items that were stored for a job; submit them again"
            )
        return [bool(each) for each in opened]

    def _open(
        self, new: Sequence[tuple[JobSpec, str]], ttl_s: int, waits: Mapping[str, tuple[int, str]]
    ) -> list[int]:
        now_ms = self.clock.now_ms()
        pipe = self.store.client.pipeline(transaction=False)
        # Rounds are not listed: their jobs lead to them.
        self.job_list.add(pipe, {spec.job: now_ms for spec, _ in new if not spec.parent})
        pipe.execute()
        return self.store.call(
            *(
                _opening(
                    self.keys,
                    spec,
                    ttl_s,
                    staged,
                    *waits.get(spec.job, (0, "")),
                    keep=self.settings.node_records,
                    grace_ms=self._grace_ms,
                )
                for spec, staged in new
            )
        )

    def claim(self, job: str, node: str, token: str, worker: str, message: int = 0) -> Claim:
        """Claim a node, and return the claim or the reason why not.

        `message` is the number of the message that led here.  Raises StoreUnavailable.
        """
        reply = self._run(
            "claim",
            job,
            node,
            token,
            self._lease_ms,
            worker,
            self.settings.death_limit,
            specs.SCHEMA,
            message,
            KNOWN_AT_ONCE,
        )
        answer = reply[0].decode()
        if answer != "run":
            waiting = tuple(each.decode() for each in reply[1:] if each)
            return Claim(answer, job, node, token, waiting=waiting)
        return _claimed(job, node, token, reply)

    def pulse(self, claim: Claim, done: int, failed: int, skipped: int) -> Call:
        """Return the call that reports a running node, and is answered with go on or stop."""
        return self._script("pulse", claim.job, claim.node, claim.token, done, failed, skipped)

    def finish(
        self,
        claim: Claim,
        report: Report,
        partial: bytes,
        *beside: Call,
        once: Sequence[Call] = (),
        more: Sequence[tuple[int, bytes]] = (),
    ) -> Finished:
        """Close a node: its partial, children and counts become true all at once, or not at all.

        `more` has further partials, each with its first item, if one is too small for all outputs.

        The calls `beside` share the round trip.  Those in `once` share it, too, but are left out
        when it is repeated after an outage: they count something, and may have counted it.

        Raises StoreUnavailable, and a ResponseError that begins with TILING when the report's parts
        do not tile the node's range.
        """
        if report.quarantined:
            # Written before the node is closed, as the index of due jobs is.
            self.quarantine.list_job(claim.job)
        finish = self._script(
            "finish",
            claim.job,
            claim.node,
            claim.token,
            _json.encode(msgspec.structs.replace(report, kids=[])),
            partial,
            self._lease_ms,
            len(report.kids),
            max((kid.depth for kid in report.kids), default=0),
            *chain.from_iterable(_new_node(claim.node, kid) for kid in report.kids),
            *(argument for page in more for argument in page),
        )
        waits = [kid.wait_ms for kid in report.kids if kid.wait_ms >= 0]
        due = [self.due.look_by(claim.job, min(waits))] if waits else []
        attempts = chain([tuple(once)], repeat(()))
        answers: list[Any] = self.call(
            lambda _: self.store.call(*due, finish, *due, *beside, *next(attempts))
        )
        reply = answers[len(due)]
        return Finished(reply[0].decode(), bool(reply[1]), reply[2].decode(), reply[3].decode())

    def park(self, claim: Claim, wait_ms: int, why: str, tries: int = 0) -> str:
        """Park a claimed node; a sweep sends it again after `wait_ms`.

        `tries` is the number of times that its first item has failed.  The result is '', or a node
        that now waits for its message: the job was ending, and the parked node was its last.
        """
        call = self._script("park", claim.job, claim.node, claim.token, wait_ms, why, tries)
        return cast(bytes, self._park_until(claim.job, call, wait_ms)).decode()

    def unpark(self, job: str, node: str) -> bool:
        """End a node's wait; return whether it was parked and now waits for a message."""
        return bool(self._run("unpark", job, node))

    def sending(self, job: str, nodes: Sequence[str]) -> None:
        """Begin the grace of queued nodes anew, because their messages are still being sent.

        So a sweep sends no copies of them.  Raises StoreUnavailable.
        """
        parts = [nodes[at : at + SENDING_AT_ONCE] for at in range(0, len(nodes), SENDING_AT_ONCE)]
        self.call(*(self._script("sending", job, *part) for part in parts))

    def _park_until(self, job: str, call: Call, wait_ms: int) -> Any:
        """Run a call that parks a node, and make sure that a sweep comes in time."""
        due = self.due.look_by(job, wait_ms)
        # The index is written twice: before the call for a crash between them, and after it for a
        # sweep between them.
        return self.call(due, call, due)[1]

    def release(
        self, job: str, node: str, token: str, item: int, died_of: str, *, condemned: bool = False
    ) -> bool:
        """Release a node of a dead process; return whether it now waits for a message.

        The cause of death counts against `item`, the item in flight as the shared page has it (-1:
        none, -2: one of several).  An empty `died_of` counts nothing.  A `condemned` item must not
        run again.
        """
        return bool(self._run("release", job, node, token, item, died_of, int(condemned)))

    def beat(self, held: Sequence[tuple[str, str, str]]) -> None:
        """Renew the leases of (job, node, token), all in one round trip."""
        if held:
            self.store.call(
                *(
                    self._script("beat", job, node, token, self._lease_ms)
                    for job, node, token in held
                )
            )

    def holds(self, claim: Claim) -> bool:
        """Renew the lease of a claim, and return whether it still holds its node."""
        return bool(self._run("beat", claim.job, claim.node, claim.token, self._lease_ms))

    def stop(
        self,
        job: str,
        reason: str,
        *,
        detail: str = "",
        by: str = "",
        error: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> str:
        """End a job early, and return its state; `force` fences its running nodes.

        `by` names the person or the program that asked for it; the first one is kept with the job.
        One call of the script skips a limited number of nodes, so it is repeated while it makes
        progress.
        """
        packed = _json.encode(error) if error else b""
        name = "".join(each if each.isprintable() else "?" for each in by[:BY_CHARS])
        left = -1
        while True:
            state, _, still = self._run("stop", job, reason, detail, packed, int(force), name)
            if int(still) in (0, left):
                break
            left = int(still)
        if left > 0:
            # A sweep fences the nodes that are still in an item when their grace is over.
            self.call(self.due.look_by(job, int(self.settings.stop_grace_s * 1000)))
        return cast(bytes, state).decode()

    # --- partials and the answer ---------------------------------------------------------------

    def compact(self, job: str, ranges: Sequence[tuple[int, int]], merged: bytes) -> bool:
        """Replace adjacent partials by one; return False if one of them is gone."""
        return bool(self._run("compact", job, merged, *(f"{lo}:{hi}" for lo, hi in ranges)))

    def close(
        self,
        job: str,
        token: str,
        state: str,
        answer: bytes = b"",
        error: Mapping[str, Any] | None = None,
    ) -> Closed:
        """End a job from its root merge; return its final state and how long it took.

        The state is '' when the caller no longer holds the root merge.
        """
        packed = _json.encode(error) if error else b""
        ended, took_ms, *splits = self._run("close", job, token, state, answer, packed)
        if ended:
            # Not a plain removal: Redis may have lost the end of the job meanwhile.
            self.call(self.due.look_again(job, 0, self.keys.of(job).job))
            self.after_close(job, [each.decode() for each in splits])
        return Closed(ended.decode(), int(took_ms))

    # --- recovery ------------------------------------------------------------------------------

    def sweep(self, job: str) -> Swept:
        """Recover one job's overdue nodes, and record the time of its next sweep."""
        stop_grace_ms = int(self.settings.stop_grace_s * 1000)
        reply = self._run(
            "sweep", job, self._grace_ms, self._lease_ms, stop_grace_ms, SWEEP_AT_ONCE, specs.SCHEMA
        )
        send = tuple(each.decode() for each in reply[2:])
        swept = Swept(reply[0].decode(), int(reply[1]), send)
        self.call(self.due.look_again(job, swept.again_ms, self.keys.of(job).job))
        return swept

    # --- notes that change no state ------------------------------------------------------------

    def note_rounds(self, job: str, number: int) -> None:
        """Record the number of a job's rounds, for its progress."""
        self.call(lambda client: client.hset(self.keys.of(job).job, "rounds", str(number)))


def _new_node(parent: str, kid: Child) -> tuple[Argument, ...]:
    """Return FINISH's arguments for a child; the last one is its record (see `prelude.lua`)."""
    record: dict[str, Any] = {
        "lo": kid.lo,
        "hi": kid.hi,
        "d": kid.depth,
        "p": parent,
        "sp": kid.split,
        "ix": kid.index,
        "t": kid.task,
        "why": kid.why,
        "e": 0,
        "rs": 0,
        **({"s": "q", "m": 0} if kid.wait_ms < 0 else {"s": "p", "wt": 1}),
        **({"tr": kid.tries} if kid.tries else {}),
    }
    return kid.id, kid.lo, kid.hi, kid.wait_ms, _json.encode(record)


def _limits_ms(spec: JobSpec) -> tuple[float, ...]:
    """Return the times in ms after which a job may expire; they are long for a job without any."""
    return tuple(each or math.inf for each in (spec.timeout_ms, spec.queue_timeout_ms))


def _opening(
    keys: Keys,
    spec: JobSpec,
    ttl_s: int,
    staged: str,
    wait_ms: int,
    why: str,
    *,
    keep: int,
    grace_ms: int,
) -> Call:
    share, early_share = spec.error_threshold, spec.early_termination_threshold
    fail_limit = -1 if share is None else _most_of(share, spec.n)
    if not spec.continue_on_error:
        fail_limit = 0
    early = max(1, _least_of(early_share, spec.n)) if early_share else 0
    return Call(
        _SCRIPTS["open"],
        (*keys.of(spec.job), *keys.staged(spec.job, staged), keys.due),
        (
            specs.dump(spec),
            spec.n,
            spec.queue,
            fail_limit,
            early,
            math.ceil(spec.timeout_ms or 0),
            ttl_s,
            "validate" if spec.validate else PROCESS,
            ROOT,
            spec.job,
            spec.schema,
            wait_ms,
            why,
            keep,
            math.ceil(spec.queue_timeout_ms or 0),
            math.ceil(min(grace_ms, *_limits_ms(spec))),
            int(spec.n > 0 and not isinstance(spec.source, RangeSource)),
        ),
    )


def _most_of(share: float, n: int) -> int:
    """Return the largest number of items that is no more than their share.

    A share of 0.29 is not exact, and neither is 1/3.  ``29 / 100`` and ``1000 / 3000`` are rounded
    in the same way, so the quotients are compared.
    """
    most = min(n, math.floor(share * n) + 1)
    while most and most / n > share:
        most -= 1
    return most


def _least_of(share: float, n: int) -> int:
    """Return the smallest number of items that is no less than their share."""
    least = max(0, math.floor(share * n) - 1)
    while least < n and least / n < share:
        least += 1
    return least


def _claimed(job: str, node: str, token: str, reply: Sequence[Any]) -> Claim:
    record = NodeRecord.parse(node, reply[2])
    return Claim(
        answer="run",
        job=job,
        node=node,
        token=token,
        epoch=int(reply[1]),
        lo=record.lo,
        hi=record.hi,
        depth=record.depth,
        slot=record.slot,
        phase=reply[3].decode(),
        tries=record.tries,
        waited=record.waited,
        spec=specs.load(reply[4], job),
        losses=record.losses,
        lost_by=record.lost_by,
        one_by_one=record.one_by_one,
        suspects=tuple(Suspect(*each) for each in msgspec.json.decode(reply[5])),
        known_failed=ranges_of(reply[6]),
        remaining_ms=int(reply[7]),
        parent=record.parent,
    )
