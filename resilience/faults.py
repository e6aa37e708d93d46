"""The meaning of exceptions: code, category, severity, and whether a retry may help.

Retries, breakers, bulkheads and the engine ask `classify`; begin there.  It knows the exceptions of
Python, of HTTP clients and of this platform; other packages add theirs with `register`.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from resilience.errors import (
    NAME_CHARS,
    Category,
    Denied,
    RetryBudgetExhausted,
    RlmError,
    Severity,
    storable,
)


@dataclass(frozen=True, slots=True)
class Fault:
    """The meaning of an exception."""

    code: str
    category: Category
    severity: Severity
    retryable: bool
    # A retry costs no attempt: nothing was tried, or the service only asked to wait.
    free: bool = False
    trips: bool = False  # a sign that the called service fails: a breaker counts it
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
CODES = {
    TRANSIENT: (
        "A service cannot be reached, or answered with a 5xx.",
        "Wait for the service; a retry policy of the operation repeats such items.",
    ),
    TIMEOUT: (
        "A call, or the item, took longer than its limit.",
        "Make the item smaller, or raise the limit.",
    ),
    RATE_LIMITED: (
        "A service answered 429.",
        "Declare `rate_limit` for the operation, so that its items wait.",
    ),
    RESOURCE: (
        "The process had too little memory for the item.",
        "Make the item smaller, or give the worker more memory.",
    ),
    WORKER_LOST: (
        "The process ended while the item ran.",
        "See the log of the worker for the reason; then retry the item.",
    ),
    INVALID: (
        "The item is not valid, or a service refused it with a 4xx.",
        "Correct the item, then call `job.retry_failed()`.",
    ),
    UNAUTHORISED: (
        "A service refused the login with a 401 or 403.",
        "Correct the key or the rights in the environment of the workers.",
    ),
    CANCELLED: (
        "The operation raised a cancellation, or ended its process itself.",
        "Remove `sys.exit` and the like from the operation.",
    ),
    OPERATION: (
        "The operation raised an exception that has no other code.",
        "Read `type`, `message` and `traceback` of the failure; mend the item or the operation.",
    ),
}
"""Each fault of code that is not ours -> its cause, and what to do."""
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
    "HTTPError": OPERATION,  # requests, urllib: their status was checked before
}


def shows_outage(code: str) -> bool:
    """Whether a breaker counts faults of a code; a failure that was stored has only its code."""
    known = (OPERATION, *_STATUS.values(), *_TYPES.values(), *_NAMES.values())
    return code == RetryBudgetExhausted.code or any(
        fault.trips and fault.code == code for fault in known
    )


def register(error: type[BaseException], fault: Fault) -> None:
    """Set the meaning of exceptions of a type and its subclasses.

    If several base classes are registered, the nearest one counts.
    """
    _TYPES[error] = fault


def classify(error: BaseException) -> Fault:
    """Return the meaning of an exception.

    The first rule that applies counts:

    1. an error of this platform carries its own meaning;
    2. an HTTP status, as httpx, requests, aiohttp, urllib and openai carry it;
    3. the nearest base class that is known by type or by name;
    4. else the called code itself failed.

    It never raises: an exception whose attributes raise counts as one of rule 4.
    """
    try:
        return _classify(error)
    except BaseException:  # a property of the user's exception raised
        return OPERATION


def _classify(error: BaseException) -> Fault:
    if isinstance(error, RlmError):
        return _of_ours(error)
    # SystemExit(500) is not the answer of a server.
    status = _status(error) if isinstance(error, Exception) else 0
    fault = _STATUS.get(status) or (
        TRANSIENT if 500 <= status < 600 else INVALID if 400 <= status < 500 else None
    )
    if fault is None:
        fault = next(
            (
                known
                for base in type(error).__mro__
                if (known := _TYPES.get(base) or _NAMES.get(base.__name__))
            ),
            OPERATION,
        )
    if fault is OPERATION and isinstance(cause := getattr(error, "reason", None), Exception):
        return classify(cause)  # urllib wraps the error of the network
    if fault.retryable and (wait_s := retry_after_s(error)) is not None:
        return replace(fault, retry_after_s=wait_s)
    return fault


def _of_ours(error: RlmError) -> Fault:
    """Return the meaning of an error of this platform; a breaker counts few of them."""
    return Fault(
        # A user's subclass may have set anything.
        storable(str(error.code)[:NAME_CHARS]),
        Category(error.category),
        Severity(error.severity),
        bool(error.retryable),
        free=isinstance(error, Denied),
        trips=bool(error.trips),
        ignored=not error.trips,
        retry_after_s=_seconds(error.retry_after_s) if isinstance(error, Denied) else None,
    )


def _seconds(value: float) -> float | None:
    return float(value) if 0 <= value < math.inf else None


def _status(error: BaseException) -> int:
    """Return the HTTP status of an error or of its response, 0 if there is none."""
    response = getattr(error, "response", None)
    for holder, name in (
        (error, "status_code"),
        (error, "status"),
        (error, "code"),
        (response, "status_code"),
        (response, "status"),
    ):
        status = getattr(holder, name, None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return 0


def retry_after_s(error: BaseException) -> float | None:
    """Return the seconds after which the service allows the next call, or None if it does not say.

    `asked_wait_s` reads the headers of the error or of its response.
    """
    return asked_wait_s(_headers(error))


FIRST_POINT_S = 1e9
"""A number of seconds from here on is a point in time: seconds since 1970, as of 2001."""
LENGTH = (
    r"(\d{0,9}\.?\d{1,9})\s*"
    r"(milli(?:s|sec(?:ond)?s?)|sec(?:ond)?s?|min(?:ute)?s?|hours?|hrs?|days?|[nuµμm]?s|[mhd])"
    r"(?![a-zµμ])"
)
"""The pattern of a number with its unit of time, without regard to capitals."""
_LENGTHS = re.compile(rf"(?:{LENGTH}(?:\s|,|\band\b)*)+", re.IGNORECASE | re.ASCII)
_UNITS = {
    name: seconds
    for names, seconds in {
        "ns": 1e-9,
        "us µs μs": 1e-6,
        "ms mil": 0.001,
        "s sec": 1.0,
        "m min": 60.0,
        "h hr hrs hou": 3600.0,
        "d day": 86400.0,
    }.items()
    for name in names.split()
}
"""The first three letters of a unit of time -> its seconds."""


def asked_wait_s(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the wait in seconds that headers ask for, or None if they ask for none.

    Reads the headers ``retry-after-ms``, ``x-ms-retry-after-ms`` (Azure) and ``Retry-After``, by
    their lower-case names.  The latter is a number of seconds or a date (RFC 9110, 10.2.3); some
    services send another form of a time, see `wait_in`.  A point in time is compared with the
    response's own ``Date``, so the clock of this machine does not matter.  Without that it is
    compared with `now`, in seconds since 1970, by default the time of this machine.
    """
    at = time_of(headers, time.time() if now is None else now)
    for name, unit_s in (
        ("retry-after-ms", 0.001),
        ("x-ms-retry-after-ms", 0.001),
        ("retry-after", 1.0),
    ):
        if (wait_s := wait_in(headers.get(name, ""), at, unit_s=unit_s)) is not None:
            return wait_s
    return None


def time_of(headers: Mapping[str, str], now: float) -> float:
    """Return the time of a response in seconds since 1970: its ``Date``, or else `now`."""
    sent = _date(headers.get("date", ""))
    return now if sent is None else sent


def wait_in(text: str, now: float, *, unit_s: float = 1.0) -> float | None:
    """Return the seconds of a length of time, or until a point in time; None for other texts.

    A length is `3`, `1.5`, `12ms`, `1h2m3.5s`, `2 minutes`, or `PT1M30S` of ISO 8601.  A point is a
    date of HTTP or of ISO 8601, or a number since 1970: from 1e9 on in seconds, from 1e12 on in
    milliseconds, and so on.  `unit_s` is the unit of a number.  A point in the past gives 0.
    """
    text = text.strip().strip("\"'")[:100]
    if re.fullmatch(r"\+?\d{0,19}\.?\d{1,19}", text):
        return _from_now_s(float(text) * unit_s, now)
    if (length := _length_s(text)) is not None:
        return length
    if (then := _date(text)) is not None:
        return max(0.0, then - now)
    # A proxy joins two headers of one name by a comma.
    return wait_in(text.partition(",")[0], now, unit_s=unit_s) if "," in text else None


def _length_s(text: str) -> float | None:
    """Return the seconds of a text such as `12ms`, `1h2m3.5s` or `PT1M30S`; None for others."""
    if re.match(r"P[\dT]", text):
        text = text[1:].replace("T", "")
    if not _LENGTHS.fullmatch(text):
        return None
    found = re.findall(LENGTH, text, re.IGNORECASE | re.ASCII)
    return sum(float(count) * _UNITS[unit.lower()[:3]] for count, unit in found)


def _from_now_s(value: float, now: float) -> float:
    """Return a number of seconds as a length; from 1e9 on it is a point in time since 1970."""
    if value < FIRST_POINT_S:
        return value
    while value >= 1000 * FIRST_POINT_S:  # milliseconds, or a smaller unit
        value /= 1000
    return max(0.0, value - now)


def _date(text: str) -> float | None:
    """Return a date of HTTP or of ISO 8601 in seconds since 1970; None for other texts.

    A date without a time zone is in UTC.
    """
    if text.isdigit():  # too long for a number of seconds
        return None
    for read in (email.utils.parsedate_to_datetime, datetime.fromisoformat):
        with suppress(ValueError, TypeError, OverflowError):
            date = read(text.upper().replace(" UTC", "Z"))
            return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return None


def _headers(error: BaseException) -> Mapping[str, str]:
    """Return the headers of an error's response or of the error, by lower-case name."""
    for holder in (getattr(error, "response", None), error):
        headers: Any = getattr(holder, "headers", None)
        if hasattr(headers, "items"):
            return {str(name).lower(): str(value) for name, value in headers.items()}
    return {}
