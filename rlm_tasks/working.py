"""Work through a range: item by item, in batches, or with many items in flight.

Decides how an operation is called and that what is done is always one range without a gap.  A boundary is
offered after each item or batch; what happens there is the node's business.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from resilience.errors import CallTimeout, Denied
from rlm_tasks.guards import PATIENCE_S, Guarded, Postponed, postponed
from rlm_tasks.harvest import Harvest
from rlm_tasks.item_limits import ItemAlarm
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
LOOK_AGAIN_S = 0.1
"""An item among others asks a guard again after this, should nobody have called its node."""
SLEEPERS_S = 1.0
"""A node that is to hand over its rest waits so long for sleepers, rather than do again what has ended behind them."""
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
        *,
        guarded: Guarded | None = None,
        waiter: Callable[[int], str] = lambda _: "",
        limit_s: float = 0.0,
    ) -> None:
        self._guarded, self._waiter, self._limit_s = guarded, waiter, limit_s
        self._alarm = ItemAlarm(0.0 if operation.is_async else limit_s)
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
        self.postponed: Postponed | None = None  # the item at `at` has to wait
        self.others: dict[int, Postponed] = {}  # items behind it that have to wait, too
        self.urgent = False  # what has stopped it waits for nobody
        self.would_repeat = False  # items have ended behind one that sleeps: to stop now is to do them again
        self.took_s: list[float] = []  # of items that ended well at their first try
        self.recovered = 0  # items that ended well at a later try

    def run(self, boundary: Callable[[], bool]) -> None:
        """Work until the range or a boundary ends it, or an item has to wait."""
        self._boundary = boundary
        if self._operation.is_async and not self._validating:
            event_loop().run(self._many_in_flight())
            return
        with self._alarm:
            if self._operation.batch and not self._validating:
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
            self._page.boundary(time.monotonic())  # reading is not the items' time
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
        call: Callable[[Any, Context], Any] = self._validate if self._validating else self._call
        keep: Callable[[Any], None] = self.harvest.count if self._validating else self.harvest.add
        context, began = self._context(), self._clock()
        for item in window:
            index = context.index = self.at
            self._page.start_item(index)
            if not (self._filtered and self._leaves_out(index, item)):
                self._attempt(index, began, lambda: keep(call(item, context)))  # noqa: B023  # called at once
                if self.postponed is not None:
                    return
            self.at = index + 1
            began = self._clock()
            self._look_up(began)
            if self.stopped:
                return

    def _attempt(self, index: int, began: float, run: Callable[[], None]) -> None:
        """Run one item: it ends well, fails, or has to wait."""
        try:
            run()
        except Postponed as wait:
            self._postpone(wait)
        except Denied as denied:
            self._postpone(postponed(denied, self._tries(index)))
        except (Exception, SystemExit) as error:
            self.harvest.fail(index, error)
        else:
            self._ended_well(index, began)

    def _ended_well(self, index: int, began: float) -> None:
        if self._tries(index):
            self.recovered += 1  # and no sample: Karn's algorithm
        else:
            self.took_s.append(self._clock() - began)

    def _postpone(self, wait: Postponed) -> None:
        """Stop before the item at `at`."""
        self.postponed, self.stopped = wait, True

    def _tries(self, index: int) -> int:
        return self._claim.tries if index == self._claim.lo else 0

    def _has_waited(self, index: int) -> bool:
        return self._claim.waited and index == self._claim.lo

    def _call(self, value: Any, context: Context) -> Any:
        """Call the operation behind its guards."""
        context.tries, context.waited = self._tries(context.index), self._has_waited(context.index)
        if self._guarded is None:
            return self._alarm.within(lambda: self._operation.apply(value, context))
        waiter = self._waiter(context.index)
        return self._guarded.call(value, context, tries=context.tries, waiter=waiter, within=self._alarm.within)

    def _validate(self, item: Any, _context: Context) -> None:
        if (validate := self._operation.validate) is not None:
            self._alarm.within(lambda: validate(item))

    def _context(self, index: int = 0) -> Context:
        return Context(self._spec.job, self._spec.params, self._claim.depth, self._claim.epoch, index)

    # --- in batches ---------------------------------------------------------------------------------

    def _one_batch(self, window: Sequence[Any]) -> None:
        began = self._clock()
        kept = window  # a range stays a range: its sum needs no list
        if self._filtered:
            kept = [item for index, item in enumerate(window, self.at) if not self._leaves_out(index, item)]
        self._page.start_item(self.at if len(window) == 1 else SEVERAL_ITEMS)
        if not kept or (len(window) > 1 and self._whole(kept, began)):
            self.at += len(window)
        elif self.postponed is None:
            self._again_one_by_one(window)
        if self.postponed is None:
            now = self._clock()
            grown = self._batch * min(BATCH_GROWTH, self._pace.slice_ms / 1000 / max(now - began, 1e-6))
            self._batch = min(self._most, max(1, int(grown)))
            self._look_up(now)

    def _whole(self, kept: Sequence[Any], began: float) -> bool:
        """Run a batch as one call; False when its items have to be run by themselves, or to wait."""
        try:
            self.harvest.add_batch(self._call(kept, self._context(self.at)), len(kept))
        except Denied as denied:
            self._postpone(postponed(denied))
        except Postponed as wait:
            if not wait.isolates:
                self._postpone(wait)
        except (Exception, SystemExit):
            return False
        else:
            self.took_s.append(self._clock() - began)
            return True
        return False

    def _again_one_by_one(self, window: Sequence[Any]) -> None:
        """A batch that raised is run again item by item, so that the failure has a name."""
        for item in window:
            index, context = self.at, self._context(self.at)
            self._page.boundary(time.monotonic())  # each has the whole limit for itself
            self._page.start_item(index)
            if index not in self.harvest.left_out:
                self._attempt(index, self._clock(), lambda: self.harvest.add_batch(self._call([item], context), 1))  # noqa: B023  # called at once
                if self.postponed is not None:
                    return
            self.at = index + 1
            if self.decided:
                return

    # --- many in flight -----------------------------------------------------------------------------

    async def _many_in_flight(self) -> None:
        """Keep up to `concurrency` items in flight; start none once a boundary has said stop.

        What waits for another try sleeps among the others; when nothing else is in flight, or nothing is to be started
        any more, it leaves the slot and comes back later.
        """
        began = self._clock()
        self._in_flight: dict[int, asyncio.Task[Any]] = {}
        self._sleeping: set[int] = set()
        self._hurry = asyncio.Event()
        self._refused: Postponed | None = None
        self._not_before = 0.0
        self._stopped_at = float("inf")
        outcomes: dict[int, Any] = {}
        launched = self.at
        while self._in_flight or (launched < self.until and not self.stopped):
            launched = self._launch(outcomes, launched)
            await self._some_end()
            for index in [index for index, task in self._in_flight.items() if task.done()]:
                outcomes[index] = self._in_flight.pop(index)
            self._collect(outcomes)
            self.would_repeat = bool(self._sleeping) and (bool(outcomes) or len(self._in_flight) > len(self._sleeping))
            if not self.stopped:
                self._look_up(self._clock())
            self._leave_slot(outcomes, launched)
        for index, task in outcomes.items():
            # What stands behind an item that waits is done again; but what waits, too, keeps its tries.
            if isinstance(task, asyncio.Task) and not task.cancelled() and isinstance(wait := task.exception(), Postponed):
                self.others[index] = wait
        self.busy_s += self._clock() - began

    def _leave_slot(self, outcomes: dict[int, Any], launched: int) -> None:
        """Hurry when the slot does nothing but wait, and no item would be done again for leaving it."""
        waiting = self._not_before - self._clock() > PATIENCE_S
        if self._refused is not None and waiting and not self._in_flight and not self.stopped:
            self._refused.wait_s = self._not_before - self._clock()
            self._postpone(self._refused)
        idle = len(self._sleeping) == len(self._in_flight) > 0 and not outcomes
        if self.stopped:
            self._stopped_at = min(self._stopped_at, self._clock())
            patient = self.would_repeat and self.postponed is None and not (self.urgent or self._pace.draining)
            if not patient or self._clock() - self._stopped_at > SLEEPERS_S:
                self._hurry.set()
        elif idle and (launched >= self.until or waiting):
            self._hurry.set()

    async def _some_end(self) -> None:
        patience_s = max(0.001, self._pace.slice_ms / 1000)
        if self._in_flight:
            self._page.start_item(next(iter(self._in_flight)) if len(self._in_flight) == 1 else SEVERAL_ITEMS)
            await asyncio.wait(self._in_flight.values(), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        elif not self.stopped:
            await asyncio.sleep(max(0.0, min(patience_s, self._not_before - self._clock())))

    def _launch(self, outcomes: dict[int, Any], launched: int) -> int:
        room = min(self._most, self._operation.concurrency) - len(self._in_flight)
        if room <= 0 or self.stopped or launched >= self.until or self._clock() < self._not_before:
            return launched
        try:
            window = self._read(launched, min(launched + room, self.until))
        except _UNREADABLE as error:
            outcomes.update(dict.fromkeys(range(launched, self.until), error))
            return self.until
        for index, item in enumerate(window, launched):
            if self._leaves_out(index, item):
                outcomes[index] = None
            elif not self._start(index, item):
                return index
        return launched + len(window)

    def _start(self, index: int, item: Any) -> bool:
        """Start an item, unless a guard says not yet."""
        context = self._context(index)
        context.tries, context.waited = self._tries(index), self._has_waited(index)
        run: Callable[[], Awaitable[Any]] = functools.partial(self._bounded, item, context)
        if self._guarded is not None:
            try:
                entry = self._guarded.enter(item, context, self._waiter(index))
                run = functools.partial(
                    self._guarded.call_async, item, context, entry, run=run, waiter=self._waiter(index), pause=self._pauses(index)
                )
            except Denied as denied:
                fallback = self._guarded.instead_of(denied)
                if fallback is None:
                    self._refused, self._not_before = postponed(denied, context.tries), self._clock() + denied.retry_after_s
                    return False
                run = functools.partial(self._instead, fallback, item, context)
            except Exception as error:  # what it costs cannot be told, or never be granted: its own failure
                run = functools.partial(_fails, error)
        self._in_flight[index] = asyncio.ensure_future(self._timed(index, run))
        return True

    async def _timed(self, index: int, run: Callable[[], Awaitable[Any]]) -> Any:
        began = self._clock()
        output = await run()
        self._ended_well(index, began)
        return output

    async def _bounded(self, item: Any, context: Context) -> Any:
        try:
            async with asyncio.timeout(self._limit_s or None) as limit:
                return await self._operation.apply(item, context)
        except TimeoutError as error:
            if limit.expired():
                raise CallTimeout("the item", self._limit_s) from error
            raise

    async def _instead(self, fallback: Callable[..., Any], item: Any, context: Context) -> Any:
        output = self._operation.with_context(fallback, item, context)
        return await output if inspect.isawaitable(output) else output

    def _pauses(self, index: int) -> Callable[[Postponed], Awaitable[None]]:
        async def pause(wait: Postponed) -> None:
            """Sleep among the others, until the slot is to be left."""
            due = self._clock() + wait.wait_s
            self._sleeping.add(index)
            try:
                # Who stands in line is called as a node, and not here: look again.
                await asyncio.wait_for(self._hurry.wait(), min(wait.wait_s, LOOK_AGAIN_S) if wait.noted else wait.wait_s)
            except TimeoutError:
                return
            finally:
                self._sleeping.discard(index)
            wait.wait_s = max(0.0, due - self._clock())
            raise wait

        return pause

    def _collect(self, outcomes: dict[int, Any]) -> None:
        """Take outcomes over in item order: what is done must be one range without a gap."""
        while self.at in outcomes and self.postponed is None:
            outcome = outcomes.pop(self.at)
            if isinstance(outcome, asyncio.Task):
                try:
                    self.harvest.add(outcome.result())
                except Postponed as wait:
                    return self._postpone(wait)
                except Denied as denied:
                    return self._postpone(postponed(denied, self._tries(self.at)))
                except (Exception, SystemExit, asyncio.CancelledError) as error:
                    self.harvest.fail(self.at, error)
            elif isinstance(outcome, Exception):
                self.harvest.fail(self.at, outcome)
            self.at += 1
        return None


async def _fails(error: Exception) -> Any:
    raise error


_runners: dict[int, asyncio.Runner] = {}


def event_loop() -> asyncio.Runner:
    """Return this process's event loop; it outlives nodes, so that users may keep connections open."""
    if os.getpid() not in _runners:
        _runners.clear()
        _runners[os.getpid()] = asyncio.Runner()
    return _runners[os.getpid()]
