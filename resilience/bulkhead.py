"""A bulkhead that every worker shares: at most so many calls of a service in flight, over all hosts
and on each.

Decides who may start a call.  A permit is leased, so that whoever dies with it gives it back; its
limit is fixed, or moves: with what the service bears (`Aimd`), or with what is asked for
(`Elastic`).  Refuses to know what is called."""

from __future__ import annotations

import functools
import inspect
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from resilience.errors import (
    BulkheadFull,
    Category,
    InvalidValue,
    NeverSatisfiable,
    StoreUnavailable,
)
from resilience.faults import classify
from resilience.keys import Keys
from resilience.store import Argument, Call, Script, Store, default_store
from resilience.waiters import IN_LINE, Wake, call_up

P = ParamSpec("P")
T = TypeVar("T")

LEASE_S = 60.0
"""A permit that was not given back by then is free: the longest a provider's call may take (source
document 3).
"""
LOOK_AGAIN_S = 0.02
_DROPS = frozenset({Category.TIMEOUT, Category.RATE_LIMITED, Category.TRANSIENT, Category.RESOURCE})
_TAKE, _RELEASE = (
    Script.load("resilience", f"bulkhead_{verb}", prelude="bulkhead")
    for verb in ("take", "release")
)


@dataclass(frozen=True, slots=True)
class Aimd:
    """A limit that finds what a service bears: one more while all goes well, a tenth less on
    time-outs, 429 and 5xx.
    """

    start: float = 20.0
    most: float = 200.0

    def __post_init__(self) -> None:
        _ordered("start", self.start, self.most)


@dataclass(frozen=True, slots=True)
class Elastic:
    """A limit that grows from a base as far as `most` when more is asked for, and shrinks when that
    has long ended.

    A memory pool of 500 MB to 2 GB with a delay of 15 min (source document 3): ``Elastic(500, 2048,
    900)``."""

    base: float
    most: float
    shrink_after_s: float = 900.0

    def __post_init__(self) -> None:
        _ordered("base", self.base, self.most)


PRESETS = {"throughput": 20, "default": 10, "constrained": 5}
"""Concurrent executions of source document 2; None finds a limit by itself: `Aimd`."""


def _ordered(name: str, least: float, most: float) -> None:
    if not 0 < least <= most:
        raise InvalidValue(name, least, f"must be above 0 and at most {most:g}")


class Permit:
    """Leave to have one call in flight; false when there is none.  Give it back with `release`, or
    by leaving ``with``.
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
        self.noted = noted  # denied, and its waiter stands in line

    def __bool__(self) -> bool:
        return bool(self.name)

    def release(self, error: BaseException | None = None) -> None:
        """Give it back, and say how the call ended; once."""
        name, self.name = self.name, ""
        if name:
            self._bulkhead.give_back(name, error, local=self.local)


class Bulkhead:
    """The calls of one service in flight; the same name on the same store is the same bulkhead, in
    every process.
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
        """`limit` may be a preset's name; None finds a limit by itself, as ``Aimd()`` does;
        `per_host` None bounds no host.

        A permit that was not given back is free after `lease_s` seconds.  A host is the machine,
        unless the caller of `acquire` names another thing to count by, such as an endpoint.  Raises
        InvalidValue."""
        self.name, self._store, self._lease_s = name, store or default_store(), lease_s
        if isinstance(limit, str) and limit not in PRESETS:
            raise InvalidValue(
                "limit", limit, f"must be a number, Aimd, Elastic, or one of {', '.join(PRESETS)}"
            )
        moving = Aimd() if limit is None else PRESETS[limit] if isinstance(limit, str) else limit
        for field, value in (
            ("limit", _base(moving)),
            ("per_host", per_host or 1),
            ("lease_s", lease_s),
        ):
            if not value > 0:
                raise InvalidValue(field, value, "must be above 0")
        self._limit, self._per_host = moving, per_host or 0
        self._host, self._wake, self._sleep = _plain(host or os.uname().nodename), wake, sleep
        self._keys = Keys(self._store.namespace).bulkhead(name)
        self._held = 0  # by this process
        self._alone: int | None = None  # how many it may hold while Redis is away

    @property
    def owner(self) -> str:
        """The process that takes permits here."""
        return self.owner_of(os.getpid())

    def owner_of(self, pid: int) -> str:
        """Return the name of a process of this machine: when it has died, `forget` gives back all
        that it held.
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
        """Take a permit, waiting up to `max_wait_s` seconds; a false one says in `wait_s` when the
        next lease ends.

        A `waiter` is noted when denied, by its urgency (0 is the most urgent), and handed to `wake`
        when there is room.  Raises NeverSatisfiable for a weight above the limit."""
        if not weight > 0:
            raise InvalidValue("weight", weight, "must be above 0")
        if weight > _most(self._limit) or 0 < self._per_host < weight:
            raise NeverSatisfiable(
                f"bulkhead {self.name}",
                weight,
                min(_most(self._limit), self._per_host or float("inf")),
            )
        until = self._store.clock() + max_wait_s
        while (
            not (permit := self._take(weight, host, waiter, urgency))
            and self._store.clock() < until
        ):
            self._sleep(LOOK_AGAIN_S * self._store.random.uniform(0.5, 1.0))
        return permit

    def waits(self, waiter: str) -> Call:
        """Return the call that answers whether a waiter still stands in line."""
        return Call(IN_LINE, (self._keys[3],), (waiter,))

    def stands(self, waiter: str) -> bool:
        """Whether a waiter that was noted still stands in line; yes while Redis is away."""
        try:
            return bool(self._store.call(self.waits(waiter), on_outage="answer")[0])
        except StoreUnavailable:
            return True

    def full(self, permit: Permit) -> BulkheadFull:
        """Return what a caller is told that got no permit."""
        return BulkheadFull(
            f"bulkhead {self.name}",
            permit.wait_s,
            "the limit of calls in flight is reached",
            noted=permit.noted,
        )

    def _take(self, weight: float, host: str, waiter: str, urgency: int) -> Permit:
        host, size = _plain(host or self._host), f"{weight:.15g}"
        name = f"{self.owner}|{host}|{size}|{secrets.token_hex(6)}"
        told: tuple[Argument, ...] = (
            name,
            host,
            size,
            int(self._lease_s * 1000),
            _base(self._limit),
        )
        shrink_ms = (
            int(self._limit.shrink_after_s * 1000) if isinstance(self._limit, Elastic) else 0
        )
        more = (self._per_host, self._kind, _most(self._limit), shrink_ms, waiter, urgency)
        try:
            [[granted, _, _, wait_ms]] = self._store.call(
                Call(_TAKE, self._keys, (*told, *more)), on_outage="answer"
            )
        except StoreUnavailable:
            return self._take_alone(name)
        self._alone = None
        if not granted:
            return Permit(self, "", max(LOOK_AGAIN_S, int(wait_ms) / 1000), noted=bool(waiter))
        self._held += 1
        return Permit(self, name)

    def _take_alone(self, name: str) -> Permit:
        """Hold as many as at the moment Redis was lost, and one at least: others do the same, so
        the sum holds.
        """
        if self._alone is None:
            self._alone = max(1, self._held)
        if self._held >= self._alone:
            return Permit(self, "", LOOK_AGAIN_S)
        self._held += 1
        return Permit(self, name, local=True)

    @property
    def _kind(self) -> str:
        return {Aimd: "aimd", Elastic: "elastic"}.get(type(self._limit), "fixed")

    # --- giving back ---------------------------------------------------------------------------

    def give_back(
        self, permit: str, error: BaseException | None = None, *, local: bool = False
    ) -> None:
        """Release a permit by its name; while Redis is away its lease does."""
        self._held -= 1
        if not local:
            dropped = error is not None and classify(error).category in _DROPS
            self._release(permit, self.owner, "dropped" if dropped else "ok")

    def forget(self, owner: str) -> int:
        """Give back all permits of a process that has died (see `owner`); return how many it
        held.
        """
        return self._release("", owner, "ok")

    def _release(self, permit: str, owner: str, outcome: str) -> int:
        told = (
            permit,
            owner,
            outcome,
            int(self._lease_s * 1000),
            self._kind,
            _base(self._limit),
            _most(self._limit),
        )
        try:
            [[held, _, *waiters]] = self._store.call(
                Call(_RELEASE, self._keys, told), on_outage="answer"
            )
        except StoreUnavailable:
            return 0
        call_up(self._store, self._keys[3], self._wake, [each.decode() for each in waiters])
        return int(held)

    def status(self) -> dict[str, float]:
        """Return used, limit and waiting.  Raises StoreUnavailable."""
        permits, about, _, waiting = self._keys
        [[used, limit, waits]] = self._store.call(
            Call(_STATUS, (permits, about, waiting), (_base(self._limit),)), on_outage="answer"
        )
        return {"used": float(used), "limit": float(limit), "waiting": int(waits)}

    # --- calling -------------------------------------------------------------------------------

    @contextmanager
    def permit(
        self, *, max_wait_s: float = 0.0, weight: float = 1.0, host: str = ""
    ) -> Generator[Permit, None, None]:
        """Guard a block of code.  Raises BulkheadFull."""
        permit = self.acquire(max_wait_s=max_wait_s, weight=weight, host=host)
        if not permit:
            raise self.full(permit)
        try:
            yield permit
        except BaseException as error:
            permit.release(error)
            raise
        permit.release()

    def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function when there is room.  Raises BulkheadFull."""
        with self.permit():
            return func(*args, **kwargs)

    async def call_async(
        self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await a coroutine function when there is room.  Raises BulkheadFull."""
        with self.permit():
            return await func(*args, **kwargs)

    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function or a coroutine function."""
        if inspect.iscoroutinefunction(func):

            @functools.wraps(func)
            async def awaiting(*args: Any, **kwargs: Any) -> Any:
                return await self.call_async(func, *args, **kwargs)

            return awaiting

        @functools.wraps(func)
        def calling(*args: Any, **kwargs: Any) -> Any:
            return self.call(func, *args, **kwargs)

        return calling


_STATUS = Script.load("resilience", "bulkhead_status")


def _plain(host: str) -> str:
    """Return a host's name without what separates the parts of a permit's."""
    return host.replace("|", "_")


def _base(limit: float | Aimd | Elastic) -> float:
    return (
        limit.start
        if isinstance(limit, Aimd)
        else limit.base
        if isinstance(limit, Elastic)
        else limit
    )


def _most(limit: float | Aimd | Elastic) -> float:
    return limit if isinstance(limit, int | float) else limit.most
