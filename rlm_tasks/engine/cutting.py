"""Where one node cuts its range, and why: before its work, at slice boundaries, at a waiting item.

`NodeRun` asks it and reports the result.  The table of reasons is `jobs.splitting.RULES`: a new
reason is a row there, and a condition in `Cutting` or in `should_yield`.  Begin with
`Cutting.at_boundary`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from resilience.bulkhead import Bulkhead
from resilience.degradation import Level
from resilience.errors import StoreUnavailable
from resilience.store import Call
from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.engine.guards import Postponed
from rlm_tasks.engine.pace import Pace
from rlm_tasks.engine.runtime import Runtime
from rlm_tasks.engine.work import Work
from rlm_tasks.jobs.splitting import (
    LONGEST_RUN,
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
from rlm_tasks.ledger.records import PROCESS, ROOT, Child, Claim, Report, Suspect
from rlm_tasks.messaging.dispatch import new_id, with_ids
from scheduler.preemption import more_urgent, rank_of

LONGEST_WAIT_S = 86_400.0
"""A node that waits for longer is sent once a day, and parks again."""


class Cutting:
    """The cut of one node, as far as it is decided."""

    def __init__(
        self, runtime: Runtime, claim: Claim, work: Work, pace: Pace, share: Bulkhead | None
    ) -> None:
        assert claim.spec is not None  # it was claimed
        self._runtime, self._claim, self._spec = runtime, claim, claim.spec
        self._work, self._pace, self._share = work, pace, share
        self.reason: Reason | None = None
        self.quarantined: Suspect | None = None  # the item that must not run again
        self.yields_to = ""  # the queue whose urgent work it has won the right to make room for
        self.taken = 0  # slots of others that the latest pulse has promised to its children
        self.next = new_id()  # the node that gets the rest, when one node gets it
        self._fork: Fork | None = None

    # --- before the first item -----------------------------------------------------------------

    def before_work(self) -> bool:
        """Cut at once as the strategy plans, or around items that may kill this process too."""
        claim, shape = self._claim, self._spec.shape
        if claim.suspects or claim.losses:
            self._isolate_suspects()
        elif shape.eager or self._is_known_to_be_long():
            slots = self._live_slots()
            if shape.eager or slots > 1:
                self._as_planned(claim.lo, slots)
        return self._fork is not None

    def _as_planned(self, lo: int, slots: int) -> bool:
        """Cut from an item on as the strategy plans; say whether it plans a cut."""
        planned = plan(self._spec.shape, lo, self._claim.hi, self._claim.depth, slots)
        if isinstance(planned, Fork):
            self.reason, self._fork = Reason.PLANNED, planned
        return isinstance(planned, Fork)

    def _isolate_suspects(self) -> None:
        """Part suspect items from their neighbours; without a suspect, halve the range."""
        claim, suspects = self._claim, sorted(each.index for each in self._claim.suspects)
        alone = claim.hi - claim.lo == 1
        if alone or self._spec.shape.mode == "sequential":
            # One node at a time, in order: work up to the suspect, or on it alone, and hand over
            # the rest.
            first = suspects[0] if suspects else (claim.lo + claim.hi + 1) // 2
            self._work.until = min(self._work.until, max(first, claim.lo + 1))
            self.reason = None if alone else Reason.ISOLATE
            self.quarantined = next(
                (each for each in claim.suspects if each.condemned and each.index == claim.lo),
                None,
            )
            return
        halves = fork(claim.lo, claim.hi, claim.depth, 2, bounded=True)
        self._fork = isolate(claim.lo, claim.hi, claim.depth, suspects) if suspects else halves
        self.reason = Reason.ISOLATE

    def _is_known_to_be_long(self) -> bool:
        """Whether this root has enough items, by the time they took in this process before."""
        known_ms = self._runtime.item_ms.get(self._spec.operation, 0.0)
        items = self._claim.hi - self._claim.lo
        return self._is_root and known_ms * items >= WORTH_PLANNING_MS

    @property
    def _is_root(self) -> bool:
        return self._claim.node in (ROOT, PROCESS)

    def _live_slots(self) -> int:
        [[_, total]] = self._runtime.ledger.call(self._runtime.slots.take(self._spec.queue, 0))
        return max(1, int(total))

    # --- at a slice boundary -------------------------------------------------------------------

    def at_boundary(self) -> bool:
        """Decide whether to stop here; True: the rest is handed over."""
        self._runtime.reached(CrashPoint.MID_SLICE)
        self._work.outcome.fold()
        if self._work.stopped:
            self._tell()
            return True
        if self._runtime.page.level is Level.EMERGENCY > self._work.degradation.level:
            self._work.set_level(Level.EMERGENCY)
        shape, progress = self._spec.shape, self._progress("go")
        # To stop now would repeat items that have ended behind one that sleeps.
        may_wait = self._pace.elapsed_ms < LONGEST_RUN * shape.target_ms
        put_off = self._work.would_repeat and may_wait
        sharable = may_fan_out(shape, progress) and not put_off and self._leaves_room()
        slots = 0
        if self._pace.wants_pulse(sharable=sharable):
            most = shape.factor if sharable and not progress.draining else 0
            order, slots = self._pulse(most)
            progress = self._progress(order)
        fatal = self._work.outcome.fatal
        reason = Reason.STOPPED if fatal else should_yield(shape, progress)
        if reason is not None and put_off and RULES[reason].may_be_put_off:
            reason = None
        self._work.urgent = reason is not None and RULES[reason].urgent
        self.reason = reason or self.reason
        if reason is None and sharable and slots > 1:
            self._fan_out(progress, slots)
        self._pace.next_slice()
        return reason is not None or self._fork is not None

    def _tell(self) -> None:
        """Report the progress of work that has stopped, while its last items are in flight."""
        if self._pace.wants_pulse(sharable=False):
            self._runtime.ledger.call(self._runtime.ledger.pulse(self._claim, *self._counts()))
            self._pace.pulsed()
        self._pace.next_slice()

    def _leaves_room(self) -> bool:
        """Whether one more node of the operation could run now.

        A free slot does not help a node that would wait for a guard or for a slot share.
        """
        if self._claim.waited or self._work.refused:
            return False
        if self._share is None:
            return True
        try:
            share = self._share.status()
        except StoreUnavailable:
            return False
        return share["used"] < share["limit"]

    def _progress(self, order: str) -> NodeProgress:
        if order == "go" and self._work.outcome.full:
            order = "flush"
        return NodeProgress(
            done=self._work.at - self._claim.lo,
            rest=self._claim.hi - self._work.at,
            elapsed_ms=self._pace.elapsed_ms,
            depth=self._claim.depth,
            order=order,
            draining=self._runtime.page.draining,
            preempted=bool(self.yields_to),
        )

    def _pulse(self, most: int) -> tuple[str, int]:
        """Report progress, take up to `most` free slots and ask for urgent work, in one round trip.

        Return the ledger's order and the number of all live slots.
        """
        ledger = self._runtime.ledger
        pulse = ledger.pulse(self._claim, *self._counts())
        take = self._runtime.slots.take(self._spec.queue, most)
        ranks = self._runtime.page.urgent
        urgent = more_urgent(ranks, self._spec.priority)
        order, (taken, slots), *won = ledger.call(pulse, take, *self._win(urgent))
        self._pace.pulsed()
        self.taken = int(taken)
        self.yields_to = self._won_queue(ranks, urgent, won)
        # A fenced node stops at once; FINISH will call it stale.
        return ("flush" if order == b"fenced" else order.decode()), int(slots)

    def _counts(self) -> tuple[int, int, int]:
        """Return the items done, failed and skipped so far, as the progress of the job shows them.

        Items that end behind one that still runs count too, unless their number decides the job:
        FINISH would not have them yet.
        """
        outcome, spec, ahead = self._work.outcome, self._spec, self._work.ahead
        done, failed = outcome.done, outcome.failed_count
        if spec.early_termination_threshold is None:
            done += ahead["done"]
        if spec.continue_on_error and spec.error_threshold is None:
            failed += ahead["failed"]
        return done, failed, len(outcome.empty)

    def _queue_of(self, priority: str) -> str:
        return f"{self._spec.queue.rpartition('.')[0]}.{priority}"

    def _win(self, urgent: str) -> list[Call]:
        return [self._runtime.preemption.win(self._queue_of(urgent))] if urgent else []

    def _won_queue(self, ranks: int, urgent: str, won: Sequence[int]) -> str:
        """Return the queue that this node makes room for, '' when it makes none.

        The most urgent queue may have its slots already; less urgent ones are asked for next.
        """
        if not won or won[0]:
            return self._queue_of(urgent) if won else ""
        ranks &= ~rank_of(urgent)
        urgent = more_urgent(ranks, self._spec.priority)
        won = self._runtime.ledger.call(*self._win(urgent)) if urgent else ()
        return self._won_queue(ranks, urgent, won)

    def _fan_out(self, progress: NodeProgress, slots: int) -> None:
        """Cut for free slots; a root that was not planned before is planned from its rest."""
        shape, lo = self._spec.shape, self._work.at
        if self._is_root and not shape.eager and self._as_planned(lo, slots):
            return
        if self.taken:
            self.reason = Reason.HUNGRY
            self._fork = share_out(
                shape=shape, at=progress, lo=lo, hi=self._claim.hi, wants=self.taken
            )

    # --- at an item that waits -----------------------------------------------------------------

    def at_waiting(self, wait: Postponed) -> None:
        """Cut at an item that waits for a guard or for a retry."""
        self.reason = wait.reason
        if self.may_part(wait):
            suspects = [self._work.at, *self._work.also_waiting]
            self._fork = isolate(self._work.at, self._claim.hi, self._claim.depth, suspects)
        else:
            self._fork = None

    def may_part(self, wait: Postponed) -> bool:
        """Whether the item that waits can leave its neighbours, which need not wait."""
        shape, claim, rest = self._spec.shape, self._claim, self._claim.hi - self._work.at
        return (
            (RULES[wait.reason].isolates or bool(self._work.also_waiting))
            and rest > 1
            and shape.mode != "sequential"
            and claim.depth < shape.max_depth
        )

    # --- the rest ------------------------------------------------------------------------------

    def hand_over(self, report: Report) -> None:
        """Register the rest as the reason's row says: one child in this slot, or a chord."""
        claim, at, reason = self._claim, self._work.at, self.reason or Reason.FLUSH
        if self._fork is not None and self._fork.lo != at:
            # Items in flight at the cut have moved its start.
            parts = min(len(self._fork.parts), claim.hi - at)
            self._fork = fork(at, claim.hi, claim.depth, parts) if parts > 1 else None
        if RULES[reason].children == "many" and self._fork is not None:
            report.splits, report.kids = with_ids(self._fork, self._spec.job, claim.slot, reason)
        else:
            report.kids = [self._only_child(at, reason)]
        if (first := self._work.postponed) is not None:
            waits = {at: first, **(self._work.also_waiting if len(report.kids) > 1 else {})}
            for kid in report.kids:
                if (wait := waits.get(kid.lo)) is not None:
                    kid.wait_ms, kid.tries, kid.why = wait_ms(wait), wait.tries, wait.why

    def _only_child(self, at: int, reason: Reason) -> Child:
        slot = self._claim.slot
        return Child(
            id=self.next,
            lo=at,
            hi=self._claim.hi,
            depth=self._claim.depth,
            split=slot.split,
            index=slot.index,
            task=slot.task,
            why=reason,
        )


def wait_ms(wait: Postponed) -> int:
    """Return for how many ms a node is parked for an item that waits."""
    return math.ceil(1000 * min(max(wait.wait_s, 0.0), LONGEST_WAIT_S))
