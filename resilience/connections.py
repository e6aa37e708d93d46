"""Connections to Redis that notice refusals, failovers and links that the network has forgotten.

Stores use `OwnConnection`; kombu's connections are mixed with `WatchfulConnection`.  A Redis that
is full, or a replica, refuses commands for a while.  That counts as an outage: begin with
`refusal`, which recognises it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
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
from resilience.errors import OUTAGES, Outage

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
_NO_CONNECTION = "No connection available."
MOVED = frozenset({"READONLY", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED"})
"""Codes after which another server may be the primary: the connection is dropped and made anew."""
SILENT_S = 1.0
"""A connection without an answer for this time, or for a longer timeout, may be forgotten by the
network.  A shorter timeout is often the fault of a busy process.
"""
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
    if text == _NO_CONNECTION:
        return OUTAGES["CONNECTIONS"]
    return OUTAGES[refusal(error) or "AWAY"]


def is_wrong(error: Exception) -> bool:
    """Whether an error is the fault of the command: neither an outage nor a missing right."""
    return (
        isinstance(error, ResponseError)
        and not isinstance(error, NoPermissionError)
        and not refusal(error)
    )


def told(error: Exception) -> str:
    """Return the class and text of an error of redis-py, without the text of a pipeline's command.

    A command may contain items.
    """
    return f"{type(error).__name__}: {_OF_PIPELINE.sub('', str(error))}"[:200]


class Refused(RedisConnectionError):
    """Redis refused a command for a while; callers treat it as a lost connection.  Has `code`."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(_OF_PIPELINE.sub("", text))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a pool process hand it to its main process."""
        return Refused, (self.code, str(self))


# --- connections ------------------------------------------------------------------------------


class _Listening(threading.local):
    """The present call of a thread: the silence that it bears, and the fate of its connection."""

    silence_s = 0.0  # the silence of Redis; 0: the socket's own timeout
    was_reset = False  # whether an open connection was lost


listening = _Listening()


class PatientConnection:
    """The part of a guard's connection that listens for an answer in steps.

    It is mixed into a class of redis-py.  The process of a guard may be stopped, or wait for a
    processor, while the answer lies in its socket.  So the silence of Redis is the time in which
    this process has listened in vain, and not the time that has passed.
    """

    def _connect(self) -> Any:
        me: Any = self
        own = me.socket_timeout, getattr(me, "socket_connect_timeout", None)
        if silence_s := listening.silence_s:
            me.socket_timeout, me.socket_connect_timeout = silence_s, min(1.0, silence_s)
        try:
            return super()._connect()  # type: ignore[misc]  # the class of redis-py
        finally:
            me.socket_timeout, me.socket_connect_timeout = own

    def read_response(self, *args: Any, **options: Any) -> Any:
        """Return the next answer.  Raises redis-py's TimeoutError after the silence of the call."""
        silence_s, me, read = listening.silence_s, self, super().read_response  # type: ignore[misc]
        if not silence_s or options:
            return read(*args, **options)
        step_s, heard = min(STEP_S, silence_s / STEPS), 0.0
        while True:
            try:
                return read(*args, timeout=step_s, disconnect_on_error=False)
            except RedisTimeoutError:
                heard += step_s
                if heard > silence_s - step_s / 2:
                    _Network.silent = _Network.silent or silence_s >= SILENT_S
                    me.disconnect()  # type: ignore[attr-defined]  # the class of redis-py
                    raise
            except ResponseError:
                raise
            except BaseException as error:
                is_lost = isinstance(error, RedisConnectionError) and not refusal(error)
                listening.was_reset = listening.was_reset or is_lost
                me.disconnect()  # type: ignore[attr-defined]
                raise


class _Network:
    """The connections of this process that the network may have forgotten."""

    silent = False  # a connection did not answer, and no new one has answered since
    generation = 0  # all connections of an older generation are made anew at their next use


class WatchfulConnection:
    """The part of our connections that notices refusals and forgotten connections.

    It is mixed into a class of redis-py.  A refusal is raised as `Refused`.  When a connection got
    no answer and a new one gets one, all others of this process are made anew before they are used.
    """

    heeds: Callable[[str], bool] = bool  # the codes that are raised as Refused
    renews = True  # an open connection is made anew; not one that kombu holds and polls
    generation = 0

    def connect(self) -> None:
        """Connect, unless the connection is open and trusted.  Raises Refused."""
        me: Any = self
        if self.renews and me._sock is not None and self.generation != _Network.generation:
            me.disconnect()
        was_open = me._sock is not None
        try:
            super().connect()  # type: ignore[misc]  # the class of redis-py
        except ResponseError as error:  # the database was refused
            raise RedisConnectionError(str(error)) from None
        if was_open:
            return
        if self.heeds("CLUSTER") and _is_cluster(me.handshake_metadata or {}):
            me.disconnect()
            raise Refused("CLUSTER", "one node of a cluster")
        if _Network.silent:
            _Network.silent, _Network.generation = False, _Network.generation + 1
        self.generation = _Network.generation

    def read_response(self, *args: Any, **options: Any) -> Any:
        """Return the next answer.  Raises Refused."""
        me: Any = self
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]  # redis-py's
        except RedisTimeoutError:
            if "timeout" not in options and (me._socket_timeout or SILENT_S) >= SILENT_S:
                _Network.silent = True
            raise
        except RedisError as error:
            code = refusal(error)
            if not code or not self.heeds(code):
                raise
            if code in MOVED:
                me.disconnect()
                _Network.silent = True
            raise Refused(code, str(error)) from None


class OwnConnection(PatientConnection, WatchfulConnection):
    """The part of the connections of stores; kombu's have only the watchful part."""


def also_elsewhere(attempt: Callable[[], Any]) -> Any:
    """Run an attempt, and once more if its connection was left: the next may reach a primary."""
    try:
        return attempt()
    except (RedisConnectionError, ResponseError) as error:
        if refusal(error) not in MOVED:
            raise
    return attempt()


def despite_reset(attempt: Callable[[], Any]) -> Any:
    """Run an attempt, and once more if its open connection was reset: Redis may be well."""
    listening.was_reset = False
    try:
        return also_elsewhere(attempt)
    except RedisConnectionError:
        if not listening.was_reset:
            raise
    return also_elsewhere(attempt)


def _is_cluster(handshake: dict[Any, Any]) -> bool:
    """Whether the server said at the handshake that it is a node of a cluster."""
    return handshake.get(b"mode", handshake.get("mode")) in (b"cluster", "cluster")
