"""One connection to Redis per process, and scripts that run in one round trip.

Every part of the platform calls Redis through `Store.call`; begin there, with its table of outages.
Timeouts are short, and redis-py does not retry by itself: it would run a script twice after a
timeout.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Any, Literal, overload

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from resilience.address import Address, is_untrusted
from resilience.errors import StoreUnavailable, StoreUntrusted
from resilience.settings import StoreSettings, store_settings

logger = logging.getLogger(__name__)

LOST = (RedisConnectionError, RedisTimeoutError)
BACK_OFF_S = 1.0
"""In an outage guards try Redis again after this time, plus up to half of it at random."""
_UNABLE = ("READONLY", "OOM", "MISCONF", "NOREPLICAS", "CLUSTERDOWN", "MASTERDOWN")
"""First words of errors from a Redis that answers but cannot write.  A script's own errors begin
differently.
"""
_USES_CLOCK = "-- uses: clock\n"
_PASSWORD = re.compile(r"(://[^:@/\s]*:)\S*@|([?&]\w*password=)[^&\s]*")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 1.0
"""A call with ``on_outage="wait"`` is repeated after the first wait; each further wait is twice as
long, up to the longest.
"""

Argument = str | int | float | bytes
OnOutage = Literal["raise", "answer", "wait"]


def masked(url: str) -> str:
    """Return the URL with its password replaced, fit for messages and logs."""
    return _PASSWORD.sub(lambda match: f"{match[1]}***@" if match[1] else f"{match[2]}***", url)


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
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
        patience_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout_s` is the longest time that Redis may take for an answer.

        A call with ``on_outage="wait"`` is repeated for `patience_s`.
        """
        self.address = Address(where) if isinstance(where, str) else where
        self.url, self.namespace, self.clock = masked(self.address.url), namespace, clock
        self.random = random or Random()
        self.patience_s, self._sleep = patience_s, sleep
        self._timeout_s = timeout_s
        self._client, self._given, self._pid = client, client is not None, os.getpid()
        self._away_until, self._away = 0.0, threading.Event()

    @classmethod
    def from_url(
        cls, url: str | Address, *, namespace: str = "rlm", timeout_s: float = 0.1
    ) -> Store:
        """Return a store for guards: a Redis that takes longer than `timeout_s` counts as away.

        Nothing connects before the first call.
        """
        return cls(url, namespace=namespace, timeout_s=timeout_s)

    @property
    def client(self) -> redis.Redis:
        """The connection pool of this process."""
        if self._client is None or (self._pid != os.getpid() and not self._given):
            self._client, self._pid = self._connect(), os.getpid()
        return self._client

    def _connect(self) -> redis.Redis:
        return self.address.client(
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
            raise self.unavailable(error) from None

    def now_ms(self) -> int:
        """Return the server's time in ms since 1970.  All times of jobs come from this clock."""
        seconds, micros = self.client.time()
        return seconds * 1000 + micros // 1000

    def unavailable(self, error: Exception) -> StoreUnavailable:
        """Return the error a user sees for a lost or refused connection."""
        kind = StoreUntrusted if is_untrusted(error) else StoreUnavailable
        return kind(self.url, f"{type(error).__name__}: {error}"[:200])

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
        the caller chooses what happens; all three end in StoreUnavailable:

        ========  ==========================================  =====================================
        outage    effect                                      callers
        ========  ==========================================  =====================================
        raise     the first lost connection raises            clients, which retry in their own loop
        answer    as raise; further calls raise at once       guards, which then decide alone
                  until Redis is tried again, after a second
        wait      the call is repeated, with backoff, for     workers, which keep finished work
                  `patience_s` of this store
        ========  ==========================================  =====================================

        Raises StoreUnavailable, and redis-py's ResponseError when the server refuses a command.
        """
        if calls and callable(calls[0]):
            command: Callable[[redis.Redis], Any] = calls[0]
            return self._outcome(lambda: command(self.client), on_outage)
        return self._outcome(lambda: self._run(*calls), on_outage)

    def _outcome(self, attempt: Callable[[], Any], on_outage: OnOutage) -> Any:
        if on_outage == "answer":
            return self._answered(attempt)
        until, wait_s = self.clock() + self.patience_s, FIRST_WAIT_S
        while True:
            try:
                return attempt()
            except (*LOST, StoreUnavailable) as error:
                if on_outage == "raise" or self.clock() + wait_s > until:
                    if isinstance(error, StoreUnavailable):
                        raise
                    raise self.unavailable(error) from None
            self._sleep(wait_s * self.random.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, LONGEST_WAIT_S)

    def _answered(self, attempt: Callable[[], Any]) -> Any:
        """Run an attempt and return its answer, or raise at once while Redis is away.

        An outage is logged once, and its end once; in between Redis is tried about once a second.
        """
        if self._away.is_set():
            if self.clock() < self._away_until:
                raise StoreUnavailable(self.url, "no answer a moment ago")
            # One caller tries Redis; other threads need not wait with it.
            self._away_until = self.clock() + BACK_OFF_S
        try:
            answers = attempt()
        except (*LOST, ResponseError) as error:
            if isinstance(error, ResponseError) and not str(error).startswith(_UNABLE):
                raise
            raise self._lost(error) from None
        if self._away.is_set():
            self._away.clear()
            logger.warning("Redis at %s answers again; state is shared again", self.url)
        return answers

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
        unavailable = self.unavailable(error)
        if not self._away.is_set():
            self._away.set()
            logger.warning(
                "%s. Until it does, breakers, buckets and bulkheads of this process decide alone",
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


@functools.cache
def default_store() -> Store:
    """Return the store of this process's guards, at the URL in ``RLM_REDIS_URL``."""
    return guard_store(store_settings())


def guard_store(settings: StoreSettings) -> Store:
    """Return a store for guards, with the address, namespace and timeout of the settings."""
    return Store.from_url(
        settings.address, namespace=settings.namespace, timeout_s=settings.guard_timeout_s
    )
