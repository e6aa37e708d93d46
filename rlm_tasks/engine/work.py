"""The work of one node: it runs the items of a range one by one or in batches.

`NodeRun` in `node` calls it; `concurrent_work` has the variant with many items in flight.  Finished
items are always one range without a gap.  After each item or batch the work asks `Pace` whether the
slice is over, and then calls the node's boundary.  Begin with `Work.run`.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from resilience.degradation import IN_FORCE, Degradation, Level
from resilience.errors import StoreUnavailable, is_a
from rlm_tasks.engine.guards import Postponed, wait_of
from rlm_tasks.engine.item_timeouts import ItemAlarm
from rlm_tasks.engine.outcome import NodeOutcome
from rlm_tasks.engine.pace import Pace
from rlm_tasks.engine.shared_page import SEVERAL_ITEMS, ProcessEntry, Steps
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import RULES
from rlm_tasks.jobs.stored_items import Unreadable
from rlm_tasks.ledger.records import PROCESS, Claim
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.ports import CallGuards
from rlm_tasks.operations.registry import Operation

WINDOW = 1024
"""Items held in memory at a time."""
BATCH_GROWTH = 8
"""The first batch is one item; each batch is at most this many times the one before.

Batches grow until one takes as long as a slice.
"""
LARGEST_BATCH = 65_536
"""Items of the largest batch: they are all in memory at once."""
AWAY_S = 1.0
"""An item that cannot be read for a further attempt, because Redis is away, waits for this long."""
_SIZED = frozenset((str, bytes, bytearray, list, tuple, dict, set, frozenset, Counter))
"""Types of items that may be empty; 0 and False are values."""

Read = Callable[[int, int], Sequence[Any]]
"""Returns new items from its first argument on, at most to before its second, at least one.

Raises Unreadable when the first of them cannot be read.
"""


class Work:
    """The work on one range, item by item; `at` is the first item that has no outcome yet."""

    def __init__(
        self,
        claim: Claim,
        spec: JobSpec,
        operation: Operation,
        read: Read,
        *,
        page: ProcessEntry,
        steps: Steps,
        pace: Pace,
        clock: Callable[[], float],
        guards: CallGuards | None = None,
        waiter: Callable[[int], str] = lambda _: "",
        limit_s: float = 0.0,
        level: Level = Level.NORMAL,
        slow_s: float = float("inf"),
        most_bytes: float = float("inf"),
    ) -> None:
        """`waiter` returns the name by which guards wake the node that begins with an item."""
        self._guards, self._waiter, self._limit_s = guards, waiter, limit_s
        self._alarm = ItemAlarm(limit_s)
        self._claim, self._spec, self._operation = claim, spec, operation
        self._read, self._page, self._pace, self._clock = read, page, pace, clock
        self._validating = claim.phase != PROCESS
        self._filtered = bool(claim.known_failed) or spec.skip_if_empty
        self._most = 1 if claim.one_by_one else LARGEST_BATCH  # items in one batch or in flight
        self.outcome = NodeOutcome(operation, steps, most_bytes)
        self.degradation = Degradation(level)
        self._window_context: Context | None = None  # the context of the items of this window
        self._slow_s = slow_s
        self.slow: list[tuple[int, float]] = []  # items that took long: index, seconds
        self.at = claim.lo
        self.until = claim.until  # less than `hi` when the rest must be another node's
        self.busy_s = 0.0
        self.stopped = False  # a boundary ended the work: no further item is started
        self.postponed: Postponed | None = None  # the item at `at` has to wait
        self.also_waiting: dict[int, Postponed] = {}  # waiting items behind `at`
        self.urgent = False  # the node must leave its slot without waiting for sleeping items
        self.refused = False  # an item was denied or postponed
        # Items that have ended behind the first one that runs: done, failed, and those that wait.
        self.ahead: Counter[str] = Counter()
        # Items have ended behind an item that sleeps: to stop now would repeat them.
        self.would_repeat = False
        self.took_s: list[float] = []  # of items that succeeded at their first try
        self.recovered = 0  # items that succeeded at a later try

    def run(self, boundary: Callable[[], bool]) -> None:
        """Work until the range ends, `boundary` returns True, or an item has to wait."""
        self._boundary = boundary
        outside = IN_FORCE.set(self.degradation)
        try:
            with self._alarm:
                self._run_range()
        finally:
            IN_FORCE.reset(outside)

    def _run_range(self) -> None:
        self._run_windows(self._each_item, lambda: WINDOW)

    def give_up(self, index: int, error: BaseException) -> None:
        """Fail an item without running it."""
        self.outcome.fail(index, error)
        self.at = index + 1

    def set_level(self, level: Level) -> None:
        """Apply a level to the next items: an emergency does not wait for the next node."""
        self.degradation = Degradation(level)
        IN_FORCE.set(self.degradation)
        if self._window_context is not None:
            self._window_context.degradation = self.degradation

    @property
    def decided(self) -> bool:
        """Whether an item has failed in a job that does not continue on errors."""
        return self.outcome.has_failed and not self._spec.continue_on_error

    def _run_windows(self, work: Callable[[Sequence[Any]], None], size: Callable[[], int]) -> None:
        while self.at < self.until and not self.stopped:
            window = self._items_up_to(min(self.at + size(), self.until))
            self._page.boundary(self._clock())  # the time limit of an item excludes reading
            began = self._clock()
            if window:
                work(window)
                self.busy_s += self._clock() - began
            else:
                self._check_slice(began)
            self._check_size()

    def _check_slice(self, now: float) -> None:
        """Call the boundary when the slice is over; its time does not count as the operation's."""
        if self.decided:
            self.stopped = True
        elif self._pace.slice_is_over(now):
            self.stopped |= self._boundary()
            self.busy_s -= self._clock() - now

    def _check_size(self) -> None:
        """Call the boundary when the node must report now: its outputs are many, or large."""
        if self.at < self.until and not self.stopped and self.outcome.full:
            self.stopped = self._boundary()

    def _items_up_to(self, end: int) -> Sequence[Any]:
        """Return items from `at` on, or none, with `at` behind those that cannot be read."""
        try:
            return self._read(self.at, end)
        except Unreadable as unreadable:
            self._fail_unread(min(unreadable.until, self.until), unreadable.error)
            return ()

    def _fail_unread(self, until: int, error: Exception) -> None:
        """Fail the items before `until` as one range: they cannot be read, and none may be lost."""
        self.outcome.fail_range(self.at, until, error, self._claim.known_failed)
        self.at = until

    def _leaves_out(self, index: int, item: Any) -> bool:
        """Leave out an item that failed in validation, or an empty one that the job skips.

        Return whether it was left out.
        """
        if index in self._claim.known_failed:
            self.outcome.leave_out(index, empty=False)
            return True
        if self._spec.skip_if_empty and (item is None or (type(item) in _SIZED and not item)):
            self.outcome.leave_out(index, empty=True)
            return True
        return False

    def _each_item(self, window: Sequence[Any]) -> None:
        call: Callable[[Any, Context], Any] = self._validate if self._validating else self._call
        keep: Callable[[Any], None] = self.outcome.count if self._validating else self.outcome.add
        context, began = self._context(), self._clock()
        self._window_context = context
        for item in window:
            index = self.at
            context.begin(index)
            self._page.start_item(index)
            if not (self._filtered and self._leaves_out(index, item)):
                self._attempt(keep=keep, call=call, value=item, context=context, began=began)
                if self.postponed is not None:
                    return
            self.at = index + 1
            began = self._clock()
            self._check_slice(began)
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
        """Run one item, and record that it succeeded, failed, or has to wait."""
        try:
            keep(call(value, context))
        except BaseException as error:
            if (wait := wait_of(error, context.tries)) is not None:
                self._postpone(wait)
            else:
                self.outcome.fail(context.index, error)
        else:
            self._succeeded(context, began)
        if context.degradation.shaped:
            self.outcome.shape(context.degradation, 1)

    def _succeeded(self, context: Context, began: float) -> None:
        took_s = self._clock() - began
        if took_s >= self._slow_s:
            self.slow.append((context.index, took_s))
        if context.tries:
            self.recovered += 1  # its time is no sample (Karn's algorithm)
        else:
            self.took_s.append(took_s)

    def _postpone(self, wait: Postponed) -> None:
        """Stop before the item at `at`."""
        self.degradation.shaped.clear()  # the item will run again
        self.postponed, self.stopped, self.refused = wait, True, True

    def _set_history(self, context: Context, rest: int) -> None:
        """Set the failed tries and the wait of an item: only a node's first item has any."""
        is_first = context.index == self._claim.lo
        context.tries = self._claim.tries if is_first else 0
        context.waited = self._claim.waited if is_first else False
        context.rest = rest

    def _call(self, value: Any, context: Context) -> Any:
        """Call the operation behind its guards."""
        self._set_history(context, 1 if self._operation.batch else self.until - context.index)
        if self._guards is None:
            return self._alarm.run(self._operation.apply, value, context)
        waiter = self._waiter(context.index)
        return self._guards.call(
            value,
            context,
            tries=context.tries,
            waiter=waiter,
            run=self._alarm.run,
            again=functools.partial(
                self._read_again,
                context.index,
                context.tries,
                len(value) if self._operation.batch else 1,  # its call may change the list
            ),
        )

    def _read_again(self, index: int, tries: int, _count: int = 1) -> Any:
        """Return a new item in place of one that a call may have changed.

        Raises Postponed while Redis is away, and the error of an item that cannot be read.
        """
        try:
            return self._read(index, index + 1)[0]
        except Unreadable as unreadable:
            raise unreadable.error from None
        except StoreUnavailable as error:  # no failure of the item
            raise Postponed(AWAY_S, str(error), tries=tries) from None

    def _validate(self, item: Any, _context: Context) -> None:
        if self._operation.validate is None:
            return
        verdict = self._alarm.run(self._operation.validate, item)
        if verdict is False:
            raise ValueError("validate returned False")
        if verdict is not None and inspect.isawaitable(verdict):
            raise TypeError("validate must be a plain function: what it returned is not awaited")

    def _context(self, index: int = 0) -> Context:
        spec, claim = self._spec, self._claim
        context = Context(
            job_id=spec.job,
            params={},
            shared_params=spec.params,
            depth=claim.depth,
            attempt=claim.epoch,
            index=index,
            degradation=self.degradation,
        )
        # A function without a context reads no params, and its guards few.
        context.has_few_params &= self._operation.takes_context
        return context


class BatchWork(Work):
    """The work on one range in batches, for operations that take a list of items."""

    _batch = 1  # items of the next batch

    def _run_range(self) -> None:
        self._run_windows(self._one_batch, lambda: self._batch)

    def _one_batch(self, window: Sequence[Any]) -> None:
        began, size = self._clock(), len(window)  # the call may change the list, too
        kept = window  # a range stays a range: its sum needs no list
        if self._filtered:
            kept = [
                item
                for index, item in enumerate(window, self.at)
                if not self._leaves_out(index, item)
            ]
        self._page.start_item(self.at if size == 1 else SEVERAL_ITEMS)
        if not kept or (size > 1 and self._run_as_one_call(kept, began)):
            self.at += size
        elif self.postponed is None:
            self._run_one_by_one(size)
        if self.postponed is None:
            now = self._clock()
            grown = self._batch * min(
                BATCH_GROWTH, self._pace.slice_ms / 1000 / max(now - began, 1e-6)
            )
            self._batch = min(self._most, max(1, int(grown)))
            self._check_slice(now)

    def _run_as_one_call(self, kept: Sequence[Any], began: float) -> bool:
        """Run a batch as one call and return True.

        Return False when its items have to run one by one, or have to wait (`postponed`).
        """
        count = len(kept)
        try:
            self.outcome.add_batch(self._call(kept, self._context(self.at)), count)
        except BaseException as error:
            wait = wait_of(error)
            if wait is not None and not (is_a(error, Postponed) and RULES[wait.reason].isolates):
                self._postpone(wait)
            return False
        else:
            self.outcome.shape(self.degradation, count)
            self.took_s.append(self._clock() - began)
            return True

    def _run_one_by_one(self, size: int) -> None:
        """Run a batch again item by item: it raised, and the item that failed must be known."""
        self.degradation.shaped.clear()  # each item runs again
        for item in self._items_up_to(self.at + size):  # the call may have changed them
            index, context = self.at, self._context(self.at)
            self._page.boundary(self._clock())  # each item has the whole time limit
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

    def _read_again(self, index: int, tries: int, count: int = 1) -> Any:
        """Return a new batch of so many items in place of one that a call may have changed."""
        batch: list[Any] = []
        while len(batch) < count:
            item = super()._read_again(index, tries)
            if index not in self.outcome.left_out:
                batch.append(item)
            index += 1
        return batch

    def _keep_one(self, output: Any) -> None:
        self.outcome.add_batch(output, 1)
