"""One connection to Redis per process, and scripts that run in one round trip.

Every part of the platform calls Redis through `Store.call`; begin there, with its table of outages.
Timeouts are short, and redis-py does not retry by itself: it would run a script twice after a
timeout.  Guards that decide without Redis count it with `Store.decided_alone`.  `connections` has
the classes of its connections.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Any, Generic, Literal, TypeVar, overload

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from resilience.address import Address
from resilience.address import masked as masked
from resilience.connections import (
    LOST,
    STEPS,
    WatchfulConnection,
    despite_reset,
    is_wrong,
    listening,
    outage_of,
    refusal,
    told,
    unreadable,
)
from resilience.errors import OUTAGES, StoreUnavailable
from resilience.keys import Keys
from resilience.settings import StoreSettings, store_settings
from resilience.validation import tell_unreadable

logger = logging.getLogger(__name__)

BACK_OFF_S = 1.0
"""In an outage guards try Redis again after this time, plus up to half of it at random."""
MAX_CONNECTIONS = 64
"""The connections of one process to one server; further threads wait for a free one."""
_USES_CLOCK = "-- uses: clock\n"

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 1.0
"""A call with ``on_outage="wait"`` is repeated after the first wait; each further wait is twice as
long, up to the longest.
"""

T = TypeVar("T")
Argument = str | int | float | bytes
OnOutage = Literal["raise", "answer", "patient", "wait"]

_on_alone: list[Callable[[str], None]] = []


def on_alone(tell: Callable[[str], None]) -> None:
    """Call a function with the kind of each guard of this process that decides without Redis."""
    if tell not in _on_alone:
        _on_alone.append(tell)


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
    """One run of a script.  Several calls passed to `Store.call` share a round trip.

    With `otherwise`, this is the answer when a record cannot be read, and the fault is logged once.
    So a damaged statistic costs no work.
    """

    script: Script
    keys: Sequence[str]
    args: Sequence[Argument]
    otherwise: Any = ...  # an ellipsis: there is no other answer


@dataclass(frozen=True, slots=True)
class Exchange(Generic[T]):
    """A call of a guard, with the meaning of its answer.  See `together`."""

    call: Call
    answered: Callable[[Any], T]
    """Returns the guard's result for an answer."""
    alone: Callable[[], T]
    """Returns the result that the guard chooses without an answer."""


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
        self.address = where if isinstance(where, Address) else Address(where)
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
            WatchfulConnection,
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
            despite_reset(self.client.ping)
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
        raise     the second lost connection raises           clients, which retry in their own loop
        answer    as raise; further calls raise at once       breakers and other guards, which
                  until Redis is tried again, after a second  then decide alone
        patient   as answer, but Redis may be silent for      buckets, budgets and bulkheads: to
                  `limit_timeout_s`                           pass their limit may cost money
        wait      the call is repeated, with backoff, for     workers, which keep finished work
                  `patience_s` of this store
        ========  ==========================================  =====================================

        A call whose open connection is reset, or forgotten by the network, runs once more, so its
        script must bear that.

        A Redis that is full, a replica, or busy counts as an outage: see `refusal`.  A record that
        a call cannot use raises RecordUnreadable, which is a ResponseError of redis-py as well.
        For ``answer`` and ``patient`` it is an outage of this call alone, so guards decide alone.

        Raises StoreUnavailable.
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
                return despite_reset(attempt)
            except (*LOST, ResponseError, StoreUnavailable) as error:
                if is_wrong(error):
                    raise unreadable(self.url, error) from None
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
        before, listening.silence_s = listening.silence_s, silence_s
        try:
            answers = despite_reset(attempt)
        except (*LOST, ResponseError) as error:
            if is_wrong(error):
                tell_unreadable("the record of a guard or a statistic", told(error))
                raise OUTAGES["DAMAGED"].error(self.url, told(error)) from None
            if isinstance(error, RedisTimeoutError) and self._bears(began, silence_s):
                raise self.unavailable(error) from None
            raise self._lost(error) from None
        finally:
            listening.silence_s = before
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

        Raises the first error of a call without another answer; a lost connection raises redis-py's
        error.
        """
        answers = self._pipelined(calls, by_sha=True)
        missing = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if missing:
            for at, answer in zip(
                missing, self._pipelined([calls[i] for i in missing], by_sha=False), strict=True
            ):
                answers[at] = answer
        for at, answer in enumerate(answers):
            if isinstance(answer, ResponseError):
                if calls[at].otherwise is ... or not is_wrong(answer):
                    raise answer
                tell_unreadable(" ".join(("one of the records", *calls[at].keys)), told(answer))
                answers[at] = calls[at].otherwise
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


def together(store: Store, *asked: Call | Exchange[Any]) -> list[Any]:
    """Make calls in one round trip; return the answers of plain calls and the results of guards.

    While Redis is away each guard decides alone, and the answer of a plain call is None.  The same
    holds for a call whose own record is damaged.
    """
    if not asked:
        return []
    exchanges = [each if isinstance(each, Exchange) else _plain(each) for each in asked]
    calls = [dataclasses.replace(each.call, otherwise=None) for each in exchanges]
    try:
        answers = store.call(*calls, on_outage="patient")
    except StoreUnavailable:
        answers = [None] * len(calls)
    return [
        each.alone() if answer is None else each.answered(answer)
        for each, answer in zip(exchanges, answers, strict=True)
    ]


def _plain(call: Call) -> Exchange[Any]:
    return Exchange(call, lambda answer: answer, lambda: None)


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
