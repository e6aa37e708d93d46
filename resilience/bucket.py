"""Token buckets that all workers share: they limit the amounts that calls take in any window.

The engine and users call it; begin with `TokenBucket.acquire`.  A caller takes from several limits
at once, or from none.

A bucket alone cannot keep a limit in *any* window: saved tokens and refill add up to more than the
limit.  So each limit has two parts, and both must have room.  One is a bucket that paces the calls,
the other a ring of cells that sums the last window.  The window is a little longer than the limit
says, for the way to the provider.  All times are the server's.  While Redis is away, each process
uses its `LocalShare`.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resilience.bulkhead import IN_LINE, URGENCY, Wake
from resilience.errors import (
    InvalidValue,
    NeverSatisfiable,
    RateLimited,
    StoreUnavailable,
    refuse_unless_name,
    refuse_unless_positive,
    refuse_unless_seconds,
)
from resilience.keys import Keys
from resilience.store import Argument, Call, Exchange, Script, Store, default_store, together

FLOORS = {"critical": 0.0, "high": 0.05, "normal": 0.15, "low": 0.30}
"""Priority -> share of the burst that it must leave to higher priorities."""
GUARD_SHARE, GUARD_S = 0.005, 0.3
"""A window is longer by a share of its length or by a time in seconds, whichever is less.

Requests take different times on their way to the provider.
"""
HOLD_MOST_S = 600.0
"""The longest pause that a provider gets; then the next caller asks it again."""
LINE_FROM_S = 5.0
"""During a pause of at least this time, waiters stand in a line that `release` wakes."""
KEEP_S = 600.0
"""The time for which a grant can be settled, and its id repeated."""

_TAKE, _SETTLE, _HOLD, _RELEASE, _LOOK = (
    Script.load("resilience", f"bucket_{verb}", prelude="bucket")
    for verb in ("take", "settle", "hold", "release", "look")
)
_STAND = Script.load("resilience", "bucket_stand")


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `limit` in any `per_s` seconds, and at most `burst` at once.

    Without `burst` it is the refill of one second, at least 1 and at most `limit`.
    """

    limit: float
    per_s: float = 1.0
    burst: float | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "per_s"):
            refuse_unless_positive(name, getattr(self, name))
        if self.burst is None:
            return
        refuse_unless_positive("burst", self.burst)
        if self.burst > self.limit:
            raise InvalidValue(
                "burst", self.burst, f"must be above 0 and at most the limit of {self.limit:g}"
            )

    @property
    def capacity(self) -> float:
        """The content of a full bucket."""
        return (
            min(self.limit, max(1.0, self.limit / self.per_s)) if self.burst is None else self.burst
        )


def check_rates(rates: Mapping[str, object], field: str) -> None:
    """Raise InvalidValue for the field unless there is a unit, and each unit has a Rate."""
    if not rates or not all(isinstance(each, Rate) for each in rates.values()):
        raise InvalidValue(
            field, dict(rates), "give each unit a Rate, as in requests=Rate(3500, per_s=60)"
        )


PROVIDER: Mapping[str, Rate] = {"requests": Rate(3500, per_s=60), "tokens": Rate(90_000, per_s=60)}
"""Limits of a provider: 3,500 requests and 90,000 tokens in any minute."""
ROUTER = Rate(1000, per_s=1, burst=100)
"""Limit of a router's back pressure: 1,000 a second, never more than 100 at once."""


@dataclass(slots=True)
class Grant:
    """The answer of a bucket; true if it was granted."""

    granted: bool
    wait_s: float  # granted: time until it may be used; denied: time until it would be granted
    at: float = 0.0  # time from which it may be used: seconds since 1970 of the server's clock
    limited_by: str = ""  # the limit that denies or delays it
    held_until: float = 0.0  # denied by a pause of the provider until then: seconds since 1970
    id: str = ""
    _settle: Callable[[Mapping[str, float]], bool] = field(default=lambda _: False, repr=False)

    def __bool__(self) -> bool:
        return self.granted

    def settle(self, **used: float) -> bool:
        """Replace the amounts taken by the amounts used, by unit.

        Returns whether that changed anything.  It does not for a grant that was settled before or
        is too old, nor while Redis is away.
        """
        return self._settle(used)


@dataclass(frozen=True, slots=True)
class _Limit:
    """One limit, for one scope, and the amount to take from it."""

    unit: str
    scope: str
    rate: Rate
    amount: float

    @property
    def name(self) -> str:
        """The name that callers see, such as ``tokens of acme``."""
        return f"{self.unit} of {self.scope}" if self.scope else self.unit

    @property
    def key(self) -> tuple[str, str]:
        """Unit and scope; they identify its Redis key and its local share."""
        return self.unit, self.scope


class TokenBucket:
    """The limits of one service, by unit.

    ``TokenBucket("llm", store, requests=Rate(3500, per_s=60), tokens=Rate(90_000, per_s=60))``.
    `scoped` limits hold in addition, for each scope (a tenant, a session).  The same name on the
    same store means the same bucket, in every process.
    """

    def __init__(
        self,
        name: str,
        store: Store | None = None,
        *,
        scoped: Mapping[str, Rate] | None = None,
        guard_s: float | None = None,
        hold_most_s: float = HOLD_MOST_S,
        sleep: Callable[[float], None] = time.sleep,
        **rates: Rate,
    ) -> None:
        refuse_unless_name("name", name)
        refuse_unless_positive("hold_most_s", hold_most_s)
        if rates or not scoped:
            check_rates(rates, "rates")
        if scoped:
            check_rates(scoped, "scoped")
        self.name, self.rates, self.scoped = name, rates, dict(scoped or {})
        self._store = store or default_store()
        self._keys, self._guard_s, self._sleep = Keys(self._store.namespace), guard_s, sleep
        self._hold_most_s, self._line = hold_most_s, self._keys.bucket(name, "", ())[2]
        self._taker = f"{os.uname().nodename}:{secrets.token_hex(4)}"
        self._takers = 1
        self._shares: dict[tuple[str, str], LocalShare] = {}

    @property
    def takers(self) -> int:
        """The number of processes that took from it within a minute, as last known."""
        return self._takers

    @property
    def clock(self) -> Callable[[], float]:
        """The clock of this process, in seconds."""
        return self._store.clock

    # --- taking --------------------------------------------------------------------------------

    def acquire(
        self,
        *,
        max_wait_s: float = 0.0,
        priority: str = "critical",
        scope: str = "",
        id: str = "",
        **amounts: float,
    ) -> Grant:
        """Take an amount from each limit named, or from none, waiting up to `max_wait_s` seconds.

        Without amounts it takes 1 from the only limit.  A denied grant is false and has taken
        nothing; after its `wait_s`, and not before, it would be granted.  The same `id` again
        returns the same grant.  A lower `priority` leaves a share of the burst to higher ones:
        ``high`` 5 %, ``normal`` 15 %, ``low`` 30 % (FLOORS).

        Raises NeverSatisfiable for an amount above the limit, InvalidValue for a negative or
        infinite amount and for an unknown limit or priority.
        """
        asked = self._taking(amounts, scope, priority, id, max_wait_s)
        grant: Grant = together(self._store, asked)[0][0]
        if grant and grant.wait_s > 0:
            self._sleep(grant.wait_s)
        return grant

    async def acquire_async(
        self,
        *,
        max_wait_s: float = 0.0,
        priority: str = "critical",
        scope: str = "",
        id: str = "",
        **amounts: float,
    ) -> Grant:
        """Do as `acquire` does, but wait without blocking the event loop."""
        asked = self._taking(amounts, scope, priority, id, max_wait_s)
        grant: Grant = together(self._store, asked)[0][0]
        if grant and grant.wait_s > 0:
            await asyncio.sleep(grant.wait_s)
        return grant

    def reserve(
        self,
        *,
        max_wait_s: float = 0.0,
        priority: str = "critical",
        scope: str = "",
        id: str = "",
        in_line: int = 0,
        returns: bool = False,
        **amounts: float,
    ) -> Grant:
        """Do as `acquire` does, but leave the waiting to the caller: the grant may be used after
        `wait_s`.

        With `in_line=n` a denied caller gets its own retry time, after earlier callers of the same
        priority.  At that time it may take the amounts up to n times, capped at 0.1 s of refill and
        a third of the burst.  A caller that `returns` from such a wait goes before new callers.
        """
        asked = self.reserving(
            max_wait_s=max_wait_s,
            priority=priority,
            scope=scope,
            id=id,
            in_line=in_line,
            returns=returns,
            **amounts,
        )
        grant: Grant = together(self._store, asked)[0]
        return grant

    def reserving(
        self,
        *,
        max_wait_s: float = 0.0,
        priority: str = "critical",
        scope: str = "",
        id: str = "",
        in_line: int = 0,
        returns: bool = False,
        **amounts: float,
    ) -> Exchange[Grant]:
        """Return what `reserve` asks of Redis, to share a round trip with others."""
        taking = self._taking(
            amounts,
            scope,
            priority,
            id,
            max_wait_s,
            line=f"{'back' if returns else 'new'}{URGENCY[priority]}" if in_line else "",
            times=in_line,
        )
        return Exchange(
            taking.call, lambda answer: taking.answered(answer)[0], lambda: taking.alone()[0]
        )

    def lease(
        self, amount: float, most: float, *, priority: str = "critical"
    ) -> tuple[Grant, float]:
        """Take an amount of the only limit, and up to `most` more of what it holds now.

        Returns the grant and the additional amount.
        """
        asked = self._taking({_only(self.rates): amount}, "", priority, "", 0.0, most=most)
        taken: tuple[Grant, float] = together(self._store, asked)[0]
        return taken

    def _taking(
        self,
        amounts: Mapping[str, float],
        scope: str,
        priority: str,
        id: str,
        max_wait_s: float,
        *,
        line: str = "",
        times: int = 0,
        most: float = 0.0,
    ) -> Exchange[tuple[Grant, float]]:
        if not isinstance(priority, str) or priority not in FLOORS:
            raise InvalidValue("priority", priority, f"must be one of {', '.join(FLOORS)}")
        limits, id = (
            self._limits(amounts or {_only(self.rates): 1}, scope),
            id or secrets.token_hex(8),
        )
        # A bucket made before a fork is another taker in each child.
        taker = f"{self._taker}:{os.getpid()}"
        args: list[Argument] = [
            taker,
            int(KEEP_S * 1000),
            int(max_wait_s * 1e6),
            line,
            times,
            most,
        ]
        for each in limits:
            owed, hold_us = self._shares[each.key].owed() if each.key in self._shares else ("[]", 0)
            numbers = (*self._about(each), each.amount, FLOORS[priority] * each.rate.capacity)
            # One argument for each limit: an argument costs the client 0.7 us.
            args.append(
                f"[{','.join([repr(float(number)) for number in numbers])},{owed},{hold_us}]"
            )

        def answered(answer: list[Any]) -> tuple[Grant, float]:
            granted, wait, at, extra, takers = answer
            self._takers = int(takers)
            for each in limits:
                self._shares.pop(each.key, None)
            if not granted:
                by, held_until = limits[int(at) - 1].name, int(extra) / 1e6
                return Grant(False, int(wait) / 1e6, limited_by=by, held_until=held_until), 0.0
            return Grant(
                granted=True,
                wait_s=int(wait) / 1e6,
                at=int(at) / 1e6,
                limited_by="",
                id=id,
                _settle=lambda used: self._settle(limits, id, used),
            ), float(extra)

        def alone() -> tuple[Grant, float]:
            self._store.decided_alone("bucket")
            return self._locally(limits, max_wait_s), 0.0

        return Exchange(self._call(_TAKE, limits, id, *args), answered, alone)

    def _limits(self, amounts: Mapping[str, float], scope: str) -> list[_Limit]:
        unknown = [name for name in amounts if name not in self.rates and name not in self.scoped]
        if unknown:
            raise InvalidValue(
                unknown[0],
                amounts[unknown[0]],
                f"rate limit {self.name} has {', '.join({**self.rates, **self.scoped})}",
            )
        chosen = [
            _Limit(name, "", rate, amounts[name])
            for name, rate in self.rates.items()
            if name in amounts
        ]
        if scope:
            named = ((name, rate) for name, rate in self.scoped.items() if name in amounts)
            chosen += [_Limit(name, scope, rate, amounts[name]) for name, rate in named]
        for each in chosen:
            if not isinstance(each.amount, int | float) or not 0 <= each.amount < float("inf"):
                raise InvalidValue(each.name, each.amount, "must be a number of at least 0")
            if each.amount > each.rate.limit:
                raise NeverSatisfiable(
                    f"{each.name} of rate limit {self.name}", each.amount, each.rate.limit
                )
        return chosen

    def _about(self, limit: _Limit) -> tuple[Argument, ...]:
        rate = limit.rate
        guard_s = min(GUARD_S, GUARD_SHARE * rate.per_s) if self._guard_s is None else self._guard_s
        return rate.limit, int(rate.per_s * 1e6), rate.capacity, int(guard_s * 1e6)

    def _call(self, script: Script, limits: Sequence[_Limit], id: str, *args: Argument) -> Call:
        keys = self._keys.bucket(self.name, id, (each.key for each in limits))
        return Call(script, keys, args)

    # --- settling and holding ------------------------------------------------------------------

    def _settle(self, limits: Sequence[_Limit], id: str, used: Mapping[str, float]) -> bool:
        args = [
            argument
            for each in limits
            for argument in (each.rate.capacity, used.get(each.unit, ""))
        ]
        try:
            [settled] = self._store.call(
                self._call(_SETTLE, limits, id, *args), on_outage="patient"
            )
        except StoreUnavailable:
            return False  # the reserved amount stays taken, which keeps the limit
        return bool(settled)

    def hold(self, retry_after_s: float, *, scope: str = "") -> None:
        """Deny all callers for the seconds that a provider asked for, in every process.

        It lasts `hold_most_s` at most.  A hold that is shorter than the current one changes
        nothing.
        """
        refuse_unless_seconds("retry_after_s", retry_after_s)
        hold_s = min(retry_after_s, self._hold_most_s)
        names = dict.fromkeys(self.scoped if scope else self.rates, 0.0)
        try:
            self._store.call(
                self._call(_HOLD, self._limits(names, scope), "", int(hold_s * 1e6)),
                on_outage="patient",
            )
        except StoreUnavailable:
            for each in self._limits(names, scope):
                self._share(each).hold(hold_s)

    def release(self, wake: Wake = lambda _: None) -> float:
        """End the pause that a provider asked for, and wake the waiters in its line.

        Returns its rest in seconds, 0 without a pause.  Raises StoreUnavailable.
        """
        limits = self._limits(dict.fromkeys(self.rates, 0.0), "")
        [[rest_us, *waiters]] = self._store.call(
            self._call(_RELEASE, limits, ""), on_outage="patient"
        )
        wake([each.decode() for each in waiters])
        return int(rest_us) / 1e6

    # --- waiting -------------------------------------------------------------------------------

    def denied(self, grant: Grant, why: str, *, waiter: str = "", urgency: int = 0) -> RateLimited:
        """Return the error for a denied grant.

        During a longer pause of the provider a `waiter` stands in the line that `release` wakes.
        """
        noted = False
        if grant.held_until:
            until = time.strftime("%H:%M:%S", time.gmtime(math.ceil(grant.held_until)))
            why = f"its provider asked for a pause until {until} UTC"
            if waiter and grant.wait_s >= LINE_FROM_S:
                noted = self._stand(waiter, urgency, grant.wait_s)
        return RateLimited(f"rate limit {self.name}", grant.wait_s, why, noted=noted)

    def _stand(self, waiter: str, urgency: int, wait_s: float) -> bool:
        """Let a waiter stand in the line of a pause; return whether it does."""
        keep_ms = int(1000 * (wait_s + LINE_FROM_S))
        try:
            self._store.call(Call(_STAND, (self._line,), (waiter, urgency, keep_ms)))
        except StoreUnavailable:
            return False
        return True

    def waits(self, waiter: str) -> Call:
        """Return the call that answers whether a waiter still stands in the line of a pause."""
        return Call(IN_LINE, (self._line,), (waiter,))

    def status(self, scope: str = "") -> dict[str, dict[str, float]]:
        """Return limit -> ``level``, ``capacity``, ``used`` in its last window, ``limit``,
        ``per_s``, ``hold_s``.

        Raises StoreUnavailable.
        """
        limits = self._limits(
            dict.fromkeys({**self.rates, **(self.scoped if scope else {})}, 0.0), scope
        )
        [states] = self._store.call(
            self._call(
                _LOOK, limits, "", *(about for each in limits for about in self._about(each))
            ),
            on_outage="patient",
        )
        return {
            each.name: {
                "level": float(level),
                "capacity": each.rate.capacity,
                "used": float(used),
                "limit": each.rate.limit,
                "per_s": each.rate.per_s,
                "hold_s": float(hold) / 1e6,
            }
            for each, (level, used, hold) in zip(limits, states, strict=True)
        }

    # --- while Redis is away -------------------------------------------------------------------

    def _locally(self, limits: Sequence[_Limit], max_wait_s: float) -> Grant:
        shares = [(self._share(each), each) for each in limits]
        wait_s, limited_by = max(
            ((share.wait_s(each.amount), each.name) for share, each in shares), default=(0.0, "")
        )
        if wait_s > max_wait_s:
            return Grant(False, wait_s, limited_by=limited_by)
        for share, each in shares:
            share.take(each.amount)
        return Grant(True, wait_s, limited_by=limited_by)

    def _share(self, limit: _Limit) -> LocalShare:
        if limit.key not in self._shares:
            self._shares[limit.key] = LocalShare(limit.rate, self._takers, self._store.clock)
        return self._shares[limit.key]


def _only(rates: Mapping[str, Rate]) -> str:
    if len(rates) != 1:
        raise InvalidValue("amounts", {}, f"give an amount for each: {', '.join(rates)}")
    return next(iter(rates))


class LocalShare:
    """One process's part of a limit while Redis is away: the rate divided by the last known takers.

    It starts empty, because the content of the shared window is not known here.  When Redis is
    back, the amounts granted in the last window and the rest of a hold are sent to the shared
    limit.
    """

    SLICES = 32

    def __init__(self, rate: Rate, takers: int, clock: Callable[[], float]) -> None:
        self._per_s, self._clock = rate.limit / rate.per_s / takers, clock
        self._capacity = max(1.0, rate.capacity / takers)
        self._level, self._at, self._held_until = 0.0, clock(), 0.0
        self._slice_s = rate.per_s / self.SLICES
        self._given: dict[int, float] = {}  # slice of time -> amount

    def wait_s(self, amount: float) -> float:
        """Return the seconds until the amount may be taken."""
        now = self._clock()
        self._level = min(self._capacity, self._level + max(0.0, now - self._at) * self._per_s)
        self._at = max(now, self._at)
        return (
            max(0.0, self._at - now)
            + max(0.0, min(amount, self._capacity) - self._level) / self._per_s
        )

    def take(self, amount: float) -> None:
        """Take an amount; the level may become negative."""
        self._level -= amount
        now = int(self._clock() / self._slice_s)
        self._given = {at: given for at, given in self._given.items() if at >= now - self.SLICES}
        self._given[now] = self._given.get(now, 0.0) + amount

    def owed(self) -> tuple[str, int]:
        """Return the amounts granted in the last window, and the rest of a hold in us.

        The amounts are JSON: [age in us, amount] ...
        """
        now = self._clock()
        ages = (
            (max(0.0, now - (at + 1) * self._slice_s), given)
            for at, given in sorted(self._given.items())
        )
        owed = [
            f"[{int(age * 1e6)},{given!r}]"
            for age, given in ages
            if age < self.SLICES * self._slice_s
        ]
        return f"[{','.join(owed)}]", int(max(0.0, self._held_until - now) * 1e6)

    def hold(self, seconds: float) -> None:
        """Deny all callers for that time."""
        self._held_until = max(self._held_until, self._clock() + seconds)
        self._level, self._at = 0.0, self._held_until


class LeasedBucket:
    """A bucket for high rates: it takes batches from the only limit of a bucket, and spends them in
    this process.

    It never admits more than the bucket grants.  The rest of a batch lapses after 0.1 s (LEASE_S).
    A call may follow the take of its batch by up to that time, so a window shorter than that may
    contain one batch more.
    """

    LEASE_S = 0.1
    ASK_AGAIN_S = 1.0
    """For this time at most a denial counts without another round trip."""

    def __init__(self, bucket: TokenBucket) -> None:
        self._bucket, self._rate = bucket, next(iter(bucket.rates.values()))
        self._left, self._spent, self._until = 0.0, 0.0, 0.0
        self._denied_until, self._asks_at = 0.0, 0.0

    def acquire(self, amount: float = 1.0, *, priority: str = "critical") -> Grant:
        """Take an amount from the current batch, or with the next batch in one round trip."""
        now = self._bucket.clock()
        if now < self._until and self._left >= amount:
            self._left -= amount
            self._spent += amount
            return Grant(True, 0.0)
        if now < self._asks_at:
            return Grant(False, self._denied_until - now, limited_by=self._bucket.name)
        grant, leased = self._bucket.lease(amount, self._batch(), priority=priority)
        self._left, self._spent, self._until = leased, amount, now + self.LEASE_S
        self._denied_until = 0.0 if grant else now + grant.wait_s
        # A pause of the provider may be released before its end.
        self._asks_at = min(self._denied_until, now + self.ASK_AGAIN_S)
        return grant

    def _batch(self) -> float:
        """Return twice the amount spent of the last batch, at most this process's share of the
        rate.
        """
        flow = self._rate.limit / self._rate.per_s * self.LEASE_S
        return min(2 * self._spent, max(0.0, min(flow, self._rate.capacity) / self._bucket.takers))
