"""What an exception means: its code, category and severity, and what is done about it.

Decides, for exceptions of users, of HTTP clients and of this platform alike, whether a retry may
help, whether it costs an attempt, and whether it speaks against the service that was called.
Refuses to know Celery: what else there is to know of is registered (`register`)."""

from __future__ import annotations

import asyncio
import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from resilience.errors import Category, Denied, RlmError, Severity


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to be known about an exception."""

    code: str
    category: Category
    severity: Severity
    retryable: bool
    free: bool = False  # a retry costs no attempt: nothing was tried, or the service only said that it was too early
    trips: bool = False  # it speaks against the service that was called: a breaker counts it
    ignored: bool = False  # control flow: neither a failure nor a success
    retry_after_s: float | None = None


TRANSIENT = Fault(
    "SERVICE_UNAVAILABLE", Category.TRANSIENT, Severity.MEDIUM, retryable=True, trips=True
)
TIMEOUT = Fault("TIMEOUT", Category.TIMEOUT, Severity.MEDIUM, retryable=True, trips=True)
RATE_LIMITED = Fault(
    "RATE_LIMITED", Category.RATE_LIMITED, Severity.LOW, retryable=True, free=True, ignored=True
)
RESOURCE = Fault("OUT_OF_MEMORY", Category.RESOURCE, Severity.HIGH, retryable=False, ignored=True)
WORKER_LOST = Fault(
    "WORKER_LOST", Category.WORKER_LOST, Severity.HIGH, retryable=True, ignored=True
)
INVALID = Fault(
    "INVALID_REQUEST", Category.VALIDATION, Severity.MEDIUM, retryable=False, ignored=True
)
UNAUTHORISED = Fault(
    "UNAUTHORISED", Category.AUTH, Severity.CRITICAL, retryable=False, ignored=True
)
CANCELLED = Fault("CANCELLED", Category.CANCELLED, Severity.LOW, retryable=False, ignored=True)
OPERATION = Fault(
    "OPERATION_FAILED", Category.OPERATION, Severity.MEDIUM, retryable=False, trips=True
)

_STATUS = {
    401: UNAUTHORISED,
    403: UNAUTHORISED,
    408: TIMEOUT,
    425: TRANSIENT,
    429: RATE_LIMITED,
    504: TIMEOUT,
}
_TYPES: dict[type[BaseException], Fault] = {
    MemoryError: RESOURCE,
    asyncio.CancelledError: CANCELLED,
    KeyboardInterrupt: CANCELLED,
    GeneratorExit: CANCELLED,
    SystemExit: CANCELLED,
    TimeoutError: TIMEOUT,
    ConnectionError: TRANSIENT,
    BlockingIOError: TRANSIENT,
}
_NAMES = {
    "RateLimitError": RATE_LIMITED,
    "TooManyRequests": RATE_LIMITED,
    "AuthenticationError": UNAUTHORISED,
    "PermissionDeniedError": UNAUTHORISED,
    "gaierror": TRANSIENT,
    "TimeoutError": TIMEOUT,  # redis, SQLAlchemy
    "ConnectTimeout": TIMEOUT,  # requests
    "APITimeoutError": TIMEOUT,
    "APIConnectionError": TRANSIENT,
    "InternalServerError": TRANSIENT,
    "ServiceUnavailable": TRANSIENT,
    "ClientConnectionError": TRANSIENT,  # aiohttp
    "TimeoutException": TIMEOUT,  # httpx
    "TransportError": TRANSIENT,  # httpx
    "Timeout": TIMEOUT,  # requests
    "ConnectionError": TRANSIENT,  # requests, redis
    "HTTPError": OPERATION,  # requests, urllib: their status has been looked at
}


def register(error: type[BaseException], fault: Fault) -> None:
    """Say what exceptions of a type mean, subclasses included; the nearest registered base class
    decides.
    """
    _TYPES[error] = fault


def classify(error: BaseException) -> Fault:
    """Return what an exception means.

    The order: this platform's own errors; an HTTP status, as httpx, requests, aiohttp, urllib and
    openai carry it; the nearest base class that is known by type or by name; else the called code
    itself failed."""
    if isinstance(error, RlmError):
        return _of_ours(error)
    status = (
        _status(error) if isinstance(error, Exception) else 0
    )  # SystemExit(500) is no answer of a server
    fault = _STATUS.get(status) or (
        TRANSIENT if 500 <= status < 600 else INVALID if 400 <= status < 500 else None
    )
    if fault is None:
        fault = next(
            (
                found
                for base in type(error).__mro__
                if (found := _TYPES.get(base) or _NAMES.get(base.__name__))
            ),
            OPERATION,
        )
    if fault is OPERATION and isinstance(cause := getattr(error, "reason", None), Exception):
        return classify(cause)  # urllib wraps what the network said
    if fault.retryable and (wait_s := retry_after_s(error)) is not None:
        return replace(fault, retry_after_s=wait_s)
    return fault


def _of_ours(error: RlmError) -> Fault:
    """Our own errors tell of guards, requests and jobs; few speak against a service."""
    return Fault(
        error.code,
        error.category,
        error.severity,
        error.retryable,
        free=isinstance(error, Denied),
        trips=error.trips,
        ignored=not error.trips,
        retry_after_s=error.retry_after_s if isinstance(error, Denied) else None,
    )


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    for holder, name in (
        (error, "status_code"),
        (error, "status"),
        (error, "code"),
        (response, "status_code"),
        (response, "status"),
    ):
        found = getattr(holder, name, None)
        if isinstance(found, int) and 100 <= found < 600:
            return found
    return 0


def retry_after_s(error: BaseException) -> float | None:
    """Return for how long the service asked to be left alone, in seconds, or None.

    Reads ``retry-after-ms`` and ``Retry-After`` as seconds or as a date, which is held against the
    response's own ``Date``, so that no clock of this machine is needed (RFC 9110, 10.2.3)."""
    headers = _headers(error)
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        told = headers.get(name, "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", told):
            return float(told) * unit
    try:
        then, now = (
            email.utils.parsedate_to_datetime(headers.get(name, ""))
            for name in ("retry-after", "date")
        )
        return max(0.0, (then - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None  # says nothing, or nothing that can be read


def _headers(error: BaseException) -> Mapping[str, str]:
    for holder in (getattr(error, "response", None), error):
        found: Any = getattr(holder, "headers", None)
        if hasattr(found, "items"):
            return {str(name).lower(): str(value) for name, value in found.items()}
    return {}
