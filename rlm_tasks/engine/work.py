"""Work through a range: item by item, or in batches; with many items in flight, see `in_flight`.

Decides how an operation is called and that what is done is always one range without a gap.  A
boundary is offered after each item or batch; what happens there is the node's business."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from resilience.degradation import IN_FORCE, Degradation, Level
from resilience.errors import Denied
from rlm_tasks.engine.guards import Postponed, postponed
from rlm_tasks.engine.item_timeouts import ItemAlarm
from rlm_tasks.engine.outcome import NodeOutcome
from rlm_tasks.engine.pace import Pace
from rlm_tasks.engine.shared_page import SEVERAL_ITEMS, ProcessEntry
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.records import PROCESS, Claim
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.ports import CallGuards
from rlm_tasks.operations.registry import Operation

WINDOW = 1024
"""Items held in memory at a time."""
BATCH_GROWTH = 8
"""A batch starts with one item and grows at most this much at a time towards the length of a
slice.
"""
LARGEST_BATCH = 65_536
"""Items of the largest batch: they are all in memory at once."""
_EMPTY: tuple[Any, ...] = (None, "", b"", [], {})

Read = Callable[[int, int], Sequence[Any]]
UNREADABLE = (LookupError, OSError, UnicodeError)


class Work:
    """One range being worked through; `at` is the first item not yet accounted for."""

    def __init__(
        self,
        claim: Claim,
        spec: JobSpec,
        operation: Operation,
        read: Read,
        *,
        page: ProcessEntry,
        pace: Pace,
        clock: Callable[[], float],
        guards: CallGuards | None = None,
        waiter: Callable[[int], str] = lambda _: "",
        limit_s: float = 0.0,
        level: Level = Level.NORMAL,
        slow_s: float = float("inf"),
    ) -> None:
        self._guards, self._waiter, self._limit_s = guards, waiter, limit_s
        self._alarm = ItemAlarm(limit_s)
        self._claim, self._spec, self._operation = claim, spec, operation
        self._read, self._page, self._pace, self._clock = read, page, pace, clock
        self._validating = claim.phase != PROCESS
        self._filtered = bool(claim.known_failed) or spec.skip_if_empty
        self._batch = 1
        self._most = 1 if claim.one_by_one else LARGEST_BATCH
        self.outcome = NodeOutcome(operation)
        self.degradation = Degradation(level)
        self._shown: Context | None = None  # what the items of this window see
        self._slow_s = slow_s
        self.slow: list[tuple[int, float]] = []  # items that took long: index, seconds
        self.at = claim.lo
        self.until = claim.hi  # less when the rest must be another node's, whatever happens here
        self.busy_s = 0.0
        self.stopped = False  # a boundary has said so: no further item is started
        self.postponed: Postponed | None = None  # the item at `at` has to wait
        self.others: dict[int, Postponed] = {}  # items behind it that have to wait, too
        self.urgent = False  # what has stopped it waits for nobody
        self.refused = False  # a guard has said not yet
        self.would_repeat = (
            False  # items have ended behind one that sleeps: to stop now is to do them again
        )
        self.took_s: list[float] = []  # of items that ended well at their first try
        self.recovered = 0  # items that ended well at a later try

    def run(self, boundary: Callable[[], bool]) -> None:
        """Work until the range or a boundary ends it, or an item has to wait."""
        self._boundary = boundary
        outside = IN_FORCE.set(self.degradation)
        try:
            with self._alarm:
                if self._operation.batch and not self._validating:
                    self._windows(self._one_batch, lambda: self._batch)
                else:
                    self._windows(self._each_item, lambda: WINDOW)
        finally:
            IN_FORCE.reset(outside)

    def give_up(self, index: int, error: BaseException) -> None:
        """Fail an item without running it."""
        self.outcome.fail(index, error)
        self.at = index + 1

    def press(self, level: Level) -> None:
        """Ask something else of the items to come: an emergency does not wait for the next node."""
        self.degradation = Degradation(level)
        IN_FORCE.set(self.degradation)
        if self._shown is not None:
            self._shown.degradation = self.degradation

    @property
    def decided(self) -> bool:
        """Whether a failure ends the job, because errors are not tolerated."""
        return bool(self.outcome.failures) and not self._spec.continue_on_error

    def _windows(self, work: Callable[[Sequence[Any]], None], size: Callable[[], int]) -> None:
        while self.at < self.until and not self.stopped:
            try:
                window = self._read(self.at, min(self.at + size(), self.until))
            except UNREADABLE as error:
                self._fail_rest(error)
                return
            self._page.boundary(self._clock())  # reading is not the items' time
            began = self._clock()
            work(window)
            self.busy_s += self._clock() - began

    def _look_up(self, now: float) -> None:
        """Offer a boundary when the slice is over; its time is not the operation's."""
        if self.decided:
            self.stopped = True
        elif self._pace.slice_is_over(now):
            self.stopped = self._boundary()
            self.busy_s -= self._clock() - now

    def _fail_rest(self, error: Exception) -> None:
        """Items that cannot be read fail, each by itself: nothing is left out silently."""
        for index in range(self.at, self.until):
            if index not in self._claim.known_failed:
                self.outcome.fail(index, error)
        self.at = self.until

    def _leaves_out(self, index: int, item: Any) -> bool:
        """Leave out what validation has failed already, and empty items where the request says
        so.
        """
        if index in self._claim.known_failed:
            self.outcome.leave_out(index, empty=False)
            return True
        if self._spec.skip_if_empty and any(
            type(item) is type(each) and item == each for each in _EMPTY
        ):
            self.outcome.leave_out(index, empty=True)
            return True
        return False

    # --- one by one ----------------------------------------------------------------------------

    def _each_item(self, window: Sequence[Any]) -> None:
        call: Callable[[Any, Context], Any] = self._validate if self._validating else self._call
        keep: Callable[[Any], None] = self.outcome.count if self._validating else self.outcome.add
        context, began = self._context(), self._clock()
        self._shown = context
        for item in window:
            index = context.index = self.at
            self._page.start_item(index)
            if not (self._filtered and self._leaves_out(index, item)):
                self._attempt(keep=keep, call=call, value=item, context=context, began=began)
                if self.postponed is not None:
                    return
            self.at = index + 1
            began = self._clock()
            self._look_up(began)
            if self.stopped:
                return

    def _attempt(
        self,
        keep: Callable[[Any], None],
        call: Callable[[Any, Context], Any],
        value: Any,
        context: Context,
        began: float,
    ) -> None:
        """Run one item: it ends well, fails, or has to wait."""
        try:
            keep(call(value, context))
        except Postponed as wait:
            self._postpone(wait)
        except Denied as denied:
            self._postpone(postponed(denied, context.tries))
        except (Exception, SystemExit) as error:
            self.outcome.fail(context.index, error)
        else:
            self._ended_well(context, began)
        if context.degradation.shaped:
            self.outcome.shape(context.degradation, 1)

    def _ended_well(self, context: Context, began: float) -> None:
        took_s = self._clock() - began
        if took_s >= self._slow_s:
            self.slow.append((context.index, took_s))
        if context.tries:
            self.recovered += 1  # and no sample: Karn's algorithm
        else:
            self.took_s.append(took_s)

    def _postpone(self, wait: Postponed) -> None:
        """Stop before the item at `at`."""
        self.degradation.shaped.clear()  # it will be asked again
        self.postponed, self.stopped, self.refused = wait, True, True

    def _remember(self, context: Context, rest: int) -> None:
        """Say of an item what the ledger remembers of it: only the first of a node has a past."""
        is_first = context.index == self._claim.lo
        context.tries, context.waited = (
            (self._claim.tries, self._claim.waited) if is_first else (0, False)
        )
        context.rest = rest

    def _call(self, value: Any, context: Context) -> Any:
        """Call the operation behind its guards."""
        self._remember(context, 1 if self._operation.batch else self.until - context.index)
        if self._guards is None:
            return self._alarm.run(self._operation.apply, value, context)
        waiter = self._waiter(context.index)
        return self._guards.call(
            value, context, tries=context.tries, waiter=waiter, run=self._alarm.run
        )

    def _validate(self, item: Any, _context: Context) -> None:
        if self._operation.validate is not None:
            self._alarm.run(self._operation.validate, item)

    def _context(self, index: int = 0) -> Context:
        spec, claim = self._spec, self._claim
        return Context(
            job_id=spec.job,
            params=spec.params,
            depth=claim.depth,
            attempt=claim.epoch,
            index=index,
            degradation=self.degradation,
        )

    # --- in batches ----------------------------------------------------------------------------

    def _one_batch(self, window: Sequence[Any]) -> None:
        began = self._clock()
        kept = window  # a range stays a range: its sum needs no list
        if self._filtered:
            kept = [
                item
                for index, item in enumerate(window, self.at)
                if not self._leaves_out(index, item)
            ]
        self._page.start_item(self.at if len(window) == 1 else SEVERAL_ITEMS)
        if not kept or (len(window) > 1 and self._whole(kept, began)):
            self.at += len(window)
        elif self.postponed is None:
            self._again_one_by_one(window)
        if self.postponed is None:
            now = self._clock()
            grown = self._batch * min(
                BATCH_GROWTH, self._pace.slice_ms / 1000 / max(now - began, 1e-6)
            )
            self._batch = min(self._most, max(1, int(grown)))
            self._look_up(now)

    def _whole(self, kept: Sequence[Any], began: float) -> bool:
        """Run a batch as one call; False when its items have to be run by themselves, or to
        wait.
        """
        try:
            self.outcome.add_batch(self._call(kept, self._context(self.at)), len(kept))
        except Denied as denied:
            self._postpone(postponed(denied))
        except Postponed as wait:
            if not wait.isolates:
                self._postpone(wait)
        except (Exception, SystemExit):
            return False
        else:
            self.outcome.shape(self.degradation, len(kept))
            self.took_s.append(self._clock() - began)
            return True
        return False

    def _keep_one(self, output: Any) -> None:
        self.outcome.add_batch(output, 1)

    def _again_one_by_one(self, window: Sequence[Any]) -> None:
        """A batch that raised is run again item by item, so that the failure has a name."""
        self.degradation.shaped.clear()  # each is asked again
        for item in window:
            index, context = self.at, self._context(self.at)
            self._page.boundary(self._clock())  # each has the whole limit for itself
            self._page.start_item(index)
            if index not in self.outcome.left_out:
                self._attempt(
                    keep=self._keep_one,
                    call=self._call,
                    value=[item],
                    context=context,
                    began=self._clock(),
                )
                if self.postponed is not None:
                    return
            self.at = index + 1
            if self.decided:
                return
