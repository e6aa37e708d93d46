"""The classification of exceptions: our own, Python's, and those of HTTP clients.

The exceptions of HTTP clients are built here as those clients build them.
"""

from __future__ import annotations

import asyncio
import email.message
import importlib
import io
import pkgutil
import socket
import urllib.error
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

import resilience
import rlm_tasks.errors
from resilience import faults
from resilience.errors import Category, Denied, RlmError, Severity
from resilience.faults import (
    CANCELLED,
    INVALID,
    OPERATION,
    RATE_LIMITED,
    RESOURCE,
    TIMEOUT,
    TRANSIENT,
    UNAUTHORISED,
    WORKER_LOST,
    Fault,
    classify,
    register,
    retry_after_s,
)

for _module in pkgutil.iter_modules(resilience.__path__):
    importlib.import_module(f"resilience.{_module.name}")
KNOWN = [
    TRANSIENT,
    TIMEOUT,
    RATE_LIMITED,
    RESOURCE,
    WORKER_LOST,
    INVALID,
    UNAUTHORISED,
    CANCELLED,
    OPERATION,
]
DATE = "Wed, 21 Oct 2015 07:28:00 GMT"


def ours(root: type[RlmError] = RlmError) -> list[type[RlmError]]:
    """Return an error and its subclasses, without those that tests define."""
    below = [found for each in root.__subclasses__() for found in ours(each)]
    return (
        [root] if root.__module__.startswith(("resilience.", "scheduler.", "rlm_tasks.")) else []
    ) + below


def made(error: type[RlmError]) -> RlmError:
    """Return an error without the data that its constructor needs; its classification belongs to
    the class.
    """
    found = error.__new__(error)
    if isinstance(found, Denied):
        found.retry_after_s = 2.5
    return found


def named(*names: str, base: type[Exception] = Exception) -> type[Exception]:
    """Return the last of a chain of classes, each derived from the one before."""
    for name in names:
        base = type(name, (base,), {})
    return base


class Answered(Exception):
    """An exception that carries its response, as those of requests, httpx and openai do."""

    def __init__(self, status: int, headers: Mapping[str, Any] | None = None) -> None:
        self.response = SimpleNamespace(status_code=status, headers=headers or {})


def retry_after_of(**headers: Any) -> float | None:
    """Return the retry time read from response headers; underscores stand for hyphens."""
    return retry_after_s(
        Answered(503, {name.replace("_", "-"): value for name, value in headers.items()})
    )


# --- our errors -------------------------------------------------------------------------------


def test_all_errors_are_found() -> None:
    wanted = {getattr(rlm_tasks.errors, name) for name in rlm_tasks.errors.__all__}

    assert wanted <= set(ours())
    assert Denied in ours()


@pytest.mark.parametrize("error", ours())
def test_our_errors_carry_their_own_classification(error: type[RlmError]) -> None:
    fault = classify(made(error))

    assert (fault.code, fault.category, fault.severity) == (
        error.code,
        error.category,
        error.severity,
    )
    assert fault.retryable == error.retryable
    assert isinstance(fault.category, Category)
    assert isinstance(fault.severity, Severity)


@pytest.mark.parametrize("error", ours())
def test_a_denial_costs_no_attempt_and_has_a_retry_time(error: type[RlmError]) -> None:
    fault = classify(made(error))

    assert fault.free == issubclass(error, Denied)
    assert fault.retry_after_s == (2.5 if issubclass(error, Denied) else None)


# Denied itself is left out: it is a base class, and its category is that of the root.
@pytest.mark.parametrize(
    "fault", KNOWN + [classify(made(error)) for error in ours() if error is not Denied]
)
def test_no_fault_contradicts_itself(fault: Fault) -> None:
    assert not (fault.trips and fault.ignored)
    assert fault.retryable or not fault.free
    assert fault.code.isupper()


def test_our_error_counts_before_the_status_that_it_carries() -> None:
    class Unusual(RlmError):
        code = "UNUSUAL"
        status_code = 503

    assert classify(Unusual()).code == "UNUSUAL"


# --- Python's ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (TimeoutError(), TIMEOUT),
        (asyncio.TimeoutError(), TIMEOUT),  # noqa: UP041  # that they are the same class is the point
        (ConnectionError(), TRANSIENT),
        (ConnectionRefusedError(111, "refused"), TRANSIENT),
        (ConnectionResetError(), TRANSIENT),
        (BrokenPipeError(), TRANSIENT),
        (BlockingIOError(), TRANSIENT),
        (socket.gaierror(-2, "unknown name"), TRANSIENT),
        (MemoryError(), RESOURCE),
        (asyncio.CancelledError(), CANCELLED),
        (KeyboardInterrupt(), CANCELLED),
        (GeneratorExit(), CANCELLED),
        (SystemExit(1), CANCELLED),
        (ValueError("not a number"), OPERATION),
        (KeyError("name"), OPERATION),
        (ZeroDivisionError(), OPERATION),
        (FileNotFoundError(2, "no such file"), OPERATION),
        (PermissionError(13, "not allowed"), OPERATION),
        (RecursionError(), OPERATION),
        (StopIteration(), OPERATION),
        (Exception(), OPERATION),
    ],
)
def test_builtin_exceptions(error: BaseException, fault: Fault) -> None:
    assert classify(error) == fault


# --- an HTTP status ---------------------------------------------------------------------------

STATUSES = [
    (400, INVALID),
    (401, UNAUTHORISED),
    (403, UNAUTHORISED),
    (404, INVALID),
    (408, TIMEOUT),
    (422, INVALID),
    (425, TRANSIENT),
    (429, RATE_LIMITED),
    (499, INVALID),
    (500, TRANSIENT),
    (502, TRANSIENT),
    (503, TRANSIENT),
    (504, TIMEOUT),
    (529, TRANSIENT),
    (599, TRANSIENT),
]


@pytest.mark.parametrize(("status", "fault"), STATUSES)
@pytest.mark.parametrize(
    "place", ["status_code", "status", "code", "response.status_code", "response.status"]
)
def test_a_status_is_found_at_each_place_where_clients_keep_it(
    place: str, status: int, fault: Fault
) -> None:
    error, name = ValueError("a type that says nothing"), place.rpartition(".")[2]
    holder: Any = SimpleNamespace() if "." in place else error
    setattr(holder, name, status)
    if "." in place:
        error.response = holder  # type: ignore[attr-defined]  # as clients add it

    assert classify(error) == fault


@pytest.mark.parametrize("status", [0, 99, 200, 302, 600, 1006, True, "429", None, 429.0])
def test_other_values_are_not_taken_for_a_status(status: Any) -> None:
    error: Any = ConnectionError()
    error.code = status

    assert classify(error) == TRANSIENT


def test_a_status_counts_before_the_name_of_a_class() -> None:
    error: Any = named("APIStatusError", "RateLimitError")()
    error.status_code = 401

    assert classify(error) == UNAUTHORISED


def test_a_code_in_words_does_not_hide_the_status() -> None:
    error: Any = Answered(429)
    error.code = "rate_limit_exceeded"

    assert classify(error) == RATE_LIMITED


@pytest.mark.parametrize(("status", "fault"), STATUSES)
def test_errors_of_urllib(status: int, fault: Fault) -> None:
    with urllib.error.HTTPError(
        "http://localhost/", status, "no", email.message.Message(), io.BytesIO()
    ) as error:
        assert classify(error) == fault


def test_an_error_of_urllib_has_its_retry_time() -> None:
    headers = email.message.Message()
    headers["Retry-After"] = "7"
    with urllib.error.HTTPError("http://localhost/", 503, "no", headers, io.BytesIO()) as error:
        assert classify(error).retry_after_s == 7.0


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        # requests
        (named("RequestException", "ConnectionError", base=OSError), TRANSIENT),
        (named("RequestException", "ConnectionError", "ProxyError", base=OSError), TRANSIENT),
        (named("RequestException", "Timeout", "ReadTimeout", base=OSError), TIMEOUT),
        (named("RequestException", "HTTPError", base=OSError), OPERATION),
        (named("RequestException", "InvalidURL", base=OSError), OPERATION),
        # httpx
        (
            named("HTTPError", "RequestError", "TransportError", "NetworkError", "ConnectError"),
            TRANSIENT,
        ),
        (
            named("HTTPError", "RequestError", "TransportError", "TimeoutException", "PoolTimeout"),
            TIMEOUT,
        ),
        (named("HTTPError", "RequestError", "DecodingError"), OPERATION),
        # openai, anthropic
        (named("APIError", "APIConnectionError"), TRANSIENT),
        (named("APIError", "APIConnectionError", "APITimeoutError"), TIMEOUT),
        (named("APIError", "APIStatusError", "RateLimitError"), RATE_LIMITED),
        (named("APIError", "APIStatusError", "AuthenticationError"), UNAUTHORISED),
        (named("APIError", "APIStatusError", "PermissionDeniedError"), UNAUTHORISED),
        (named("APIError", "APIStatusError", "InternalServerError"), TRANSIENT),
        # google.api_core, aiohttp
        (named("ClientError", "TooManyRequests"), RATE_LIMITED),
        (named("ServerError", "ServiceUnavailable"), TRANSIENT),
        (named("ClientError", "ClientConnectionError", "ServerDisconnectedError"), TRANSIENT),
    ],
)
def test_errors_of_clients_that_are_not_installed_are_known_by_name(
    error: type[Exception], fault: Fault
) -> None:
    assert classify(error()) == fault


# --- registered types -------------------------------------------------------------------------


@pytest.fixture
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_TYPES", dict(faults._TYPES))


@pytest.mark.usefixtures("_nothing_registered")
def test_a_registered_type_covers_its_subclasses_and_the_nearest_one_counts() -> None:
    class Odd(ConnectionError):
        pass

    class Odder(Odd):
        pass

    assert classify(Odder()) == TRANSIENT
    register(Odd, RESOURCE)
    assert (classify(Odd()), classify(Odder()), classify(ConnectionError())) == (
        RESOURCE,
        RESOURCE,
        TRANSIENT,
    )
    register(Odder, WORKER_LOST)
    assert (classify(Odd()), classify(Odder())) == (RESOURCE, WORKER_LOST)


@pytest.mark.usefixtures("_nothing_registered")
def test_a_registered_type_counts_before_its_name() -> None:
    error = named("RateLimitError")
    register(error, UNAUTHORISED)

    assert classify(error()) == UNAUTHORISED


# --- retry times ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry_after", "wait_s"),
    [("0", 0.0), ("7", 7.0), ("1.5", 1.5), (120, 120.0), ("1m30s", 90.0), ("5, 5", 5.0)],
)
def test_retry_after_in_seconds(retry_after: Any, wait_s: float) -> None:
    assert retry_after_of(Retry_After=retry_after) == wait_s


def test_retry_after_in_milliseconds_counts_first() -> None:
    assert retry_after_of(retry_after_ms="250") == 0.25
    assert retry_after_of(Retry_After_Ms="250", retry_after="1") == 0.25


@pytest.mark.parametrize(
    ("retry_after", "date", "wait_s"),
    [
        ("Wed, 21 Oct 2015 07:28:30 GMT", DATE, 30.0),
        ("Wed, 21 Oct 2015 09:28:30 +0200", DATE, 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", DATE, 0.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", "", 0.0),  # it is over by the time of this machine
        ("Wed, 21 Oct 2015 07:28:30 GMT", "today", 0.0),
        ("Wed, 21 Oct 2015 07:28:30 -0000", DATE, 30.0),  # a date without a zone
        ("1445412510", DATE, 30.0),  # seconds since 1970
        ("1445412510000", DATE, 30.0),  # milliseconds since 1970
        ("soon", DATE, None),
    ],
)
def test_a_retry_date_is_compared_with_the_date_of_the_response(
    retry_after: str, date: str, wait_s: float | None
) -> None:
    assert retry_after_of(Retry_After=retry_after, Date=date) == wait_s


@pytest.mark.parametrize(
    "retry_after",
    ["", "soon", "-3", "1.2.3", ".", "\u00b2", "1e3", "nan", "Wed, 99 Oct 2015 07:28:00 GMT", None],
)
def test_unreadable_retry_times_are_ignored(retry_after: Any) -> None:
    assert retry_after_of(Retry_After=retry_after, Date=DATE) is None
    assert retry_after_of(retry_after_ms="soon") is None


def test_headers_may_be_on_the_exception_itself_or_missing() -> None:
    error: Any = Exception()
    assert retry_after_s(error) is None
    error.headers = None
    assert retry_after_s(error) is None
    error.headers = {"RETRY-AFTER": "3"}
    assert retry_after_s(error) == 3.0


@pytest.mark.parametrize(
    ("status", "wait_s"),
    [(429, 7.0), (503, 7.0), (504, 7.0), (400, None), (401, None), (404, None)],
)
def test_only_retryable_faults_have_a_retry_time(status: int, wait_s: float | None) -> None:
    fault = classify(Answered(status, {"Retry-After": "7"}))

    assert fault.retry_after_s == wait_s
    assert fault.retryable == (wait_s is not None)


def test_the_retry_time_of_one_fault_does_not_stay_on_the_next() -> None:
    assert classify(Answered(429, {"Retry-After": "7"})).retry_after_s == 7.0
    assert classify(Answered(429)) == RATE_LIMITED
    assert RATE_LIMITED.retry_after_s is None
