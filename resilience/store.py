"""One connection to Redis per process, and scripts that run in one round trip.

Every part of the platform calls Redis through `Store.call`; begin there, with its table of outages.
A Redis that refuses a command for a while, because it is full or a replica, counts as an outage:
`refusal` recognises it.  Timeouts are short, and redis-py does not retry by itself: it would run a
script twice after a timeout.  Guards that decide without Redis count it with `Store.decided_alone`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Any, Literal, overload

import redis
from redis.backoff import NoBackoff
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
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from resilience.address import Address, is_untrusted
from resilience.address import masked as masked
from resilience.errors import OUTAGES, Outage, StoreUnavailable
from resilience.keys import Keys
from resilience.settings import StoreSettings, store_settings

logger = logging.getLogger(__name__)

LOST = (RedisConnectionError, RedisTimeoutError)
BACK_OFF_S = 1.0
"""In an outage guards try Redis again after this time, plus up to half of it at random."""
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
MAX_CONNECTIONS = 64
"""The connections of one process to one server; further threads wait for a free one."""
STEP_S = 0.1
"""A guard listens for an answer in steps of at most this time.  A step counts in full, however long
it took: a process that was stopped or starved meanwhile has heard nothing, so it listens longer.
"""
STEPS = 4
"""The least number of steps in which a guard listens."""
_USES_CLOCK = "-- uses: clock\n"

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 1.0
"""A call with ``on_outage="wait"`` is repeated after the first wait; each further wait is twice as
long, up to the longest.
"""

Argument = str | int | float | bytes
OnOutage = Literal["raise", "answer", "patient", "wait"]


class _Listening(threading.local):
    """The present call of a thread: the silence that it bears, and the fate of its connection."""

    silence_s = 0.0  # the silence of Redis; 0: the socket's own timeout
    was_reset = False  # whether an open connection was lost


_listening = _Listening()
_on_alone: list[Callable[[str], None]] = []


def on_alone(tell: Callable[[str], None]) -> None:
    """Call a function with the kind of each guard of this process that decides without Redis."""
    if tell not in _on_alone:
        _on_alone.append(tell)


class PatientConnection:
    """The part of a guard's connection that listens for an answer in steps.

    It is mixed into a class of redis-py.  The process of a guard may be stopped, or wait for a
    processor, while the answer lies in its socket.  So the silence of Redis is the time in which
    this process has listened in vain, and not the time that has passed.
    """

    def _connect(self) -> Any:
        me: Any = self
        own = me.socket_timeout, getattr(me, "socket_connect_timeout", None)
        if silence_s := _listening.silence_s:
            me.socket_timeout, me.socket_connect_timeout = silence_s, min(1.0, silence_s)
        try:
            return super()._connect()  # type: ignore[misc]  # the class of redis-py
        finally:
            me.socket_timeout, me.socket_connect_timeout = own

    def read_response(self, *args: Any, **options: Any) -> Any:
        """Return the next answer.  Raises redis-py's TimeoutError after the silence of the call."""
        silence_s, me, read = _listening.silence_s, self, super().read_response  # type: ignore[misc]
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
                _listening.was_reset = _listening.was_reset or is_lost
                me.disconnect()  # type: ignore[attr-defined]
                raise


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


def _is_wrong(error: Exception) -> bool:
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


def _also_elsewhere(attempt: Callable[[], Any]) -> Any:
    """Run an attempt, and once more if its connection was left: the next may reach a primary."""
    try:
        return attempt()
    except (RedisConnectionError, ResponseError) as error:
        if refusal(error) not in MOVED:
            raise
    return attempt()


def _despite_reset(attempt: Callable[[], Any]) -> Any:
    """Run an attempt, and once more if its open connection was reset: Redis may be well."""
    _listening.was_reset = False
    try:
        return _also_elsewhere(attempt)
    except RedisConnectionError:
        if not _listening.was_reset:
            raise
    return _also_elsewhere(attempt)


def _is_cluster(handshake: dict[Any, Any]) -> bool:
    """Whether the server said at the handshake that it is a node of a cluster."""
    return handshake.get(b"mode", handshake.get("mode")) in (b"cluster", "cluster")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script: its text, and the digest under which Redis keeps it."""

    name: str
    text: str
    sha: str

    @classmethod
    def load(cls, package: str, name: str, *, prelude: str = "") -> Script:
        """Read ``lua/<name>.lua`` of a package, with a shared prelude in front of it.

        A file whose first line is ``-- uses: clock`` gets the functions of ``clock.lua`` as well.
        """
        parts = [_lua(package, part) for part in (prelude, name) if part]
        if any(part.startswith(_USES_CLOCK) for part in parts):
            parts.insert(0, _lua("resilience", "clock"))
        text = "\n".join(parts)
        return cls(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _lua(package: str, name: str) -> str:
    return (files(package) / "lua" / f"{name}.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a script.  Several calls passed to `Store.call` share a round trip."""

    script: Script
    keys: Sequence[str]
    args: Sequence[Argument]


class Store:
    """A Redis client that knows its URL, survives a fork and never retries behind its caller."""

    def __init__(
        self,
        where: str | Address,
        *,
        namespace: str = "rlm",
        client: redis.Redis | None = None,
        timeout_s: float = 5.0,
        limit_timeout_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
        patience_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_s` is the longest time that Redis may take for an answer.

        A guard whose own decision may cost money waits for `limit_timeout_s`, if that is longer.

        A call with ``on_outage="wait"`` is repeated for `patience_s`.
        """
        self.address = Address(where) if isinstance(where, str) else where
        self.url, self.namespace, self.clock = masked(self.address.url), namespace, clock
        self.random = random or Random()
        self.patience_s, self._sleep = patience_s, sleep
        self._timeout_s, self.limit_timeout_s = timeout_s, max(timeout_s, limit_timeout_s)
        self._client, self._given, self._pid = client, client is not None, os.getpid()
        self._away_until, self._away, self._why = 0.0, threading.Event(), OUTAGES["AWAY"]
        self._silent_since, self._silences = 0.0, 0  # about the present silence
        self._alone: Counter[str] = Counter()
        self._alone_keys = Keys(namespace).alone
        # Whether another process warns of a Redis that refuses.
        self.is_quiet = False
        # Whether a refused call with ``on_outage="wait"`` is repeated beyond `patience_s`.
        self.stays: Callable[[], bool] = lambda: False

    @classmethod
    def from_url(
        cls,
        url: str | Address,
        *,
        namespace: str = "rlm",
        timeout_s: float = 0.1,
        limit_timeout_s: float = 2.0,
    ) -> Store:
        """Return a store for guards: a Redis that is silent for `limit_timeout_s` counts as away.

        A single call of a breaker waits for `timeout_s` only.  Nothing connects before the first
        call.
        """
        return cls(url, namespace=namespace, timeout_s=timeout_s, limit_timeout_s=limit_timeout_s)

    @property
    def client(self) -> redis.Redis:
        """The connection pool of this process."""
        if self._client is None or (self._pid != os.getpid() and not self._given):
            self._alone.clear()  # a fork does not tell the decisions of its parent
            self._client, self._pid = self._connect(), os.getpid()
        return self._client

    def _connect(self) -> redis.Redis:
        return self.address.client(
            OwnConnection,
            max_connections=MAX_CONNECTIONS,
            timeout=max(1.0, self.limit_timeout_s),  # for a free connection
            socket_timeout=self._timeout_s,
            socket_connect_timeout=min(1.0, self._timeout_s),
            socket_keepalive=True,
            health_check_interval=0,
            retry=Retry(NoBackoff(), 0),
        )

    def close(self) -> None:
        """Close the connections of this process, those to sentinels as well.  A later call opens
        new ones.
        """
        if self._client is None or (self._pid != os.getpid() and not self._given):
            return
        self._client.close()
        if (
            sentinels := getattr(self._client.connection_pool, "sentinel_manager", None)
        ) is not None:
            sentinels.close()

    def check(self) -> None:
        """Raise StoreUnavailable, naming the URL without its password, unless Redis answers."""
        try:
            self.client.ping()
        except (RedisError, OSError) as error:
            if outage_of(error) is OUTAGES["AWAY"] and (kind := self.address.misses_tls()):
                raise OUTAGES[kind].error(self.url, told(error)) from None
            raise self.unavailable(error) from None

    def refusal(self) -> StoreUnavailable | None:
        """Return the error of a small write, None when Redis takes it.

        A full server, or a replica, answers reads as usual.
        """
        probe = Keys(self.namespace).probe
        try:
            self.call(lambda client: client.set(probe, "1", px=1000))
        except StoreUnavailable as error:
            return error
        return None

    def now_ms(self) -> int:
        """Return the server's time in ms since 1970.  All times of jobs come from this clock.

        Raises StoreUnavailable.
        """
        seconds, micros = self.call(lambda client: client.time())
        return int(seconds) * 1000 + int(micros) // 1000

    def unavailable(self, error: Exception) -> StoreUnavailable:
        """Return the error a user sees for a lost, refusing or refused connection."""
        outage = outage_of(error)
        cause = self._memory() if outage is OUTAGES["OOM"] else ""
        return outage.error(self.url, cause or told(error))

    def _memory(self) -> str:
        """Return the used and the allowed memory in words, '' when Redis does not say."""
        try:
            memory = self.client.info("memory")
        except (RedisError, OSError):
            return ""
        used, most = (int(memory.get(name, 0)) / 2**20 for name in ("used_memory", "maxmemory"))
        return f"{min(used, most):.0f} of {most:.0f} MB" if most else "it was at its limit"

    @overload
    def call(
        self, command: Callable[[redis.Redis], Any], /, *, on_outage: OnOutage = "raise"
    ) -> Any: ...
    @overload
    def call(self, *scripts: Call, on_outage: OnOutage = "raise") -> list[Any]: ...
    def call(self, *calls: Any, on_outage: OnOutage = "raise") -> Any:
        """Run scripts in one round trip and return their answers, or run one plain command.

        A command gets the client and may run more than once, so it must be idempotent.  A script
        that the server does not know (restart, SCRIPT FLUSH) is sent whole, once.  During an outage
        the caller chooses what happens; all of it ends in StoreUnavailable:

        ========  ==========================================  =====================================
        outage    effect                                      callers
        ========  ==========================================  =====================================
        raise     the first lost connection raises            clients, which retry in their own loop
        answer    as raise; further calls raise at once       breakers and other guards, which
                  until Redis is tried again, after a second  then decide alone
        patient   as answer, but Redis may be silent for      buckets, budgets and bulkheads: to
                  `limit_timeout_s`                           pass their limit may cost money
        wait      the call is repeated, with backoff, for     workers, which keep finished work
                  `patience_s` of this store
        ========  ==========================================  =====================================

        With ``answer`` and ``patient`` a call whose open connection is reset runs once more, so its
        script must bear that.

        A Redis that is full, a replica, or busy counts as an outage: see `refusal`.

        Raises StoreUnavailable, and redis-py's ResponseError for a command that is wrong.
        """
        if calls and callable(calls[0]):
            command: Callable[[redis.Redis], Any] = calls[0]
            return self._outcome(lambda: command(self.client), on_outage)
        return self._outcome(lambda: self._run(*calls), on_outage)

    def _outcome(self, attempt: Callable[[], Any], on_outage: OnOutage) -> Any:
        if on_outage in ("answer", "patient"):
            return self._answered(attempt, patient=on_outage == "patient")
        until, wait_s = self.clock() + self.patience_s, FIRST_WAIT_S
        while True:
            try:
                return _also_elsewhere(attempt)
            except (*LOST, ResponseError, StoreUnavailable) as error:
                if _is_wrong(error):
                    raise
                # No other worker can do this work while all are refused, so the caller stays.
                stays = refusal(error) and self.stays()
                if on_outage == "raise" or (self.clock() + wait_s > until and not stays):
                    if isinstance(error, StoreUnavailable):
                        raise
                    raise self.unavailable(error) from None
            self._sleep(wait_s * self.random.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, LONGEST_WAIT_S)

    @property
    def is_away(self) -> bool:
        """Whether guards decide alone: the connection was lost, or Redis is silent for long."""
        return self._away.is_set()

    def _answered(self, attempt: Callable[[], Any], *, patient: bool) -> Any:
        """Run an attempt and return its answer, or raise at once while Redis is away.

        An outage is logged once, and its end once; in between Redis is tried about once a second.
        """
        began = self.clock()
        if self._away.is_set():
            patient = False  # to look for its return takes no patience
            if self.clock() < self._away_until:
                raise self._why.error(self.url, "no answer a moment ago")
            # One caller tries Redis; other threads need not wait with it.
            self._away_until = self.clock() + BACK_OFF_S
        silence_s = self.limit_timeout_s if patient else self._timeout_s
        before, _listening.silence_s = _listening.silence_s, silence_s
        try:
            answers = _despite_reset(attempt)
        except (*LOST, ResponseError) as error:
            if _is_wrong(error):
                raise
            if isinstance(error, RedisTimeoutError) and self._bears(began, silence_s):
                raise self.unavailable(error) from None
            raise self._lost(error) from None
        finally:
            _listening.silence_s = before
        self._silences = 0
        if self._away.is_set():
            self._away.clear()
            self._back()
        return answers

    def _bears(self, began: float, silence_s: float) -> bool:
        """Count a call without an answer, and return whether Redis may still be busy only."""
        self._silent_since = self._silent_since if self._silences else began
        self._silences += 1
        if self._away.is_set() or silence_s >= self.limit_timeout_s:
            return False
        return self._silences < STEPS or self.clock() - self._silent_since < self.limit_timeout_s

    # --- decisions without Redis ---------------------------------------------------------------

    def decided_alone(self, kind: str) -> None:
        """Count a decision that a guard of a kind, such as ``bucket``, made without Redis."""
        self._alone[kind] += 1
        for tell in _on_alone:
            tell(kind)

    def _back(self) -> None:
        """Log the end of an outage, and add its decisions to the shared count."""
        alone, self._alone = self._alone, Counter()
        logger.warning(
            "Redis at %s answers again; state is shared again. Decided without it: %s",
            self.url,
            ", ".join(f"{kind} {count}" for kind, count in sorted(alone.items())) or "nothing",
        )
        if not alone:
            return
        counts = [part for each in alone.items() for part in each]
        try:
            self._run(Call(_ADD_ALONE, (self._alone_keys,), counts))
        except RedisError:
            self._alone.update(alone)  # the next return tells them

    def alone(self) -> tuple[Mapping[str, int], float]:
        """Return kind of guard -> its decisions without Redis of late, and the age of the last.

        They are those of all processes that Redis has answered again.  They are forgotten a day
        after the last one; the age is in seconds.  Raises StoreUnavailable.
        """
        [[age_ms, *parts]] = self.call(Call(_READ_ALONE, (self._alone_keys,), ()))
        kinds = [part.decode() for part in parts[::2]]
        return dict(zip(kinds, map(int, parts[1::2]), strict=True)), int(age_ms) / 1000

    def _run(self, *calls: Call) -> list[Any]:
        """Run scripts in one round trip and return their answers.

        Raises the first error; a lost connection raises redis-py's error.
        """
        answers = self._pipelined(calls, by_sha=True)
        missing = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if missing:
            for at, answer in zip(
                missing, self._pipelined([calls[i] for i in missing], by_sha=False), strict=True
            ):
                answers[at] = answer
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise answer
        return answers

    def _lost(self, error: Exception) -> StoreUnavailable:
        self._away_until = self.clock() + BACK_OFF_S * self.random.uniform(1.0, 1.5)
        unavailable, self._why = self.unavailable(error), outage_of(error)
        if not self._away.is_set():
            self._away.set()
            logger.log(
                logging.INFO if refusal(error) and self.is_quiet else logging.WARNING,
                "%s. Until then, breakers, buckets and bulkheads of this process decide alone",
                unavailable,
            )
        return unavailable

    def _pipelined(self, calls: Sequence[Call], *, by_sha: bool) -> list[Any]:
        commands = [
            (
                *(("EVALSHA", call.script.sha) if by_sha else ("EVAL", call.script.text)),
                len(call.keys),
                *call.keys,
                *call.args,
            )
            for call in calls
        ]
        if len(commands) == 1:  # a pipeline of one costs 9 us more
            try:
                return [self.client.execute_command(*commands[0])]  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
            except ResponseError as error:
                return [error]
        pipe = self.client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)  # type: ignore[no-untyped-call]
        return pipe.execute(raise_on_error=False)


_ADD_ALONE, _READ_ALONE = (Script.load("resilience", f"alone_{verb}") for verb in ("add", "read"))


@functools.cache
def default_store() -> Store:
    """Return the store of this process's guards, at the URL in ``RLM_REDIS_URL``."""
    return guard_store(store_settings())


def guard_store(settings: StoreSettings) -> Store:
    """Return a store for guards, with the address, namespace and timeout of the settings."""
    return Store.from_url(
        settings.address,
        namespace=settings.namespace,
        timeout_s=settings.guard_timeout_s,
        limit_timeout_s=settings.limit_timeout_s,
    )
