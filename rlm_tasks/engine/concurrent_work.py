"""Work through a range with many items in flight, for operations that are coroutine functions.

Decides when an item is started, and when the slot is left.  ProcessGuards are asked in item order when an
item is started, so that what is in flight is always ahead of what waits, and what is done stays one
range.  An item that waits for another try sleeps among the others; when nothing but sleepers is
left, the slot is left to others and the rest comes back later."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Awaitable, Callable
from typing import Any

from resilience.degradation import IN_FORCE, Degradation
from resilience.errors import CallTimeout, Denied
from rlm_tasks.engine.guards import PATIENCE_S, Postponed, postponed
from rlm_tasks.engine.shared_page import SEVERAL_ITEMS
from rlm_tasks.engine.work import UNREADABLE, Work
from rlm_tasks.operations.context import Context

LOOK_AGAIN_S = 0.1
"""An item among others asks a guard again after this, should nobody have called its node."""
STEPS_TO_SEND = 6
"""An item that was let in gets so many turns of the event loop before the next one asks: a call
that was granted is to be sent now.  Ten that were granted together, and sent afterwards, were up to
115 ms late, and met 429s. """
SLEEPERS_S = 1.0
"""A node that is to hand over its rest waits so long for sleepers, rather than do again what has
ended behind them.
"""


class ConcurrentWork(Work):
    """One range being worked through, with up to `concurrency` items at once."""

    def run(self, boundary: Callable[[], bool]) -> None:
        """Work until the range or a boundary ends it, or an item has to wait."""
        self._boundary = boundary
        event_loop().run(self._to_the_end())

    async def _to_the_end(self) -> None:
        began = self._clock()
        self._in_flight: dict[int, asyncio.Task[Any]] = {}
        self._sleeping: set[int] = set()
        self._asked: dict[int, Degradation] = {}
        self._hurry = asyncio.Event()
        self._refused: Postponed | None = None
        self._refused_at = -1
        self._not_before = 0.0
        self._stopped_at = float("inf")
        outcomes: dict[int, Any] = {}
        launched = self.at
        try:
            while self._in_flight or (launched < self.until and not self.stopped):
                launched = await self._launch(outcomes, launched)
                await self._some_end()
                for index in [index for index, task in self._in_flight.items() if task.done()]:
                    outcomes[index] = self._in_flight.pop(index)
                self._collect(outcomes)
                self.would_repeat = bool(self._sleeping) and (
                    bool(outcomes) or len(self._in_flight) > len(self._sleeping)
                )
                if not self.stopped:
                    self._look_up(self._clock())
                self._leave_slot(outcomes, launched)
        finally:
            for task in self._in_flight.values():
                task.cancel()  # the node is lost: nothing of it may run on in the next one
            await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        for index, task in outcomes.items():
            # What stands behind an item that waits is done again; but what waits, too, keeps its
            # tries.
            if (
                isinstance(task, asyncio.Task)
                and not task.cancelled()
                and isinstance(wait := task.exception(), Postponed)
            ):
                self.others[index] = wait
        self.busy_s += self._clock() - began

    def _leave_slot(self, outcomes: dict[int, Any], launched: int) -> None:
        """Hurry when the slot does nothing but wait, and no item would be done again for leaving
        it.
        """
        waiting = self._not_before - self._clock() > PATIENCE_S
        if self._refused is not None and waiting and not self._in_flight and not self.stopped:
            self._refused.wait_s = self._not_before - self._clock()
            self._postpone(self._refused)
        idle = len(self._sleeping) == len(self._in_flight) > 0 and not outcomes
        if self.stopped:
            self._stopped_at = min(self._stopped_at, self._clock())
            patient = (
                self.would_repeat
                and self.postponed is None
                and not (self.urgent or self._pace.draining)
            )
            if not patient or self._clock() - self._stopped_at > SLEEPERS_S:
                self._hurry.set()
        elif idle and (launched >= self.until or waiting):
            self._hurry.set()

    async def _some_end(self) -> None:
        patience_s = max(0.001, self._pace.slice_ms / 1000)
        if self._in_flight:
            self._page.start_item(
                next(iter(self._in_flight)) if len(self._in_flight) == 1 else SEVERAL_ITEMS
            )
            await asyncio.wait(
                self._in_flight.values(), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED
            )
        elif not self.stopped:
            await asyncio.sleep(max(0.0, min(patience_s, self._not_before - self._clock())))

    async def _launch(self, outcomes: dict[int, Any], launched: int) -> int:
        room = min(self._most, self._operation.concurrency) - len(self._in_flight)
        if room <= 0 or self.stopped or launched >= self.until or self._clock() < self._not_before:
            return launched
        try:
            window = self._read(launched, min(launched + room, self.until))
        except UNREADABLE as error:
            outcomes.update(dict.fromkeys(range(launched, self.until), error))
            return self.until
        for index, item in enumerate(window, launched):
            if self._leaves_out(index, item):
                outcomes[index] = None
            elif not self._start(index, item, len(window) - (index - launched)):
                return index
            elif self._guards is not None:
                for _ in range(STEPS_TO_SEND):
                    await asyncio.sleep(0)
        return launched + len(window)

    def _start(self, index: int, item: Any, rest: int) -> bool:
        """Start an item, unless a guard says not yet; so many would be started now."""
        context = self._context(index)
        self._remember(context, rest)
        context.waited |= index == self._refused_at
        context.degradation = self._asked[index] = Degradation(self.degradation.level)
        IN_FORCE.set(context.degradation)  # here and in the task, which begins with a copy
        run: Callable[[], Awaitable[Any]] = functools.partial(self._bounded, item, context)
        if self._guards is not None:
            try:
                entry = self._guards.enter(item, context, self._waiter(index))
                context.rest = 1  # should it ask again, it asks for itself
                run = functools.partial(
                    self._guards.call_async,
                    item,
                    context,
                    entry,
                    run=run,
                    waiter=self._waiter(index),
                    pause=self._pauses(index),
                )
            except Denied as denied:
                fallback = self._guards.instead_of(denied)
                if fallback is None:
                    self._refused, self._not_before = (
                        postponed(denied, context.tries),
                        self._clock() + denied.retry_after_s,
                    )
                    self.refused, self._refused_at = True, index
                    return False
                run = functools.partial(self._instead, fallback, item, context)
            except (
                Exception
            ) as error:  # what it costs cannot be told, or never be granted: its own failure
                run = functools.partial(_fails, error)
        self._in_flight[index] = asyncio.ensure_future(self._timed(context, run))
        return True

    async def _timed(self, context: Context, run: Callable[[], Awaitable[Any]]) -> Any:
        began = self._clock()
        output = await run()
        self._ended_well(context, began)
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
                await asyncio.wait_for(
                    self._hurry.wait(),
                    min(wait.wait_s, LOOK_AGAIN_S) if wait.noted else wait.wait_s,
                )
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
                    self.outcome.add(outcome.result())
                except Postponed as wait:
                    return self._postpone(wait)
                except Denied as denied:
                    return self._postpone(
                        postponed(denied, self._claim.tries if self.at == self._claim.lo else 0)
                    )
                except (Exception, SystemExit, asyncio.CancelledError) as error:
                    self.outcome.fail(self.at, error)
            elif isinstance(outcome, Exception):
                self.outcome.fail(self.at, outcome)
            if self.at in self._asked:
                self.outcome.shape(self._asked.pop(self.at), 1)
            self.at += 1
        return None


async def _fails(error: Exception) -> Any:
    raise error


_runners: dict[int, asyncio.Runner] = {}


def event_loop() -> asyncio.Runner:
    """Return this process's event loop; it outlives nodes, so that users may keep connections
    open.
    """
    if os.getpid() not in _runners:
        _runners.clear()
        _runners[os.getpid()] = asyncio.Runner()
    return _runners[os.getpid()]
