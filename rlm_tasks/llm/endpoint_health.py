"""Which endpoints are well, as all workers see it.

Decides after how many strikes an endpoint gets no calls, and for how long such word is believed;
refuses to know who asks endpoints how they are."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Store
from rlm_tasks.settings.environment import key_of
from rlm_tasks.settings.llm import LlmSettings

READ_EVERY_S = 1.0
BELIEVED = 3
"""Word of an endpoint is believed for so many intervals of its checks."""


@dataclass(frozen=True, slots=True)
class Checkup:
    """How an endpoint was when it was asked last."""

    name: str
    at_ms: int  # by the server's clock
    latency_ms: float  # of an answer; 0: there was none
    strikes: int  # checks in a row that it did not pass
    why: str  # it did not pass


def configured(settings: LlmSettings) -> bool:
    """Whether this process knows an endpoint: one is named, or the key of the default one is
    set.
    """
    return bool(settings.endpoints) or any(
        key_of(each.key_env) for each in settings.endpoints_or_default
    )


class EndpointHealth:
    """The word of all endpoints."""

    def __init__(self, store: Store, settings: LlmSettings) -> None:
        self._store, self._keys, self._settings = store, Keys(store.namespace), settings
        self._ill: frozenset[str] = frozenset()
        self._read_at = -math.inf

    def ill(self) -> frozenset[str]:
        """Return the names of endpoints that get no calls, at most 1 s old; nobody while Redis is
        away.
        """
        now = self._store.clock()
        if now - self._read_at >= READ_EVERY_S:
            self._read_at = now
            try:
                self._ill = frozenset(each.name for each in self.checkups() if self.is_ill(each))
            except StoreUnavailable:
                self._ill = frozenset()
        return self._ill

    def is_ill(self, checkup: Checkup) -> bool:
        """Whether an endpoint gets no calls after this."""
        return checkup.strikes >= self._settings.health_strikes

    def checkups(self) -> list[Checkup]:
        """Return the latest word of each endpoint; what is too old is left out.  Raises
        StoreUnavailable.
        """
        found = self._store.call(lambda client: client.hvals(self._keys.endpoints()))
        oldest = (
            self._store.call(lambda _: self._store.now_ms())
            - BELIEVED * 1000 * self._settings.health_every_s
        )
        every = [Checkup(**json.loads(each)) for each in found]
        return sorted((each for each in every if each.at_ms >= oldest), key=lambda each: each.name)

    def tell(self, name: str, *, latency_s: float = 0.0, why: str = "") -> Checkup:
        """Note how an endpoint was: what it took to answer, or why it did not.  Raises
        StoreUnavailable.
        """
        before = next((each for each in self.checkups() if each.name == name), None)
        strikes = (before.strikes if before else 0) + 1 if why else 0
        now_ms = self._store.call(lambda _: self._store.now_ms())
        found = Checkup(
            name=name, at_ms=now_ms, latency_ms=latency_s * 1000, strikes=strikes, why=why
        )

        def write(client: Any) -> None:
            client.hset(self._keys.endpoints(), name, json.dumps(asdict(found)))
            client.pexpire(
                self._keys.endpoints(), int(BELIEVED * 1000 * self._settings.health_every_s)
            )

        self._store.call(write)
        return found
