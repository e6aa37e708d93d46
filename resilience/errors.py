"""The root of every error that a user can meet, and the errors of guards and of Redis.

    RlmError
    ├── StoreUnavailable        Redis does not answer, or refuses every command for a while
    │   ├── StoreFull           its memory is used up
    │   ├── StoreReadOnly       it takes no writes: a replica, a full disk, too few replicas
    │   ├── StoreUnauthorised   it refuses the password, or asks for one
    │   ├── StoreInCluster      it is a node of a cluster, which is not supported
    │   └── StoreUntrusted      TLS failed: the server's certificate or the client's is not trusted
    ├── InvalidValue            a field, its value, and what to do (also a ValueError)
    ├── NeverSatisfiable        the amount is more than a limit can ever grant (also a ValueError)
    ├── CallTimeout             a call reached its time limit (also a TimeoutError)
    ├── RetryBudgetExhausted    too many of the calls to a service are retries already
    ├── Denied                  a guard refused a call before it ran; has `retry_after_s`
    │   ├── RateLimited         a bucket is empty, or a provider asked for a pause
    │   ├── BulkheadFull        the limit of calls in flight is reached
    │   └── CircuitOpen         (in resilience.breaker: it is an error of pybreaker as well)
    └── (rlm_tasks.errors)      requests and jobs

Every module raises them; users catch them.  Begin with `RlmError`: each class has a code, a
category, a severity, and says whether a retry may help.  An error has its data as attributes, and
its message says what to do next.  A denied call costs no attempt.  `name_of` and `text_of` describe
an exception of any class, and never raise; `printable` is for texts that reach a terminal.
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeIs

T = TypeVar("T", bound=BaseException)

TEXT_CHARS = 4000
"""The largest number of characters that are kept of an exception's message."""
NAME_CHARS = 200
"""The largest number of characters that are kept of the name of an exception's class."""
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
_class_name = type.__dict__["__name__"].__get__  # the metaclass of an exception may hide its name
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 200
_short.maxdict = _short.maxlist = _short.maxtuple = _short.maxset = _short.maxfrozenset = 20


# --- numbers in sentences ---------------------------------------------------------------------


def figure(number: float) -> str:
    """Return a number with the digits that matter: "1,235", "12.50", "0.092", "0.00007".

    A small number is never shown as 0.
    """
    size = abs(number)
    if size >= 1000 or abs(number - round(number)) < 1e-9 * max(1.0, size):
        return f"{round(number):,}" if size >= 0.5 or not number else _tiny(number)
    if size >= 1:
        return f"{number:.2f}"
    return f"{number:.4f}".rstrip("0") if size >= 0.001 else _tiny(number)


def _tiny(number: float) -> str:
    """Return a number below 0.001 with two digits that matter, from 1e-9 on without an exponent."""
    if abs(number) < 1e-9:
        return f"{number:.2g}"
    return f"{number:.{1 - math.floor(math.log10(abs(number)))}f}".rstrip("0")


def count(number: float, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 node", "1,200 nodes", "0 nodes", "0.5 seconds"."""
    shown = figure(number)
    return f"{shown} {noun if shown == '1' else plural or noun + 's'}"


# --- exceptions -------------------------------------------------------------------------------


def short_repr(value: Any) -> str:
    """Return the repr of a value in at most 80 characters, whatever its size, depth and repr."""
    try:
        shown = _short.repr(value)
    except BaseException:  # an integer of 5,000 digits has no repr, and a repr may raise
        shown = f"<{_class_name(type(value))}>"
    return shown if len(shown) <= 80 else shown[:77] + "..."


class Severity(IntEnum):
    """How much an error matters to the operator of the platform."""

    LOW = 1  # expected, and handled
    MEDIUM = 2  # a call failed
    HIGH = 3  # a process or a host is in trouble
    CRITICAL = 4  # nothing works until a person acts


class Category(StrEnum):
    """The kind of trouble that an error stands for; it decides what is done about the error."""

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
    OPERATION = "operation"  # the called code failed; nothing more is known


class RlmError(Exception):
    """Base of every error that this platform raises on purpose.

    The attributes of its class say whether a retry may help, and whether a breaker counts it.
    """

    code = "RLM_ERROR"
    category = Category.OPERATION
    severity = Severity.MEDIUM
    retryable = False
    trips = False  # a sign that the called service fails: a breaker counts it
    http_status = 500  # a web backend answers with it
    when = "A part of the platform, or the program that calls it, raised it."  # the cause
    remedy = "Read its message: it says what to do."
    retry_after_s: float | None = None  # the time to wait, where it is known

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a pool process hand it to its main process, which makes it without `__init__`."""
        return _remade, (type(self), self.args, self.__dict__)


def _remade(kind: type[RlmError], args: tuple[Any, ...], attributes: dict[str, Any]) -> RlmError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


class StoreUnavailable(RlmError):
    """Redis cannot be reached, stopped answering, or refuses every command for a while.

    Attributes: its `url` without the password, the `cause`, and `advice` on what to do.
    """

    code = "SERVICE_UNAVAILABLE"
    category = Category.TRANSIENT
    severity = Severity.HIGH
    retryable = True
    trips = True
    what, advice = "does not answer ({cause})", "start it, or set {variable}"
    http_status = 503
    when = "The server is down, unreachable, starting, busy, or has no connection left."
    remedy = "Start the server, or correct the address; the message names the setting."

    def __init__(
        self,
        url: str,
        cause: str,
        *,
        what: str = "",
        advice: str = "",
        server: str = "Redis",
        variable: str = "RLM_REDIS_URL",
    ) -> None:
        self.url, self.cause = url, cause
        self.advice = (advice or self.advice).replace("{variable}", variable)
        found = (what or self.what).replace("{cause}", cause)
        super().__init__(f"{server} at {url} {found}; {self.advice}")


class StoreFull(StoreUnavailable):
    """Redis takes no writes because its memory is used up.  Work goes on when it has room."""

    category = Category.RESOURCE
    severity = Severity.CRITICAL
    what = "is full ({cause})"
    advice = "raise its maxmemory, or let results expire earlier with RLM_RESULT_TTL_S"
    when = "The memory of Redis has reached its `maxmemory`."
    remedy = "Raise `maxmemory`, or lower `RLM_RESULT_TTL_S`."


class StoreReadOnly(StoreUnavailable):
    """Redis takes no writes for another reason: a replica, a full disk, too few replicas."""

    severity = Severity.CRITICAL
    what = "takes no writes ({cause})"
    advice = "set {variable} to the primary, or wait until the failover has ended"
    when = "The server is a replica, cannot save to its disk, or has too few replicas."
    remedy = "Set the URL to the primary, or repair the server; the message has the reason."


class StoreUnauthorised(StoreUnavailable):
    """Redis refuses the user name or the password, or asks for one; a retry does not help."""

    code = "UNAUTHORISED"
    category = Category.AUTH
    severity = Severity.CRITICAL
    retryable = False
    trips = False
    what = "refuses the user name or the password"
    advice = "correct them in {variable}"
    http_status = 500
    when = "The user name, the password or an ACL of the server is wrong."
    remedy = "Correct the URL, or give the user the rights that the message names."


class StoreInCluster(StoreUnavailable):
    """Redis is one node of a cluster, which the platform does not support."""

    severity = Severity.CRITICAL
    retryable = False
    trips = False
    what = "is one node of a cluster, which is not supported"
    advice = "set {variable} to a server outside of a cluster"
    http_status = 500
    when = "The URL names a node of a Redis Cluster."
    remedy = "Set the URL to a server outside of a cluster."


class StoreUntrusted(StoreUnavailable):
    """Redis and this process do not agree on TLS; a retry does not help."""

    code = "UNAUTHORISED"
    category = Category.AUTH
    severity = Severity.CRITICAL
    retryable = False
    trips = False
    what = "is not trusted ({cause})"
    advice = "see its certificate, and port and ssl_ca_certs in {variable}"
    http_status = 500
    when = "A certificate, a port or the scheme of the URL is wrong."
    remedy = "Correct `rediss://`, the port or the `ssl_` options of the URL."


class Outage(NamedTuple):
    """The error for one kind of outage: its class, what is wrong, and what to do.

    An empty text stands for the text of the class.
    """

    kind: type[StoreUnavailable]
    what: str = ""
    advice: str = ""

    def error(self, url: str, cause: str) -> StoreUnavailable:
        """Return the error of Redis at a URL; the cause is in the words of its client."""
        return self.kind(url, cause, what=self.what, advice=self.advice)


OUTAGES = {
    "AWAY": Outage(StoreUnavailable),
    "CONNECTIONS": Outage(
        StoreUnavailable,
        "answers, but all connections of this process are in use",
        "use fewer threads at once, or try again",
    ),
    "MAXCLIENTS": Outage(
        StoreUnavailable,
        "takes no more connections",
        "raise its maxclients, or run fewer processes",
    ),
    "PROTOCOL": Outage(
        StoreUnavailable,
        "answers, but not as Redis does",
        "correct host and port in {variable}, or the proxy in between",
    ),
    "DATABASE": Outage(
        StoreUnavailable, "has no such database ({cause})", "correct the number in {variable}"
    ),
    "WRONGPASS": Outage(StoreUnauthorised),
    "NOAUTH": Outage(
        StoreUnauthorised,
        "asks for a password",
        "write it into {variable}: redis://:PASSWORD@HOST:6379/0",
    ),
    "NOPASS": Outage(
        StoreUnauthorised, "has no password, but one was given", "remove it from {variable}"
    ),
    "NOPERM": Outage(
        StoreUnauthorised,
        "refuses a call ({cause})",
        "give the user of {variable} the rights to it (ACL SETUSER)",
    ),
    "DAMAGED": Outage(
        StoreUnavailable,
        "has a record that cannot be used ({cause})",
        "delete the record: another program or release wrote it, or it is damaged",
    ),
    "UNTRUSTED": Outage(StoreUntrusted),
    "NOTLS": Outage(
        StoreUntrusted,
        "speaks no TLS on this port",
        "write its port for TLS into {variable}, or redis:// instead of rediss://",
    ),
    "TLS": Outage(
        StoreUntrusted,
        "speaks only TLS on this port",
        "write rediss:// instead of redis:// into {variable}",
    ),
    # --- the codes of refusals --------------------------------------------------------------
    "OOM": Outage(StoreFull),
    "READONLY": Outage(StoreReadOnly, "takes no writes, because it is a replica"),
    "UNBLOCKED": Outage(StoreReadOnly, "takes no writes, because it became a replica"),
    "NOREPLICAS": Outage(
        StoreReadOnly,
        "takes no writes, because too few of its replicas are connected",
        "start them, or lower min-replicas-to-write",
    ),
    "MISCONF": Outage(
        StoreReadOnly,
        "takes no writes, because it could not save to its disk",
        "free disk space; its log has the reason",
    ),
    "BUSY": Outage(
        StoreUnavailable, "is busy with a script", "wait until it ends, or send SCRIPT KILL"
    ),
    "LOADING": Outage(StoreUnavailable, "loads its data after a start", "wait until it is ready"),
    "MASTERDOWN": Outage(
        StoreUnavailable, "is a replica that has lost its primary", "set {variable} to the primary"
    ),
    "CLUSTERDOWN": Outage(StoreInCluster),
    "TRYAGAIN": Outage(StoreInCluster),
    "CLUSTER": Outage(StoreInCluster),
}
"""The kinds of outages; `resilience.connections.outage_of` finds the kind of an error."""


class InvalidValue(RlmError, ValueError):
    """A value that cannot be used.

    Attributes: the `field`, its `value`, and `advice` on what to do.
    """

    code = "INVALID_VALUE"
    category = Category.VALIDATION
    http_status = 422
    when = "A call, a policy or a guard got a value of the wrong type or size."
    remedy = "Correct the field that the message names."

    def __init__(self, field: str, value: Any, advice: str) -> None:
        self.field, self.value, self.advice = field, value, advice
        super().__init__(f"{field}={short_repr(value)}: {advice}")

    @classmethod
    def missing(cls, field: str, advice: str) -> Self:
        """Return the error of a field without a value; its message shows none."""
        error = cls(field, None, advice)
        error.args = (f"{field}: {advice}",)
        return error

    def within(self, place: str) -> Self:
        """Put a place before the field, such as the entry of a file, and return the error."""
        self.field, self.args = f"{place}: {self.field}", (f"{place}: {self}",)
        return self


def refuse_unless_positive(
    field: str,
    value: Any,
    advice: str = "must be a number above 0",
    error: type[InvalidValue] = InvalidValue,
) -> None:
    """Raise InvalidValue, or another `error`, unless the value is a finite number above 0."""
    if not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise error(field, value, advice)


def refuse_unless_name(field: str, value: Any, error: type[InvalidValue] = InvalidValue) -> None:
    """Raise InvalidValue, or another `error`, unless the value can name a guard in Redis."""
    if not (isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()):
        raise error(field, value, f"must be a text of 1 to {LONGEST_NAME} printable characters")


def refuse_unless_count(
    field: str, value: Any, *, least: int = 1, error: type[InvalidValue] = InvalidValue
) -> None:
    """Raise InvalidValue, or another `error`, unless the value is a whole number >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise error(field, value, f"must be a whole number of at least {least}")


def refuse_unless_seconds(field: str, value: Any, error: type[InvalidValue] = InvalidValue) -> None:
    """Raise InvalidValue, or another `error`, unless the value is a number; None is one, too."""
    if value is None or value == math.inf:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise error(field, value, "must be a number of seconds")


LONGEST_NAME = 200
"""Characters of the longest name of a guard or an operation."""


class NeverSatisfiable(RlmError, ValueError):
    """An amount that is more than its limit can ever grant at once.

    Attributes: `what` is limited, the `amount`, and the `limit`.
    """

    code = "NEVER_SATISFIABLE"
    category = Category.QUOTA
    http_status = 422
    when = "One call asks for more than the whole limit."
    remedy = "Ask for less at once, or raise the limit."

    def __init__(self, what: str, amount: float, limit: float) -> None:
        self.what, self.amount, self.limit = what, amount, limit
        super().__init__(
            f"{what}: {min(amount, sys.float_info.max):g} at once can never be granted, "
            f"the limit is {limit:g}; ask for less, or raise the limit"
        )


class CallTimeout(RlmError, TimeoutError):
    """A call was stopped because it reached its time limit.

    Attributes: `what` ran, and `limit_s`, its limit in seconds.
    """

    code = "TIMEOUT"
    category = Category.TIMEOUT
    retryable = True
    trips = True
    http_status = 504
    when = "The called code or its service is slow, or the limit is too short."
    remedy = "Make the call shorter, or raise `timeout_s` or the item's limit."

    def __init__(self, what: str, limit_s: float) -> None:
        self.what, self.limit_s = what, limit_s
        super().__init__(f"{what} ran longer than its limit of {limit_s:g} s and was stopped")


class RetryBudgetExhausted(RlmError):
    """A retry was not made, because too many of the calls to its service are retries.

    Attributes: the `service`, and `last`, the error of the attempt before.
    """

    code = "RETRY_BUDGET_EXHAUSTED"
    category = Category.TRANSIENT
    severity = Severity.HIGH
    trips = True
    http_status = 503
    when = "A service fails so often that retries would add to its load."
    remedy = "Repair the service; its last error is in the message."

    def __init__(self, service: str, last: BaseException) -> None:
        self.service, self.last = service, last
        super().__init__(
            f"no retry of {service!r}: its retry budget is spent, so repair the service; "
            f"the last error was {name_of(last)}: {text_of(last)}"
        )


class Denied(RlmError):
    """A guard refused a call before it ran.

    Attributes: the `guard`, `why` it refused, `retry_after_s` in seconds, and `noted`: the waiter
    stands in the guard's line and will be woken.
    """

    severity = Severity.LOW
    retryable = True
    retry_after_s: float
    http_status = 503
    when = "A guard that all workers share is at its limit."
    remedy = "Try again after `retry_after_s` seconds."

    def __init__(self, guard: str, retry_after_s: float, why: str, *, noted: bool = False) -> None:
        self.guard, self.retry_after_s, self.why = guard, retry_after_s, why
        self.noted = noted
        super().__init__(f"{guard}: {why}; come back in {retry_after_s:.3g} s")


class RateLimited(Denied):
    """A bucket does not hold the amount, or its provider asked for a pause."""

    code = "RATE_LIMITED"
    category = Category.RATE_LIMITED
    http_status = 429
    when = "The calls of all processes have used the limit up."
    remedy = "Try again after `retry_after_s` seconds, or raise the limit."


class BulkheadFull(Denied):
    """The limit of calls in flight is reached."""

    code = "BULKHEAD_FULL"
    category = Category.BULKHEAD_FULL
    when = "As many calls as allowed run at this moment."
    remedy = "Try again after `retry_after_s` seconds, or raise the bulkhead."


def is_a(error: BaseException, kinds: type[T] | tuple[type[T], ...]) -> TypeIs[T]:
    """Whether an exception is of a class; unlike `isinstance`, it runs no code of the exception."""
    return issubclass(type(error), kinds)


def name_of(error: BaseException) -> str:
    """Return the name of an exception's class, in printable characters of one line."""
    name: str = _class_name(type(error))[:NAME_CHARS]
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def text_of(error: BaseException, most: int = TEXT_CHARS) -> str:
    """Return the first `most` characters of an exception's message.

    If the message cannot be made, the text says so.
    """
    try:
        text = str(error)
    except BaseException as broken:
        text = f"<str() of {name_of(error)} raised {name_of(broken)}>"
    return storable(str.__getitem__(text, slice(most)))


def printable(text: str) -> str:
    """Return a text in which characters that control a terminal are escapes; lines and tabs stay.

    These are the control characters C0 and C1, marks of the direction of writing, invisible tags,
    and what cannot be encoded.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def storable(text: str) -> str:
    """Return a text that can be encoded as UTF-8: lone surrogates are replaced by escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
