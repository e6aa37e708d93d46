"""The root of every error a user can meet, and what is said about each: code, category, severity,
retryable.

    RlmError
    ├── StoreUnavailable        Redis does not answer
    │   └── StoreUntrusted      its certificate is not trusted, or ours is not
    ├── InvalidValue            a field, its value, and what to do (also a ValueError)
    ├── NeverSatisfiable        asks for more than a limit can ever grant (also a ValueError)
    ├── CallTimeout             a call ran into its limit (also a TimeoutError)
    ├── RetryBudgetExhausted    too much of the load on a service is retries already
    ├── Denied                  a guard said no before anything ran: costs no attempt, has
    `retry_after_s`
    │   ├── RateLimited         a bucket is empty, or a provider asked for a pause
    │   ├── BulkheadFull        as many calls are in flight as may be
    │   └── CircuitOpen         (in resilience.breaker, beside pybreaker whose error it is, too)
    └── (rlm_tasks.errors)      requests and jobs

An error carries its data as attributes first; the message says what to do next.
Refuses to know what a job is.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Any


class Severity(IntEnum):
    """How much an error matters to whoever operates the platform."""

    LOW = 1  # expected, and handled
    MEDIUM = 2  # a call failed
    HIGH = 3  # a process or a host is in trouble
    CRITICAL = 4  # nothing will work until a person acts


class Category(StrEnum):
    """What kind of trouble an error is; it decides what is done about it."""

    TRANSIENT = "transient"
    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"
    CIRCUIT_OPEN = "circuit_open"
    BULKHEAD_FULL = "bulkhead_full"
    RESOURCE = "resource"
    WORKER_LOST = "worker_lost"
    VALIDATION = "validation"
    AUTH = "auth"
    QUOTA = "quota"
    POISON = "poison"
    CANCELLED = "cancelled"
    OPERATION = "operation"  # the called code itself: nothing more is known


class RlmError(Exception):
    """Base of every error this platform raises on purpose; each says by its class what may be done
    about it.
    """

    code = "RLM_ERROR"
    category = Category.OPERATION
    severity = Severity.MEDIUM
    retryable = False
    trips = False  # it speaks against the service that was called: a breaker counts it


class StoreUnavailable(RlmError):
    """Redis cannot be reached, or stopped answering.  Has its `url`, without a password, and the
    `cause`.
    """

    code = "SERVICE_UNAVAILABLE"
    category = Category.TRANSIENT
    severity = Severity.HIGH
    retryable = True

    def __init__(self, url: str, cause: str) -> None:
        self.url, self.cause = url, cause
        super().__init__(
            f"Redis at {url} does not answer ({cause}); start it, or set RLM_REDIS_URL"
        )


class StoreUntrusted(StoreUnavailable):
    """Redis and this process do not agree on TLS: it will not heal by itself."""

    code = "UNAUTHORISED"
    category = Category.AUTH
    severity = Severity.CRITICAL
    retryable = False

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(url, cause)
        self.args = (
            f"Redis at {url} is not trusted ({cause}); see its certificate, and port and ssl_ca_certs in RLM_REDIS_URL",
        )


class InvalidValue(RlmError, ValueError):
    """A value that cannot be used.  Has the `field`, its `value`, and `advice` on what to do."""

    code = "INVALID_VALUE"
    category = Category.VALIDATION

    def __init__(self, field: str, value: Any, advice: str) -> None:
        self.field, self.value, self.advice = field, value, advice
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}={shown}: {advice}")


class NeverSatisfiable(RlmError, ValueError):
    """Asks a limit for more than it can ever grant at once.  Has `what` was asked, the `amount` and
    the `limit`.
    """

    code = "NEVER_SATISFIABLE"
    category = Category.QUOTA

    def __init__(self, what: str, amount: float, limit: float) -> None:
        self.what, self.amount, self.limit = what, amount, limit
        super().__init__(
            f"{what}: {amount:g} at once can never be granted, the limit is {limit:g}; ask for less, or raise it"
        )


class CallTimeout(RlmError, TimeoutError):
    """A call was stopped because it ran into its limit.  Has `what` ran, and `limit_s`."""

    code = "TIMEOUT"
    category = Category.TIMEOUT
    retryable = True
    trips = True

    def __init__(self, what: str, limit_s: float) -> None:
        self.what, self.limit_s = what, limit_s
        super().__init__(f"{what} ran longer than its limit of {limit_s:g} s and was stopped")


class RetryBudgetExhausted(RlmError):
    """A retry was not made, because too many of the calls to its `service` are retries; `last` is
    the error before.
    """

    code = "RETRY_BUDGET_EXHAUSTED"
    category = Category.TRANSIENT
    severity = Severity.HIGH

    def __init__(self, service: str, last: BaseException) -> None:
        self.service, self.last = service, last
        super().__init__(
            f"no retry of {service!r}: its retry budget is spent; the last error was {type(last).__name__}: {last}"
        )


class Denied(RlmError):
    """A `guard` said no before anything ran, and `why`; come back after `retry_after_s` seconds."""

    severity = Severity.LOW
    retryable = True

    def __init__(self, guard: str, retry_after_s: float, why: str, *, noted: bool = False) -> None:
        self.guard, self.retry_after_s, self.why = guard, retry_after_s, why
        self.noted = noted  # who waits is in line at the guard, and will be woken
        super().__init__(f"{guard}: {why}; come back in {retry_after_s:.3g} s")


class RateLimited(Denied):
    """A bucket has too little, or its provider asked for a pause."""

    code = "RATE_LIMITED"
    category = Category.RATE_LIMITED


class BulkheadFull(Denied):
    """As many calls are in flight as may be."""

    code = "BULKHEAD_FULL"
    category = Category.BULKHEAD_FULL
