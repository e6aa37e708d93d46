"""Single flight: one of several identical calls is made, and its value serves all of them.

Calls to models use it, over all processes.  Begin with `SingleFlight.begin`.  A key is a digest
made by the caller, a value is bytes.

A value serves the callers that began before it landed.  It also serves later callers that ask for a
cache, which all share, or for a memo of their own.  Without these, a later caller makes the call
again: nothing is cached unasked.

In one process this is Go's ``singleflight``.  Over many processes the holder of a call has a lease,
because it may die.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from resilience.errors import InvalidValue, StoreUnavailable, refuse_unless_positive
from resilience.keys import Keys
from resilience.store import Call, Script, Store

LOOK_AGAIN_S = 0.05
"""Time between two polls of a waiter, up to a fifth more or less, so that waiters spread out."""
_BEGIN, _LOOK, _LAND, _ABANDON = (
    Script.load("resilience", f"flight_{verb}", prelude="flight")
    for verb in ("begin", "look", "land", "abandon")
)
_FORGET = Script.load("resilience", "flight_forget")


@dataclass(frozen=True, slots=True)
class Flight:
    """One caller's part in a call.

    ``mine``: this caller makes the call.  ``others``: another one does.  ``landed``: its value is
    there.
    """

    key: str
    id: str
    state: Literal["mine", "others", "landed"] = "mine"
    value: bytes = field(default=b"", repr=False)  # once it has landed
    source: Literal["", "memo", "cache", "flight"] = ""  # the place of the value
    wait_s: float = 0.0  # seconds until the next poll, while others make the call
    seen: str = ""  # id of the last landing when this caller began
    by: str = ""  # the owner for which the call is made
    again: bool = False  # taken over from an earlier holder of the same owner, which is gone


class SingleFlight:
    """Calls by key.  The same name on the same store means the same calls, in every process."""

    def __init__(self, name: str, store: Store, *, lease_s: float = 120.0) -> None:
        """After `lease_s` seconds another caller may make the call, so let it be longer than any
        call.  Raises InvalidValue.
        """
        refuse_unless_positive("lease_s", lease_s, "must be above 0, and longer than any call")
        self.name, self._store, self._lease_ms = name, store, math.ceil(lease_s * 1000)
        self._keys = Keys(store.namespace)

    # --- asking --------------------------------------------------------------------------------

    def begin(self, key: str, *, cached: bool = False, memo: str = "", by: str = "") -> Flight:
        """Return a flight, in one round trip: with the value of a memo or the cache if one has it.

        `memo` names a memo, `cached` allows the cache; the memo is read first.  On ``mine`` the
        caller makes the call, then calls `land` or `abandon`.  While Redis is away every caller
        gets ``mine``.

        `by` names the owner of the call, such as an item, of which only one process can run at a
        time.  So a second caller with the same owner takes over at once, without waiting for the
        lease of the first.
        """
        made, landed, cache, memo_key = self._keys.flight(self.name, key, memo)
        kept = ({"memo": memo_key} if memo else {}) | ({"cache": cache} if cached else {})
        id = secrets.token_hex(8)
        return self._asked(
            key,
            id,
            by,
            Call(_BEGIN, (made, landed, *kept.values()), (id, self._lease_ms, by, *kept)),
        )

    def look(self, flight: Flight) -> Flight:
        """Poll a flight of ``others`` and return its state.

        It is ``landed`` when the value is there, and ``mine`` if its holder gave up or died.
        """
        made, landed, *_ = self._keys.flight(self.name, flight.key)
        args = (flight.id, self._lease_ms, flight.by, flight.seen)
        return self._asked(flight.key, flight.id, flight.by, Call(_LOOK, (made, landed), args))

    def _asked(self, key: str, id: str, by: str, call: Call) -> Flight:
        try:
            [[state, value_or_landing, source]] = self._store.call(call, on_outage="patient")
        except StoreUnavailable:
            self._store.decided_alone("single_flight")
            return Flight(key, id)  # to make a call twice is better than not at all
        if state == b"landed":
            return Flight(
                key=key, id=id, state="landed", value=value_or_landing, source=source.decode()
            )
        if state == b"others":
            wait_s = LOOK_AGAIN_S * self._store.random.uniform(0.8, 1.2)
            seen = value_or_landing.decode()
            return Flight(key, id, "others", wait_s=wait_s, seen=seen, by=by)
        return Flight(key, id, by=by, again=state == b"again")

    # --- ending --------------------------------------------------------------------------------

    def land(
        self,
        flight: Flight,
        value: bytes,
        *,
        cache_ttl_s: float = 0,
        memo: str = "",
        memo_ttl_s: float = 0,
    ) -> None:
        """Give the value to the waiters, and keep it in the cache or a memo if asked.

        Waiters can read it for 60 s.  It is kept for `cache_ttl_s` in the cache, for `memo_ttl_s`
        in the memo, and not stored without them.  It may be late: another caller may already make
        the call.  The value of a flight that was ``landed`` is only kept.  While Redis is away the
        value is lost.  Raises InvalidValue.
        """
        with suppress(StoreUnavailable):
            self._store.call(
                self.landing(
                    flight, value, cache_ttl_s=cache_ttl_s, memo=memo, memo_ttl_s=memo_ttl_s
                ),
                on_outage="patient",
            )

    def landing(
        self,
        flight: Flight,
        value: bytes,
        *,
        cache_ttl_s: float = 0,
        memo: str = "",
        memo_ttl_s: float = 0,
    ) -> Call:
        """Return the call that lands a value, see `land`, for a round trip with others."""
        made, landed, cache, memo_key = self._keys.flight(self.name, flight.key, memo)
        kept = {memo_key: _ms("memo_ttl_s", memo_ttl_s)} if memo else {}
        if cache_ttl_s:
            kept[cache] = _ms("cache_ttl_s", cache_ttl_s)
        landing_id = "" if flight.state == "landed" else flight.id
        return Call(_LAND, (made, landed, *kept), (landing_id, value, *kept.values()))

    def abandon(self, flight: Flight) -> None:
        """Leave the call to the next caller: it failed, or cannot be made now."""
        with suppress(StoreUnavailable):
            self._store.call(self.abandoning(flight), on_outage="patient")

    def abandoning(self, flight: Flight) -> Call:
        """Return the call that abandons a flight, see `abandon`, for a round trip with others."""
        made, landed, *_ = self._keys.flight(self.name, flight.key)
        return Call(_ABANDON, (made, landed), (flight.id,))

    def forgetting(self, memos: Sequence[tuple[str, str]]) -> list[Call]:
        """Return the calls that drop memos, each a (key, memo), for a round trip with others."""
        return [
            Call(_FORGET, (self._keys.flight(self.name, key, memo)[3],), (), otherwise=None)
            for key, memo in memos
        ]


def _ms(name: str, seconds: float) -> int:
    if not seconds > 0:
        raise InvalidValue(name, seconds, "must be above 0: no value is kept for ever")
    return math.ceil(seconds * 1000)
