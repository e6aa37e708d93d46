"""The state of breakers: shared in Redis, and kept by each process while Redis is away.

`CircuitBreaker` calls it; begin with `SharedStorage.admit` and `SharedStorage.report`.

A process uses the state of a closed breaker for a quarter of a second without asking Redis.  Then
it reads all its breakers in one round trip.  Failures, probes and openings are one script each.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psutil
import pybreaker
from pydantic import Field, model_validator

from resilience.bulkhead import IN_LINE
from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.settings import store_settings
from resilience.store import Argument, Call, Script, Store
from resilience.validation import Seconds

logger = logging.getLogger(__name__)

CLOSED, OPEN, HALF_OPEN = pybreaker.STATE_CLOSED, pybreaker.STATE_OPEN, pybreaker.STATE_HALF_OPEN
FRESH_S = 0.25
"""A process uses the state of a breaker for this time before it reads it again."""
ASK_AGAIN_S = 0.1
"""A process that was refused a probe asks Redis again after this time, or at once for a waiter."""

_ADMIT, _REPORT, _LOOK, _SET = (
    Script.load("resilience", f"breaker_{verb}", prelude="breaker")
    for verb in ("admit", "report", "look", "set")
)


class BreakerConfig(Seconds):
    """The rules by which a breaker opens and closes.

    Names and defaults are those of other orchestrators.
    """

    failure_threshold: int = Field(default=5, ge=1, description="Failures in a row that open it.")
    recovery_timeout_s: float = Field(
        default=60.0, gt=0, description="Time for which it stays open before probes pass."
    )
    half_open_max_calls: int = Field(
        default=3, ge=1, description="Probes in flight at once, over all workers."
    )
    half_open_timeout_s: float = Field(
        default=30.0, gt=0, description="Lease of a probe; after it the place of the probe is free."
    )
    success_threshold: int = Field(default=3, ge=1, description="Successful probes that close it.")
    memory_threshold_mb: float | None = Field(
        default=None,
        gt=0,
        description="Open in a process whose resident memory is larger; None: never.",
    )
    failure_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of failed calls that opens it as well; None: no such rule.",
    )
    window_s: float = Field(default=30.0, gt=0, description="Window of time for the failure rate.")
    min_calls: int = Field(
        default=20,
        ge=1,
        description="Number of calls in the window from which the failure rate counts.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_timeout_seconds(cls, fields: Any) -> Any:
        """Accept ``timeout_seconds``, another name of the recovery timeout."""
        if not isinstance(fields, dict):
            return fields
        return cls.renamed(fields, "timeout_seconds", "recovery_timeout_s")


CircuitBreakerConfig = BreakerConfig
"""The name that other orchestrators use."""

PRESETS = {
    "default": BreakerConfig(memory_threshold_mb=2048),
    "client": BreakerConfig(failure_threshold=5, recovery_timeout_s=30, half_open_max_calls=3),
    "executor": BreakerConfig(failure_threshold=10, recovery_timeout_s=60),
    "realtime": BreakerConfig(failure_threshold=3, recovery_timeout_s=30),
}
"""Named configurations, as other orchestrators have them."""


def configured(
    config: BreakerConfig | Mapping[str, Any] | str | None = None, **fields: Any
) -> BreakerConfig:
    """Return a configuration with some fields changed.

    `config` is a configuration, a dict of its fields, the name of a preset, or None for the
    default.  Raises InvalidValue for a name or a field that does not exist.
    """
    if isinstance(config, Mapping):
        return configured(None, **{**config, **fields})
    if isinstance(config, str) and config not in PRESETS:
        raise InvalidValue("preset", config, f"unknown; must be one of {', '.join(PRESETS)}")
    if config is not None and not isinstance(config, BreakerConfig | str):
        raise InvalidValue(
            "breaker", config, "must be a preset's name, a BreakerConfig or a dict of its fields"
        )
    base = config if isinstance(config, BreakerConfig) else PRESETS[config or "default"]
    if config is None:
        settings = store_settings().breakers.model_dump(
            include={"failure_threshold", "recovery_timeout_s"}, exclude_none=True
        )
        base = base.model_copy(update=settings)
    return BreakerConfig(
        **{**base.model_dump(), **BreakerConfig(**fields).model_dump(exclude_unset=True)}
    )


_NAMES = Script.load("resilience", "breaker_names")


@dataclass(frozen=True, slots=True)
class BreakerSnapshot:
    """The state of a breaker as this process knows it.  Times are of this process's clock."""

    state: str = CLOSED
    generation: str = "0"
    until: float = 0.0  # time until which it stays open
    failures: int = 0  # in a row
    successes: int = 0  # of probes since it became half-open
    last_failure_ms: int = 0  # by the server's clock; 0: none known
    read_at: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Admission:
    """The permission to make one call."""

    generation: str
    probe: str = ""  # the permit of a probe; '' for a closed breaker
    local: bool = False  # granted while Redis was away


@dataclass(frozen=True, slots=True)
class Refusal:
    """A denied call: the breaker's state, the seconds after which to retry, and the reason."""

    state: str
    retry_after_s: float
    why: str
    noted: bool = False  # the waiter stands in the line


@dataclass(frozen=True, slots=True)
class BreakerVerdict:
    """The answer of a script."""

    kind: str  # go, probe, no; kept, dropped, opened, closed; set
    wait_s: float = 0.0
    waiters: tuple[str, ...] = ()  # waiters to wake, taken out of the line


class _Group:
    """The breakers of one process on one store, which are read together in one round trip."""

    def __init__(self) -> None:
        self.members: weakref.WeakSet[SharedStorage] = weakref.WeakSet()
        self.not_before = float("-inf")  # no read before this time, because Redis was silent
        self.reading = threading.Lock()
        self.listing = threading.Lock()  # a set that grows while it is listed raises


_groups: weakref.WeakKeyDictionary[Store, _Group] = weakref.WeakKeyDictionary()


class LocalBreaker:
    """A breaker of this process alone, for the time while Redis is away."""

    def __init__(self, threshold: int, recovery_s: float, snapshot: BreakerSnapshot) -> None:
        self._threshold, self._recovery_s = threshold, recovery_s
        self.failures = snapshot.failures if snapshot.state == CLOSED else threshold
        self.until = snapshot.until if snapshot.state == OPEN else 0.0
        self._probing = False
        self._move()

    def _move(self) -> None:
        """Begin a generation; calls admitted in another one do not count in it."""
        self._generation = secrets.token_hex(4)

    @property
    def state(self) -> str:
        """Closed, open, or half-open while a probe runs."""
        if self.failures < self._threshold:
            return CLOSED
        return HALF_OPEN if self._probing else OPEN

    def admit(self, now: float) -> Admission | Refusal:
        """Admit a call; of an open breaker, one probe at a time after the recovery timeout."""
        if self.state == CLOSED:
            return Admission(self._generation, local=True)
        if now < self.until or self._probing:
            return Refusal(
                self.state,
                max(self.until - now, ASK_AGAIN_S),
                f"its circuit is {self.state} here, and Redis is away",
            )
        self._probing = True
        return Admission(self._generation, local=True)

    def report(self, outcome: str, now: float, generation: str = "") -> None:
        """Count a failure; one success closes the breaker.

        A call without a generation was admitted before Redis was lost.
        """
        was_open = self.failures >= self._threshold
        if generation != self._generation if generation else was_open:
            return
        self._probing = False
        if outcome == "failed":
            self.failures += 1
        elif outcome == "ok":
            self.failures = 0
        if self.failures >= self._threshold and outcome == "failed":
            self.until = now + self._recovery_s
            self._move()
        elif was_open and not self.failures:
            self._move()


class SharedStorage(pybreaker.CircuitBreakerStorage):
    """The state of one breaker in Redis.

    For pybreaker it is read-only.  Only scripts change the state, so that no reader resets a
    counter.
    """

    def __init__(
        self, name: str, store: Store, config: BreakerConfig, memory_mb: Callable[[], float]
    ) -> None:
        super().__init__(name)
        self._store, self._config, self._clock = store, config, store.clock
        keys = Keys(store.namespace)
        self._keys = (*keys.breaker(name), keys.breakers)
        self._rules = json.dumps(
            {
                "failures": config.failure_threshold,
                "recovery_ms": int(config.recovery_timeout_s * 1000),
                "probes": config.half_open_max_calls,
                "lease_ms": int(config.half_open_timeout_s * 1000),
                "successes": config.success_threshold,
                "window_ms": int(config.window_s * 1000),
                "rate": config.failure_rate or 0,
                "calls": config.min_calls,
            }
        )
        self.snapshot = BreakerSnapshot()
        self._local: LocalBreaker | None = None
        self._unreported = 0
        self._refused_until = 0.0
        self._memory_mb, self._measure_at, self._too_large_until = memory_mb, float("-inf"), 0.0
        self._group = _groups.setdefault(store, _Group())
        with self._group.listing:
            self._group.members.add(self)

    # --- reading -------------------------------------------------------------------------------

    def fresh(self) -> BreakerSnapshot:
        """Return the snapshot.  If it is too old, read it and all others of this process first."""
        now = self._clock()
        is_due = now - self.snapshot.read_at > FRESH_S and now >= self._group.not_before
        if is_due and self._group.reading.acquire(blocking=False):
            try:
                self._read_all()
            finally:
                self._group.reading.release()
        return self.snapshot

    def _read_all(self) -> None:
        with self._group.listing:
            storages = list(self._group.members)
        try:
            # A breaker whose state was never read has none to go on with.
            is_new = any(each.snapshot.read_at < 0 for each in storages)
            answers = self._store.call(
                *(each.look() for each in storages), on_outage="patient" if is_new else "answer"
            )
        except StoreUnavailable:
            if not self._store.is_away:  # a busy server, so the state is used a little longer
                self._group.not_before = self._clock() + FRESH_S
                return
            for each in storages:
                each.cut_off()
            return
        for each, answer in zip(storages, answers, strict=True):
            each.absorb(answer)

    def look(self) -> Call:
        """Return the call that reads this breaker, and adds the successes counted here since."""
        unreported, self._unreported = self._unreported, 0
        return self._call(_LOOK, unreported, self.snapshot.generation)

    def absorb(self, answer: list[bytes | int]) -> BreakerVerdict:
        """Store the state in a script's answer as the snapshot, and return the rest."""
        verdict, state, generation, open_ms, failures, successes, at, wait_ms, *woken = answer
        now = self._clock()
        if _text(generation) != self.snapshot.generation:
            self._unreported = 0
        self.snapshot = BreakerSnapshot(
            state=_text(state),
            generation=_text(generation),
            until=now + int(open_ms) / 1000,
            failures=int(failures),
            successes=int(successes),
            last_failure_ms=int(at),
            read_at=now,
        )
        self._local = None
        return BreakerVerdict(
            _text(verdict), int(wait_ms) / 1000, tuple(_text(each) for each in woken)
        )

    def cut_off(self) -> LocalBreaker:
        """Return the breaker of this process alone, which begins with the last known state."""
        if self._local is None:
            self._local = LocalBreaker(
                self._config.failure_threshold, self._config.recovery_timeout_s, self.snapshot
            )
        return self._local

    def _call(self, script: Script, *args: Argument) -> Call:
        return Call(script, self._keys, (self._name, self._rules, *args))

    # --- deciding ------------------------------------------------------------------------------

    def standing(self) -> Refusal | None:
        """Return a refusal if no call would be made now, as far as this process knows, or None."""
        snapshot, now = self.fresh(), self._clock()
        if now < self._too_large_until:
            limit = self._config.memory_threshold_mb
            return Refusal(
                OPEN,
                self._too_large_until - now,
                f"this process uses more memory than memory_threshold_mb={limit:g}",
            )
        if self._local is not None:
            return (
                Refusal(OPEN, self._local.until - now, "its circuit is open")
                if now < self._local.until
                else None
            )
        until = max(snapshot.until if snapshot.state == OPEN else 0.0, self._refused_until)
        return (
            Refusal(snapshot.state, until - now, f"its circuit is {snapshot.state}")
            if now < until
            else None
        )

    def admit(self, waiter: str = "", urgency: int = 0) -> Admission | Refusal:
        """Return the permission for a call, or a refusal.

        A refused `waiter` joins the line, and is named when the breaker closes.
        """
        snapshot, now = self.fresh(), self._clock()
        self._check_memory(now)
        if snapshot.state == CLOSED and self._local is None and now >= self._too_large_until:
            return Admission(snapshot.generation)
        refusal = self.standing()
        if refusal is not None and (not waiter or now < self._too_large_until):
            return refusal
        if self._local is not None:
            self._store.decided_alone("breaker")
            return self._local.admit(now)
        permit = secrets.token_hex(8)
        try:
            [answer] = self._store.call(
                self._call(_ADMIT, permit, waiter, urgency), on_outage="patient"
            )
        except StoreUnavailable:
            self._store.decided_alone("breaker")
            return self.cut_off().admit(now)
        verdict = self.absorb(answer)
        if verdict.kind == "no":
            state = self.snapshot.state
            self._refused_until = now + ASK_AGAIN_S if state == HALF_OPEN else 0.0
            return Refusal(state, verdict.wait_s, f"its circuit is {state}", noted=bool(waiter))
        self._refused_until = 0.0
        return Admission(_text(answer[2]), permit if verdict.kind == "probe" else "")

    def report(self, admission: Admission, outcome: str) -> BreakerVerdict:
        """Report the end of an admitted call: ``ok``, ``failed`` or ``ignored``.

        A success that changes nothing costs no round trip.
        """
        if admission.local:
            # Once Redis is back, calls admitted without it do not count.
            if self._local is not None:
                self._local.report(outcome, self._clock(), admission.generation)
            return BreakerVerdict("kept")
        if (
            not admission.probe
            and outcome != "failed"
            and (outcome == "ignored" or not self.snapshot.failures)
        ):
            counts = (
                self._config.failure_rate is not None
                and admission.generation == self.snapshot.generation
            )
            self._unreported += outcome == "ok" and counts
            return BreakerVerdict("kept")
        try:
            [answer] = self._store.call(
                self._call(_REPORT, admission.probe, admission.generation, outcome),
                on_outage="patient",
            )
        except StoreUnavailable:
            self.cut_off().report(outcome, self._clock())
            return BreakerVerdict("kept")
        return self.absorb(answer)

    @property
    def line(self) -> str:
        """The key of the line of its waiters."""
        return self._keys[2]

    def waits(self, waiter: str) -> Call:
        """Return the call that answers whether a waiter still stands in the line."""
        return Call(IN_LINE, (self.line,), (waiter,))

    def put(self, state: str) -> BreakerVerdict:
        """Set the state of the breaker.  Raises StoreUnavailable."""
        [answer] = self._store.call(self._call(_SET, state), on_outage="patient")
        self._refused_until = self._too_large_until = 0.0
        return self.absorb(answer)

    def _check_memory(self, now: float) -> None:
        """Open the breaker in this process alone if the process uses too much memory."""
        limit = self._config.memory_threshold_mb
        if limit is None or now < max(self._measure_at, self._too_large_until):
            return
        self._measure_at = now + FRESH_S
        if (used := self._memory_mb()) > limit:
            self._too_large_until = now + self._config.recovery_timeout_s
            logger.warning(
                "Breaker %s opened in this process: it uses %.0f MB, the limit is %g",
                self._name,
                used,
                limit,
            )

    # --- attributes of pybreaker's storage ------------------------------------------------------

    @property  # type: ignore[misc]  # read-only on purpose
    def state(self) -> str:
        """The state as this process knows it, at most FRESH_S old."""
        snapshot = self.fresh()
        if self._clock() < self._too_large_until:
            return OPEN
        return self._local.state if self._local is not None else snapshot.state

    @property
    def counter(self) -> int:
        """Failures in a row."""
        return self._local.failures if self._local is not None else self.fresh().failures

    @property
    def success_counter(self) -> int:
        """Successes of probes since it became half-open."""
        return self.fresh().successes

    @property  # type: ignore[misc]  # read-only on purpose
    def opened_at(self) -> datetime | None:
        """The time at which it opened, or None while it is not open."""
        snapshot = self.fresh()
        opened = datetime.fromtimestamp(int(snapshot.generation) / 1_000_000, UTC)
        return opened if snapshot.state == OPEN else None


def names_of(store: Store) -> Call:
    """Return the call that answers the names of all breakers changed lately."""
    return Call(_NAMES, (Keys(store.namespace).breakers,), ())


def resident_mb() -> float:
    """Return the resident memory of this process in MB."""
    return float(psutil.Process().memory_info().rss) / 2**20


def _text(value: bytes | int) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
