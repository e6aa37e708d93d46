"""Bulkheads: a limit on the calls of a service in flight, over all hosts and on each host.

The engine and users call it; begin with `Bulkhead.acquire`.  All workers share a bulkhead.

A permit has a lease, so the permits of a dead process become free.  The limit is fixed, follows the
service's answers (`Aimd`), or follows the demand (`Elastic`).  `guarded` decorates functions of
every kind, and `call_up` wakes nodes that wait in a guard's line, for breakers as well.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
import queue
import secrets
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from types import AsyncGeneratorType, GeneratorType
from typing import Any, ParamSpec, TypeVar

from resilience.errors import (
    BulkheadFull,
    Category,
    InvalidValue,
    NeverSatisfiable,
    StoreUnavailable,
    is_a,
    refuse_unless_name,
    refuse_unless_positive,
)
from resilience.faults import classify
from resilience.keys import Keys
from resilience.store import Argument, Call, Exchange, Script, Store, default_store, together

P = ParamSpec("P")
T = TypeVar("T")
Ended = Callable[[BaseException | None], None]
"""Reports the end of an admitted call, with its error if it failed."""
Begin = Callable[..., Ended]
"""Admits a call of a function with its arguments, or raises."""

LEASE_S = 60.0
"""Lease of a permit; the longest call that other orchestrators allow to a provider."""
ASK_AGAIN_S = 0.1
"""A process that was denied does not ask again for this time, unless one of its calls ends."""
POLL_S = 0.02
"""Longest time between two tries of a caller that waits for a permit."""
URGENCY = {"critical": 0, "high": 1, "normal": 2, "low": 3}
"""Priority -> urgency in a line; 0 is the most urgent, and goes first."""
Wake = Callable[[Sequence[str]], int | None]
"""Wakes waiters and returns how many of them still waited; None stands for all."""
_DROPS = frozenset({Category.TIMEOUT, Category.RATE_LIMITED, Category.TRANSIENT, Category.RESOURCE})
_TAKE, _RELEASE = (
    Script.load("resilience", f"bulkhead_{verb}", prelude="bulkhead")
    for verb in ("take", "release")
)
IN_LINE, _NEXT = Script.load("resilience", "in_line"), Script.load("resilience", "next_in_line")


@dataclass(frozen=True, slots=True)
class Aimd:
    """A limit that adapts to the capacity of a service, from `start` up to `most`.

    It grows by one for each round of successful calls, and falls by a tenth on timeouts, 429 and
    5xx.  A round is as many calls as the limit.

    With `slow_s` it also follows the time of calls, and finds the capacity within a few rounds:

    - It is multiplied by 2 to 8 for each round, while calls take no longer than with few in flight.
    - It grows by one, or a quarter, while they take longer, but less than `slow_s` seconds.
    - It is halved when they take longer, and more than `slow_s`.  So a queue in the service is kept
      short.
    - It is halved when more than a quarter of a round ends with a timeout, 429 or 5xx.  A tenth is
      enough if the other calls take more than `slow_s`.

    Set `slow_s` to about a quarter of the calls' time limit.
    """

    start: float = 20.0
    most: float = 200.0
    slow_s: float | None = None

    def __post_init__(self) -> None:
        _ordered("start", self.start, self.most)
        if self.slow_s is not None:
            refuse_unless_positive("slow_s", self.slow_s)


@dataclass(frozen=True, slots=True)
class Elastic:
    """A limit that grows from `base` up to `most` on demand.

    It shrinks to the base when the demand has been within the base for `shrink_after_s`.  A memory
    pool of 500 MB to 2 GB with a delay of 15 min is ``Elastic(500, 2048, 900)``.
    """

    base: float
    most: float
    shrink_after_s: float = 900.0

    def __post_init__(self) -> None:
        _ordered("base", self.base, self.most)
        refuse_unless_positive("shrink_after_s", self.shrink_after_s)


PRESETS = {"throughput": 20, "default": 10, "constrained": 5}
"""Named limits, as other orchestrators set them.  A limit of None adapts by itself: `Aimd`."""


def _ordered(name: str, least: float, most: float) -> None:
    refuse_unless_positive("most", most)
    refuse_unless_positive(name, least)
    if least > most:
        raise InvalidValue(name, least, f"must be above 0 and at most {most:g}")


class Permit:
    """The permission to have one call in flight; false if it was denied.

    Give it back with `release`.  A denied caller may retry after `wait_s` seconds; if the permit is
    `noted`, its waiter stands in the line.  A `local` permit was granted while Redis was away.
    """

    def __init__(
        self,
        bulkhead: Bulkhead,
        name: str,
        wait_s: float = 0.0,
        *,
        local: bool = False,
        noted: bool = False,
    ) -> None:
        self._bulkhead, self.name, self.wait_s, self.local = bulkhead, name, wait_s, local
        self.noted = noted

    def __bool__(self) -> bool:
        return bool(self.name)

    def release(self, error: BaseException | None = None) -> None:
        """Give the permit back, with the error of a failed call.  A second call does nothing."""
        together(self._bulkhead.store, *self.releasing(error))

    def withdraw(self) -> None:
        """Give back the permit of a call that was not made; an adaptive limit ignores it."""
        self.release(asyncio.CancelledError())

    def releasing(self, error: BaseException | None = None) -> list[Exchange[int]]:
        """Return what `release` asks of Redis, to share a round trip with others.

        It is empty for a permit that was denied, given back before, or `local`.
        """
        name, self.name = self.name, ""
        return self._bulkhead.returning(name, error, local=self.local) if name else []


class Bulkhead:
    """The calls of one service in flight.

    The same name on the same store means the same bulkhead, in every process.
    """

    def __init__(
        self,
        name: str,
        store: Store | None = None,
        *,
        limit: float | str | Aimd | Elastic | None = 50,
        per_host: float | None = 10,
        lease_s: float = LEASE_S,
        host: str = "",
        wake: Wake = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`limit` may be the name of a preset; None means ``Aimd()``.  `per_host` None means no
        limit by host.

        A permit that was not given back is free after `lease_s` seconds.  A host is the machine,
        unless the caller of `acquire` names something else to count by, such as an endpoint.
        Raises InvalidValue.
        """
        refuse_unless_name("name", name)
        self.name, self.store, self._lease_s = name, store or default_store(), lease_s
        moving = _moving(limit)
        for field, value in (
            ("limit", _base(moving)),
            ("per_host", per_host or 1),
            ("lease_s", lease_s),
        ):
            refuse_unless_positive(field, value)
        self._limit, self._per_host = moving, per_host or 0
        self.moves = isinstance(moving, Aimd | Elastic)  # its limit follows errors or the demand
        self._host, self._wake, self._sleep = _plain(host or os.uname().nodename), wake, sleep
        self._keys = Keys(self.store.namespace).bulkhead(name)
        self.limit = _base(moving)  # as last known
        self._full_until, self._spare = 0.0, 0.0  # see `is_known_full`
        self._held = 0  # by this process
        self._alone: int | None = None  # permits that it may hold while Redis is away

    @property
    def owner(self) -> str:
        """The name of this process as the owner of its permits."""
        return self.owner_of(os.getpid())

    def owner_of(self, pid: int) -> str:
        """Return the name of a process of this machine; `forget` gives its permits back when it
        has died.
        """
        return f"{self._host}:{pid}"

    # --- taking --------------------------------------------------------------------------------

    def acquire(
        self,
        *,
        max_wait_s: float = 0.0,
        weight: float = 1.0,
        host: str = "",
        waiter: str = "",
        urgency: int = 0,
    ) -> Permit:
        """Take a permit, waiting up to `max_wait_s` seconds for it.

        A denied permit is false; its `wait_s` is the time until the next lease ends.  A denied
        `waiter` joins the line by its urgency (0 is the most urgent), and is passed to `wake` when
        there is room.  Raises NeverSatisfiable for a weight above the limit.
        """
        if not isinstance(weight, Real) or not weight > 0:
            raise InvalidValue("weight", weight, "must be a number above 0")
        if weight > (most := min(capacity(self._limit), self._per_host or float("inf"))):
            raise NeverSatisfiable(f"bulkhead {self.name}", weight, most)
        until = self.store.clock() + max_wait_s
        while True:
            asked = self.taking(weight=weight, host=host, waiter=waiter, urgency=urgency)
            permit: Permit = together(self.store, asked)[0]
            if permit or self.store.clock() >= until:
                return permit
            self._sleep(POLL_S * self.store.random.uniform(0.5, 1.0))

    @property
    def is_known_full(self) -> bool:
        """Whether it denied a call of this process within 0.1 s, and none has ended here since.

        To ask it again would be in vain, most likely.
        """
        return self._spare <= 0 and self.store.clock() < self._full_until

    def waits(self, waiter: str) -> Call:
        """Return the call that answers whether a waiter still stands in the line."""
        return Call(IN_LINE, (self._keys[3],), (waiter,))

    def stands(self, waiter: str) -> bool:
        """Whether a waiter still stands in the line; true while Redis is away."""
        try:
            return bool(self.store.call(self.waits(waiter), on_outage="patient")[0])
        except StoreUnavailable:
            return True

    def full(self, permit: Permit) -> BulkheadFull:
        """Return the error for a denied permit."""
        return BulkheadFull(
            f"bulkhead {self.name}",
            permit.wait_s,
            "the limit of calls in flight is reached",
            noted=permit.noted,
        )

    def taking(
        self, *, weight: float = 1.0, host: str = "", waiter: str = "", urgency: int = 0
    ) -> Exchange[Permit]:
        """Return what `acquire` asks of Redis, to share a round trip with others."""
        host, size = _plain(host or self._host), f"{weight:.15g}"
        name = f"{self.owner}|{host}|{size}|{secrets.token_hex(6)}"
        shrink_ms = (
            int(self._limit.shrink_after_s * 1000) if isinstance(self._limit, Elastic) else 0
        )
        args: tuple[Argument, ...] = (
            name,
            host,
            size,
            int(self._lease_s * 1000),
            _base(self._limit),
            self._per_host,
            _kind(self._limit),
            capacity(self._limit),
            shrink_ms,
            waiter,
            urgency,
        )

        def answered(answer: list[Any]) -> Permit:
            granted, _, limit, wait_ms = answer
            self._alone = None
            self.limit = float(limit)
            if not granted:
                self._full_until, self._spare = self.store.clock() + ASK_AGAIN_S, 0.0
                return Permit(self, "", max(POLL_S, int(wait_ms) / 1000), noted=bool(waiter))
            self._held += 1
            self._spare -= weight
            return Permit(self, name)

        def alone() -> Permit:
            self.store.decided_alone("bulkhead")
            return self._take_alone(name)

        return Exchange(Call(_TAKE, self._keys, args), answered, alone)

    def _take_alone(self, name: str) -> Permit:
        """Return a permit up to the number that this process held when Redis was lost, at least 1.

        Other processes do the same, so the sum stays within the limit.
        """
        if self._alone is None:
            self._alone = max(1, self._held)
        if self._held >= self._alone:
            return Permit(self, "", POLL_S)
        self._held += 1
        return Permit(self, name, local=True)

    # --- giving back ---------------------------------------------------------------------------

    def give_back(
        self, permit: str, error: BaseException | None = None, *, local: bool = False
    ) -> None:
        """Give a permit back by its name.  While Redis is away, the end of its lease frees it."""
        together(self.store, *self.returning(permit, error, local=local))

    def returning(
        self, permit: str, error: BaseException | None, *, local: bool
    ) -> list[Exchange[int]]:
        """Return what `give_back` asks of Redis, to share a round trip with others."""
        self._held -= 1
        if local:
            return []
        outcome = "ok" if error is None else "failed"
        if error is not None and classify(error).category in _DROPS:
            outcome = "dropped"
        return [self._releasing(permit, self.owner, outcome)]

    def forget(self, owner: str) -> int:
        """Give back all permits of a process that has died (see `owner`), and return their
        number.
        """
        [held] = together(self.store, self._releasing("", owner, "failed"))
        return int(held)

    def _releasing(self, permit: str, owner: str, outcome: str) -> Exchange[int]:
        slow_s = self._limit.slow_s if isinstance(self._limit, Aimd) else None
        args = (
            permit,
            owner,
            outcome,
            int(self._lease_s * 1000),
            _kind(self._limit),
            _base(self._limit),
            capacity(self._limit),
            int((slow_s or 0) * 1000),
        )

        def answered(answer: list[Any]) -> int:
            held, limit, *waiters = answer
            self._spare += held
            if float(limit) > self.limit:
                self._full_until = 0.0
            self.limit = float(limit)
            call_up(self.store, self._keys[3], self._wake, [each.decode() for each in waiters])
            return int(held)

        return Exchange(Call(_RELEASE, self._keys, args), answered, lambda: 0)

    def status(self) -> dict[str, float]:
        """Return the numbers ``used``, ``limit`` and ``waiting``.  Raises StoreUnavailable."""
        permits, about, _, waiting = self._keys
        [[used, limit, waits]] = self.store.call(
            Call(_STATUS, (permits, about, waiting), (_base(self._limit), _kind(self._limit))),
            on_outage="patient",
        )
        return {"used": float(used), "limit": float(limit), "waiting": int(waits)}

    # --- calling -------------------------------------------------------------------------------

    @contextmanager
    def permit(
        self, *, max_wait_s: float = 0.0, weight: float = 1.0, host: str = ""
    ) -> Generator[Permit, None, None]:
        """Hold a permit for a block of code.  Raises BulkheadFull."""
        permit = self.acquire(max_wait_s=max_wait_s, weight=weight, host=host)
        if not permit:
            raise self.full(permit)
        try:
            yield permit
        except BaseException as error:
            report_end(permit.release, error)
            raise
        permit.release()

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function under a permit, and return its value.  Raises BulkheadFull.

        The permit of a generator or an awaitable is given back when that has ended.
        """
        return call_guarded(self._begin, func, args, kwargs)  # type: ignore[no-any-return]

    async def call_async(
        self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await a coroutine function under a permit, and return its value.  Raises BulkheadFull."""
        with self.permit():
            return await func(*args, **kwargs)

    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function, a coroutine function or a generator; see `guarded`."""
        return guarded(func, self._begin)

    def _begin(self, *_: Any) -> Ended:
        permit = self.acquire()
        if not permit:
            raise self.full(permit)
        return permit.release


_STATUS = Script.load("resilience", "bulkhead_status")


# --- the line of waiting nodes ----------------------------------------------------------------


def call_up(store: Store, line: str, wake: Wake, waiters: Sequence[str]) -> None:
    """Wake waiters that were taken out of a line.

    If jobs of some have ended, as many of the next in the line are taken out and woken instead.
    Does nothing more while Redis is away.
    """
    while waiters:
        woken = wake(waiters)
        missing = 0 if woken is None else len(waiters) - woken
        if not missing:
            return
        try:
            [following] = store.call(Call(_NEXT, (line,), (missing,)), on_outage="patient")
        except StoreUnavailable:
            return
        waiters = [each.decode() for each in following]


# --- functions of every kind ------------------------------------------------------------------


def guarded(func: Callable[..., Any], begin: Begin) -> Callable[..., Any]:
    """Return a function of the same kind whose calls are admitted by `begin` and report their end.

    The call of a coroutine function lasts until it has returned, that of a generator from its first
    item to its end.  An error that leaves a generator is a failure; a generator that is closed
    early has succeeded.
    """
    if isinstance(func, classmethod | staticmethod):
        return type(func)(guarded(func.__func__, begin))
    function = underlying(func)
    for is_kind, wrapped in (
        (inspect.isasyncgenfunction, _streaming),
        (inspect.isgeneratorfunction, _iterating),
        (inspect.iscoroutinefunction, _awaiting),
    ):
        if is_kind(function):
            return wrapped(func, begin)

    @functools.wraps(func)
    def calling(*args: Any, **kwargs: Any) -> Any:
        return call_guarded(begin, func, args, kwargs)

    return calling


def underlying(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function behind a partial or an object with ``__call__``."""
    while isinstance(func, functools.partial):
        func = func.func
    return func if inspect.isroutine(func) else type(func).__call__


def call_guarded(begin: Begin, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function and return its value.

    The work of a generator, a coroutine or a future goes on after the call.  Its end is reported
    later: when it has ended, or when it is thrown away.
    """
    ended = _begun(begin, func, args, kwargs)
    try:
        value = func(*args, **kwargs)
    except BaseException as error:
        ended(error)
        raise
    wrapped: Callable[[Callable[..., Any], Begin], Callable[..., Any]]
    if isinstance(value, AsyncGeneratorType):
        wrapped = _streaming
    elif isinstance(value, GeneratorType):
        wrapped = _iterating
    elif hasattr(type(value), "__await__"):
        wrapped = _awaiting
    else:
        ended(None)
        return value
    once = _Once(ended)
    lasting: Any = wrapped(lambda: value, lambda *_: once)()
    if isinstance(value, asyncio.Future):
        lasting = asyncio.ensure_future(lasting)
    weakref.finalize(lasting, report_end, once, asyncio.CancelledError()).atexit = False
    return lasting


class _Collector(threading.local):
    """Whether the garbage collector runs in this thread."""

    runs = False

    def note(self, phase: str, _: object) -> None:
        """Take note of a phase, ``start`` or ``stop``; `gc.callbacks` calls it."""
        self.runs = phase == "start"


_collector = _Collector()
gc.callbacks.append(_collector.note)
_unreported: queue.SimpleQueue[tuple[Ended, BaseException | None]] = queue.SimpleQueue()
"""Ends that the garbage collector has brought about; its ``put`` may interrupt itself."""


def report_end(ended: Ended, error: BaseException | None) -> None:
    """Report the end of a call; inside the garbage collector the next call reports it.

    The collector may run while its thread holds a lock of the connection pool.  A report needs that
    lock, so the thread would wait for itself.
    """
    if _collector.runs:
        _unreported.put((ended, error))
    else:
        ended(error)


def _left(ended: Ended, error: BaseException) -> None:
    """Report the error that left a generator; one that is closed early has succeeded."""
    report_end(ended, None if is_a(error, GeneratorExit) else error)


def _begun(begin: Begin, func: Callable[..., Any], args: Any, kwargs: Any) -> Ended:
    """Begin a call, after the report of ends that the garbage collector has brought about."""
    while not _unreported.empty():
        with suppress(queue.Empty):  # another thread reports it
            ended, error = _unreported.get_nowait()
            ended(error)
    return begin(func, args, kwargs)


class _Once:
    """The report of the end of a call; only the first one counts."""

    def __init__(self, ended: Ended) -> None:
        self._ended: Ended | None = ended

    def __call__(self, error: BaseException | None) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(error)


def _awaiting(func: Callable[..., Awaitable[Any]], begin: Begin) -> Callable[..., Any]:
    @functools.wraps(func)
    async def awaiting(*args: Any, **kwargs: Any) -> Any:
        ended = _begun(begin, func, args, kwargs)
        try:
            value = await func(*args, **kwargs)
        except BaseException as error:
            report_end(ended, error)
            raise
        ended(None)
        return value

    return awaiting


def _iterating(
    func: Callable[..., Generator[Any, Any, Any]], begin: Begin
) -> Callable[..., Generator[Any, Any, Any]]:
    @functools.wraps(func)
    def iterating(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        ended = _begun(begin, func, args, kwargs)
        try:
            value = yield from func(*args, **kwargs)
        except BaseException as error:
            _left(ended, error)
            raise
        ended(None)
        return value

    return iterating


def _streaming(
    func: Callable[..., AsyncGenerator[Any, Any]], begin: Begin
) -> Callable[..., AsyncGenerator[Any, Any]]:
    @functools.wraps(func)
    async def streaming(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        ended = _begun(begin, func, args, kwargs)
        stream = func(*args, **kwargs)
        step = stream.asend(None)
        try:
            while True:
                item = await step
                try:
                    step = stream.asend((yield item))
                except GeneratorExit:
                    await stream.aclose()
                    raise
                except BaseException as error:
                    step = stream.athrow(error)
        except StopAsyncIteration:
            ended(None)
        except BaseException as error:
            _left(ended, error)
            raise

    return streaming


def _plain(host: str) -> str:
    """Return a host's name without the separator of a permit's parts."""
    return host.replace("|", "_")


def _base(limit: float | Aimd | Elastic) -> float:
    return (
        limit.start
        if isinstance(limit, Aimd)
        else limit.base
        if isinstance(limit, Elastic)
        else limit
    )


def _kind(limit: float | Aimd | Elastic) -> str:
    return {Aimd: "aimd", Elastic: "elastic"}.get(type(limit), "fixed")


def capacity(limit: float | str | Aimd | Elastic | None, field: str = "limit") -> float:
    """Return the most that a limit can ever grant at once.  Raises InvalidValue for the field."""
    moving = _moving(limit, field)
    return moving if isinstance(moving, int | float) else moving.most


def _moving(
    limit: float | str | Aimd | Elastic | None, field: str = "limit"
) -> float | Aimd | Elastic:
    found = Aimd() if limit is None else PRESETS.get(limit) if isinstance(limit, str) else limit
    if isinstance(found, bool) or not isinstance(found, int | float | Aimd | Elastic):
        raise InvalidValue(
            field, limit, f"must be a number, Aimd, Elastic, or one of {', '.join(PRESETS)}"
        )
    return found
