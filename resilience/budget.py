"""What a tree of jobs may spend, in named units (tokens, calls, money ...), shared by all workers.

Decides who may spend how much: an amount is reserved before a call and replaced by what was used
after it.  Accounts are carved out of each other, so that a branch cannot spend what another needs,
and fold back into what they came from.

Nothing is ever counted too low: a reservation whose holder died is spent in full when its lease is
over, and only a late `settle` of its holder corrects it.  Who cannot ask Redis may not spend.
Refuses to know what is bought."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.store import Argument, Call, Script, Store

_OPEN, _CARVE, _FOLD, _CHARGE, _SETTLE, _STATUS = (
    Script.load("resilience", f"spend_{verb}", prelude="spend")
    for verb in ("open", "carve", "fold", "charge", "settle", "status")
)


@dataclass(frozen=True, slots=True)
class Charge:
    """What a budget answered; true when granted."""

    id: str  # to settle it by: the one that was asked for, or another when a charge of that id has lapsed
    state: Literal["granted", "wait", "exhausted"]
    limited_by: str = ""  # the unit that says no

    def __bool__(self) -> bool:
        return self.state == "granted"


@dataclass(frozen=True, slots=True)
class Spending:
    """What became of a budget, by unit, over all accounts.  limits = spent + held + left, for each
    unit that is limited.
    """

    limits: dict[str, float]
    spent: dict[str, float]  # used; and reserved by charges that have lapsed
    held: dict[str, float]  # reserved by charges in flight
    left: dict[str, float]  # below zero when calls have used more than they reserved
    by_label: dict[str, dict[str, float]]  # label -> unit -> amount settled under it
    accounts: dict[str, dict[str, float]]  # open account -> unit -> amount left in it


class SharedBudget:
    """The accounts of one tree; the same name on the same store is the same budget, in every
    process.

    All of it is forgotten `ttl_s` seconds after its last change.  A charge that is not settled
    within `lease_s` seconds (by the server's time) has lapsed: it counts as spent in full.  Amounts
    are doubles, and stored with all their digits: what a million charges lose to rounding is below
    a billionth of the limit."""

    def __init__(
        self, name: str, store: Store, *, ttl_s: float = 7 * 86400, lease_s: float = 120.0
    ) -> None:
        for field, value in (("ttl_s", ttl_s), ("lease_s", lease_s)):
            if not value > 0:
                raise InvalidValue(field, value, "must be above 0")
        self.name, self._store = name, store
        self._keys, self._ttl_ms, self._lease_ms = (
            Keys(store.namespace).spending(name),
            int(ttl_s * 1000),
            int(lease_s * 1000),
        )

    # --- accounts ------------------------------------------------------------------------------

    def open(self, limits: Mapping[str, float]) -> None:
        """Make the root account, "", with its limits by unit; only the first call does.

        A unit that is not named is counted, and not limited.  Raises InvalidValue,
        StoreUnavailable."""
        self._store.call(self._call(_OPEN, _amounts(limits)), on_outage="answer")

    def carve(self, account: str, share: float = 1.0, *, of: str = "") -> dict[str, float]:
        """Move a share (0 to 1) of what is free in an account into a new one; return what that got,
        by unit.

        Once: a later call returns what the account got first, also when it was folded.  What is
        carved of a folded account comes from its nearest open ancestor.  Raises InvalidValue,
        StoreUnavailable."""
        if not 0 <= share <= 1:
            raise InvalidValue("share", share, "must be from 0 to 1")
        [got] = self._store.call(
            self._call(_CARVE, _named("account", account), share, of), on_outage="answer"
        )
        return _unpacked(self._known(got, of))

    def fold(self, account: str) -> None:
        """Let what an account has left flow back to its parent, its charges in flight included;
        once.

        Whatever is charged to it from then on counts on its nearest open ancestor.  Raises
        InvalidValue, StoreUnavailable."""
        [folded] = self._store.call(
            self._call(_FOLD, _named("account", account)), on_outage="answer"
        )
        self._known(folded, account)

    def _known(self, answer: Any, account: str) -> Any:
        if answer is None:
            raise InvalidValue(
                "account",
                account,
                f"budget {self.name} has no such account: open the budget, or carve it, first",
            )
        return answer

    # --- charges -------------------------------------------------------------------------------

    def charge(
        self, id: str, amounts: Mapping[str, float], *, account: str = "", again: bool = False
    ) -> Charge:
        """Reserve all amounts of an account, or nothing, before a call.

        Asking again with the id of a charge in flight is the same charge; when that has lapsed it
        is a new one, whose id the charge tells; `again` says that it has: who asked before is gone,
        and may have used it.  `wait`: it fits when charges in flight on this account use less than
        they reserved; come back soon.  `exhausted`: what was spent leaves too little whatever they
        use.  What was carved out of the account is not in it until it is folded.  Raises
        InvalidValue, StoreUnavailable."""
        told = (_named("id", id), account, _amounts(amounts), self._lease_ms, int(again))
        [answer] = self._store.call(self._call(_CHARGE, *told), on_outage="answer")
        name, *reasons = self._known(answer, account)
        if not reasons:
            return Charge(name.decode(), "granted")
        state, unit = min(reasons)  # `exhausted` is the first by name, too
        return Charge(name.decode(), state.decode(), unit.decode())

    def settle(self, charge_id: str, used: Mapping[str, float], *, label: str = "") -> bool:
        """Replace what a charge reserved by what was used, and say whether that changed anything:
        once.

        A unit that is not named was not used; more than was reserved is counted as it is.  A charge
        that has lapsed is corrected.  With a label, what was used is tallied under it, too.  While
        Redis is away nothing is changed: what was reserved stays counted.  Raises InvalidValue."""
        try:
            [settled] = self._store.call(
                self.settling(charge_id, used, label=label), on_outage="answer"
            )
        except StoreUnavailable:
            return False
        return bool(settled)

    def settling(self, charge_id: str, used: Mapping[str, float], *, label: str = "") -> Call:
        """Return the call that settles a charge, and answers 1, or 0 when it changed nothing; see
        `settle`.
        """
        return self._call(_SETTLE, charge_id, _amounts(used), label)

    def withdraw(self, charge_id: str) -> None:
        """Give back all that a charge reserved, because nothing was called."""
        self.settle(charge_id, {})

    # --- looking -------------------------------------------------------------------------------

    def status(self) -> Spending:
        """Return what was spent so far; nothing is limited before the budget is open.  Raises
        StoreUnavailable.
        """
        [[raw_accounts, raw_labels]] = self._store.call(self._call(_STATUS), on_outage="answer")
        accounts, by_label = _by_name(raw_accounts), _by_name(raw_labels)
        spent, held, left = (
            _sum(account[part] for account in accounts.values())
            for part in ("spent", "held", "free")
        )
        units = dict.fromkeys([*left, *spent, *held], 0.0)
        return Spending(
            limits=accounts[""]["got"] if accounts else {},
            spent=units | spent,
            held=units | held,
            left=left,
            by_label=by_label,
            accounts={name: account["free"] for name, account in accounts.items()},
        )

    def _call(self, script: Script, *args: Argument) -> Call:
        return Call(script, self._keys, (self._ttl_ms, *args))


def _named(field: str, name: str) -> str:
    if not name:
        raise InvalidValue(field, name, "must not be empty")
    return name


def _amounts(amounts: Mapping[str, float]) -> str:
    """Return unit -> amount as a script is told it.  Raises InvalidValue."""
    for unit, amount in amounts.items():
        if not (isinstance(amount, int | float) and 0 <= amount < float("inf")):
            raise InvalidValue(unit, amount, "must be a finite number of at least 0")
    return json.dumps({unit: float(amount) for unit, amount in amounts.items()})


def _unpacked(amounts: bytes) -> dict[str, Any]:
    """Return what a script told as JSON; a whole number is told without a point."""
    found: dict[str, Any] = json.loads(amounts, parse_int=float)
    return found


def _by_name(pairs: list[bytes]) -> dict[str, dict[str, Any]]:
    """Return a hash of JSON, as HGETALL tells it."""
    return {
        name.decode(): _unpacked(value) for name, value in zip(pairs[::2], pairs[1::2], strict=True)
    }


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for unit, amount in part.items():
            total[unit] = total.get(unit, 0.0) + amount
    return total
