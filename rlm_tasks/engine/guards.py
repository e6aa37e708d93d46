"""What protects the calls of an operation, and in which order.

Decides when a call may start, what its end means for what it called, and whether an item comes back
later.  Guards are `resilience`'s; refuses to know how they decide, and what becomes of the node
whose item has to wait."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from resilience.errors import Denied, RateLimited, RetryBudgetExhausted, StoreUnavailable
from resilience.faults import classify
from rlm_tasks.ledger.budgets import JobBudgets
from rlm_tasks.operations import registry
from rlm_tasks.operations.protection import Protection

if TYPE_CHECKING:
    from resilience.breaker import CircuitBreaker, CircuitBreakers
    from resilience.breaker_storage import Admission
    from resilience.bucket import Grant, TokenBucket
    from resilience.bulkhead import Bulkhead, Permit
    from resilience.retry import Retry
    from resilience.store import Call, Store
    from rlm_tasks.jobs.spec import JobSpec
    from rlm_tasks.operations.context import Context
    from rlm_tasks.operations.ports import CallGuards
    from rlm_tasks.operations.registry import Operation
    from rlm_tasks.settings.model import Settings

ORDER = ("deadline", "retry", "rate_limit", "breaker", "bulkhead")
"""The guards of a call, outermost first.

An item's *deadline* bounds one attempt, and the job's own bounds them all.  *Retry* is outside of
what may refuse a call, so that each attempt asks again.  The *rate limit* comes before the breaker:
a call that must wait for tokens takes no probe's place; and a 429 is the bucket's news, not the
breaker's.  The *breaker* comes before the *bulkhead*: an open circuit needs no permit, and a permit
is held for the call alone, never while something is waited for.  What an inner guard refuses is
given back to the outer ones: it costs no token, no probe, no attempt. """

PATIENCE_S = 0.02
"""A shorter wait is slept: handing the rest of a node over costs about as much."""
_CPU = "cpu_s"
Within = Callable[..., Any]
T = TypeVar("T")


class Postponed(Exception):
    """An item that is not done and comes back: control flow between a guard and its node."""

    def __init__(
        self,
        wait_s: float,
        why: str,
        *,
        tries: int = 0,
        isolates: bool = False,
        noted: bool = False,
    ) -> None:
        self.wait_s, self.why = wait_s, why
        self.noted = noted  # its node stands in line at a guard, and will be woken
        self.tries = tries  # attempts that failed so far
        self.isolates = isolates  # it alone has to wait, its neighbours do not
        super().__init__(why)


def postponed(denied: Denied, tries: int = 0) -> Postponed:
    """Return what a guard's refusal means for an item."""
    return Postponed(
        denied.retry_after_s, f"{denied.guard}: {denied.why}", tries=tries, noted=denied.noted
    )


@dataclass(slots=True)
class Entry:
    """What one call holds of its guards."""

    grant: Grant | None = None
    admission: Admission | None = None
    permit: Permit | None = None
    cpu_s: float = 0.0


class Guarded:
    """One operation behind its guards, in one process."""

    def __init__(
        self,
        operation: Operation,
        about: Protection,
        *,
        breaker: CircuitBreaker | None,
        bucket: TokenBucket | None,
        bulkhead: Bulkhead | None,
        retry: Retry | None,
        priority: str,
        urgency: int,
        store: Store,
    ) -> None:
        self._operation, self._about = operation, about
        self._breaker, self._bucket, self._bulkhead, self._retry = breaker, bucket, bulkhead, retry
        self._priority, self._urgency = priority, urgency
        self._store, self._random, self._cpu_s = store, Random(), 0.01

    # --- entering and leaving ------------------------------------------------------------------

    def enter(self, item: Any, context: Context, waiter: str) -> Entry:
        """Take what one call needs, all or nothing.  Raises Denied, saying when to come back.

        Who comes back from waiting stands before those who are new.
        """
        entry = Entry()
        try:
            if self._bucket is not None:
                entry.grant = self._pay(item, context, self._bucket)
            if self._breaker is not None:
                entry.admission = self._breaker.admit(waiter, self._urgency)
            if self._bulkhead is not None:
                entry.permit = self._bulkhead.acquire(waiter=waiter, urgency=self._urgency)
                if not entry.permit:
                    raise self._bulkhead.full(entry.permit)
        except Exception:  # refused, or its cost cannot be told: nothing was called
            self._withdraw(entry)
            raise
        if self._retry is not None and self._retry.budget is not None and not context.tries:
            self._retry.budget.attempted()
        context.grant = entry.grant
        entry.cpu_s = time.process_time()
        return entry

    def _pay(self, item: Any, context: Context, bucket: TokenBucket) -> Grant:
        cost = self._about.cost
        amounts = dict(self._operation.with_context(cost, item, context)) if cost else {}
        if _CPU in bucket.rates:
            amounts.setdefault(_CPU, self._cpu_s)
        if not amounts:
            amounts = dict.fromkeys(
                [name for name in bucket.rates if name == "requests"] or list(bucket.rates), 1.0
            )
        grant = bucket.reserve(
            priority=self._priority, in_line=context.rest, returns=context.waited, **amounts
        )
        if not grant:
            raise RateLimited(
                f"bucket {bucket.name}",
                grant.wait_s,
                f"its limit of {grant.limited_by} has no room for it yet",
            )
        return grant

    def _withdraw(self, entry: Entry) -> None:
        """Nothing was called: give back what outer guards have taken."""
        if entry.admission is not None and self._breaker is not None:
            self._breaker.withdraw(entry.admission)
        if entry.grant is not None and self._bucket is not None:
            entry.grant.settle(**dict.fromkeys(self._bucket.rates, 0.0))

    def leave(self, entry: Entry, error: BaseException | None = None) -> None:
        """Tell the guards how the call ended."""
        if entry.permit is not None:
            entry.permit.release(error)
        if entry.admission is not None and self._breaker is not None:
            self._breaker.ended(entry.admission, error)
        if self._bucket is None or entry.grant is None:
            return
        if (
            error is not None
            and (fault := classify(error)).code == RateLimited.code
            and fault.retry_after_s
        ):
            self._bucket.hold(fault.retry_after_s)
        if _CPU in self._bucket.rates:
            used_s = time.process_time() - entry.cpu_s
            self._cpu_s += 0.2 * (used_s - self._cpu_s)
            entry.grant.settle(**{_CPU: used_s})

    # --- one item ------------------------------------------------------------------------------

    def call(
        self,
        item: Any,
        context: Context,
        *,
        tries: int,
        waiter: str,
        within: Within = lambda run, *args: run(*args),
    ) -> Any:
        """Call the operation; raises Postponed for an item that comes back, or what finally went
        wrong with it.

        `within` runs the operation's own code, and may interrupt that, but never what is done for
        the guards."""
        try:
            entry = self._enter_soon(item, context, waiter)
        except Denied as denied:
            if (fallback := self.instead_of(denied)) is not None:
                return within(self._operation.with_context, fallback, item, context)
            raise postponed(denied, tries) from None
        try:
            output = within(self._operation.apply, item, context)
        except BaseException as error:
            self.leave(entry, error)
            if isinstance(error, Exception):
                raise self._again(error, tries) from error
            raise
        self.leave(entry)
        return output

    def instead_of(self, denied: Denied) -> Callable[..., Any] | None:
        """Return what is called while the breaker is open, if it is that and something was
        declared.
        """
        return self._about.fallback if denied.code == "CIRCUIT_OPEN" else None

    def still_waits(self, waiter: str) -> bool:
        """Say whether a waiter that was noted is still in line; one that is not has been woken
        before it lay down.
        """
        lines = [
            guard.waits(waiter) for guard in (self._breaker, self._bulkhead) if guard is not None
        ]
        try:
            return any(self._store.call(*lines, on_outage="answer"))
        except StoreUnavailable:
            return True

    def forgetting(self, until: int) -> list[Call]:
        """Return what is to be told when the node's items before `until` are safe in its
        partial.
        """
        return []

    def _enter_soon(self, item: Any, context: Context, waiter: str) -> Entry:
        while True:
            try:
                return self.enter(item, context, waiter)
            except Denied as denied:
                if denied.retry_after_s > PATIENCE_S:
                    raise
                time.sleep(denied.retry_after_s)

    def _again(self, error: Exception, tries: int) -> Exception:
        """Return the item's postponement, or its error where another try is not wanted."""
        from resilience.retry import RetryState

        if isinstance(error, Denied):
            return postponed(error, tries)
        if self._retry is None:
            return error
        course = RetryState(self._retry, failures=tries)
        try:
            wait_s = course.wait_s(error)
        except RetryBudgetExhausted:
            # A node can wait, where a caller cannot: until the service bears more.
            wait_s = self._retry.policy.max_delay_s * self._random.uniform(0.5, 1.0)
        except Exception as final:
            return final
        why = f"attempt {course.failures + 1} of {self._retry.policy.max_attempts} after {type(error).__name__}"
        return Postponed(wait_s, why, tries=course.failures, isolates=True)

    # --- many in flight ------------------------------------------------------------------------

    async def call_async(
        self,
        item: Any,
        context: Context,
        entry: Entry,
        *,
        run: Callable[[], Awaitable[Any]],
        waiter: str,
        pause: Callable[[Postponed], Awaitable[None]],
    ) -> Any:
        """Await one item, entered already, by `run`; between attempts `pause` sleeps, or raises the
        postponement.
        """
        tries = context.tries
        while True:
            try:
                output = await run()
            except BaseException as error:
                self.leave(entry, error)
                if not isinstance(error, Exception) or isinstance(error, asyncio.CancelledError):
                    raise
                again = self._again(error, tries)
                if not isinstance(again, Postponed):
                    raise
                tries = context.tries = again.tries
                await pause(again)
            else:
                self.leave(entry)
                return output
            entry = await self._reenter(
                item=item, context=context, tries=tries, pause=pause, waiter=waiter
            )

    async def _reenter(
        self,
        item: Any,
        context: Context,
        tries: int,
        pause: Callable[[Postponed], Awaitable[None]],
        waiter: str,
    ) -> Entry:
        while True:
            try:
                return self.enter(item, context, waiter)
            except Denied as denied:
                context.waited = True
                await pause(postponed(denied, tries))


def breakers_of(
    store: Store, settings: Settings, wake: Callable[[Sequence[str]], int | None] = lambda _: None
) -> CircuitBreakers:
    """Return all breakers, those that operations declare also before anything has gone wrong."""
    from resilience.breaker import CircuitBreakers

    found = CircuitBreakers(store, wake=wake)
    for about in registry.protections(settings):
        if about.breaker is not None:
            found.get(about.service, about.breaker)
    return found


class Guards:
    """The guards of one process, by service; built when an operation first needs them."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        wake: Callable[[Sequence[str]], int | None],
        stop: Callable[..., object] = lambda *_, **__: None,
    ) -> None:
        """`stop` ends a job's items by its id and a reason, as `Ledger.stop` does."""
        self.store, self.settings, self.stop = store, settings, stop
        self._wake = wake
        self._breakers: dict[str, CircuitBreaker] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._bulkheads: dict[str, Bulkhead] = {}
        self._retries: dict[str, Retry] = {}
        self._kept: dict[tuple[Callable[[Guards], Any], int], Any] = {}
        self.budgets = JobBudgets(store, settings)

    def kept(self, make: Callable[[Guards], T]) -> T:
        """Return what gates of operations share in this process, made when it is first asked
        for.
        """
        key = make, os.getpid()
        if key not in self._kept:
            self._kept[key] = make(self)
        found: T = self._kept[key]
        return found

    def of(self, operation: Operation, spec: JobSpec) -> CallGuards | None:
        """Return an operation behind its guards, for one job, or None when it declares none."""
        if operation.gate is not None:
            return operation.gate(self, operation, spec)
        return (
            self.guarded(operation, operation.protection, spec.priority)
            if operation.protection.guards_calls
            else None
        )

    def guarded(self, operation: Operation, about: Protection, priority: str) -> Guarded:
        """Return an operation behind the guards of a service."""
        from resilience.waiters import URGENCY

        return Guarded(
            operation,
            about,
            breaker=self.breaker(about),
            bucket=self.bucket(about),
            bulkhead=self.bulkhead(about),
            retry=self.retry_of(operation.name, about),
            priority=priority,
            urgency=URGENCY[priority],
            store=self.store,
        )

    def breaker(self, about: Protection) -> CircuitBreaker | None:
        """Return the breaker of a service, or None when it has none."""
        if about.breaker is None or not self.settings.breakers.enabled:
            return None
        from resilience.breaker import CircuitBreaker

        if about.service not in self._breakers:
            self._breakers[about.service] = CircuitBreaker(
                about.service, self.store, about.breaker, wake=self._wake
            )
        return self._breakers[about.service]

    def bucket(self, about: Protection) -> TokenBucket | None:
        """Return the bucket of a service, or None when it has none."""
        if not about.rate_limit:
            return None
        from resilience.bucket import TokenBucket

        if about.service not in self._buckets:
            rates: dict[str, Any] = dict(about.rate_limit)
            self._buckets[about.service] = TokenBucket(about.service, self.store, **rates)
        return self._buckets[about.service]

    def bulkhead(self, about: Protection) -> Bulkhead | None:
        """Return the bulkhead of a service, or None when it has none."""
        if about.bulkhead is None:
            return None
        from resilience.bulkhead import LEASE_S, Bulkhead

        if about.service not in self._bulkheads:
            lease_s = max(LEASE_S, about.timeout_s or 0.0)
            self._bulkheads[about.service] = Bulkhead(
                about.service,
                self.store,
                limit=about.bulkhead,
                per_host=about.per_host,
                lease_s=lease_s,
                wake=self._wake,
            )
        return self._bulkheads[about.service]

    def forget(self, pid: int) -> None:
        """Give back what a process of this machine held of any bulkhead: it has died."""
        for name in registry.names():
            if (bulkhead := self.bulkhead(registry.get(name).protection)) is not None:
                bulkhead.forget(bulkhead.owner_of(pid))

    def retry_of(self, operation: str, about: Protection) -> Retry | None:
        """Return how an operation's items are tried again, or None when they are not."""
        if about.retry is None:
            return None
        from resilience.retry import Retry, RetryBudget

        if operation not in self._retries:
            # What bounds an item that waits is its job's own time: nothing accepted is given up for
            # waiting.
            policy = about.retry.model_copy(update={"deadline_s": float("inf")})
            self._retries[operation] = Retry(policy, RetryBudget(about.service, self.store))
        return self._retries[operation]
