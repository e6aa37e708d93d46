"""Identical calls of all processes are made once while one is in flight, and what they gave may be
kept.

Decides who makes a call, who waits for it, and whom its value serves: those who began before it
landed, and those who asked for what is kept, in a cache that all share or as a memo of their own.
Whoever begins later makes the call again: nothing is cached unasked.  Refuses to know what is
called; a key is a digest that its caller made, a value is bytes.

In one process this is Go's ``singleflight``; the lease is what many need, because a holder may die.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store

LOOK_AGAIN_S = 0.05
"""More or less by a fifth, so that those who wait do not all look at once."""
_BEGIN, _LOOK, _LAND, _ABANDON = (
    Script.load("resilience", f"flight_{verb}", prelude="flight")
    for verb in ("begin", "look", "land", "abandon")
)
_FORGET = Script.load("resilience", "flight_forget")


@dataclass(frozen=True, slots=True)
class Flight:
    """One caller's part in a call: it is the caller's to make (``mine``), others make it, or its
    value is there (``landed``).
    """

    key: str
    id: str
    state: Literal["mine", "others", "landed"] = "mine"
    value: bytes = field(default=b"", repr=False)  # once it has landed
    source: Literal["", "memo", "cache", "flight"] = ""  # where the value was found
    wait_s: float = 0.0  # until it is worth another look, while others make it
    seen: str = ""  # the last landing when it began
    by: str = ""  # on whose behalf
    again: bool = False  # who made it before did so on the same behalf, and is gone


class SingleFlight:
    """Calls by their keys; the same name on the same store is the same, in every process."""

    def __init__(self, name: str, store: Store, *, lease_s: float = 120.0) -> None:
        """Who makes a call is given up after `lease_s` seconds: let it be longer than any call.
        Raises InvalidValue.
        """
        if not lease_s > 0:
            raise InvalidValue("lease_s", lease_s, "must be above 0, and longer than any call")
        self.name, self._store, self._lease_ms = name, store, math.ceil(lease_s * 1000)
        self._keys = Keys(store.namespace)

    # --- asking --------------------------------------------------------------------------------

    def begin(self, key: str, *, cached: bool = False, memo: str = "", by: str = "") -> Flight:
        """Ask for a call, in one round trip: what a memo of this name holds, or (`cached`) the
        cache, else a flight.

        Who is told ``mine`` makes the call, then calls `land` or `abandon`; so does everybody while
        Redis is away.  `by` says on whose behalf: of those only one can be at it, so who asks again
        takes over from itself, and waits for no lease."""
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
        """Look again at a flight of ``others``: has it landed, and if its holder gave up or died,
        is it ``mine`` now?
        """
        made, landed, *_ = self._keys.flight(self.name, flight.key)
        told = (flight.id, self._lease_ms, flight.by, flight.seen)
        return self._asked(flight.key, flight.id, flight.by, Call(_LOOK, (made, landed), told))

    def _asked(self, key: str, id: str, by: str, call: Call) -> Flight:
        try:
            [[state, found, source]] = self._store.call(call, on_outage="answer")
        except StoreUnavailable:
            return Flight(key, id)  # made twice is better than not at all
        if state == b"landed":
            return Flight(key=key, id=id, state="landed", value=found, source=source.decode())
        if state == b"others":
            wait_s = LOOK_AGAIN_S * self._store.random.uniform(0.8, 1.2)
            return Flight(key, id, "others", wait_s=wait_s, seen=found.decode(), by=by)
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
        """Tell the value to those who wait (for 60 s), and keep it where asked, for so many
        seconds; else it is not stored.

        It may come late, when somebody else has begun to make the call.  The value of a flight that
        has ``landed`` before is only kept.  While Redis is away it is lost.  Raises InvalidValue.
        """
        with suppress(StoreUnavailable):
            self._store.call(
                self.landing(
                    flight, value, cache_ttl_s=cache_ttl_s, memo=memo, memo_ttl_s=memo_ttl_s
                ),
                on_outage="answer",
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
        """Return what `land` does, to share a round trip with others."""
        made, landed, cache, memo_key = self._keys.flight(self.name, flight.key, memo)
        kept = {memo_key: _ms("memo_ttl_s", memo_ttl_s)} if memo else {}
        if cache_ttl_s:
            kept[cache] = _ms("cache_ttl_s", cache_ttl_s)
        news = "" if flight.state == "landed" else flight.id
        return Call(_LAND, (made, landed, *kept), (news, value, *kept.values()))

    def abandon(self, flight: Flight) -> None:
        """Leave the call to whoever looks or begins next: it failed, or cannot be made now."""
        made, landed, *_ = self._keys.flight(self.name, flight.key)
        with suppress(StoreUnavailable):
            self._store.call(Call(_ABANDON, (made, landed), (flight.id,)), on_outage="answer")

    def forgetting(self, memos: Sequence[tuple[str, str]]) -> list[Call]:
        """Return what drops memos, (key, memo) each, to share a round trip with others."""
        return [
            Call(_FORGET, (self._keys.flight(self.name, key, memo)[3],), ()) for key, memo in memos
        ]


def _ms(name: str, seconds: float) -> int:
    if not seconds > 0:
        raise InvalidValue(name, seconds, "must be above 0: nothing is kept for ever")
    return math.ceil(seconds * 1000)
