"""The health of endpoints, shared by all workers in Redis.

`endpoint_checks` records the results of checks; `endpoint_pool` and plans read which endpoints get
no calls.  An endpoint is unhealthy after some failed checks in a row, until a check succeeds.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from resilience.validation import readable
from rlm_tasks.settings.environment import key_of
from rlm_tasks.settings.llm import LlmSettings

READ_EVERY_S = 1.0
_ANSWERED = Script.load("rlm_tasks.llm", "answered")
VALID_INTERVALS = 3
"""A result is valid for this many intervals of checks."""


@dataclass(frozen=True, slots=True)
class Checkup:
    """The latest check of an endpoint."""

    name: str
    at_ms: int  # by the server's clock
    latency_ms: float  # time of its answer; 0: it did not answer
    strikes: int  # failed checks in a row
    why: str  # the cause of the failure, or what it says of the key; '' if it passed


def configured(settings: LlmSettings) -> bool:
    """Return whether endpoints are set, or the key of the default endpoint."""
    return bool(settings.endpoints) or any(
        key_of(each.key_env) for each in settings.endpoints_or_default
    )


class EndpointHealth:
    """The results of checks of all endpoints."""

    def __init__(self, store: Store, settings: LlmSettings) -> None:
        self._store, self._settings = store, settings
        self._checks, self._answers, _ = Keys(store.namespace).endpoints()
        self._told: dict[str, float] = {}  # endpoint -> time at which an answer was recorded
        self._unhealthy: frozenset[str] = frozenset()
        self._read_at = -math.inf

    def unhealthy(self) -> frozenset[str]:
        """Return the names of endpoints that get no calls, at most 1 s old.

        It is empty while Redis is away.
        """
        now = self._store.clock()
        if now - self._read_at >= READ_EVERY_S:
            self._read_at = now
            try:
                self._unhealthy = frozenset(
                    each.name for each in self.checkups() if self.is_unhealthy(each)
                )
            except StoreUnavailable:
                self._unhealthy = frozenset()
        return self._unhealthy

    def is_unhealthy(self, checkup: Checkup) -> bool:
        """Return whether an endpoint gets no calls after this check.

        An answer to a call within the last interval counts more than failed checks.  Raises
        StoreUnavailable.
        """
        if checkup.strikes < self._settings.health_strikes:
            return False
        answered = self._store.call(lambda client: client.hget(self._answers, checkup.name))
        now_ms = self._store.call(lambda _: self._store.now_ms())
        return bool(now_ms - int(answered or 0) > 1000 * self._settings.health_every_s)

    def answered(self, name: str) -> list[Call]:
        """Return the call that records an answer to a call, to share a round trip with others.

        A process records one in a quarter of the interval, and returns no call in between.
        """
        now = self._store.clock()
        if now - self._told.get(name, -math.inf) < self._settings.health_every_s / 4:
            return []
        self._told[name] = now
        keep_ms = int(VALID_INTERVALS * 1000 * self._settings.health_every_s)
        return [Call(_ANSWERED, (self._answers,), (name, keep_ms), otherwise=None)]

    def checkups(self) -> list[Checkup]:
        """Return the latest check of each endpoint, without those that are too old.

        Raises StoreUnavailable.
        """
        stored = self._store.call(lambda client: client.hvals(self._checks))
        oldest = (
            self._store.call(lambda _: self._store.now_ms())
            - VALID_INTERVALS * 1000 * self._settings.health_every_s
        )
        every = readable("a check of an endpoint", stored, lambda each: Checkup(**json.loads(each)))
        return sorted((each for each in every if each.at_ms >= oldest), key=lambda each: each.name)

    def record(
        self, name: str, *, latency_s: float = 0.0, why: str = "", failed: bool = False
    ) -> Checkup:
        """Store a check: the time of its answer, or the cause of its failure.

        Raises StoreUnavailable.
        """
        before = next((each for each in self.checkups() if each.name == name), None)
        strikes = (before.strikes if before else 0) + 1 if failed else 0
        now_ms = self._store.call(lambda _: self._store.now_ms())
        checkup = Checkup(
            name=name, at_ms=now_ms, latency_ms=latency_s * 1000, strikes=strikes, why=why
        )

        def write(client: Any) -> None:
            client.hset(self._checks, name, json.dumps(asdict(checkup)))
            client.pexpire(
                self._checks, int(VALID_INTERVALS * 1000 * self._settings.health_every_s)
            )

        self._store.call(write)
        return checkup
