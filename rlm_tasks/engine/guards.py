"""The guards of an operation's calls: rate limit, breaker, bulkhead and retry, in one fixed order.

A node passes each item through them (`work`, `concurrent_work`).  `resilience` has the guards
themselves.  Begin with `ORDER`, then `OperationGuards.call`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from resilience.errors import (
    Denied,
    RateLimited,
    RetryBudgetExhausted,
    StoreUnavailable,
    is_a,
    name_of,
    storable,
)
from resilience.faults import classify
from rlm_tasks.jobs.item_failures import SAID, is_ours, raise_if_shutdown
from rlm_tasks.jobs.splitting import Reason
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

- An item's *deadline* bounds one attempt; the job's deadline bounds all attempts.
- *Retry* is outside of the guards that may deny a call, so each attempt asks them again.
- The *rate limit* comes before the breaker: a call that must wait for tokens takes no probe.
  A 429 pauses the bucket; the breaker does not count it.
- The *breaker* comes before the *bulkhead*: an open breaker needs no permit.  A permit is held
  during the call only, never during a wait.

If an inner guard denies a call, the outer guards get back what they gave: the call costs no token,
no probe and no attempt.
"""

PATIENCE_S = 0.02
"""A shorter wait is slept: to hand over the rest of a node costs about as much."""
WHY_CHARS = 1000
"""The largest number of characters of the reason why an item waits."""
_CPU = "cpu_s"
T = TypeVar("T")


class Postponed(Exception):
    """An item is not done and comes back: control flow between a guard and its node."""

    def __init__(
        self,
        wait_s: float,
        why: str,
        *,
        tries: int = 0,
        reason: Reason = Reason.WAITING,
        noted: bool = False,
    ) -> None:
        self.wait_s, self.why = wait_s, why
        self.noted = noted  # its node stands in the line of a guard, which will wake it
        self.tries = tries  # attempts that failed so far
        self.reason = reason  # the reason of the cut at this item
        super().__init__(why)


def postponed(denied: Denied, tries: int = 0) -> Postponed:
    """Return the postponement of an item whose call was denied by a guard, or by itself."""
    why = f"{denied.guard}{': ' if is_ours(denied) else SAID}{denied.why}"
    return Postponed(denied.retry_after_s, why, tries=tries, noted=denied.noted)


def wait_of(error: BaseException, tries: int = 0) -> Postponed | None:
    """Return how long an item that raised an exception has to wait, None if it has failed.

    Raises the exception again if a signal ends this worker.
    """
    raise_if_shutdown(error)
    if not is_a(error, Denied):
        return error if is_a(error, Postponed) else None
    try:
        wait = postponed(error, tries)
        wait.why, wait.noted = storable(wait.why[:WHY_CHARS]), bool(wait.noted)
        return wait if math.isfinite(wait.wait_s) else None
    except BaseException:  # a user's subclass, without the attributes of a denial
        return None


def line_of(context: Context, waiter: str) -> str:
    """Return the waiter for the line of a bulkhead, '' for an item that joins no line.

    A node with items in flight asks again when one of them ends, so nobody has to wake it.
    """
    return "" if context.beside else waiter


@dataclass(slots=True)
class HeldGuards:
    """The grant, the admission and the permit that one call holds."""

    grant: Grant | None = None
    admission: Admission | None = None
    permit: Permit | None = None
    cpu_s: float = 0.0  # processor time of the process at the start of the call


class OperationGuards:
    """The guards of one operation's calls, in one process."""

    def __init__(
        self,
        operation: Operation,
        protection: Protection,
        *,
        breaker: CircuitBreaker | None,
        bucket: TokenBucket | None,
        bulkhead: Bulkhead | None,
        retry: Retry | None,
        priority: str,
        urgency: int,
        store: Store,
    ) -> None:
        self._operation, self._protection = operation, protection
        self._breaker, self._bucket, self._bulkhead, self._retry = breaker, bucket, bulkhead, retry
        self._priority, self._urgency = priority, urgency
        self._store, self._random = store, Random()
        self._cpu_s = 0.01  # moving average of the processor time of a call

    # --- entering and leaving ------------------------------------------------------------------

    def enter(self, item: Any, context: Context, waiter: str) -> HeldGuards:
        """Take what one call needs, all or nothing.

        Raises Denied with the time to come back.  An item that comes back from a wait is served
        before new items.
        """
        held = HeldGuards()
        try:
            if self._bucket is not None:
                held.grant = self._reserve(item, context, self._bucket, waiter)
            if self._breaker is not None:
                held.admission = self._breaker.admit(waiter, self._urgency)
            if self._bulkhead is not None:
                weight = self._weight(item, context)
                held.permit = self._bulkhead.acquire(
                    weight=weight, waiter=line_of(context, waiter), urgency=self._urgency
                )
                if not held.permit:
                    raise self._bulkhead.full(held.permit)
        except BaseException:  # denied, or `cost` raised: nothing was called
            self._withdraw(held)
            raise
        if self._retry is not None and self._retry.budget is not None and not context.tries:
            self._retry.budget.attempted()
        context.grant = held.grant
        held.cpu_s = time.process_time()
        return held

    def _reserve(self, item: Any, context: Context, bucket: TokenBucket, waiter: str) -> Grant:
        """Reserve the cost of one call, by default 1 request.  Raises RateLimited."""
        cost = self._protection.cost
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
            why = f"its limit of {grant.limited_by} has no room for it yet"
            raise bucket.denied(grant, why, waiter=waiter, urgency=self._urgency)
        return grant

    def _weight(self, item: Any, context: Context) -> float:
        """Return the part of the bulkhead that one call takes, by default 1."""
        weight = self._protection.weight
        return self._operation.with_context(weight, item, context) if callable(weight) else weight

    def _withdraw(self, held: HeldGuards) -> None:
        """Give back what outer guards gave to a call that was not made."""
        if held.admission is not None and self._breaker is not None:
            self._breaker.withdraw(held.admission)
        if held.grant is not None and self._bucket is not None:
            held.grant.settle(**dict.fromkeys(self._bucket.rates, 0.0))

    def leave(self, held: HeldGuards, error: BaseException | None = None) -> None:
        """Report to the guards how the call ended, and return what it held."""
        if held.permit is not None:
            held.permit.release(error)
        if held.admission is not None and self._breaker is not None:
            self._breaker.ended(held.admission, error)
        if self._bucket is None or held.grant is None:
            return
        if error is not None and (asked_s := self._pause_s(error)):
            self._bucket.hold(asked_s)
        if _CPU in self._bucket.rates:
            used_s = time.process_time() - held.cpu_s
            self._cpu_s += 0.2 * (used_s - self._cpu_s)
            held.grant.settle(**{_CPU: used_s})

    def _pause_s(self, error: BaseException) -> float:
        """Return the seconds for which a 429 pauses the rate limit, 0 for other errors."""
        if self._bucket is None or (fault := classify(error)).code != RateLimited.code:
            return 0.0
        return fault.retry_after_s or 0.0

    # --- one item ------------------------------------------------------------------------------

    def call(
        self,
        item: Any,
        context: Context,
        *,
        tries: int,
        waiter: str,
        run: Callable[..., Any] = lambda function, *args: function(*args),
        again: Callable[[], Any] | None = None,
    ) -> Any:
        """Call the operation and return its output.

        `run` calls the operation's function with its arguments.  It may interrupt that function,
        but not the work of the guards.  `again` returns a new item for the fallback.  Raises
        Postponed for an item that comes back, or the item's final error.
        """
        try:
            held = self._enter_soon(item, context, waiter)
        except Denied as denied:
            if (wait := wait_of(denied, tries)) is None:
                raise  # `cost` raised it
            if (fallback := self.instead_of(denied)) is None:
                raise wait from None
        else:
            try:
                output = run(self._operation.apply, item, context)
            except BaseException as error:
                self.leave(held, error)
                if not is_a(error, Exception):
                    raise
                outcome = self._after_failure(error, tries)
                if (fallback := self.instead_of(outcome)) is None:
                    raise outcome from error
            else:
                self.leave(held)
                return output
        # The call, or `cost`, may have changed its item and its params.
        context.begin(context.index)
        item = item if again is None else again()
        return run(self._operation.with_context, fallback, item, context)

    def instead_of(self, error: Exception) -> Callable[..., Any] | None:
        """Return the declared fallback of a call that failed for good, otherwise None.

        It replaces a call that an open breaker denied, and one whose error is worth a retry but has
        none left.
        """
        if self._protection.fallback is None or is_a(error, Postponed):
            return None
        from resilience.retry import DEFAULT

        policy = self._protection.retry or DEFAULT
        is_open = is_a(error, Denied) and classify(error).code == "CIRCUIT_OPEN"
        failed = not is_a(error, Denied) and policy.wants(error, classify(error))
        return self._protection.fallback if is_open or failed else None

    def still_waits(self, waiter: str) -> bool:
        """Whether a noted waiter is still in a line; if not, it was woken before it was parked.

        True while Redis is away.
        """
        lines = [
            guard.waits(waiter)
            for guard in (self._bucket, self._breaker, self._bulkhead)
            if guard is not None
        ]
        try:
            return any(self._store.call(*lines, on_outage="answer"))
        except StoreUnavailable:
            return True

    def forgetting(self, until: int) -> list[Call]:
        """Return the calls to make when the node's items before `until` are in its partial."""
        return []

    def _enter_soon(self, item: Any, context: Context, waiter: str) -> HeldGuards:
        """Enter, and sleep through waits of up to PATIENCE_S.  Raises Denied for a longer wait."""
        while True:
            try:
                return self.enter(item, context, waiter)
            except Denied as denied:
                wait = wait_of(denied)
                if wait is None or wait.wait_s > PATIENCE_S:
                    raise
                time.sleep(max(0.0, wait.wait_s))

    def _after_failure(self, error: Exception, tries: int) -> Exception:
        """Return the postponement of a failed item, or its error when it is not tried again."""
        from resilience.retry import RetryState

        # A pause of the bucket is its own matter: the item asks again, and joins its line.
        is_paused = self._pause_s(error) > 0
        if (wait := wait_of(error, tries)) is not None:
            wait.wait_s = 0.0 if is_paused else wait.wait_s
            return wait
        if self._retry is None:
            return error
        state, policy = RetryState(self._retry, failures=tries), self._retry.policy
        try:
            wait_s = state.wait_s(error)
        except RetryBudgetExhausted:
            # A node, unlike a caller, can wait until the service bears more retries.
            wait_s = policy.max_delay_s * self._random.uniform(0.5, 1.0)
        except Exception as final:
            return final
        attempt = f"attempt {state.failures + 1} of {policy.max_attempts}"
        why = f"{attempt} after {name_of(error)}"
        return Postponed(
            0.0 if is_paused else wait_s, why, tries=state.failures, reason=Reason.RETRY
        )

    # --- many in flight ------------------------------------------------------------------------

    async def call_async(
        self,
        item: Any,
        context: Context,
        held: HeldGuards,
        *,
        run: Callable[[Any], Awaitable[Any]],
        again: Callable[[], Any],
        waiter: str,
        pause: Callable[[Postponed], Awaitable[None]],
    ) -> Any:
        """Await `run` for an item that has entered, and return its output.

        Between attempts `pause` sleeps, or raises the postponement.  `again` returns a new item for
        a further attempt, and for the fallback.  Raises the item's final error.
        """
        tries = context.tries
        while True:
            try:
                output = await run(item)
            except BaseException as error:
                self.leave(held, error)
                if not is_a(error, Exception) or is_a(error, asyncio.CancelledError):
                    raise
                outcome = self._after_failure(error, tries)
                if (fallback := self.instead_of(outcome)) is not None:
                    context.begin(context.index)
                    output = self._operation.with_context(fallback, again(), context)
                    return await output if inspect.isawaitable(output) else output
                if not isinstance(outcome, Postponed):
                    raise
                tries = context.tries = outcome.tries
                await pause(outcome)
                context.begin(context.index)
                item = again()
            else:
                self.leave(held)
                return output
            held = await self._reenter(
                item=item, context=context, tries=tries, pause=pause, waiter=waiter
            )

    async def _reenter(
        self,
        item: Any,
        context: Context,
        tries: int,
        pause: Callable[[Postponed], Awaitable[None]],
        waiter: str,
    ) -> HeldGuards:
        """Enter for another attempt, and pause after each denial."""
        while True:
            try:
                return self.enter(item, context, waiter)
            except Denied as denied:
                if (wait := wait_of(denied, tries)) is None:
                    raise  # `cost` raised it
                context.waited = True
                await pause(wait)


def breakers_of(
    store: Store, settings: Settings, wake: Callable[[Sequence[str]], int | None] = lambda _: None
) -> CircuitBreakers:
    """Return all breakers, including declared ones that have recorded no call yet."""
    from resilience.breaker import CircuitBreakers

    found = CircuitBreakers(store, wake=wake)
    for protection in registry.protections(settings):
        if protection.breaker is not None:
            found.get(protection.service, protection.breaker)
    return found


class ProcessGuards:
    """The guards of one process, by service; each is built when an operation first needs it."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        wake: Callable[[Sequence[str]], int | None],
        stop: Callable[..., object] = lambda *_, **__: None,
    ) -> None:
        """`stop` ends a job by its id and a reason, as `Ledger.stop` does."""
        self.store, self.settings, self.stop = store, settings, stop
        self._wake = wake
        self._breakers: dict[str, CircuitBreaker] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._bulkheads: dict[str, Bulkhead] = {}
        self._retries: dict[str, Retry] = {}
        self._shared_parts: dict[tuple[Callable[[ProcessGuards], Any], int], Any] = {}
        self.budgets = JobBudgets(store, settings)

    def shared_part(self, make: Callable[[ProcessGuards], T]) -> T:
        """Return the object that all gates in this process share; `make` builds it at first use."""
        key = make, os.getpid()
        if key not in self._shared_parts:
            self._shared_parts[key] = make(self)
        found: T = self._shared_parts[key]
        return found

    def of(self, operation: Operation, spec: JobSpec) -> CallGuards | None:
        """Return the guards of an operation for one job, or None when it declares none."""
        if operation.gate is not None:
            return operation.gate(self, operation, spec)
        return (
            self._operation_guards(operation, operation.protection, spec.priority)
            if operation.protection.guards_calls
            else None
        )

    def _operation_guards(
        self, operation: Operation, protection: Protection, priority: str
    ) -> OperationGuards:
        from resilience.bulkhead import URGENCY

        return OperationGuards(
            operation,
            protection,
            breaker=self.breaker(protection),
            bucket=self.bucket(protection),
            bulkhead=self.bulkhead(protection),
            retry=self.retry_of(operation.name, protection),
            priority=priority,
            urgency=URGENCY[priority],
            store=self.store,
        )

    def breaker(self, protection: Protection) -> CircuitBreaker | None:
        """Return the breaker of a service, or None when it has none."""
        if protection.breaker is None or not self.settings.breakers.enabled:
            return None
        from resilience.breaker import CircuitBreaker

        if protection.service not in self._breakers:
            self._breakers[protection.service] = CircuitBreaker(
                protection.service, self.store, protection.breaker, wake=self._wake
            )
        return self._breakers[protection.service]

    def bucket(self, protection: Protection) -> TokenBucket | None:
        """Return the bucket of a service, or None when it has none."""
        if not protection.rate_limit:
            return None
        from resilience.bucket import TokenBucket

        if protection.service not in self._buckets:
            rates: dict[str, Any] = dict(protection.rate_limit)
            self._buckets[protection.service] = TokenBucket(protection.service, self.store, **rates)
        return self._buckets[protection.service]

    def bulkhead(self, protection: Protection) -> Bulkhead | None:
        """Return the bulkhead of a service, or None when it has none."""
        if protection.bulkhead is None:
            return None
        from resilience.bulkhead import LEASE_S, Bulkhead

        if protection.service not in self._bulkheads:
            lease_s = max(LEASE_S, protection.timeout_s or 0.0)
            self._bulkheads[protection.service] = Bulkhead(
                protection.service,
                self.store,
                limit=protection.bulkhead,
                per_host=protection.per_host,
                lease_s=lease_s,
                wake=self._wake,
            )
        return self._bulkheads[protection.service]

    def forget(self, pid: int) -> None:
        """Give back the permits of all bulkheads that a dead process of this machine held."""
        for protection in registry.protections(self.settings):
            if (bulkhead := self.bulkhead(protection)) is not None:
                bulkhead.forget(bulkhead.owner_of(pid))

    def retry_of(
        self, operation: str, protection: Protection, *, asked_most_s: float | None = None
    ) -> Retry | None:
        """Return how an operation's items are tried again, or None when it declares no retry.

        `asked_most_s` is the longest wait that a service may ask for.
        """
        if protection.retry is None:
            return None
        from resilience.retry import Retry, RetryBudget

        if operation not in self._retries:
            # Only the job's deadline bounds an item that waits: an accepted item is not given up
            # because of its waits.
            policy = protection.retry.model_copy(
                update={"deadline_s": None, "max_refused_s": float("inf")}
            )
            retry = Retry(policy, RetryBudget(protection.service, self.store))
            retry.asked_most_s = asked_most_s or retry.asked_most_s
            self._retries[operation] = retry
        return self._retries[operation]
