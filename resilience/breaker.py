"""Circuit breakers that all workers share, with pybreaker's names, listeners and exceptions.

Users decorate functions with `with_circuit_breaker`; the engine uses `CircuitBreaker.admit` and
`ended`.  Begin with `CircuitBreaker`.  `breaker_storage` keeps the shared state.

It differs from pybreaker's breaker in three ways:

- it holds no lock while the called code runs;
- the call that opens it raises its own error;
- an excluded exception is neither a failure nor a success.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import pybreaker

from resilience.breaker_storage import (
    CLOSED,
    HALF_OPEN,
    OPEN,
    Admission,
    BreakerConfig,
    Refusal,
    SharedStorage,
    configured,
    names_of,
    resident_mb,
)
from resilience.bulkhead import Ended, Wake, call_guarded, call_up, guarded, report_end
from resilience.errors import Category, Denied, name_of, refuse_unless_name
from resilience.faults import classify
from resilience.settings import store_settings
from resilience.store import Call, Store, default_store

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Excluded = type[BaseException] | Callable[[BaseException], bool]


class CircuitOpen(Denied, pybreaker.CircuitBreakerError):
    """A call was not made, because the breaker of its service is open.

    It may be repeated after `retry_after_s` seconds.
    """

    code = "CIRCUIT_OPEN"
    category = Category.CIRCUIT_OPEN
    when = "The service failed several times in a row."
    remedy = "Try again after `retry_after_s` seconds; repair the service."


class State(str):
    """``closed``, ``open`` or ``half-open``, as a text with the `name` that pybreaker's listeners
    read.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """The state as a plain text."""
        return str(self)


def _wake_none(_waiters: Sequence[str]) -> None:
    """Wake no waiter: outside of the engine no node waits for a breaker."""


class CircuitBreaker(pybreaker.CircuitBreaker):
    """The breaker of one service.

    The same name on the same store means the same breaker, in every process of every host.  Without
    a `store` it uses that of ``RLM_REDIS_URL``.

    A `config` may be the name of a preset: ``default``, ``client``, ``executor``, ``realtime``.
    In `exclude` are exception types, and functions that return whether an exception is excluded.
    """

    def __init__(
        self,
        name: str,
        store: Store | None = None,
        config: BreakerConfig | str | None = None,
        *,
        listeners: Sequence[pybreaker.CircuitBreakerListener] = (),
        exclude: Iterable[Excluded] = (),
        wake: Wake = _wake_none,
        memory_mb: Callable[[], float] = resident_mb,
    ) -> None:
        refuse_unless_name("name", name)
        self.config = configured(config)
        self._store = store or default_store()
        self._storage = SharedStorage(name, self._store, self.config, memory_mb)
        self._wake, self._seen = wake, State(CLOSED)
        super().__init__(
            self.config.failure_threshold,
            self.config.recovery_timeout_s,
            self.config.success_threshold,
            exclude=exclude,
            listeners=list(listeners),
            # Replaced below: construction must not ask Redis.
            state_storage=pybreaker.CircuitMemoryStorage(CLOSED),
            name=name,
            throw_new_error_on_trip=False,
        )
        self._state_storage = self._storage

    # --- reading -------------------------------------------------------------------------------

    @property  # type: ignore[misc]  # read-only
    def state(self) -> State:  # type: ignore[override]  # a name, where pybreaker has an object with behaviour
        """``closed``, ``open`` or ``half-open``, at most a quarter of a second old (FRESH_S)."""
        return self._notice(self._storage.state)

    @property
    def failure_count(self) -> int:
        """Failures in a row, over all workers."""
        return self._storage.counter

    @property
    def last_failure_time(self) -> float | None:
        """Time of the last failure in seconds since 1970 of the server's clock, or None."""
        at = self._storage.fresh().last_failure_ms
        return at / 1000 if at else None

    def can_execute(self) -> tuple[bool, str]:
        """Return whether a call would be made now, and the reason if not.  It takes no probe."""
        refusal = self._storage.standing()
        return (True, "") if refusal is None else (False, str(self._open(refusal)))

    def status(self) -> dict[str, Any]:
        """Return ``state``, ``failure_count``, ``last_failure_time`` (seconds since 1970, or None)
        and ``retry_after_s``.
        """
        refusal = self._storage.standing()
        return {
            "state": str(self.state),
            "failure_count": self.failure_count,
            "last_failure_time": self.last_failure_time,
            "retry_after_s": refusal.retry_after_s if refusal else 0.0,
        }

    def _open(self, refusal: Refusal) -> CircuitOpen:
        return CircuitOpen(
            f"breaker {self.name}", refusal.retry_after_s, refusal.why, noted=refusal.noted
        )

    # --- calling -------------------------------------------------------------------------------

    def admit(self, waiter: str = "", urgency: int = 0) -> Admission:
        """Return the admission of one call; pass it to `ended` after the call.

        A refused `waiter` joins the line by its urgency (0 is the most urgent), and is passed to
        `wake` when the breaker closes.  Raises CircuitOpen.
        """
        answer = self._storage.admit(waiter, urgency)
        if isinstance(answer, Refusal):
            self._notice(answer.state)
            raise self._open(answer)
        return answer

    def ended(self, admission: Admission, error: BaseException | None = None) -> None:
        """Report the end of an admitted call, with its error if it failed."""
        outcome = "ok" if error is None else "failed" if self.is_system_error(error) else "ignored"
        verdict = self._storage.report(admission, outcome)
        if verdict.kind == "opened":
            logger.warning(
                "Breaker %s opened for %g s: %s",
                self.name,
                self.config.recovery_timeout_s,
                name_of(error) if error else "",
            )
        elif verdict.kind == "closed":
            logger.warning("Breaker %s closed: its service answers again", self.name)
        call_up(self._store, self._storage.line, self._wake, verdict.waiters)
        for listener in self._listeners if outcome != "ignored" else ():
            listener.success(self) if error is None else listener.failure(self, error)
        if self._listeners:
            self._notice(self._storage.state)

    def waits(self, waiter: str) -> Call:
        """Return the call that answers whether a waiter still stands in the line."""
        return self._storage.waits(waiter)

    def withdraw(self, admission: Admission) -> None:
        """Give back an admission that was not used."""
        verdict = self._storage.report(admission, "ignored")
        call_up(self._store, self._storage.line, self._wake, verdict.waiters)

    def is_system_error(self, exception: BaseException) -> bool:
        """Return whether an exception counts as a failure of the service.

        Excluded exceptions, a 429, a 4xx and control flow do not count.
        """
        for exclusion in self._excluded_exceptions:
            is_type = isinstance(exclusion, type)
            if isinstance(exception, exclusion) if is_type else exclusion(exception):  # type: ignore[arg-type]
                return False
        fault = classify(exception)
        return fault.trips and not fault.ignored

    @contextmanager
    def calling(self) -> Generator[None, None, None]:
        """Guard a block of code.  Raises CircuitOpen."""
        admission = self.admit()
        try:
            yield
        except BaseException as error:
            self.ended(admission, error)
            raise
        self.ended(admission)

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function and return its value.  Raises its error, or CircuitOpen before it.

        The call of a generator or an awaitable lasts until that has ended.
        """
        return call_guarded(self._begin, func, args, kwargs)  # type: ignore[no-any-return]

    async def call_async(
        self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await a coroutine function and return its value.

        Raises its error, or CircuitOpen before it.
        """
        ended = self._begin(func, args, kwargs)
        try:
            value = await func(*args, **kwargs)
        except BaseException as error:
            report_end(ended, error)
            raise
        ended(None)
        return value

    execute = call
    """The same as `call`."""

    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[override]  # no Tornado
        """Decorate a function, a coroutine function or a generator.

        A generator is admitted when its first item is asked for.  An error that leaves it is a
        failure; a generator that is closed early has succeeded.
        """
        return guarded(func, self._begin)

    def _begin(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Ended:
        admission = self.admit()
        for listener in self._listeners:
            listener.before_call(self, func, *args, **kwargs)
        return functools.partial(self.ended, admission)

    # --- by hand -------------------------------------------------------------------------------

    def open(self) -> bool:
        """Open it for the recovery timeout.  Raises StoreUnavailable."""
        self._put(OPEN)
        return False

    def half_open(self) -> None:
        """Let probes pass.  Raises StoreUnavailable."""
        self._put(HALF_OPEN)

    def close(self) -> None:
        """Close it and forget its failures.  Raises StoreUnavailable."""
        self._put(CLOSED)

    reset = close
    """The same as `close`."""

    def _put(self, state: str) -> None:
        verdict = self._storage.put(state)
        logger.warning("Breaker %s was set to %s by hand", self.name, state)
        self._notice(state)
        call_up(self._store, self._storage.line, self._wake, verdict.waiters)

    def _notice(self, state: str) -> State:
        """Report a change of state to listeners, also one that another process made."""
        current = State(state)
        if current != self._seen:
            before, self._seen = self._seen, current
            for listener in self._listeners:
                listener.state_change(self, before, current)  # type: ignore[arg-type]  # they read its name
        return current


class CircuitBreakers:
    """All breakers of one store by name: those of this process, and those that others changed."""

    def __init__(self, store: Store | None = None, *, wake: Wake = _wake_none) -> None:
        self._given, self._wake = store, wake
        self._known: dict[str, CircuitBreaker] = {}

    @property
    def _store(self) -> Store:
        return self._given or default_store()

    def get(
        self, name: str, config: BreakerConfig | str | None = None, **fields: Any
    ) -> CircuitBreaker:
        """Return the breaker of a name.

        The first call in this process for a name sets its configuration.  Raises InvalidValue.
        """
        refuse_unless_name("name", name)
        if name not in self._known:
            self._known[name] = CircuitBreaker(
                name, self._store, configured(config, **fields), wake=self._wake
            )
        return self._known[name]

    def names(self) -> list[str]:
        """Return the sorted names of the breakers used here, or changed lately by any process.

        Raises StoreUnavailable.
        """
        [changed] = self._store.call(names_of(self._store), on_outage="patient")
        return sorted({*self._known, *(name.decode() for name in changed)})

    def can_execute(self, name: str) -> tuple[bool, str]:
        """Return whether a call of a service would be made now, and the reason if not."""
        return self.get(name).can_execute()

    def reset(self, name: str | None = None) -> list[str]:
        """Close one breaker, or all, and return their names.  Raises StoreUnavailable."""
        chosen = self.names() if name is None else [name]
        for each in chosen:
            self.get(each).reset()
        return chosen

    def status(self) -> dict[str, dict[str, Any]]:
        """Return name -> `CircuitBreaker.status`.  Raises StoreUnavailable."""
        return {name: self.get(name).status() for name in self.names()}


def with_circuit_breaker(
    name: str,
    config: BreakerConfig | str | None = None,
    *,
    store: Store | None = None,
    **fields: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that guards functions and generators, also async ones, by a breaker.

    ``@with_circuit_breaker("agent-factory", failure_threshold=5)``: the fields are those of
    BreakerConfig.  Without a store it uses that of RLM_REDIS_URL.  Raises InvalidValue for a wrong
    name or field at once.
    """
    refuse_unless_name("name", name)
    effective = configured(config, **fields)

    @functools.cache
    def breaker() -> CircuitBreaker:
        return CircuitBreaker(name, store, effective)

    def begin(*call: Any) -> Ended:
        return breaker()._begin(*call)

    return lambda func: guarded(func, begin) if store_settings().breakers.enabled else func
