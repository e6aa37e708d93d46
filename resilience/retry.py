"""Retries of failed calls: whether to retry, after which delay, and within which share of the load.

Users decorate functions with `with_retry`; the engine uses `Retry` for items.  Begin with
`RetryPolicy`, then `RetryState`.

Two kinds of failure cost no attempt.  Either a guard refused the call before it ran (an empty
bucket), or the service only put it off (429).  Other guards belong inside the retried call, and
only one layer may retry.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, ParamSpec, TypeVar

from pydantic import Field, model_validator

from resilience.bucket import HOLD_MOST_S, LocalShare, Rate
from resilience.bulkhead import underlying
from resilience.errors import (
    Denied,
    InvalidValue,
    RetryBudgetExhausted,
    StoreUnavailable,
    is_a,
    refuse_unless_name,
)
from resilience.faults import Fault, classify
from resilience.keys import Keys
from resilience.store import Call, Script, Store, default_store
from resilience.validation import Seconds

P = ParamSpec("P")
T = TypeVar("T")

DEPOSIT = 0.1
"""Each first attempt allows a tenth of a retry (SRE book, Handling Overload: 10 % per client)."""
FLOOR_PER_S = 3.0
"""Retries a second that are always allowed, at any traffic (failsafe-go: 3)."""
MOST = 100.0
"""The most that a retry budget holds."""
COST, TIMEOUT_COST = 1.0, 2.0
"""The cost of a retry.  After a timeout it is higher: the failed call has cost its service more."""
_SPEND = Script.load("resilience", "budget")


class RetryPolicy(Seconds):
    """The number of attempts of a call, and the delays between them.

    Names and defaults are those of other orchestrators.
    """

    max_attempts: int = Field(
        default=5, ge=1, description="Number of calls in all, with the first one."
    )
    initial_delay_s: float = Field(
        default=1.0, ge=0, description="Longest wait before the first retry."
    )
    backoff_multiplier: float = Field(
        default=2.0, ge=1, le=1000, description="Factor from one longest wait to the next."
    )
    max_delay_s: float = Field(
        default=30.0, ge=0, description="Longest wait; only a service may ask for a longer one."
    )
    deadline_s: float | None = Field(
        default=None, gt=0, description="Time from the first attempt after which no retry starts."
    )
    max_refused_s: float = Field(
        default=300.0,
        gt=0,
        description="Longest time of refusals in a row (429, an empty bucket), which cost no "
        "attempt.",
    )
    retryable_errors: tuple[str, ...] = Field(
        default=("TIMEOUT", "RATE_LIMITED", "SERVICE_UNAVAILABLE"),
        description="Codes of faults that are retried. With CIRCUIT_OPEN or BULKHEAD_FULL among "
        "them, a call waits until its guard admits it.",
    )
    retry_on: tuple[type[BaseException], ...] = Field(
        default=(), description="Exceptions that are always retried, whatever their fault."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_max_retries(cls, fields: Any) -> Any:
        """Accept ``max_retries``, the number of attempts after the first."""
        for name in ("max_retries", "maxRetries"):
            if isinstance(fields, dict) and name in fields:
                retries = fields[name]
                if type(retries) is not int or retries < 0:
                    raise InvalidValue(name, retries, "must be a whole number from 0 on")
                fields = cls.renamed({**fields, name: retries + 1}, name, "max_attempts")
        return fields

    @classmethod
    def known_fields(cls) -> list[str]:
        """Return the names of the fields, with that of the attempts after the first."""
        return [*cls.model_fields, "max_retries"]

    def wants(self, error: BaseException, fault: Fault) -> bool:
        """Return whether the policy retries such an error."""
        return is_a(error, self.retry_on) or fault.code in self.retryable_errors

    def delay_s(self, failures: int, random: Random) -> float:
        """Return the seconds to wait after that number of failures, with full jitter.

        See AWS, Exponential Backoff And Jitter.
        """
        longest = self.initial_delay_s * self.backoff_multiplier ** min(failures - 1, 64)
        return random.uniform(0.0, min(self.max_delay_s, longest))


DEFAULT = RetryPolicy()


class RetryBudget:
    """The share of the calls to a service that may be retries, over all workers.

    It is a tenth of the first attempts, and three retries a second.
    """

    def __init__(self, service: str, store: Store | None = None) -> None:
        refuse_unless_name("service", service)
        self.service, self._store = service, store or default_store()
        self._key = Keys(self._store.namespace).budget(service)
        self._first_attempts = 0
        self._alone: LocalShare | None = None

    def attempted(self) -> None:
        """Count a first attempt.  The count is sent to Redis with the next call of `spend`."""
        self._first_attempts += 1

    def spend(self, cost: float = COST) -> bool:
        """Take the cost of a retry, in one round trip, and return whether it was granted.

        While Redis is away, this process may make three retries a second.
        """
        attempts, self._first_attempts = self._first_attempts, 0
        try:
            [[spent, _]] = self._store.call(
                Call(_SPEND, (self._key,), (attempts, DEPOSIT, FLOOR_PER_S, MOST, cost)),
                on_outage="patient",
            )
        except StoreUnavailable:
            self._store.decided_alone("retry_budget")
            self._alone = self._alone or LocalShare(Rate(FLOOR_PER_S), 1, self._store.clock)
            if self._alone.wait_s(cost) > 0:
                return False
            self._alone.take(cost)
            return True
        self._alone = None
        return bool(spent)


@dataclass
class Retry:
    """A policy for the calls of one service, with the service's retry budget."""

    policy: RetryPolicy = DEFAULT
    budget: RetryBudget | None = None
    random: Random = field(default_factory=Random)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    asked_most_s: float = HOLD_MOST_S
    """The longest wait that a service may ask for; then it is asked again."""

    def begin(self) -> RetryState:
        """Return the state of a call before its first attempt."""
        if self.budget is not None:
            self.budget.attempted()
        return RetryState(self)

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function until it succeeds, and return its value.

        If the function returns an awaitable, so does this method, and the retries follow while it
        is awaited.  Raises the error of the last attempt, or RetryBudgetExhausted from it.
        """
        state = self.begin()
        while True:
            try:
                value = func(*args, **kwargs)
            except Exception as error:
                self.sleep(state.wait_s(error))
                continue
            if not hasattr(type(value), "__await__"):
                return value
            again: Any = functools.partial(func, *args, **kwargs)
            lasting: Any = self._awaited(state, again, value)
            if isinstance(value, asyncio.Future):
                lasting = asyncio.ensure_future(lasting)
            return lasting  # type: ignore[no-any-return]  # an awaitable, as T is

    async def call_async(
        self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do as `call` does, for a coroutine function."""
        return await self._awaited(self.begin(), functools.partial(func, *args, **kwargs))

    async def _awaited(
        self, state: RetryState, call: Callable[[], Awaitable[T]], begun: Any = None
    ) -> T:
        """Await the call that has begun, or a new one, until one succeeds."""
        while True:
            try:
                return await (call() if begun is None else begun)
            except Exception as error:
                begun = None
                await asyncio.sleep(state.wait_s(error))


class RetryState:
    """The attempts of one call so far."""

    def __init__(self, retry: Retry, *, failures: int = 0) -> None:
        self._retry, self.failures, self._put_off = retry, failures, 0
        self._began = retry.clock()
        self._refused_at = self._began  # time of the first refusal in a row

    def wait_s(self, error: BaseException, fault: Fault | None = None) -> float:
        """Return the seconds to wait before the next attempt, or raise the error if it is final.

        A `fault` gives the error a meaning other than that of `classify`.  If the service asked for
        a longer wait, that counts, up to `asked_most_s`, plus up to a tenth at random: so callers
        do not all return at once.  Raises RetryBudgetExhausted when the retry budget is spent.
        """
        policy, fault = self._retry.policy, fault or classify(error)
        if not policy.wants(error, fault):
            raise error
        self.failures += not fault.free
        self._put_off = self._put_off + 1 if fault.free else 0
        now = self._retry.clock()
        if self._put_off <= 1:
            self._refused_at = now
        if self.failures >= policy.max_attempts:
            raise error
        asked_s, is_ours = fault.retry_after_s or 0.0, is_a(error, Denied)
        if not is_ours:
            asked_s = min(asked_s, self._retry.asked_most_s)
        asked_s *= self._retry.random.uniform(1.0, 1.1)
        exact = is_ours and asked_s > 0
        wait_s = max(
            asked_s, 0.0 if exact else self._delay_s(requested=fault.retry_after_s is not None)
        )
        if now + wait_s > self._until(free=fault.free):
            raise error
        budget = self._retry.budget
        if (
            budget is not None
            and not fault.free
            and not budget.spend(TIMEOUT_COST if fault.code == "TIMEOUT" else COST)
        ):
            raise RetryBudgetExhausted(budget.service, error) from error
        return wait_s

    def _until(self, *, free: bool) -> float:
        """Return the time after which no retry starts."""
        policy = self._retry.policy
        return min(
            float("inf") if policy.deadline_s is None else self._began + policy.deadline_s,
            self._refused_at + policy.max_refused_s if free else float("inf"),
        )

    def _delay_s(self, *, requested: bool) -> float:
        """Return the policy's delay in seconds.

        Refusals lengthen it as failures do, unless the service has requested a delay.
        """
        times = self.failures + (0 if requested else self._put_off)
        return self._retry.policy.delay_s(max(1, times), self._retry.random)


def retrying(
    policy: RetryPolicy | Mapping[str, Any] | None = None,
    *,
    service: str = "",
    store: Store | None = None,
    **fields: Any,
) -> Retry:
    """Return a `Retry` of a policy or its fields, or of the default, with some fields changed.

    With a `service` it has the retry budget that all workers share.  Raises InvalidValue.
    """
    if service != "":
        refuse_unless_name("service", service)
    if isinstance(policy, Mapping):
        policy = RetryPolicy(**policy)
    # The dump has the names of RetryPolicy, also for fields passed by another name.
    changed = RetryPolicy(**fields).model_dump(exclude_unset=True)
    effective = (
        RetryPolicy(**{**(policy or DEFAULT).model_dump(), **changed})
        if fields
        else policy or DEFAULT
    )
    return Retry(effective, _budget(service, store or default_store()) if service else None)


@functools.lru_cache(maxsize=1024)
def _budget(service: str, store: Store) -> RetryBudget:
    """Return the one budget of a service in this process: it counts the first attempts of all
    calls.
    """
    return RetryBudget(service, store)


def execute_with_retry(
    func: Callable[..., T],
    *args: Any,
    policy: RetryPolicy | Mapping[str, Any] | None = None,
    service: str = "",
    **kwargs: Any,
) -> T:
    """Call a function with its arguments until it succeeds, as the policy says; return its value.

    Raises the error of the last attempt, or RetryBudgetExhausted from it.
    """
    return retrying(policy, service=service).call(func, *args, **kwargs)


def with_retry(
    policy: RetryPolicy | Mapping[str, Any] | None = None,
    *,
    service: str = "",
    store: Store | None = None,
    **fields: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for functions and coroutine functions; it refuses generators.

    ``@with_retry(max_attempts=5, service="agent-factory")``: the fields are those of RetryPolicy.
    Put it above ``@with_circuit_breaker``, so that each attempt asks the breaker.  Raises
    InvalidValue for a wrong field at once.
    """
    if service != "":
        refuse_unless_name("service", service)
    retrying(policy, **fields)

    def decorate(func: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(func, classmethod | staticmethod):
            return type(func)(decorate(func.__func__))
        function = underlying(func)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidValue(
                "func",
                getattr(func, "__name__", func),
                "a generator cannot be retried, because its first items are in use already; "
                "retry the call that makes one item, or guard it with a breaker",
            )
        retry = functools.cache(lambda: retrying(policy, service=service, store=store, **fields))
        if inspect.iscoroutinefunction(function):

            @functools.wraps(func)
            async def awaiting(*args: Any, **kwargs: Any) -> Any:
                return await retry().call_async(func, *args, **kwargs)

            return awaiting

        @functools.wraps(func)
        def calling(*args: Any, **kwargs: Any) -> Any:
            return retry().call(func, *args, **kwargs)

        return calling

    return decorate
