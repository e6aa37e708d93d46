"""The one idea: a node owns a range of items, works through it in slices, and may cut it.

A pool process runs `run_node` for each message of a node.  `NodeRun` tells the story of one claimed
node: work (`work`), cuts (`cutting`), the report, and the messages that follow from it.
"""

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

from resilience.bulkhead import URGENCY, Bulkhead, Permit
from resilience.connections import Refused
from resilience.errors import StoreUnavailable
from resilience.store import Call
from rlm_tasks.engine import counts
from rlm_tasks.engine.closing import merge_root
from rlm_tasks.engine.concurrent_work import ConcurrentWork
from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.engine.cutting import Cutting, wait_ms
from rlm_tasks.engine.guards import Postponed
from rlm_tasks.engine.pace import Pace
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.engine.shared_page import NO_ITEM, ProcessEntry, Step
from rlm_tasks.engine.work import BatchWork, Work
from rlm_tasks.errors import Quarantined, UnknownOperation
from rlm_tasks.jobs.item_failures import outline
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import MERGE, PROCESS, ROOT, Claim, Finished, Report, Suspect
from rlm_tasks.operations import registry
from rlm_tasks.operations.registry import Operation
from rlm_tasks.results import QuarantinedItem
from scheduler.admission import sheds
from scheduler.sampling import held_mb

logger = logging.getLogger(__name__)

PARK_MS = 5000
"""A node that this worker cannot run is parked for this long: another worker may run it."""
CALM_MS = 15_000
"""A job that is not admitted yet asks again after this."""
MAX_FAILURES = 1000
"""Failures that one report carries in full; further ones are counted."""


def run_node(runtime: Runtime, job: str, node: str, message: int = 0) -> bool:
    """Do what CLAIM's answer asks for; return whether this message now fills its slot in a chord.

    ==========  =================================================================================
    run         work; the slot is filled unless the node was cut
    done        fill the slot: the part may have been lost between FINISH and the chord
    cut         send the children that still wait for their messages; they fill the slot
    closed      fill the slot, so that the chord drains
    any other   leave the slot to the holder of the node, or to its next message: busy, parked,
                newer, unknown
    ==========  =================================================================================
    """
    entry, token = entry_of_next_node(runtime), secrets.token_hex(8)
    entry.hold(pid=os.getpid(), job=job, node=node, token=token, at=runtime.clock())
    try:
        runtime.reached(CrashPoint.BEFORE_CLAIM)
        claim = runtime.ledger.claim(
            job=job, node=node, token=token, worker=runtime.worker, message=message
        )
        if claim.answer == "run":
            runtime.reached(CrashPoint.AFTER_CLAIM)
            with _in_its_slot(runtime, claim):
                return _run_claimed(runtime, claim, entry)
    except MemoryError:
        # Treated as the death of this process: the range is halved, and a lone item is a suspect.
        logger.error("Node %s of job %s ran out of memory; it is given back", node, job)
        release(runtime, runtime.ledger, job, node, token, died_of="MemoryError")
        return False
    except (StoreUnavailable, Refused):
        entry.give_up()
        raise
    finally:
        entry.let_go()
    if claim.waiting:
        runtime.delivery.resend(job, claim.waiting)
    return claim.answer in ("done", "closed")


@contextmanager
def _in_its_slot(runtime: Runtime, claim: Claim) -> Iterator[None]:
    """Void the tokens of an urgent node: it has its slot, so no other node makes room for it.

    A copy of its message may be announced while it runs, so they are voided again at its end.
    """
    spec = claim.spec
    urgent = spec.queue if spec is not None and spec.preempts else ""
    if urgent:
        runtime.preemption.settle(urgent, f"{claim.job} {claim.node}")
    yield
    if urgent:
        runtime.preemption.settle(urgent, f"{claim.job} {claim.node}")


def entry_of_next_node(runtime: Runtime) -> ProcessEntry:
    """Return this process's entry of the shared page, free for the next node.

    A node that was given up without Redis goes back first.  Raises StoreUnavailable.
    """
    entry = runtime.page_entry()
    if (held := entry.given_up) is not None:
        release(runtime, runtime.ledger, held.job, held.node, held.token)
        entry.clear()
    return entry


def release(
    runtime: Runtime, ledger: Ledger, job: str, node: str, token: str, *, died_of: str = ""
) -> None:
    """Give back a node that this worker no longer runs, or the merge that followed it.

    Without a cause of death this counts as no loss.  Raises StoreUnavailable.
    """
    for held in dict.fromkeys((node, MERGE)):
        if ledger.release(job=job, node=held, token=token, item=NO_ITEM, died_of=died_of):
            runtime.delivery.resend(job, [held])


def _run_claimed(runtime: Runtime, claim: Claim, entry: ProcessEntry) -> bool:
    """Run a claimed node, or park it when it must not begin here now."""
    spec = claim.spec
    assert spec is not None  # CLAIM answers `run` with a spec, always
    try:
        operation = registry.get(spec.operation)
    except UnknownOperation:
        why = f"worker {runtime.worker} does not know operation {spec.operation!r}"
        return _put_off(runtime, claim, PARK_MS, why)
    if claim.node == ROOT and spec.patient and (why := _not_admitted(runtime, spec)):
        put_off = _put_off(runtime, claim, CALM_MS, why)
        # The monitor wakes it as soon as there is room, which this host may learn after the job.
        now_ms = runtime.ledger.call(lambda _: runtime.ledger.store.now_ms())
        runtime.waiting_room.enter(spec.queue, {f"{spec.job} {ROOT}": now_ms})
        return put_off
    if claim.node == MERGE:
        merge_root(
            ledger=runtime.ledger,
            claim=claim,
            spec=spec,
            operation=operation,
            steps=runtime.steps(spec),
            rounds=runtime.rounds,
            limit=runtime.output_limit,
            node_events=runtime.node_events,
            reached=runtime.reached,
        )
        return True
    if why := runtime.shares.obstacle(operation):
        return _put_off(runtime, claim, PARK_MS, why)
    return NodeRun(runtime, claim, spec, operation, entry).run()


def _not_admitted(runtime: Runtime, spec: JobSpec) -> str:
    """Return why a job that may wait must not begin yet; '': it is admitted, and has its place."""
    if sheds(spec.priority, level := runtime.page.refusing):
        return f"pressure is {level.label}, and {spec.priority} work waits"
    refused = runtime.waiting_room.crowded(spec.job, spec.priority)
    return refused.why if refused else ""


def _put_off(runtime: Runtime, claim: Claim, park_ms: int, why: str) -> bool:
    """Park a node that must not begin here now; it fills no slot."""
    _park(runtime, claim, park_ms, why, claim.tries)
    return False


def _park(runtime: Runtime, claim: Claim, park_ms: int, why: str, tries: int) -> bool:
    """Park a node and say whether it is; the last node of an ending job sends its successor."""
    if successor := runtime.ledger.park(claim, park_ms, why, tries):
        runtime.delivery.resend(claim.job, [successor])
        return False
    logger.info("Waits for %.1f s, or until it is woken: %s", park_ms / 1000, outline(why))
    return True


class NodeRun:
    """One claimed node, from its first slice to its finish."""

    def __init__(
        self,
        runtime: Runtime,
        claim: Claim,
        spec: JobSpec,
        operation: Operation,
        entry: ProcessEntry,
    ) -> None:
        self._runtime, self._claim, self._spec = runtime, claim, spec
        self._operation, self._entry = operation, entry
        self._guards = runtime.guards.of(operation, spec)
        level, target_s = runtime.page.level, spec.shape.target_ms / 1000
        self._share = runtime.shares.of(operation, spec.priority, level, target_s)
        self._waiter = f"{spec.job} {claim.node}"  # the name by which guards wake this node
        self._pace = Pace(runtime.clock, runtime.page, runtime.settings.node, claim.remaining_ms)
        limit_s = runtime.timeouts.limit_s(
            operation=operation.name,
            declared_s=operation.protection.timeout_s,
            complexity=spec.complexity,
            tries=claim.tries,
            priority=spec.priority,
            estimate_s=spec.estimate_s,
        )
        entry.limit(limit_s)
        self._steps = runtime.steps(spec)
        self._work = _kind_of_work(operation, claim)(
            claim,
            spec,
            operation,
            self._read,
            page=entry,
            steps=self._steps,
            pace=self._pace,
            clock=runtime.clock,
            guards=self._guards,
            waiter=self._waiter_from,
            limit_s=limit_s,
            level=level,
            slow_s=runtime.node_events.slow_s,
            most_bytes=runtime.settings.node.output_mb * 2**20,
        )
        self._cutting = Cutting(runtime, claim, self._work, self._pace, self._share)

    def run(self) -> bool:
        """Work, in any slot share; return whether this message fills its chord slot."""
        if self._share is None:
            return self._run()
        permit = self._share.acquire(waiter=self._waiter, urgency=URGENCY[self._spec.priority])
        if not permit:
            return self._wait_for_share(self._share, permit)
        try:
            return self._run()
        finally:
            permit.release()

    def _run(self) -> bool:
        """Cut or work, then park or finish."""
        cutting, work = self._cutting, self._work
        if not cutting.before_work():
            if cutting.quarantined is not None:
                work.give_up(self._claim.lo, _condemned(cutting.quarantined))
            else:
                work.run(self._at_boundary)
            self._entry.boundary(self._runtime.clock())
        if (wait := work.postponed) is not None:
            if work.at == self._claim.lo and not cutting.may_part(wait):
                return self._wait_for_guard(wait)
            cutting.at_waiting(wait)
        return self._finish()

    def _at_boundary(self) -> bool:
        if not self._work.stopped:
            # After a stop only the items in flight count: the worker kills one that never ends.
            self._entry.boundary(self._runtime.clock())
        return self._cutting.at_boundary()

    def _read(self, lo: int, hi: int) -> Sequence[Any]:
        spec, keys = self._spec, self._runtime.ledger.keys.of(self._spec.job)
        with self._steps.run(Step.READING):
            found: Sequence[Any] = self._runtime.ledger.call(
                lambda _: self._runtime.items.read(
                    source=spec.source, index=keys.items, blocks=keys.blocks, lo=lo, hi=hi
                )
            )
        return found

    # --- waiting -------------------------------------------------------------------------------

    def _waiter_from(self, index: int) -> str:
        """Return the name by which guards wake the node that will begin with an item."""
        at_start = index == self._claim.lo
        return self._waiter if at_start else f"{self._spec.job} {self._cutting.next}"

    def _wait_for_share(self, share: Bulkhead, denied: Permit) -> bool:
        """Park the node until its operation may run one more node."""
        why = f"as many nodes of {self._operation.name} run as may now"
        # Without pressure no node takes a share any more, so none gives one back and wakes others.
        park_ms = min(CALM_MS, math.ceil(denied.wait_s * 1000))
        parked = _park(self._runtime, self._claim, park_ms, why, self._claim.tries)
        if parked and denied.noted and not share.stands(self._waiter):
            self._runtime.delivery.wake([self._waiter])  # it was woken before it was parked
        return False

    def _wait_for_guard(self, wait: Postponed) -> bool:
        """Park the node itself: it has done nothing yet."""
        _park(self._runtime, self._claim, wait_ms(wait), wait.why, wait.tries)
        self._record_faults()
        self._wake_if_called(wait, self._claim.node)
        return False

    def _wake_if_called(self, wait: Postponed, node: str) -> None:
        """Wake a node that its guard has called before it was parked: no other call follows."""
        if wait.noted and self._guards is not None:
            waiter = f"{self._spec.job} {node}"
            if not self._guards.still_waits(waiter):
                self._runtime.delivery.wake([waiter])

    # --- finishing -----------------------------------------------------------------------------

    def _finish(self) -> bool:
        """Report the range and hand over the rest; return whether the chord slot is filled."""
        runtime, claim, outcome = self._runtime, self._claim, self._work.outcome
        validating = claim.phase != PROCESS
        pages: list[tuple[int, bytes]] = []
        if not validating:
            pages = outcome.packed(range(claim.lo, self._work.at), runtime.output_limit)
        if outcome.fatal:
            runtime.ledger.stop(
                self._spec.job, "failed", detail="its merge raised", error=outcome.fatal
            )
        report = self._report()
        self._record_faults()
        if report.mid > claim.lo and not validating:
            self._learn(report.mid - claim.lo)
        runtime.reached(CrashPoint.BEFORE_FINISH)
        once, beside = self._calls_beside(report, validating=validating)
        partial, more = pages[0][1] if pages else b"", pages[1:]
        finished = runtime.ledger.finish(claim, report, partial, *beside, once=once, more=more)
        if finished.answer == "stale":
            logger.info(
                "Node %s of job %s was given to another worker; its work is discarded",
                claim.node,
                claim.job,
            )
            return False
        if finished.outcome:  # all of the job's nodes have ended
            runtime.items.forget(runtime.ledger.keys.of(self._spec.job).blocks)
        self._log(report)
        counts.count_node(
            self._spec.operation,
            report,
            claim.hi,
            took_s=self._pace.elapsed_ms / 1000,
            recovered=self._work.recovered,
            given_up=outcome.given_up,
            validating=validating,
            cache=runtime.items.lookups(),
        )
        return self._follow(finished, report)

    def _learn(self, items: int) -> None:
        """Keep how long items of the operation took in this process."""
        self._runtime.timeouts.took(self._spec.operation, self._work.took_s)
        self._runtime.item_ms[self._spec.operation] = self._work.busy_s * 1000 / items

    def _calls_beside(self, report: Report, *, validating: bool) -> tuple[list[Call], list[Call]]:
        """Return the calls that share FINISH's round trip, and emit events of this node.

        The first ones count, so they must not be repeated.
        """
        runtime, operation = self._runtime, self._spec.operation
        held_kb = int(held_mb(os.getpid()) * 1024) or _peak_kb()  # 0: the system does not say
        once, calls = list[Call](), list[Call]()
        if not validating:
            once.append(
                runtime.usage.tally(
                    operation,
                    done=report.done,
                    failed=report.failed_count,
                    busy_us=report.busy_us,
                    memory_kb=held_kb,
                    version=self._spec.version,
                )
            )
        if self._cutting.yields_to:
            calls.append(runtime.preemption.yielded(self._cutting.yields_to, self._waiter))
        runtime.node_events.of_node(
            operation,
            self._claim.job,
            runtime.worker,
            slow=self._work.slow,
            memory_mb=held_kb / 1024,
        )
        if self._guards is not None:
            calls += self._guards.forgetting(report.mid)
        return once, calls

    def _log(self, report: Report) -> None:
        """Log the node in one line; Celery's two lines per message are for DEBUG (`logs`)."""
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
            report.failed_count,
            rest,
        )

    def _record_faults(self) -> None:
        """Record faults for operators: one round trip for a node that had some."""
        outcome, recovered = self._work.outcome, self._work.recovered
        if outcome.faults or recovered:
            self._runtime.faults.record(
                self._operation.protection.service,
                outcome.faults,
                recovered=recovered,
                given_up=outcome.given_up,
            )

    def _report(self) -> Report:
        """Return what the node did with its range: worked through [lo, mid), cut off the rest."""
        outcome, at = self._work.outcome, self._work.at
        failed, failed_ranges = outcome.failed_items()
        full = [*outcome.unread, *outcome.failures][:MAX_FAILURES]
        report = Report(
            mid=at,
            done=outcome.done,
            # An empty item beyond `at` is another node's.
            skipped=[index for index in outcome.empty if index < at],
            failed=failed,
            failed_ranges=failed_ranges,
            failures=[(each["index"], msgspec.json.encode(each).decode()) for each in full],
            why=self._cutting.reason or "",
            busy_us=int(self._work.busy_s * 1e6),
            peak_kb=_peak_kb(),
            shaped=[
                (strategy, level.label, items)
                for (strategy, level), items in outcome.shaped.items()
            ],
        )
        if (suspect := self._cutting.quarantined) is not None:
            report.quarantined = [(suspect.index, self._quarantine_record(suspect))]
        if at < self._claim.hi:
            self._cutting.hand_over(report)
        return report

    def _quarantine_record(self, suspect: Suspect) -> str:
        record = QuarantinedItem(
            job_id=self._spec.job,
            index=suspect.index,
            operation=self._spec.operation,
            item=self._spec.source.describe(suspect.index),
            attempts=suspect.deaths,
            last_signal=suspect.by,
        )
        return msgspec.json.encode(record).decode()

    def _follow(self, finished: Finished, report: Report) -> bool:
        """Do what FINISH's answer asks for; return whether this message fills its chord slot."""
        runtime, spec = self._runtime, self._spec
        if finished.registered:
            self._send_children(report)
            return False
        if finished.outcome == MERGE:
            self._merge()
        elif finished.outcome == "closed":
            runtime.rounds.continue_parent(spec)
        elif finished.waits:
            runtime.dispatcher.send_root([spec], finished.waits)
        return True

    def _send_children(self, report: Report) -> None:
        runtime, spec = self._runtime, self._spec
        runtime.reached(CrashPoint.BEFORE_PUBLISH)
        now = [f"{spec.job} {kid.id}" for kid in report.kids if kid.wait_ms < 0]
        urgent = now if spec.preempts and len(now) > 1 else ()
        with runtime.delivery.making_room(spec.queue, urgent, freed=1 + self._cutting.taken):
            runtime.dispatcher.send_children(
                spec, report.kids, report.splits, merges=self._operation.merge is not None
            )
        if self._work.postponed is not None:
            self._wake_if_called(self._work.postponed, report.kids[0].id)

    def _merge(self) -> None:
        """Run the root merge, which FINISH has given to this process."""
        runtime, spec, token = self._runtime, self._spec, self._claim.token
        held = Claim(
            answer="run",
            job=spec.job,
            node=MERGE,
            token=token,
            epoch=1,
            lo=0,
            hi=spec.n,
            spec=spec,
        )
        self._entry.hold(pid=os.getpid(), job=spec.job, node=MERGE, token=token, at=runtime.clock())
        merge_root(
            ledger=runtime.ledger,
            claim=held,
            spec=spec,
            operation=self._operation,
            steps=runtime.steps(spec),
            rounds=runtime.rounds,
            limit=runtime.output_limit,
            node_events=runtime.node_events,
            reached=runtime.reached,
        )


def _kind_of_work(operation: Operation, claim: Claim) -> type[Work]:
    """Return the class that runs a node's items: many at once, in batches, or one by one."""
    if claim.phase != PROCESS:
        return Work  # items are validated one by one
    if operation.is_async:
        return ConcurrentWork
    return BatchWork if operation.batch else Work


def _condemned(suspect: Suspect) -> Quarantined:
    return Quarantined(f"item {suspect.index}", suspect.deaths, suspect.by)


def _peak_kb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak
