"""Connections to Redis that notice refusals, failovers and links that the network has forgotten.

Stores, kombu and Celery's result backend use `WatchfulConnection`.  A Redis that is full, or a
replica, refuses commands for a while.  That counts as an outage: begin with `refusal`, which
recognises it.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from resilience.address import is_untrusted
from resilience.errors import OUTAGES, Category, Outage, RlmError, Severity

LOST = (RedisConnectionError, RedisTimeoutError)
_CODES: dict[type[RedisError], str] = {
    OutOfMemoryError: "OOM",
    ReadOnlyError: "READONLY",
    BusyLoadingError: "LOADING",
    MasterDownError: "MASTERDOWN",
    ClusterDownError: "CLUSTERDOWN",
    TryAgainError: "TRYAGAIN",
    MovedError: "CLUSTER",
    AskError: "CLUSTER",
    ClusterCrossSlotError: "CLUSTER",
}
"""The codes of errors for which redis-py has a class: it removes the code from their text."""
_CODE = re.compile(
    r"(?:^|caused error: |@user_script: ?\d+: -?)"
    r"(OOM|READONLY|MISCONF|BUSY|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|LOADING|TRYAGAIN|UNBLOCKED) "
)
_LEFT = "The previous master is now a slave"
"""redis-py's words for READONLY when sentinels name the primary."""
_CLUSTER = re.compile(r"SELECT is not allowed in cluster|keys? in a cluster node|same slot")
_OF_PIPELINE = re.compile(r"^Command # \d+ .* of pipeline caused error: ", re.DOTALL)
_NO_TLS = re.compile("wrong version number|record layer failure|unknown protocol", re.IGNORECASE)
_OF_PARSER = (InvalidResponse, ValueError, LookupError)
"""The errors by which redis-py's parser meets an answer that is none of Redis."""
_NO_CONNECTION = "No connection available."
MOVED = frozenset({"READONLY", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED"})
"""Codes after which another server may be the primary: the connection is dropped and made anew."""
SILENT_S = 1.0
"""A connection without an answer for this time, or for a longer timeout, may be forgotten by the
network.  A shorter timeout is often the fault of a busy process.
"""
FORGOTTEN_S = 2.0
"""A new connection asks the server after this silence, or half of a shorter timeout."""
ASKED_S = 1.0
"""The new connection waits for its answer for this time at most."""
LAST_CHANCE_S = 0.5
"""The old connection may still answer for this time after the new one."""
STEP_S = 0.1
"""A guard listens for an answer in steps of at most this time.  A step counts in full, however long
it took: a process that was stopped or starved meanwhile has heard nothing, so it listens longer.
"""
STEPS = 4
"""The least number of steps in which a guard listens."""


# --- refusals ---------------------------------------------------------------------------------


def refusal(error: BaseException) -> str:
    """Return the code by which Redis refused a command for a while, '' for any other error.

    redis-py gives some of these errors a class and removes the code from their text; others are
    known by the code at the start, also behind the words of a pipeline or of a script.
    """
    if isinstance(error, Refused):
        return error.code
    if not isinstance(error, RedisError):
        return ""
    if code := _CODES.get(type(error), ""):
        return code
    text = str(error)
    if found := _CODE.search(text):
        return found[1]
    if text == _LEFT:
        return "READONLY"
    return "CLUSTER" if isinstance(error, ResponseError) and _CLUSTER.search(text) else ""


def outage_of(error: BaseException) -> Outage:
    """Return what a failed call to a server says about it, and what to do."""
    text = str(error)
    if is_untrusted(error):
        return OUTAGES["NOTLS" if _NO_TLS.search(text) else "UNTRUSTED"]
    if isinstance(error, AuthenticationWrongNumberOfArgsError) or "without any password" in text:
        return OUTAGES["NOPASS"]
    if isinstance(error, NoPermissionError):
        return OUTAGES["NOPERM"]
    if isinstance(error, AuthenticationError):
        return OUTAGES["NOAUTH" if "equired" in text else "WRONGPASS"]
    if "DB index is out of range" in text or "invalid DB index" in text:
        return OUTAGES["DATABASE"]
    if isinstance(error, Garbled):
        return OUTAGES["PROTOCOL"]
    if text == _NO_CONNECTION:
        return OUTAGES["CONNECTIONS"]
    if "max number of clients" in text:
        return OUTAGES["MAXCLIENTS"]
    return OUTAGES[refusal(error) or "AWAY"]


def is_wrong(error: BaseException) -> bool:
    """Whether an error is the fault of the command: neither an outage nor a missing right."""
    return (
        isinstance(error, ResponseError)
        and not isinstance(error, NoPermissionError)
        and not refusal(error)
    )


def is_outage(error: BaseException | None) -> bool:
    """Whether Redis was away or refused a command, as this error says, or one that led to it."""
    for _ in range(10):  # causes may be in a loop
        if error is None or isinstance(error, RedisError):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, RedisError) and not is_wrong(error)


def told(error: BaseException | None) -> str:
    """Return the class and text of an error of redis-py, without the text of a pipeline's command.

    A command may contain items.
    """
    return f"{type(error).__name__}: {_OF_PIPELINE.sub('', str(error))}"[:200]


class RecordUnreadable(RlmError, ResponseError):
    """Redis cannot carry out a call, because a record has another type or form than it expects.

    Another program or release wrote the record, or it is damaged.  Has the `url`, without its
    password, and the `cause`, in the words of Redis.
    """

    code = "RECORD_UNREADABLE"
    category = Category.VALIDATION
    severity = Severity.HIGH
    http_status = 500
    when = "Another program or release wrote the record, or it is damaged."
    remedy = "Delete the record, or use the release that wrote it."

    def __init__(self, url: str, cause: str) -> None:
        self.url, self.cause = url, cause
        super().__init__(
            f"Redis at {url} cannot carry out a call ({cause}): a record is damaged, or another "
            "program or release wrote it; delete it, or set another RLM_NAMESPACE"
        )


def unreadable(url: str, error: Exception) -> RecordUnreadable:
    """Return the error a user sees for a command that Redis answers with an error."""
    return error if isinstance(error, RecordUnreadable) else RecordUnreadable(url, told(error))


def answers_of(pipe: Any) -> list[Any]:
    """Run a pipeline and return its answers; a command that is wrong for its key has its error.

    So a damaged record of one job hides no other.  Raises any other error, such as an outage.
    """
    answers = list(pipe.execute(raise_on_error=False))
    for each in answers:
        if isinstance(each, Exception) and not is_wrong(each):
            raise each
    return answers


class Refused(RedisConnectionError):
    """Redis refused a command for a while; callers treat it as a lost connection.  Has `code`."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(_OF_PIPELINE.sub("", text))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a pool process hand it to its main process."""
        return Refused, (self.code, str(self))


class Forgotten(RedisConnectionError):
    """The network has forgotten a connection: it got no answer, and a newer one got one."""

    def __init__(self) -> None:
        super().__init__("the connection got no answer, and a new one did")

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a pool process hand it to its main process."""
        return Forgotten, ()


class Garbled(RedisConnectionError):
    """An answer is none of Redis.  Its bytes may be of items, so they are not told."""

    def __init__(self) -> None:
        super().__init__("an answer breaks the protocol of Redis")

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a pool process hand it to its main process."""
        return Garbled, ()


# --- connections ------------------------------------------------------------------------------


class _Listening(threading.local):
    """The present call of a thread: the silence that it bears, and the fate of its connection."""

    silence_s = 0.0  # the silence of Redis; 0: the socket's own timeout
    was_reset = False  # whether an open connection was lost


listening = _Listening()


class _Network:
    """The connections of this process that the network may have forgotten."""

    silent = False  # a connection did not answer, and no new one has answered since
    generation = 0  # all connections of an older generation are made anew at their next use


class WatchfulConnection:
    """The part of our connections that notices refusals, silence and forgotten connections.

    It is mixed into a class of redis-py.  A refusal is raised as `Refused`.

    The network may forget a connection without telling either end.  So after some silence a new
    connection asks the same server.  If only the new one is answered, the old one is closed.  All
    others of this process are made anew before they are used.  A slow server answers neither.
    """

    heeds: Callable[[str], bool] = bool  # the codes that are raised as Refused
    renews = True  # an open connection is made anew; not one that kombu holds and polls
    generation = 0

    @property
    def silence_s(self) -> float:
        """The longest silence of the server; 0: it is not watched."""
        me: Any = self
        return listening.silence_s or me.socket_timeout or 0.0

    @property
    def is_stale(self) -> bool:
        """Whether the connection is open, and older than the last one that was forgotten."""
        me: Any = self
        return me._sock is not None and self.generation != _Network.generation

    def connect(self) -> None:
        """Connect, unless the connection is open and trusted.  Raises Refused."""
        me: Any = self
        if self.renews and self.is_stale:
            me.disconnect()
        was_open = me._sock is not None
        try:
            super().connect()  # type: ignore[misc]  # the class of redis-py
        except ResponseError as error:  # the database was refused
            raise RedisConnectionError(str(error)) from None
        except (*_OF_PARSER, AttributeError, TypeError):  # the handshake
            me.disconnect()
            raise Garbled from None
        if was_open:
            return
        if self.heeds("CLUSTER") and _is_cluster(me.handshake_metadata or {}):
            me.disconnect()
            raise Refused("CLUSTER", "one node of a cluster")
        if _Network.silent:
            _Network.silent, _Network.generation = False, _Network.generation + 1
        self.generation = _Network.generation

    def _connect(self) -> Any:
        me: Any = self
        own = me.socket_timeout, getattr(me, "socket_connect_timeout", None)
        if silence_s := listening.silence_s:
            me.socket_timeout, me.socket_connect_timeout = silence_s, min(1.0, silence_s)
        try:
            return super()._connect()  # type: ignore[misc]  # the class of redis-py
        finally:
            me.socket_timeout, me.socket_connect_timeout = own

    def send_packed_command(self, *args: Any, **options: Any) -> None:
        """Send a command."""
        was_open = self._sock is not None  # type: ignore[attr-defined]  # the class of redis-py
        try:
            super().send_packed_command(*args, **options)  # type: ignore[misc]
        except RedisConnectionError:
            listening.was_reset = listening.was_reset or was_open
            raise

    def read_response(self, *args: Any, **options: Any) -> Any:
        """Return the next answer.

        Raises Refused, Forgotten, and redis-py's TimeoutError after the longest silence.
        """
        me, read, silence_s = self, super().read_response, self.silence_s  # type: ignore[misc]
        try:
            if options or not silence_s:
                return read(*args, **options)
            return self._listen(functools.partial(read, *args), silence_s)
        except RedisTimeoutError:
            if "timeout" not in options and (silence_s or SILENT_S) >= SILENT_S:
                _Network.silent = True
            raise
        except RedisError as error:
            code = refusal(error)
            if not code or not self.heeds(code):
                raise
            if code in MOVED:
                me.disconnect()  # type: ignore[attr-defined]  # the class of redis-py
                _Network.silent = True
            raise Refused(code, str(error)) from None

    def _listen(self, read: Callable[..., Any], silence_s: float) -> Any:
        """Return the answer, and close the connection if its reading ends in any other way."""
        try:
            return self._answer(read, silence_s)
        except ResponseError:
            raise
        except BaseException as error:
            is_garbled = isinstance(error, _OF_PARSER)
            is_lost = isinstance(error, RedisConnectionError) and not refusal(error)
            listening.was_reset = listening.was_reset or is_lost or is_garbled
            self.disconnect()  # type: ignore[attr-defined]  # the class of redis-py
            if is_garbled:
                raise Garbled from None
            raise

    def _answer(self, read: Callable[..., Any], silence_s: float) -> Any:
        quiet_s = min(FORGOTTEN_S, silence_s / 2) if silence_s >= SILENT_S else silence_s
        asked_s, left_s = min(ASKED_S, quiet_s), silence_s
        while True:
            try:
                return _hear(read, min(quiet_s, left_s))
            except RedisTimeoutError:
                left_s -= quiet_s
                if left_s <= 0:
                    raise
            if self._is_answered_anew(asked_s):
                break
            left_s = max(left_s - asked_s, STEP_S)
        try:
            return _hear(read, min(quiet_s, LAST_CHANCE_S))
        except RedisTimeoutError:
            _Network.generation += 1
            raise Forgotten from None

    def _is_answered_anew(self, within_s: float) -> bool:
        """Whether a new connection to the server is answered within a time.

        It needs no password: a refusal is an answer as well.
        """
        before, listening.silence_s = listening.silence_s, within_s
        try:
            with closing(self._connect()) as new:
                new.sendall(b"PING\r\n")
                return bool(new.recv(1))
        except (OSError, RedisError):
            return False
        finally:
            listening.silence_s = before


def _hear(read: Callable[..., Any], seconds: float) -> Any:
    """Return the answer that comes within a time.  Raises redis-py's TimeoutError.

    A guard listens in steps.  Its process may be stopped, or wait for a processor, while the answer
    lies in its socket.  So the silence of Redis is the time in which this process has listened in
    vain, and not the time that has passed.
    """
    is_guard, heard_s = bool(listening.silence_s), 0.0
    step_s = min(STEP_S, seconds / STEPS) if is_guard else seconds
    while True:
        try:
            return read(timeout=step_s, disconnect_on_error=False)
        except RedisTimeoutError:
            heard_s += step_s
            if heard_s > seconds - step_s / 2:
                raise


def _also_elsewhere(attempt: Callable[[], Any]) -> Any:
    """Run an attempt, and once more if its connection was left or forgotten."""
    try:
        return attempt()
    except (RedisConnectionError, ResponseError) as error:
        if not isinstance(error, Forgotten) and refusal(error) not in MOVED:
            raise
    return attempt()


def despite_reset(attempt: Callable[[], Any]) -> Any:
    """Run an attempt, and once more if its open connection was reset: Redis may be well."""
    listening.was_reset = False
    try:
        return _also_elsewhere(attempt)
    except RedisConnectionError:
        if not listening.was_reset:
            raise
    return _also_elsewhere(attempt)


def _is_cluster(handshake: dict[Any, Any]) -> bool:
    """Whether the server said at the handshake that it is a node of a cluster."""
    return handshake.get(b"mode", handshake.get("mode")) in (b"cluster", "cluster")
