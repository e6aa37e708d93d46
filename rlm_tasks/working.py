"""Work through a range: item by item, in batches, or with many items in flight.

Decides how an operation is called and that what is done is always one range without a gap.  A boundary is
offered after each item or batch; what happens there is the node's business.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

from rlm_tasks.harvest import Harvest
from rlm_tasks.ledger import PROCESS, Claim
from rlm_tasks.operations import Context, Operation
from rlm_tasks.pace import Pace
from rlm_tasks.page import SEVERAL_ITEMS, PageSlot
from rlm_tasks.spec import Spec

WINDOW = 1024
"""Items held in memory at a time."""
BATCH_GROWTH = 8
"""A batch starts with one item and grows at most this much at a time towards the length of a slice."""
LARGEST_BATCH = 65_536
"""Items of the largest batch: they are all in memory at once."""
_EMPTY: tuple[Any, ...] = (None, "", b"", [], {})

Read = Callable[[int, int], Sequence[Any]]
_UNREADABLE = (LookupError, OSError, UnicodeError)


class Work:
    """One range being worked through; `at` is the first item not yet accounted for."""

    def __init__(
        self,
        claim: Claim,
        spec: Spec,
        operation: Operation,
        read: Read,
        page: PageSlot,
        pace: Pace,
        clock: Callable[[], float],
    ) -> None:
        self._claim, self._spec, self._operation = claim, spec, operation
        self._read, self._page, self._pace, self._clock = read, page, pace, clock
        self._validating = claim.phase != PROCESS
        self._filtered = bool(claim.known_failed) or spec.skip_if_empty
        self._batch = 1
        self._most = 1 if claim.one_by_one else LARGEST_BATCH
        self.harvest = Harvest(operation)
        self.at = claim.lo
        self.until = claim.hi  # less when the rest must be another node's, whatever happens here
        self.busy_s = 0.0
        self.stopped = False  # a boundary has said so: no further item is started

    def run(self, boundary: Callable[[], bool]) -> None:
        """Work until the range or a boundary ends it."""
        self._boundary = boundary
        if self._operation.is_async and not self._validating:
            event_loop().run(self._many_in_flight())
        elif self._operation.batch and not self._validating:
            self._windows(self._one_batch, lambda: self._batch)
        else:
            self._windows(self._each_item, lambda: WINDOW)

    def give_up(self, index: int, error: BaseException) -> None:
        """Fail an item without running it."""
        self.harvest.fail(index, error)
        self.at = index + 1

    @property
    def decided(self) -> bool:
        """Whether a failure ends the job, because errors are not tolerated."""
        return bool(self.harvest.failures) and not self._spec.continue_on_error

    def _windows(self, work: Callable[[Sequence[Any]], None], size: Callable[[], int]) -> None:
        while self.at < self.until and not self.stopped:
            try:
                window = self._read(self.at, min(self.at + size(), self.until))
            except _UNREADABLE as error:
                self._fail_rest(error)
                return
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
                self.harvest.fail(index, error)
        self.at = self.until

    def _leaves_out(self, index: int, item: Any) -> bool:
        """Leave out what validation has failed already, and empty items where the request says so."""
        if index in self._claim.known_failed:
            self.harvest.leave_out(index, empty=False)
            return True
        if self._spec.skip_if_empty and any(type(item) is type(each) and item == each for each in _EMPTY):
            self.harvest.leave_out(index, empty=True)
            return True
        return False

    # --- one by one ---------------------------------------------------------------------------------

    def _each_item(self, window: Sequence[Any]) -> None:
        call: Callable[[Any, Context], Any] = self._validate if self._validating else self._operation.apply
        keep: Callable[[Any], None] = self.harvest.count if self._validating else self.harvest.add
        context = self._context()
        for item in window:
            index = context.index = self.at
            self._page.start_item(index)
            if not (self._filtered and self._leaves_out(index, item)):
                try:
                    keep(call(item, context))
                except (Exception, SystemExit) as error:
                    self.harvest.fail(index, error)
            self.at = index + 1
            self._look_up(self._clock())
            if self.stopped:
                return

    def _validate(self, item: Any, _context: Context) -> None:
        if self._operation.validate is not None:
            self._operation.validate(item)

    def _context(self, index: int = 0) -> Context:
        return Context(self._spec.job, self._spec.params, self._claim.depth, self._claim.epoch, index)

    # --- in batches ---------------------------------------------------------------------------------

    def _one_batch(self, window: Sequence[Any]) -> None:
        began = self._clock()
        kept = window  # a range stays a range: its sum needs no list
        if self._filtered:
            kept = [item for index, item in enumerate(window, self.at) if not self._leaves_out(index, item)]
        self._page.start_item(self.at if len(window) == 1 else SEVERAL_ITEMS)
        try:
            if kept:
                self.harvest.add_batch(self._operation.apply(kept, self._context(self.at)), len(kept))
            self.at += len(window)
        except (Exception, SystemExit):
            self._again_one_by_one(window)
        now = self._clock()
        grown = self._batch * min(BATCH_GROWTH, self._pace.slice_ms / 1000 / max(now - began, 1e-6))
        self._batch = min(self._most, max(1, int(grown)))
        self._look_up(now)

    def _again_one_by_one(self, window: Sequence[Any]) -> None:
        """A batch that raised is run again item by item, so that the failure has a name."""
        for item in window:
            index = self.at
            self._page.start_item(index)
            if index not in self.harvest.left_out:
                try:
                    self.harvest.add_batch(self._operation.apply([item], self._context(index)), 1)
                except (Exception, SystemExit) as error:
                    self.harvest.fail(index, error)
            self.at = index + 1
            if self.decided:
                return

    # --- many in flight -----------------------------------------------------------------------------

    async def _many_in_flight(self) -> None:
        """Keep up to `concurrency` items in flight; start none once a boundary has said stop."""
        began = self._clock()
        waiting: dict[int, asyncio.Task[Any]] = {}
        outcomes: dict[int, Any] = {}
        launched = self.at
        while waiting or (launched < self.until and not self.stopped):
            launched = self._launch(waiting, outcomes, launched)
            if waiting:
                self._page.start_item(next(iter(waiting)) if len(waiting) == 1 else SEVERAL_ITEMS)
                patience = max(0.001, self._pace.slice_ms / 1000)
                await asyncio.wait(waiting.values(), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for index in [index for index, task in waiting.items() if task.done()]:
                outcomes[index] = waiting.pop(index)
            self._collect(outcomes)
            if not self.stopped:
                self._look_up(self._clock())
        self.busy_s += self._clock() - began

    def _launch(self, waiting: dict[int, asyncio.Task[Any]], outcomes: dict[int, Any], launched: int) -> int:
        room = min(self._most, self._operation.concurrency) - len(waiting)
        if room <= 0 or self.stopped or launched >= self.until:
            return launched
        try:
            window = self._read(launched, min(launched + room, self.until))
        except _UNREADABLE as error:
            outcomes.update(dict.fromkeys(range(launched, self.until), error))
            return self.until
        for index, item in enumerate(window, launched):
            if self._leaves_out(index, item):
                outcomes[index] = None
            else:
                waiting[index] = asyncio.ensure_future(self._operation.apply(item, self._context(index)))
        return launched + len(window)

    def _collect(self, outcomes: dict[int, Any]) -> None:
        """Take outcomes over in item order: what is done must be one range without a gap."""
        while self.at in outcomes:
            outcome = outcomes.pop(self.at)
            if isinstance(outcome, asyncio.Task):
                try:
                    self.harvest.add(outcome.result())
                except (Exception, SystemExit, asyncio.CancelledError) as error:
                    self.harvest.fail(self.at, error)
            elif isinstance(outcome, Exception):
                self.harvest.fail(self.at, outcome)
            self.at += 1


_runners: dict[int, asyncio.Runner] = {}


def event_loop() -> asyncio.Runner:
    """Return this process's event loop; it outlives nodes, so that users may keep connections open."""
    if os.getpid() not in _runners:
        _runners.clear()
        _runners[os.getpid()] = asyncio.Runner()
    return _runners[os.getpid()]
