"""The work of one node with many items in flight, for operations that are coroutine functions.

`NodeRun` in `node` calls it.  Items ask the guards in item order when they start.  So items in
flight are always before items that wait, and finished items stay one range.  An item that waits for
another try sleeps beside the others.  When only sleeping items are left, the node leaves its slot
and hands over the rest.  Begin with `ConcurrentWork._run_all`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from resilience.bulkhead import ASK_AGAIN_S
from resilience.degradation import IN_FORCE, Degradation
from resilience.errors import BulkheadFull, CallTimeout, Denied, is_a
from rlm_tasks.engine.guards import PATIENCE_S, Postponed, wait_of
from rlm_tasks.engine.shared_page import SEVERAL_ITEMS
from rlm_tasks.engine.work import Work
from rlm_tasks.jobs.item_failures import raise_if_shutdown
from rlm_tasks.jobs.stored_items import Unreadable
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.ports import CallGuards

STEPS_TO_SEND = 6
"""Turns of the event loop that a started item gets before the next item asks its guards.

A granted call must be sent at once.  When ten calls were granted together and sent afterwards, they
were up to 115 ms late, and the provider answered 429.
"""
SLEEPERS_S = 1.0
"""A node that must hand over its rest waits this long for sleeping items.

Without the wait, items that have ended behind a sleeping item would run again.
"""


class ConcurrentWork(Work):
    """The work on one range with up to `concurrency` items at once."""

    def run(self, boundary: Callable[[], bool]) -> None:
        """Work until the range ends, `boundary` returns True, or an item has to wait."""
        self._boundary = boundary
        run_to_end(self._run_all())

    async def _run_all(self) -> None:
        began = self._clock()
        self._in_flight: dict[int, asyncio.Task[Any]] = {}
        self._sleeping: set[int] = set()
        self._degradations: dict[int, Degradation] = {}
        self._end_sleeps = asyncio.Event()  # sleeping items raise their postponement now
        self._denied: Postponed | None = None  # the wait of the next item, which a guard denied
        self._denied_index = -1
        self._not_before = 0.0  # no item starts before this time
        self._wants_permit = False  # a bulkhead denied the next item while others were in flight
        self._stopped_at = float("inf")
        outcomes: dict[int, Any] = {}
        launched = self.at
        try:
            while self._in_flight or (launched < self.until and not self.stopped):
                launched = await self._launch(outcomes, launched)
                await self._wait_for_an_end()
                for index in [index for index, task in self._in_flight.items() if task.done()]:
                    outcomes[index] = self._in_flight.pop(index)
                    self.ahead[_kind_of(outcomes[index])] += 1
                    if self._wants_permit:
                        self._not_before = 0.0  # the item has given a permit back
                self._record(outcomes)
                self.would_repeat = bool(self._sleeping) and (
                    bool(outcomes) or len(self._in_flight) > len(self._sleeping)
                )
                self._check_slice(self._clock())  # when it has stopped, too: its progress goes on
                self._check_size()
                self._end_sleeps_in_time(outcomes, launched)
        finally:
            for task in self._in_flight.values():
                task.cancel()  # this node was lost: its items must not run on during the next node
            await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        self._note_waiting(outcomes)
        self.busy_s += self._clock() - began

    def _note_waiting(self, outcomes: dict[int, Any]) -> None:
        """Keep the tries of waiting items behind the first one; finished ones run again."""
        for index, task in outcomes.items():
            if (
                isinstance(task, asyncio.Task)
                and not task.cancelled()
                and isinstance(wait := task.exception(), Postponed)
            ):
                self.also_waiting[index] = wait

    def _end_sleeps_in_time(self, outcomes: dict[int, Any], launched: int) -> None:
        """End all sleeps when the slot does nothing but wait, and no item would run again."""
        waiting = self._not_before - self._clock() > PATIENCE_S
        if self._denied is not None and waiting and not self._in_flight and not self.stopped:
            self._denied.wait_s = self._not_before - self._clock()
            self._postpone(self._denied)
        idle = len(self._sleeping) == len(self._in_flight) > 0 and not outcomes
        if self.stopped:
            self._stopped_at = min(self._stopped_at, self._clock())
            patient = (
                self.would_repeat
                and self.postponed is None
                and not (self.urgent or self._pace.draining)
            )
            if not patient or self._clock() - self._stopped_at > SLEEPERS_S:
                self._end_sleeps.set()
        elif idle and (launched >= self.until or waiting):
            self._end_sleeps.set()

    async def _wait_for_an_end(self) -> None:
        """Wait until an item ends, at most for a slice."""
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
        """Start items from `launched` on while there is room; return the first one not started."""
        room = min(self._most, self._operation.concurrency) - len(self._in_flight)
        if room <= 0 or self.stopped or launched >= self.until or self._clock() < self._not_before:
            return launched
        try:
            window = self._read(launched, min(launched + room, self.until))
        except Unreadable as unreadable:
            outcomes[launched] = unreadable
            return min(unreadable.until, self.until)
        for index, item in enumerate(window, launched):
            self._page.start_item(SEVERAL_ITEMS if self._in_flight else index)
            if self._leaves_out(index, item):
                outcomes[index] = None
            elif not self._start(index, item, len(window) - (index - launched)):
                return index
            elif self._guards is not None:
                for _ in range(STEPS_TO_SEND):
                    await asyncio.sleep(0)
        return launched + len(window)

    def _start(self, index: int, item: Any, rest: int) -> bool:
        """Start an item; False when a guard denies it.  `rest` items could start now."""
        context = self._context(index)
        self._set_history(context, rest)
        context.waited |= index == self._denied_index
        context.degradation = self._degradations[index] = Degradation(self.degradation.level)
        IN_FORCE.set(context.degradation)  # here, and in the task, which gets a copy
        run: Callable[[], Awaitable[Any]] = functools.partial(self._run_in_time, context, item)
        if self._guards is not None:
            try:
                run = self._enter(self._guards, item, context)
            except BaseException as error:
                wait = wait_of(error, context.tries)
                if wait is None or not is_a(error, Denied):
                    # `cost` raised, or the cost can never be granted: the item fails.
                    run = functools.partial(_raise, error)
                elif (fallback := self._guards.instead_of(error)) is not None:
                    run = functools.partial(self._run_fallback, fallback, item, context)
                else:
                    self._deny(index, wait, error)
                    return False
        self._in_flight[index] = asyncio.ensure_future(self._timed(context, run))
        return True

    def _deny(self, index: int, wait: Postponed, denied: BaseException) -> None:
        """Note that the next item has to wait.

        A permit may be free at any time, and wakes nodes, not items in a running node: ask soon.
        """
        self._denied, self._denied_index, self.refused = wait, index, True
        self._wants_permit = is_a(denied, BulkheadFull) and bool(self._in_flight)
        wait_s = min(wait.wait_s, ASK_AGAIN_S) if self._wants_permit else wait.wait_s
        self._not_before = self._clock() + wait_s

    def _enter(
        self, guards: CallGuards, item: Any, context: Context
    ) -> Callable[[], Awaitable[Any]]:
        """Return the call of an item that holds its guards.  Raises Denied."""
        waiter = self._waiter(context.index)
        context.beside = len(self._in_flight)
        held = guards.enter(item, context, waiter)
        if self._wants_permit and context.index == self._denied_index:
            self.refused = False
        # If it asks again, it asks for itself only, and its node may stand in a line.
        context.rest, context.beside = 1, 0
        return functools.partial(
            guards.call_async,
            item,
            context,
            held,
            run=functools.partial(self._run_in_time, context),
            again=lambda: self._read_again(context.index, context.tries),
            waiter=waiter,
            pause=self._pause_of(context.index),
        )

    async def _timed(self, context: Context, run: Callable[[], Awaitable[Any]]) -> Any:
        began = self._clock()
        try:
            output = await run()
        except (KeyboardInterrupt, SystemExit) as error:
            raise Raised(error) from None
        self._succeeded(context, began)
        return output

    async def _run_in_time(self, context: Context, item: Any) -> Any:
        """Run an item within its time limit.  Raises CallTimeout."""
        try:
            async with asyncio.timeout(self._limit_s or None) as limit:
                return await self._operation.apply(item, context)
        except TimeoutError as error:
            if limit.expired():
                raise CallTimeout("the item", self._limit_s) from error
            raise

    async def _run_fallback(self, fallback: Callable[..., Any], item: Any, context: Context) -> Any:
        output = self._operation.with_context(fallback, item, context)
        return await output if inspect.isawaitable(output) else output

    def _pause_of(self, index: int) -> Callable[[Postponed], Awaitable[None]]:
        """Return the function by which an item waits between two attempts."""

        async def pause(wait: Postponed) -> None:
            """Sleep; raise the postponement when the node must leave its slot."""
            due = self._clock() + wait.wait_s
            self._sleeping.add(index)
            try:
                # A guard wakes a node, not an item in a running node: ask again soon.
                await asyncio.wait_for(
                    self._end_sleeps.wait(),
                    min(wait.wait_s, ASK_AGAIN_S) if wait.noted else wait.wait_s,
                )
            except TimeoutError:
                return
            finally:
                self._sleeping.discard(index)
            wait.wait_s = max(0.0, due - self._clock())
            raise wait

        return pause

    def _record(self, outcomes: dict[int, Any]) -> None:
        """Record outcomes in item order, so that finished items are one range without a gap."""
        while self.at in outcomes and self.postponed is None:
            outcome = outcomes.pop(self.at)
            if isinstance(outcome, asyncio.Task):
                self.ahead[_kind_of(outcome)] -= 1
                try:
                    self.outcome.add(outcome.result())
                except BaseException as raised:
                    error = raised.error if is_a(raised, Raised) else raised
                    tries = self._claim.tries if self.at == self._claim.lo else 0
                    if (wait := wait_of(error, tries)) is not None:
                        return self._postpone(wait)
                    self.outcome.fail(self.at, error)
            elif isinstance(outcome, Unreadable):
                self._fail_unread(min(outcome.until, self.until), outcome.error)
                continue
            if self.at in self._degradations:
                self.outcome.shape(self._degradations.pop(self.at), 1)
            self.at += 1
        return None


def _kind_of(task: asyncio.Task[Any]) -> str:
    """Return how an item has ended: done, failed, or waits."""
    if task.cancelled():
        return "failed"
    error = task.exception()
    if error is None:
        return "done"
    return "waits" if is_a(error, (Postponed, Denied)) else "failed"


async def _raise(error: BaseException) -> Any:
    raise error


class Raised(Exception):
    """Carries an exception of an item that would stop the event loop."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__()


_runners: dict[int, asyncio.Runner] = {}


def event_loop() -> asyncio.Runner:
    """Return this process's event loop.

    It lives longer than a node, so users' code may keep connections open between nodes.
    """
    if os.getpid() not in _runners:
        _runners.clear()
        _runners[os.getpid()] = asyncio.Runner()
    return _runners[os.getpid()]


def run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in this process's event loop until it ends.

    A task that an operation has started may raise KeyboardInterrupt or SystemExit, or stop the
    loop.  Then asyncio leaves the loop, and the coroutine goes on here.
    """
    loop = event_loop().get_loop()
    task: asyncio.Task[None] = event_loop().run(_started(work))
    while True:
        try:
            return loop.run_until_complete(task)
        except (KeyboardInterrupt, SystemExit, RuntimeError) as error:
            raise_if_shutdown(error)
            if task.done() or loop.is_running() or loop.is_closed():
                raise


async def _started(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Return a task of the running loop, in the loop's own context."""
    return asyncio.ensure_future(work)
