"""The one idea: a node owns a range of items, works through it in slices, and may cut it.

Decides what a node does from claim to finish: which items run, when the rest is handed over, what is
reported.  Refuses to know how messages travel; the ledger holds the truth about every range.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from rlm_tasks import codec, operations
from rlm_tasks.dispatch import freeze, mint
from rlm_tasks.errors import UnknownOperation
from rlm_tasks.failures import failure_of
from rlm_tasks.ledger import MERGE, PROCESS, ROOT, Child, Claim, Finished, Report
from rlm_tasks.merging import merge_root
from rlm_tasks.operations import Context, Operation
from rlm_tasks.page import PageSlot
from rlm_tasks.runtime import Runtime
from rlm_tasks.spec import SCHEMA, Spec
from rlm_tasks.splitting import (
    RULES,
    Fork,
    Reason,
    Standing,
    fork,
    isolate,
    may_fan_out,
    plan,
    share_out,
    should_yield,
)

logger = logging.getLogger(__name__)

FIRST_SLICE_MS = 10.0
WINDOW = 1024  # items held in memory at a time
OUTPUTS_AT_ONCE = 65_536  # outputs after which a node without a merge hands its page in
FOLD_AT = 4096  # outputs after which a node with a merge folds them into one
FIRST_BATCH, BATCH_GROWTH = 1, 8
PARK_MS = 5000
_EMPTY: tuple[Any, ...] = (None, "", b"", [], {})


def run_node(runtime: Runtime, job: str, node: str) -> bool:
    """Do what CLAIM's answer says; return whether this message now fills its slot in a chord."""
    claim = runtime.ledger.claim(job, node, secrets.token_hex(8), runtime.worker)
    if claim.answer == "run":
        return _work(runtime, claim)
    if claim.answer == "cut":
        _resend(runtime, claim)
        return False
    if claim.answer == "closed" and claim.waiting:
        _resend(runtime, claim)
    return claim.answer in ("done", "closed")


def _resend(runtime: Runtime, claim: Claim) -> None:
    if claim.waiting:
        runtime.dispatcher.resend(claim.job, claim.waiting, merges=_merges(runtime, claim.job))


def _merges(runtime: Runtime, job: str) -> bool:
    """Whether splits of a job are chords; an operation this worker does not know gets none."""
    spec = runtime.ledger.spec(job)
    return spec is not None and spec.operation in operations.names() and operations.get(spec.operation).merge is not None


def _work(runtime: Runtime, claim: Claim) -> bool:
    spec = claim.spec
    assert spec is not None  # CLAIM answers `run` with a spec, always
    try:
        operation = _known(spec)
    except UnknownOperation as error:
        runtime.ledger.park(claim, PARK_MS, str(error))
        return False
    page = runtime.page_slot()
    page.hold(os.getpid(), claim.job, claim.node, claim.epoch, time.monotonic())
    try:
        if claim.node == MERGE:
            merge_root(runtime.ledger, claim, spec, operation)
            return True
        return NodeRun(runtime, claim, spec, operation, page).run()
    finally:
        page.let_go()


def _known(spec: Spec) -> Operation:
    if spec.schema > SCHEMA:
        raise UnknownOperation(f"{spec.operation} (schema {spec.schema}, this worker reads {SCHEMA})", operations.names())
    return operations.get(spec.operation)


class Harvest:
    """What a node has so far: outputs or a folded partial, failures, counts."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self.outputs: list[Any] = []
        self.done = 0
        self.skipped: list[int] = []
        self.failures: list[dict[str, Any]] = []
        self.fatal: dict[str, Any] | None = None

    def add(self, output: Any) -> None:
        """Keep the output of one item."""
        self.outputs.append(output)
        self.done += 1

    def count(self, _nothing: None) -> None:
        """Count an item that leaves no output."""
        self.done += 1

    def add_batch(self, output: Any, count: int) -> None:
        """Keep what a batch returned: one partial, or one output per item."""
        if self._operation.merge is not None:
            self.outputs.append(output)
        elif not isinstance(output, Sequence) or len(output) != count:
            raise TypeError(f"a batch of {count} items must return a list of {count} outputs")
        else:
            self.outputs.extend(output)
        self.done += count

    def fail(self, index: int, error: BaseException) -> None:
        """Keep an item's exception as data."""
        self.failures.append(failure_of(index, error))

    def fold(self, *, at: int) -> None:
        """Merge the outputs into one when there are `at` of them, so that memory stays flat."""
        if self._operation.merge is None or len(self.outputs) < at or self.fatal:
            return
        try:
            self.outputs = [self._operation.merge(iter(self.outputs))]
        except Exception as error:
            self.fatal = failure_of(-1, error)

    def packed(self) -> bytes:
        """Return the node's partial, packed; nothing when no item succeeded."""
        self.fold(at=1)
        if not self.outputs or self.fatal:
            return b""
        try:
            return codec.pack(self.outputs if self._operation.merge is None else self.outputs[0])
        except TypeError as error:
            self.fatal = failure_of(-1, error)
            return b""


class NodeRun:
    """One claimed node, from its first slice to its finish."""

    def __init__(self, runtime: Runtime, claim: Claim, spec: Spec, operation: Operation, page: PageSlot) -> None:
        self._runtime, self._claim, self._spec, self._operation, self._page = runtime, claim, spec, operation, page
        self._clock = runtime.clock
        self._validating = claim.phase != PROCESS
        self._at = claim.lo
        self._harvest = Harvest(operation)
        self._context = Context(spec.job, spec.params, claim.depth, claim.epoch)
        self._reason: Reason | None = None
        self._fork: Fork | None = None
        self._busy = 0.0
        self._slice_ms = min(FIRST_SLICE_MS, runtime.settings.node.slice_ms)
        self._batch = FIRST_BATCH
        self._keys = runtime.ledger.keys.of(spec.job)
        self._passed_over: set[int] = set()

    # --- from claim to finish -----------------------------------------------------------------------

    def run(self) -> bool:
        """Work, then finish; return whether this message fills its chord slot."""
        self._began = self._clock()
        self._next_slice()
        if not self._cut_before_work():
            self._work_through()
        return self._finish()

    def _cut_before_work(self) -> bool:
        """Cut at once when the strategy plans it so, or around items that may kill this process too."""
        claim, shape = self._claim, self._spec.shape
        if claim.suspects and claim.hi - claim.lo > 1:
            self._reason, self._fork = Reason.ISOLATE, isolate(claim.lo, claim.hi, claim.depth, list(claim.suspects))
        elif shape.eager:
            planned = plan(shape, claim.lo, claim.hi, claim.depth, self._live_slots())
            if isinstance(planned, Fork):
                self._reason, self._fork = Reason.PLANNED, planned
        return self._fork is not None

    def _live_slots(self) -> int:
        [[_, total]] = self._runtime.ledger.store.run(self._runtime.slots.take(self._spec.queue, 0))
        return max(1, int(total))

    def _work_through(self) -> None:
        deaths = max(self._claim.suspects.values(), default=0)
        if deaths >= self._runtime.settings.ledger.death_limit:
            self._harvest.fail(self._at, ChildProcessError(f"its process died {deaths} times while this item ran"))
            self._at += 1
        elif self._operation.is_async and not self._validating:
            _loop().run(self._work_async())
        elif self._operation.batch and not self._validating:
            self._each_window(self._work_batch)
        else:
            self._each_window(self._work_items)

    def _finish(self) -> bool:
        partial = b"" if self._validating else self._packed()
        report = self._report()
        if self._harvest.fatal:
            self._runtime.ledger.stop(self._spec.job, "failed", detail="its merge raised", error=self._harvest.fatal)
        finished = self._runtime.ledger.finish(self._claim, report, partial)
        if finished.answer == "stale":
            logger.info("Node %s of job %s was given to another worker; its work is discarded", self._claim.node, self._spec.job)
            return False
        return self._follow(finished, report)

    def _follow(self, finished: Finished, report: Report) -> bool:
        """Do what FINISH's answer asks for; return whether this message fills its chord slot."""
        runtime, spec = self._runtime, self._spec
        if finished.registered:
            runtime.dispatcher.send_children(spec, report.kids, report.splits, merges=self._operation.merge is not None)
            return False
        if finished.outcome == MERGE:
            held = Claim("run", spec.job, MERGE, self._claim.token, finished.epoch, 0, spec.n, spec=spec)
            self._page.hold(os.getpid(), spec.job, MERGE, finished.epoch, time.monotonic())
            merge_root(runtime.ledger, held, spec, self._operation)
        elif finished.waits:
            runtime.dispatcher.send_root([spec], finished.waits)
        return True

    # --- what is reported ---------------------------------------------------------------------------

    def _packed(self) -> bytes:
        """Return the partial; outputs that cannot be stored become failures of their items."""
        harvest = self._harvest
        packed = harvest.packed()
        if not harvest.fatal or harvest.fatal["type"] != "TypeError" or self._operation.merge is not None:
            return packed
        harvest.fatal = None
        return self._without_unstorable()

    def _without_unstorable(self) -> bytes:
        harvest, kept = self._harvest, []
        gone = {failure["index"] for failure in harvest.failures} | self._claim.known_failed | self._passed_over
        indexes = (index for index in range(self._claim.lo, self._at) if index not in gone)
        for index, output in zip(indexes, harvest.outputs, strict=True):
            try:
                codec.encode(output)
                kept.append(output)
            except TypeError as error:
                harvest.fail(index, TypeError(f"its output cannot be stored as plain data: {error}"))
                harvest.done -= 1
        harvest.outputs = kept
        return harvest.packed()

    def _report(self) -> Report:
        harvest, claim = self._harvest, self._claim
        report = Report(
            mid=self._at,
            done=harvest.done,
            skipped=harvest.skipped,
            failed=[failure["index"] for failure in harvest.failures],
            failures=[(failure["index"], msgspec.json.encode(failure).decode()) for failure in harvest.failures[:1000]],
            why=self._reason or "",
            busy_us=int(self._busy * 1e6),
            peak_kb=_peak_kb(),
        )
        if self._at < claim.hi:
            self._hand_over(report)
        return report

    def _hand_over(self, report: Report) -> None:
        """Register the rest, as the table of reasons says: one child in this slot, or a chord over it."""
        claim, reason = self._claim, self._reason or Reason.FLUSH
        if self._fork is not None and self._fork.lo != self._at:
            # Items in flight at the cut have moved its start.
            parts = min(len(self._fork.parts), claim.hi - self._at)
            self._fork = fork(self._at, claim.hi, claim.depth, parts) if parts > 1 else None
        if RULES[reason].children == "many" and self._fork is not None:
            report.splits, report.kids = freeze(self._fork, self._spec.job, claim.slot, reason)
        else:
            slot = claim.slot
            report.kids = [Child(mint(), self._at, claim.hi, claim.depth, slot.split, slot.index, slot.task, reason)]

    # --- slices -------------------------------------------------------------------------------------

    def _boundary(self) -> bool:
        """Tell the ledger where this node stands and decide whether to go on; True: hand over the rest."""
        self._page.boundary(time.monotonic())
        self._harvest.fold(at=FOLD_AT)
        now = self._clock()
        at = self._standing(now)
        order, taken, slots = self._ask(at)
        at = self._standing(now, order)
        self._reason = should_yield(self._spec.shape, at)
        if self._reason is None and self._harvest.fatal:
            self._reason = Reason.STOPPED
        if self._reason is None and at.rest and slots > 1 and may_fan_out(self._spec.shape, at):
            self._fan_out(at, taken, slots)
        self._slice_ms = min(self._slice_ms * 2, self._runtime.settings.node.slice_ms)
        self._next_slice()
        return self._reason is not None

    def _next_slice(self) -> None:
        now = self._clock()
        self._boundary_at = now + self._slice_ms / 1000
        self._early_at = now + min(self._slice_ms, FIRST_SLICE_MS) / 1000

    def _slice_is_over(self, now: float) -> bool:
        """At the boundary, or somewhat before it when a slot of this very worker is waiting."""
        return now >= self._boundary_at or (self._runtime.page.hungry and now >= self._early_at)

    def _standing(self, now: float, order: str = "go") -> Standing:
        done = self._at - self._claim.lo
        if self._operation.merge is None and len(self._harvest.outputs) >= OUTPUTS_AT_ONCE:
            order = "flush" if order == "go" else order
        return Standing(
            done, self._claim.hi - self._at, (now - self._began) * 1000, self._claim.depth, order, self._runtime.page.draining
        )

    def _ask(self, at: Standing) -> tuple[str, int, int]:
        """Pulse, and take free slots if the rest is worth sharing: one round trip."""
        ledger, harvest = self._runtime.ledger, self._harvest
        pulse = ledger.pulse(self._claim, harvest.done, len(harvest.failures), len(harvest.skipped))
        most = self._spec.shape.factor if may_fan_out(self._spec.shape, at) and not at.draining else 0
        take = self._runtime.slots.take(self._spec.queue, most)
        order, (taken, slots) = ledger.patiently(lambda: ledger.store.run(pulse, take))
        word = order.decode()
        return ("flush" if word == "fenced" else word), int(taken), int(slots)

    def _fan_out(self, at: Standing, taken: int, slots: int) -> None:
        """Cut for free slots; a root that was not planned ahead is now, from what is left."""
        claim, shape = self._claim, self._spec.shape
        if claim.node in (ROOT, PROCESS) and not shape.eager:
            planned = plan(shape, self._at, claim.hi, claim.depth, slots)
            if isinstance(planned, Fork):
                self._reason, self._fork = Reason.PLANNED, planned
                return
        if taken:
            self._reason, self._fork = Reason.HUNGRY, share_out(shape, at, self._at, claim.hi, taken)

    # --- items --------------------------------------------------------------------------------------

    def _each_window(self, work: Callable[[Sequence[Any]], bool]) -> None:
        """Read windows of items until one asks to hand over, or none is left."""
        while self._at < self._claim.hi:
            size = self._batch if work == self._work_batch else WINDOW
            try:
                window = self._read(self._at, min(self._at + size, self._claim.hi))
            except (LookupError, OSError, UnicodeError) as error:
                self._fail_rest(error)
                return
            if work(window):
                return

    def _read(self, lo: int, hi: int) -> Sequence[Any]:
        return self._runtime.ledger.patiently(
            lambda: self._runtime.items.read(self._spec.source, self._keys.items, self._keys.blocks, lo, hi)
        )

    def _fail_rest(self, error: Exception) -> None:
        """Items that cannot be read fail, each by itself: nothing is left out silently."""
        for index in range(self._at, self._claim.hi):
            if index not in self._claim.known_failed:
                self._harvest.fail(index, error)
        self._at = self._claim.hi

    def _passes_over(self, index: int, item: Any) -> bool:
        """Leave out what validation has failed already, and empty items where the request says so."""
        if index in self._claim.known_failed:
            self._passed_over.add(index)
            return True
        if self._spec.skip_if_empty and any(item is each or (item == each and type(item) is type(each)) for each in _EMPTY):
            self._passed_over.add(index)
            self._harvest.skipped.append(index)
            return True
        return False

    def _work_items(self, window: Sequence[Any]) -> bool:
        call: Callable[[Any, Context], Any] = self._validate if self._validating else self._operation.apply
        keep: Callable[[Any], None] = self._harvest.count if self._validating else self._harvest.add
        filtered = bool(self._claim.known_failed) or self._spec.skip_if_empty
        began = self._clock()
        for item in window:
            index = self._context.index = self._at
            self._page.start_item(index)
            if not (filtered and self._passes_over(index, item)):
                try:
                    keep(call(item, self._context))
                except (Exception, SystemExit) as error:
                    self._harvest.fail(index, error)
            self._at = index + 1
            now = self._clock()
            if self._slice_is_over(now) or (self._harvest.failures and not self._spec.continue_on_error):
                self._busy += now - began
                if self._decided() or self._boundary():
                    return True
                began = self._clock()
        self._busy += self._clock() - began
        return False

    def _decided(self) -> bool:
        """The first failure decides where errors are not tolerated."""
        if self._harvest.failures and not self._spec.continue_on_error:
            self._reason = Reason.FLUSH
            return True
        return False

    def _validate(self, item: Any, _context: Context) -> None:
        if self._operation.validate is not None:
            self._operation.validate(item)

    def _work_batch(self, window: Sequence[Any]) -> bool:
        began = self._clock()
        if self._claim.known_failed or self._spec.skip_if_empty:
            kept = [item for index, item in enumerate(window, self._at) if not self._passes_over(index, item)]
        else:
            kept = window  # type: ignore[assignment]  # a range stays a range: its sum needs no list
        self._context.index = self._at
        self._page.start_item(self._at)
        try:
            if kept:
                self._harvest.add_batch(self._operation.apply(kept, self._context), len(kept))
            self._at += len(window)
        except (Exception, SystemExit):
            self._one_by_one(window)
        spent = self._clock() - began
        self._busy += spent
        self._batch = max(1, int(self._batch * min(BATCH_GROWTH, self._slice_ms / 1000 / max(spent, 1e-6))))
        return self._decided() or (self._slice_is_over(self._clock()) and self._boundary())

    def _one_by_one(self, window: Sequence[Any]) -> None:
        """A batch that raised is run again item by item, so that the failure has a name."""
        for item in window:
            index = self._context.index = self._at
            self._page.start_item(index)
            if index not in self._passed_over:
                try:
                    self._harvest.add_batch(self._operation.apply([item], self._context), 1)
                except (Exception, SystemExit) as error:
                    self._harvest.fail(index, error)
            self._at = index + 1
            if self._harvest.failures and not self._spec.continue_on_error:
                return

    # --- many items in flight -----------------------------------------------------------------------

    async def _work_async(self) -> None:
        """Keep up to `concurrency` items in flight; start none once the rest is to be handed over."""
        began = self._clock()
        waiting: dict[int, asyncio.Task[Any]] = {}
        outcomes: dict[int, Any] = {}
        launched = self._at
        while (launched < self._claim.hi and self._reason is None) or waiting:
            launched = self._launch(waiting, outcomes, launched)
            if waiting:
                timeout = max(0.001, self._boundary_at - self._clock())
                await asyncio.wait(waiting.values(), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for index in [index for index, task in waiting.items() if task.done()]:
                outcomes[index] = waiting.pop(index)
            self._collect(outcomes)
            if self._reason is None and not self._decided() and self._clock() >= self._boundary_at:
                self._boundary()
            if self._reason is not None and not waiting and self._at >= launched:
                break
        self._busy += self._clock() - began

    def _launch(self, waiting: dict[int, asyncio.Task[Any]], outcomes: dict[int, Any], launched: int) -> int:
        room = self._operation.concurrency - len(waiting)
        if room <= 0 or self._reason is not None or launched >= self._claim.hi:
            return launched
        try:
            window = self._read(launched, min(launched + room, self._claim.hi))
        except (LookupError, OSError, UnicodeError) as error:
            outcomes.update(dict.fromkeys(range(launched, self._claim.hi), error))
            return self._claim.hi
        for index, item in enumerate(window, launched):
            if self._passes_over(index, item):
                outcomes[index] = None
                continue
            context = Context(self._spec.job, self._spec.params, self._claim.depth, self._claim.epoch, index)
            waiting[index] = asyncio.ensure_future(self._operation.apply(item, context))
        return launched + len(window)

    def _collect(self, outcomes: dict[int, Any]) -> None:
        """Take outcomes over in item order: what is done must be one range without a gap."""
        while self._at in outcomes:
            outcome = outcomes.pop(self._at)
            if isinstance(outcome, asyncio.Task):
                try:
                    self._harvest.add(outcome.result())
                except (Exception, SystemExit, asyncio.CancelledError) as error:
                    self._harvest.fail(self._at, error)
            elif isinstance(outcome, Exception):
                self._harvest.fail(self._at, outcome)
            self._at += 1


_runners: dict[int, asyncio.Runner] = {}


def _loop() -> asyncio.Runner:
    """Return this process's event loop; it outlives nodes, so that users may keep connections open."""
    if os.getpid() not in _runners:
        _runners.clear()
        _runners[os.getpid()] = asyncio.Runner()
    return _runners[os.getpid()]


def _peak_kb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak
