"""Token buckets that every worker shares: so much in any window, paced, taken from several limits
at once or from none.

Decides what a grant costs, how long its caller waits, and what a process may do by itself while
Redis is away.

A bucket alone cannot promise a limit in *any* window: what it saved up and what flows in add up to
more than the limit. So each limit is a pacing bucket **and** a ring of cells that sums the last
window and a small guard for the way to the provider; both must have room.  Time is the server's.
Refuses to know what is paid for."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from resilience.errors import InvalidValue, NeverSatisfiable, StoreUnavailable
from resilience.keys import Keys
from resilience.store import Argument, Call, Script, Store, default_store
from resilience.waiters import URGENCY

FLOORS = {"critical": 0.0, "high": 0.05, "normal": 0.15, "low": 0.30}
"""The share of a bucket's burst that a class must leave to more urgent ones."""
GUARD_SHARE, GUARD_S = 0.005, 0.3
"""A window is counted this much longer (the smaller of both), for requests that are longer on their
way than others.
"""
KEEP_S = 600.0
"""A grant can be settled, or asked for again by its id, for this long."""

_TAKE, _SETTLE, _HOLD, _LOOK = (
    Script.load("resilience", f"bucket_{verb}", prelude="bucket")
    for verb in ("take", "settle", "hold", "look")
)


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `limit` in any `per_s` seconds, and at most `burst` at once (left out: what flows in
    within a second).
    """

    limit: float
    per_s: float = 1.0
    burst: float | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "per_s"):
            if not getattr(self, name) > 0:
                raise InvalidValue(name, getattr(self, name), "must be above 0")
        if self.burst is not None and not 0 < self.burst <= self.limit:
            raise InvalidValue(
                "burst", self.burst, f"must be above 0 and at most the limit of {self.limit:g}"
            )

    @property
    def capacity(self) -> float:
        """What a full bucket holds."""
        return (
            min(self.limit, max(1.0, self.limit / self.per_s)) if self.burst is None else self.burst
        )


PROVIDER: Mapping[str, Rate] = {"requests": Rate(3500, per_s=60), "tokens": Rate(90_000, per_s=60)}
"""A provider's limits (source document 3): 3,500 requests and 90,000 tokens in any minute."""
ROUTER = Rate(1000, per_s=1, burst=100)
"""A router's back pressure (source document 3): 1,000 a second, never more than 100 at once."""


@dataclass(slots=True)
class Grant:
    """What a bucket answered; true when granted."""

    granted: bool
    wait_s: float  # granted: until it may be used; denied: until it would be granted
    at: float = 0.0  # seconds since the epoch by the server: from when it may be used
    limited_by: str = ""  # the limit that says no, or no earlier
    id: str = ""
    _settle: Callable[[Mapping[str, float]], bool] = field(default=lambda _: False, repr=False)

    def __bool__(self) -> bool:
        return self.granted

    def settle(self, **used: float) -> bool:
        """Correct it to what was really used, in units of its limits; say whether that changed
        anything: once.
        """
        return self._settle(used)


@dataclass(frozen=True, slots=True)
class _Limit:
    unit: str
    scope: str
    rate: Rate
    amount: float

    @property
    def name(self) -> str:
        """The name that callers see."""
        return f"{self.unit} of {self.scope}" if self.scope else self.unit

    @property
    def key(self) -> tuple[str, str]:
        """What its Redis key and its local share are found by."""
        return self.unit, self.scope


class TokenBucket:
    """Named limits of one service; the same name on the same store is the same bucket, in every
    process.

    ``TokenBucket("llm", store, requests=Rate(3500, per_s=60), tokens=Rate(90_000, per_s=60))``;
    `scoped` limits hold for each scope (a tenant, a session) beside them."""

    def __init__(
        self,
        name: str,
        store: Store | None = None,
        *,
        scoped: Mapping[str, Rate] | None = None,
        guard_s: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
        **rates: Rate,
    ) -> None:
        if not rates and not scoped:
            raise InvalidValue(
                "rates", {}, "give at least one, as in requests=Rate(3500, per_s=60)"
            )
        self.name, self.rates, self.scoped = name, rates, dict(scoped or {})
        self._store = store or default_store()
        self._keys, self._guard_s, self._sleep = Keys(self._store.namespace), guard_s, sleep
        self._me = f"{os.uname().nodename}:{secrets.token_hex(4)}"
        self._takers = 1
        self._shares: dict[tuple[str, str], LocalShare] = {}

    @property
    def takers(self) -> int:
        """How many processes have taken from it within a minute, as last heard."""
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
        """Take from every limit that an amount is given for, waiting up to `max_wait_s` seconds;
        all or nothing.

        Without amounts it takes 1 from the only limit.  A denied grant is false, and `wait_s` says
        exactly when it would be granted; nothing was taken.  Asking again with the same `id` is the
        same grant.  A lower `priority` leaves its share of the burst to higher ones: ``high`` 5 %,
        ``normal`` 15 %, ``low`` 30 % (FLOORS).  Raises NeverSatisfiable for more than a limit ever
        grants, InvalidValue for an amount or a limit that cannot be."""
        grant, _ = self._take(
            amounts=amounts, scope=scope, priority=priority, id=id, max_wait_s=max_wait_s
        )
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
        """Do as `acquire` does, without blocking the event loop while it waits."""
        grant, _ = self._take(
            amounts=amounts, scope=scope, priority=priority, id=id, max_wait_s=max_wait_s
        )
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
        """Do as `acquire` does, and leave the waiting to the caller: the grant may be used after
        `wait_s`.

        Who is denied `in_line` is told a time of its own, behind those of its priority that were
        told before: when it may take so much that many times, or as often as flows in within 0.1 s
        and as a third of a full bucket is good for. Who `returns` from waiting is told one before
        those who are new."""
        line = f"{'back' if returns else 'new'}{URGENCY[priority]}" if in_line else ""
        grant, _ = self._take(
            amounts=amounts,
            scope=scope,
            priority=priority,
            id=id,
            max_wait_s=max_wait_s,
            line=line,
            times=in_line,
        )
        return grant

    def lease(
        self, amount: float, most: float, *, priority: str = "critical"
    ) -> tuple[Grant, float]:
        """Take an amount of the only limit, and up to `most` more that are there now; return the
        grant and how many.
        """
        return self._take(
            amounts={self._only(): amount},
            scope="",
            priority=priority,
            id="",
            max_wait_s=0.0,
            most=most,
        )

    def _take(
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
    ) -> tuple[Grant, float]:
        if priority not in FLOORS:
            raise InvalidValue("priority", priority, f"must be one of {', '.join(FLOORS)}")
        limits, id = self._limits(amounts or {self._only(): 1}, scope), id or secrets.token_hex(8)
        me = f"{self._me}:{os.getpid()}"  # a bucket made before a fork is another taker in each child
        told: list[Argument] = [me, int(KEEP_S * 1000), int(max_wait_s * 1e6), line, times, most]
        for each in limits:
            owed, hold_us = self._shares[each.key].told() if each.key in self._shares else ("[]", 0)
            numbers = (*self._about(each), each.amount, FLOORS[priority] * each.rate.capacity)
            # As one argument: each costs the client 0.7 us.
            told.append(
                f"[{','.join([repr(float(number)) for number in numbers])},{owed},{hold_us}]"
            )
        try:
            [[granted, wait, at, leased, takers]] = self._store.call(
                self._call(_TAKE, limits, id, *told), on_outage="answer"
            )
        except StoreUnavailable:
            return self._locally(limits, max_wait_s), 0.0
        self._takers = int(takers)
        for each in limits:
            self._shares.pop(each.key, None)
        if not granted:
            return Grant(False, int(wait) / 1e6, limited_by=limits[int(at) - 1].name), 0.0
        return Grant(
            granted=True,
            wait_s=int(wait) / 1e6,
            at=int(at) / 1e6,
            limited_by="",
            id=id,
            _settle=lambda used: self._settle(limits, id, used),
        ), float(leased)

    def _limits(self, amounts: Mapping[str, float], scope: str) -> list[_Limit]:
        unknown = [name for name in amounts if name not in self.rates and name not in self.scoped]
        if unknown:
            raise InvalidValue(
                unknown[0],
                amounts[unknown[0]],
                f"bucket {self.name} limits {', '.join({**self.rates, **self.scoped})}",
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
            if not 0 <= each.amount < float("inf"):
                raise InvalidValue(each.name, each.amount, "must be a number of at least 0")
            if each.amount > each.rate.limit:
                raise NeverSatisfiable(
                    f"{each.name} of bucket {self.name}", each.amount, each.rate.limit
                )
        return chosen

    def _only(self) -> str:
        if len(self.rates) != 1:
            raise InvalidValue("amounts", {}, f"say how much of each: {', '.join(self.rates)}")
        return next(iter(self.rates))

    def _about(self, limit: _Limit) -> tuple[Argument, ...]:
        rate = limit.rate
        guard_s = min(GUARD_S, GUARD_SHARE * rate.per_s) if self._guard_s is None else self._guard_s
        return rate.limit, int(rate.per_s * 1e6), rate.capacity, int(guard_s * 1e6)

    def _call(self, script: Script, limits: Sequence[_Limit], id: str, *args: Argument) -> Call:
        keys = self._keys.bucket(self.name, id, (each.key for each in limits))
        return Call(script, keys, args)

    # --- afterwards ----------------------------------------------------------------------------

    def _settle(self, limits: Sequence[_Limit], id: str, used: Mapping[str, float]) -> bool:
        told = [
            argument
            for each in limits
            for argument in (each.rate.capacity, used.get(each.unit, ""))
        ]
        try:
            [settled] = self._store.call(self._call(_SETTLE, limits, id, *told), on_outage="answer")
        except StoreUnavailable:
            return False  # what was reserved stays taken: the safe side
        return bool(settled)

    def hold(self, retry_after_s: float, *, scope: str = "") -> None:
        """Let nothing pass for as long as a provider asked for, in every process; a shorter hold
        changes nothing.
        """
        names = dict.fromkeys(self.scoped if scope else self.rates, 0.0)
        try:
            self._store.call(
                self._call(_HOLD, self._limits(names, scope), "", int(retry_after_s * 1e6)),
                on_outage="answer",
            )
        except StoreUnavailable:
            for each in self._limits(names, scope):
                self._share(each).hold(retry_after_s)

    def status(self, scope: str = "") -> dict[str, dict[str, float]]:
        """Return limit -> level, capacity, used (in its last window), limit, per_s, hold_s.  Raises
        StoreUnavailable.
        """
        limits = self._limits(
            dict.fromkeys({**self.rates, **(self.scoped if scope else {})}, 0.0), scope
        )
        [found] = self._store.call(
            self._call(
                _LOOK, limits, "", *(about for each in limits for about in self._about(each))
            ),
            on_outage="answer",
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
            for each, (level, used, hold) in zip(limits, found, strict=True)
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


class LocalShare:
    """One process's part of a limit while Redis is away: the rate over the takers that were known
    last.

    It starts empty, since what the window holds already is not known here.  What it gave in its
    last window, and what is left of a hold, is told to the shared limit when Redis is back."""

    SLICES = 32

    def __init__(self, rate: Rate, takers: int, clock: Callable[[], float]) -> None:
        self._per_s, self._clock = rate.limit / rate.per_s / takers, clock
        self._capacity = max(1.0, rate.capacity / takers)
        self._level, self._at, self._held_until = 0.0, clock(), 0.0
        self._slice_s = rate.per_s / self.SLICES
        self._given: dict[int, float] = {}  # slice of time -> amount

    def wait_s(self, amount: float) -> float:
        """Return in how many seconds so much may be taken."""
        now = self._clock()
        self._level = min(self._capacity, self._level + max(0.0, now - self._at) * self._per_s)
        self._at = max(now, self._at)
        return (
            max(0.0, self._at - now)
            + max(0.0, min(amount, self._capacity) - self._level) / self._per_s
        )

    def take(self, amount: float) -> None:
        """Take; the level may become negative."""
        self._level -= amount
        now = int(self._clock() / self._slice_s)
        self._given = {at: given for at, given in self._given.items() if at >= now - self.SLICES}
        self._given[now] = self._given.get(now, 0.0) + amount

    def told(self) -> tuple[str, int]:
        """Return what it gave in its last window (JSON: [age, amount] ...), and for how long
        nothing may pass, in us.
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
        """Let nothing pass for a while."""
        self._held_until = max(self._held_until, self._clock() + seconds)
        self._level, self._at = 0.0, self._held_until


class LeasedBucket:
    """A cheap way to a high rate: takes batches from the only limit of a bucket, and spends them in
    this process.

    It never admits more than the bucket grants, and what it has not spent within 0.1 s (LEASE_S)
    lapses.  A lease is spent up to that much after it was taken, so a window shorter than that may
    hold a batch more."""

    LEASE_S = 0.1

    def __init__(self, bucket: TokenBucket) -> None:
        self._bucket, self._rate = bucket, next(iter(bucket.rates.values()))
        self._left, self._spent, self._until, self._denied_until = 0.0, 0.0, 0.0, 0.0

    def acquire(self, amount: float = 1.0, *, priority: str = "critical") -> Grant:
        """Take an amount: from the batch at hand, or with the next batch in one round trip."""
        now = self._bucket.clock()
        if now < self._until and self._left >= amount:
            self._left -= amount
            self._spent += amount
            return Grant(True, 0.0)
        if now < self._denied_until:
            return Grant(False, self._denied_until - now, limited_by=self._bucket.name)
        grant, leased = self._bucket.lease(amount, self._batch(), priority=priority)
        self._left, self._spent, self._until = leased, amount, now + self.LEASE_S
        self._denied_until = 0.0 if grant else now + grant.wait_s
        return grant

    def _batch(self) -> float:
        """Return twice what the last batch was good for, and at most this process's part of the
        rate.
        """
        flow = self._rate.limit / self._rate.per_s * self.LEASE_S
        return min(2 * self._spent, max(0.0, min(flow, self._rate.capacity) / self._bucket.takers))
