"""The one idea: a node owns a range of items, works through it in slices, and may cut it.

Decides what a node does from claim to finish: which reason ends it, what its rest becomes, what is
reported. Refuses to know how items are called (working), and how messages travel (dispatch); the
ledger holds the truth about every range."""

from __future__ import annotations

import logging
import math
import os
import resource
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from resilience.bulkhead import Bulkhead, Permit
from resilience.degradation import Level
from resilience.errors import StoreUnavailable
from resilience.store import Call
from resilience.waiters import URGENCY
from rlm_tasks.engine import counts
from rlm_tasks.engine.closing import merge_root
from rlm_tasks.engine.concurrent_work import ConcurrentWork
from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.engine.guards import Postponed
from rlm_tasks.engine.pace import Pace
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.engine.shared_page import ProcessEntry
from rlm_tasks.engine.work import Work
from rlm_tasks.errors import Quarantined, UnknownOperation
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import (
    RULES,
    WORTH_PLANNING_MS,
    Fork,
    NodeProgress,
    Reason,
    fork,
    isolate,
    may_fan_out,
    plan,
    share_out,
    should_yield,
)
from rlm_tasks.ledger.records import MERGE, PROCESS, ROOT, Child, Claim, Finished, Report, Suspect
from rlm_tasks.messaging.dispatch import freeze, mint
from rlm_tasks.operations import registry
from rlm_tasks.operations.registry import Operation
from rlm_tasks.results import QuarantinedItem
from scheduler.admission import sheds
from scheduler.preemption import more_urgent, rank_of
from scheduler.sampling import held_mb

logger = logging.getLogger(__name__)

PARK_MS = 5000
"""How long a node waits that this worker cannot run: another one may know its operation."""
LONGEST_WAIT_S = 86_400.0
"""A node that waits for longer looks again once a day."""
CALM_MS = 15_000
"""A job that is not taken in yet looks again after this."""
MAX_FAILURES_TOLD = 1000


def run_node(runtime: Runtime, job: str, node: str, message: int = 0) -> bool:
    """Do what CLAIM's answer says; return whether this message now fills its slot in a chord.

    ==========  =====================================================================
    run         work; the slot is filled unless the node was cut
    done        fill the slot: the part may have been lost between FINISH and the chord
    cut         send again what still waits of its children; they fill the slot
    closed      fill the slot, so that the chord drains
    busy, parked, newer, unknown   leave the slot to whoever holds the node, or will
    ==========  =====================================================================
    """
    page, token = runtime.page_entry(), secrets.token_hex(8)
    page.hold(pid=os.getpid(), job=job, node=node, token=token, at=runtime.clock())
    try:
        runtime.reached(CrashPoint.BEFORE_CLAIM)
        claim = runtime.ledger.claim(
            job=job, node=node, token=token, worker=runtime.worker, message=message
        )
        if claim.answer == "run":
            runtime.reached(CrashPoint.AFTER_CLAIM)
            with _in_its_slot(runtime, claim):
                return _work(runtime, claim, page)
    except MemoryError:
        _give_up_for_memory(runtime, job, node, token)
        return False
    finally:
        page.let_go()
    if claim.waiting:
        runtime.delivery.resend(job, claim.waiting)
    return claim.answer in ("done", "closed")


@contextmanager
def _in_its_slot(runtime: Runtime, claim: Claim) -> Iterator[None]:
    """Let nobody make room for an urgent node that has its slot; a copy of its message may be
    announced meanwhile.
    """
    spec = claim.spec
    urgent = spec.queue if spec is not None and spec.preempts else ""
    if urgent:
        runtime.preemption.settle(urgent, f"{claim.job} {claim.node}")
    yield
    if urgent:
        runtime.preemption.settle(urgent, f"{claim.job} {claim.node}")


def _give_up_for_memory(runtime: Runtime, job: str, node: str, token: str) -> None:
    """Treat it as the death of this process, which it nearly is: the range is halved, a lone item
    is a suspect.
    """
    logger.error("Node %s of job %s needs more memory than there is; it is given back", node, job)
    for held in (node, MERGE):
        if runtime.ledger.release(job=job, node=held, token=token, item=-1, died_of="MemoryError"):
            runtime.delivery.resend(job, [held])


def _work(runtime: Runtime, claim: Claim, page: ProcessEntry) -> bool:
    spec = claim.spec
    assert spec is not None  # CLAIM answers `run` with a spec, always
    try:
        operation = registry.get(spec.operation)
    except UnknownOperation as error:
        return _put_off(runtime, claim, PARK_MS, str(error))
    if claim.node == ROOT and spec.patient and (why := _not_taken_in(runtime, spec)):
        put_off = _put_off(runtime, claim, CALM_MS, why)
        # The monitor calls it as soon as there is room, and this host may hear of that later than
        # the job.
        runtime.waiting_room.enter(
            spec.queue, {f"{spec.job} {ROOT}": runtime.ledger.store.now_ms()}
        )
        return put_off
    if claim.node != MERGE and (why := runtime.shares.obstacle(operation)):
        return _put_off(runtime, claim, PARK_MS, why)
    if claim.node == MERGE:
        merge_root(
            ledger=runtime.ledger,
            claim=claim,
            spec=spec,
            operation=operation,
            rounds=runtime.rounds,
            reached=runtime.reached,
        )
        return True
    return NodeRun(runtime=runtime, claim=claim, spec=spec, operation=operation, page=page).run()


def _not_taken_in(runtime: Runtime, spec: JobSpec) -> str:
    """Return why a job that may wait must not begin yet, '' when it may; it then has its place."""
    if sheds(spec.priority, level := runtime.page.level):
        return f"pressure is {level.label}, and {spec.priority} work waits"
    refused = runtime.waiting_room.crowded(spec.job, spec.priority)
    return refused.why if refused else ""


def _put_off(runtime: Runtime, claim: Claim, wait_ms: int, why: str) -> bool:
    """Park a node that must not begin here now; of a job that has just ended, send what is left to
    do.
    """
    if waits := _lie_down(
        runtime=runtime, claim=claim, wait_ms=wait_ms, why=why, tries=claim.tries
    ):
        runtime.delivery.resend(claim.job, [waits])
    return False


def _lie_down(runtime: Runtime, claim: Claim, wait_ms: int, why: str, tries: int) -> str:
    """Park a node; return what of its job waits for its message instead, because the job was
    ending.
    """
    waits = runtime.ledger.park(claim, wait_ms, why, tries)
    if not waits:
        logger.info("Waits for %.1f s, or until it is called: %s", wait_ms / 1000, why)
    return waits


class NodeRun:
    """One claimed node, from its first slice to its finish."""

    def __init__(
        self,
        runtime: Runtime,
        claim: Claim,
        spec: JobSpec,
        operation: Operation,
        page: ProcessEntry,
    ) -> None:
        self._runtime, self._claim, self._spec, self._operation, self._page = (
            runtime,
            claim,
            spec,
            operation,
            page,
        )
        self._pace = Pace(runtime.clock, runtime.page, runtime.settings.node, claim.remaining_ms)
        keys = runtime.ledger.keys.of(spec.job)

        def read(lo: int, hi: int) -> Sequence[Any]:
            found: Sequence[Any] = runtime.ledger.call(
                lambda _: runtime.items.read(
                    source=spec.source, index=keys.items, blocks=keys.blocks, lo=lo, hi=hi
                )
            )
            return found

        limit_s = runtime.timeouts.limit_s(
            operation=operation.name,
            declared_s=operation.protection.timeout_s,
            complexity=spec.complexity,
            tries=claim.tries,
            priority=spec.priority,
        )
        page.limit(limit_s)
        self._guarded = runtime.guards.of(operation, spec)
        level = runtime.page.level
        self._share = runtime.shares.of(
            operation, spec.priority, level, spec.shape.target_ms / 1000
        )
        self._me = f"{spec.job} {claim.node}"
        self._next = mint()  # the node that comes after this one, should it have to wait
        in_flight = operation.is_async and claim.phase == PROCESS
        self._work = (ConcurrentWork if in_flight else Work)(
            claim,
            spec,
            operation,
            read,
            page,
            self._pace,
            runtime.clock,
            guarded=self._guarded,
            waiter=self._waiter,
            limit_s=limit_s,
            level=level,
            slow_s=runtime.node_events.slow_s,
        )
        self._reason: Reason | None = None
        self._fork: Fork | None = None
        self._quarantined: Suspect | None = None
        self._yields_to = ""  # the queue for whose urgent work it has won the right to make room
        self._taken = 0  # slots of others that its latest look has promised to its children

    def run(self) -> bool:
        """Work in a place of one's own, if places are counted; return whether this message fills
        its chord slot.
        """
        if self._share is None:
            return self._run()
        place = self._share.acquire(waiter=self._me, urgency=URGENCY[self._spec.priority])
        if not place:
            return self._wait_for(self._share, place)
        try:
            return self._run()
        finally:
            place.release()

    def _run(self) -> bool:
        """Work, then finish."""
        if not self._cut_before_work():
            if self._quarantined is not None:
                self._work.give_up(self._claim.lo, self._condemnation(self._quarantined))
            else:
                self._work.run(self._boundary)
            self._page.boundary(self._runtime.clock())
        if (wait := self._work.postponed) is not None:
            if self._work.at == self._claim.lo and not self._may_part(wait):
                return self._park(wait)
            self._reason = Reason.RETRY if wait.isolates else Reason.WAITING
            self._fork = self._parted() if self._may_part(wait) else None
        return self._finish()

    # --- waiting -------------------------------------------------------------------------------

    def _waiter(self, index: int) -> str:
        """Return by which name a guard knows the node that will begin with an item."""
        return self._me if index == self._claim.lo else f"{self._spec.job} {self._next}"

    def _may_part(self, wait: Postponed) -> bool:
        """Whether the item that waits can leave its neighbours, which need not."""
        shape, claim, rest = self._spec.shape, self._claim, self._claim.hi - self._work.at
        return (
            (wait.isolates or bool(self._work.others))
            and rest > 1
            and shape.mode != "sequential"
            and claim.depth < shape.max_depth
        )

    def _parted(self) -> Fork:
        at, hi = self._work.at, self._claim.hi
        return isolate(at, hi, self._claim.depth, [at, *self._work.others])

    def _wait_for(self, share: Bulkhead, denied: Permit) -> bool:
        """Let the node wait for a place among its operation's nodes."""
        why = f"as many nodes of {self._operation.name} run as may now"
        # When pressure has gone nobody takes places any more, so nobody gives one back and calls.
        wait_ms = min(CALM_MS, math.ceil(denied.wait_s * 1000))
        if waits := _lie_down(
            runtime=self._runtime,
            claim=self._claim,
            wait_ms=wait_ms,
            why=why,
            tries=self._claim.tries,
        ):
            self._runtime.delivery.resend(self._spec.job, [waits])
        elif denied.noted and not share.stands(self._me):
            self._runtime.delivery.wake([self._me])  # it was called before it lay down
        return False

    def _park(self, wait: Postponed) -> bool:
        """Let the node itself wait: it has done nothing yet."""
        if waits := _lie_down(
            runtime=self._runtime,
            claim=self._claim,
            wait_ms=_ms(wait),
            why=wait.why,
            tries=wait.tries,
        ):
            self._runtime.delivery.resend(self._spec.job, [waits])
        self._tell_faults()
        self._wake_if_called(wait, self._claim.node)
        return False

    def _wake_if_called(self, wait: Postponed, node: str) -> None:
        """Go on at once when the guard has called the node before it lay down: nobody would call
        again.
        """
        if wait.noted and self._guarded is not None:
            waiter = f"{self._spec.job} {node}"
            if not self._guarded.still_waits(waiter):
                self._runtime.delivery.wake([waiter])

    # --- cutting -------------------------------------------------------------------------------

    def _cut_before_work(self) -> bool:
        """Cut at once when the strategy plans it so, or around items that may kill this process
        too.
        """
        claim, shape = self._claim, self._spec.shape
        if claim.suspects or claim.losses:
            self._isolate()
        elif shape.eager or self._is_known_to_be_long():
            slots = self._live_slots()
            planned = (
                plan(shape, claim.lo, claim.hi, claim.depth, slots)
                if shape.eager or slots > 1
                else None
            )
            if isinstance(planned, Fork):
                self._reason, self._fork = Reason.PLANNED, planned
        return self._fork is not None

    def _isolate(self) -> None:
        """Part a suspect item from its neighbours; halve the range when nobody saw which item it
        was.
        """
        claim, suspects = self._claim, sorted(each.index for each in self._claim.suspects)
        alone = claim.hi - claim.lo == 1
        if alone or self._spec.shape.mode == "sequential":
            # One node at a time, in order: work up to the suspect, or on it alone, and hand over
            # the rest.
            middle = (claim.lo + claim.hi + 1) // 2
            first = suspects[0] if suspects else middle
            self._work.until = max(first, claim.lo + 1)
            self._reason = None if alone else Reason.ISOLATE
            self._quarantined = next(
                (s for s in claim.suspects if s.condemned and s.index == claim.lo), None
            )
        else:
            halves = fork(claim.lo, claim.hi, claim.depth, 2, bounded=True)
            self._fork = isolate(claim.lo, claim.hi, claim.depth, suspects) if suspects else halves
            self._reason = Reason.ISOLATE

    def _condemnation(self, suspect: Suspect) -> Quarantined:
        return Quarantined(f"item {suspect.index}", suspect.deaths, suspect.by)

    def _is_known_to_be_long(self) -> bool:
        """Whether this process has seen such items, and this root has enough of them to be shared
        at once.
        """
        known_ms = self._runtime.item_ms.get(self._spec.operation, 0.0)
        return (
            self._claim.node in (ROOT, PROCESS)
            and known_ms * (self._claim.hi - self._claim.lo) >= WORTH_PLANNING_MS
        )

    def _live_slots(self) -> int:
        ledger, look = self._runtime.ledger, self._runtime.slots.take(self._spec.queue, 0)
        [[_, total]] = ledger.call(look)
        return max(1, int(total))

    def _boundary(self) -> bool:
        """Decide at a slice boundary whether to go on; True: hand over the rest."""
        self._page.boundary(self._runtime.clock())
        self._runtime.reached(CrashPoint.MID_SLICE)
        self._work.harvest.fold()
        if self._runtime.page.level is Level.EMERGENCY > self._work.degradation.level:
            self._work.press(Level.EMERGENCY)
        shape, at = self._spec.shape, self._standing("go")
        put_off = self._work.would_repeat and self._pace.elapsed_ms < 4 * shape.target_ms
        sharable = may_fan_out(shape, at) and not put_off and self._leaves_room()
        slots = 0
        if self._pace.wants_pulse(sharable=sharable):
            order, slots = self._pulse(shape.factor if sharable and not at.draining else 0)
            at = self._standing(order)
        reason = Reason.STOPPED if self._work.harvest.fatal else should_yield(shape, at)
        if put_off and reason in (Reason.TARGET, Reason.FULL):
            reason = None
        self._work.urgent = reason in (
            Reason.STOPPED,
            Reason.PREEMPTED,
            Reason.DRAINING,
            Reason.FLUSH,
        )
        self._reason = reason or self._reason
        if reason is None and sharable and slots > 1:
            self._fan_out(at, slots)
        self._pace.next_slice()
        return reason is not None or self._fork is not None

    def _leaves_room(self) -> bool:
        """Whether one more node of the operation would get on: a free slot is of no use to one that
        would wait.
        """
        if self._claim.waited or self._work.refused:
            return False  # its guards have said that there is too much of it already
        if self._share is None:
            return True
        try:
            places = self._share.status()
        except StoreUnavailable:
            return False
        return places["used"] < places["limit"]

    def _standing(self, order: str) -> NodeProgress:
        done = self._work.at - self._claim.lo
        if order == "go" and self._work.harvest.full:
            order = "flush"
        rest = self._claim.hi - self._work.at
        draining = self._runtime.page.draining
        return NodeProgress(
            done=done,
            rest=rest,
            elapsed_ms=self._pace.elapsed_ms,
            depth=self._claim.depth,
            order=order,
            draining=draining,
            preempted=bool(self._yields_to),
        )

    def _pulse(self, most: int) -> tuple[str, int]:
        """Tell the ledger where this node stands, take free slots, ask whether to make room: one
        round trip.
        """
        ledger, harvest = self._runtime.ledger, self._work.harvest
        pulse = ledger.pulse(self._claim, harvest.done, len(harvest.failures), len(harvest.empty))
        take = self._runtime.slots.take(self._spec.queue, most)
        ranks = self._runtime.page.urgent
        urgent = more_urgent(ranks, self._spec.priority)
        word, (taken, slots), *won = ledger.call(pulse, take, *self._win(urgent))
        self._pace.pulsed()
        self._taken = int(taken)
        self._yields_to = self._follows(ranks, urgent, won)
        # A fenced node hands in at once; FINISH will call it stale.
        order = word.decode()
        return ("flush" if order == "fenced" else order), int(slots)

    def _queue_of(self, priority: str) -> str:
        return f"{self._spec.queue.rpartition('.')[0]}.{priority}"

    def _win(self, urgent: str) -> list[Call]:
        return [self._runtime.preemption.win(self._queue_of(urgent))] if urgent else []

    def _follows(self, ranks: int, urgent: str, won: Sequence[int]) -> str:
        """Return the queue this node makes room for, asking for less urgent work, too: the most
        urgent may have its slots.
        """
        if not won or won[0]:
            return self._queue_of(urgent) if won else ""
        ledger, ranks = self._runtime.ledger, ranks & ~rank_of(urgent)
        urgent = more_urgent(ranks, self._spec.priority)
        won = ledger.call(*self._win(urgent)) if urgent else ()
        return self._follows(ranks, urgent, won)

    def _fan_out(self, at: NodeProgress, slots: int) -> None:
        """Cut for free slots; a root that was not planned ahead is now, from what is left."""
        claim, shape, lo = self._claim, self._spec.shape, self._work.at
        if claim.node in (ROOT, PROCESS) and not shape.eager:
            planned = plan(shape, lo, claim.hi, claim.depth, slots)
            if isinstance(planned, Fork):
                self._reason, self._fork = Reason.PLANNED, planned
                return
        if self._taken:
            self._reason, self._fork = (
                Reason.HUNGRY,
                share_out(shape=shape, at=at, lo=lo, hi=claim.hi, wants=self._taken),
            )

    # --- finishing -----------------------------------------------------------------------------

    def _finish(self) -> bool:
        claim, harvest = self._claim, self._work.harvest
        validating = claim.phase != PROCESS
        partial = b"" if validating else harvest.packed(range(claim.lo, self._work.at))
        if harvest.fatal:
            self._runtime.ledger.stop(
                self._spec.job, "failed", detail="its merge raised", error=harvest.fatal
            )
        report = self._report()
        self._tell_faults()
        if report.mid > claim.lo and not validating:
            self._runtime.timeouts.took(self._spec.operation, self._work.took_s)
            self._runtime.item_ms[self._spec.operation] = (
                self._work.busy_s * 1000 / (report.mid - claim.lo)
            )
        self._runtime.reached(CrashPoint.BEFORE_FINISH)
        held_kb = int(held_mb(os.getpid()) * 1024) or _peak_kb()  # where the system does not say
        told = [] if validating else [self._tally(report, held_kb)]
        if self._yields_to:
            told.append(self._runtime.preemption.yielded(self._yields_to, self._me))
        self._runtime.node_events.of_node(
            self._spec.operation,
            claim.job,
            self._runtime.worker,
            slow=self._work.slow,
            memory_mb=held_kb / 1024,
        )
        if self._guarded is not None:
            told += self._guarded.forgetting(report.mid)
        finished = self._runtime.ledger.finish(claim, report, partial, *told)
        if finished.answer == "stale":
            logger.info(
                "Node %s of job %s was given to another worker; its work is discarded",
                claim.node,
                claim.job,
            )
            return False
        self._say(report)
        counts.count_node(
            self._spec.operation,
            report,
            claim.hi,
            took_s=self._pace.elapsed_ms / 1000,
            recovered=self._work.recovered,
            given_up=harvest.given_up,
            validating=validating,
            cache=self._runtime.items.lookups(),
        )
        return self._follow(finished, report)

    def _say(self, report: Report) -> None:
        """Tell in one line what has been done; Celery's two lines per message are for DEBUG
        (logs).
        """
        claim, name, left = self._claim, self._spec.operation, self._claim.hi - report.mid
        if report.mid == claim.lo:
            logger.info(
                "Items %d to %d of %s are for other nodes: %s",
                claim.lo,
                claim.hi - 1,
                name,
                report.why,
            )
            return
        word = "done" if claim.phase == PROCESS else "validated"
        rest = f"; {left} left to other nodes: {report.why}" if left else ""
        logger.info(
            "Items %d to %d of %s %s in %.2f s, %d failed%s",
            claim.lo,
            report.mid - 1,
            name,
            word,
            self._work.busy_s,
            len(report.failed),
            rest,
        )

    def _tally(self, report: Report, held_kb: int) -> Call:
        return self._runtime.usage.tally(
            self._spec.operation,
            done=report.done,
            failed=len(report.failed),
            busy_us=report.busy_us,
            memory_kb=held_kb,
            version=self._spec.version,
        )

    def _tell_faults(self) -> None:
        """Tell what went wrong here, for those who operate the platform: one round trip for a node
        that had faults.
        """
        harvest, recovered = self._work.harvest, self._work.recovered
        if harvest.faults or recovered:
            given_up = harvest.given_up
            self._runtime.faults.record(
                self._operation.protection.service,
                harvest.faults,
                recovered=recovered,
                given_up=given_up,
            )

    def _report(self) -> Report:
        harvest, at = self._work.harvest, self._work.at
        told = harvest.failures[:MAX_FAILURES_TOLD]
        report = Report(
            mid=at,
            done=harvest.done,
            skipped=[
                index for index in harvest.empty if index < at
            ],  # what lies beyond is another node's
            failed=[failure["index"] for failure in harvest.failures],
            failures=[
                (failure["index"], msgspec.json.encode(failure).decode()) for failure in told
            ],
            why=self._reason or "",
            busy_us=int(self._work.busy_s * 1e6),
            peak_kb=_peak_kb(),
            shaped=[
                (strategy, level.label, items)
                for (strategy, level), items in harvest.shaped.items()
            ],
        )
        if self._quarantined is not None:
            report.quarantined = [(self._quarantined.index, self._record_of(self._quarantined))]
        if at < self._claim.hi:
            self._hand_over(report)
        return report

    def _record_of(self, suspect: Suspect) -> str:
        item = self._spec.source.describe(suspect.index)
        record = QuarantinedItem(
            job_id=self._spec.job,
            index=suspect.index,
            operation=self._spec.operation,
            item=item,
            attempts=suspect.deaths,
            last_signal=suspect.by,
        )
        return msgspec.json.encode(record).decode()

    def _hand_over(self, report: Report) -> None:
        """Register the rest, as the table of reasons says: one child in this slot, or a chord over
        it.
        """
        claim, at, reason = self._claim, self._work.at, self._reason or Reason.FLUSH
        if self._fork is not None and self._fork.lo != at:
            # Items in flight at the cut have moved its start.
            parts = min(len(self._fork.parts), claim.hi - at)
            self._fork = fork(at, claim.hi, claim.depth, parts) if parts > 1 else None
        if RULES[reason].children == "many" and self._fork is not None:
            report.splits, report.kids = freeze(self._fork, self._spec.job, claim.slot, reason)
        else:
            slot = claim.slot
            report.kids = [
                Child(
                    id=self._next,
                    lo=at,
                    hi=claim.hi,
                    depth=claim.depth,
                    split=slot.split,
                    index=slot.index,
                    task=slot.task,
                    why=reason,
                )
            ]
        if (first := self._work.postponed) is not None:
            waits = {at: first, **(self._work.others if len(report.kids) > 1 else {})}
            for kid in report.kids:
                if (wait := waits.get(kid.lo)) is not None:
                    kid.wait_ms, kid.tries, kid.why = _ms(wait), wait.tries, wait.why

    def _follow(self, finished: Finished, report: Report) -> bool:
        """Do what FINISH's answer asks for; return whether this message fills its chord slot."""
        runtime, spec = self._runtime, self._spec
        if finished.registered:
            runtime.reached(CrashPoint.BEFORE_PUBLISH)
            now = [f"{spec.job} {kid.id}" for kid in report.kids if kid.wait_ms < 0]
            with runtime.delivery.making_room(
                spec.queue, now if spec.preempts and len(now) > 1 else (), freed=1 + self._taken
            ):
                runtime.dispatcher.send_children(
                    spec, report.kids, report.splits, merges=self._operation.merge is not None
                )
            if self._work.postponed is not None:
                self._wake_if_called(self._work.postponed, report.kids[0].id)
            return False
        if finished.outcome == MERGE:
            held = Claim(
                answer="run",
                job=spec.job,
                node=MERGE,
                token=self._claim.token,
                epoch=1,
                lo=0,
                hi=spec.n,
                spec=spec,
            )
            self._page.hold(
                pid=os.getpid(), job=spec.job, node=MERGE, token=held.token, at=runtime.clock()
            )
            merge_root(
                ledger=runtime.ledger,
                claim=held,
                spec=spec,
                operation=self._operation,
                rounds=runtime.rounds,
                reached=runtime.reached,
            )
        elif finished.outcome == "closed":
            runtime.rounds.call(spec)
        elif finished.waits:
            runtime.dispatcher.send_root([spec], finished.waits)
        return True


def _ms(wait: Postponed) -> int:
    return math.ceil(1000 * min(max(wait.wait_s, 0.0), LONGEST_WAIT_S))


def _peak_kb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak
