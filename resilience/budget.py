"""Budgets of a tree of jobs in named units (tokens, calls, money ...), shared by all workers.

Calls to models charge it; begin with `SharedBudget.charge`.  An amount is reserved before a call,
and replaced by the amount used after it.  An account can be carved out of another, so that one
branch cannot spend the share of the next; later it folds back.

The amount spent is never counted too low.  If a holder dies, its reservation counts as spent in
full when the lease ends; only a late `settle` of the holder corrects it.  While Redis is away
nothing can be spent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from resilience.errors import InvalidValue, StoreUnavailable, count, figure
from resilience.keys import Keys
from resilience.store import Argument, Call, Script, Store

UNITS_FIRST = ("calls", "tokens", "money")
"""The units that a sentence names first; others follow by name."""
_OPEN, _CARVE, _FOLD, _CHARGE, _SETTLE, _STATUS = (
    Script.load("resilience", f"spend_{verb}", prelude="spend")
    for verb in ("open", "carve", "fold", "charge", "settle", "status")
)


@dataclass(frozen=True, slots=True)
class Charge:
    """The answer of a budget; true if it was granted."""

    # The id to settle it by.  It differs from the id passed if a charge of that id has lapsed.
    id: str
    state: Literal["granted", "wait", "exhausted"]
    limited_by: str = ""  # the unit that denies it

    def __bool__(self) -> bool:
        return self.state == "granted"


@dataclass(frozen=True, slots=True)
class Spending:
    """The amounts of a budget by unit, over all accounts.

    For each unit with a limit: limits = spent + held + left.  `str` makes a sentence of it.
    """

    limits: dict[str, float]
    spent: dict[str, float]  # used; and reserved by charges that have lapsed
    held: dict[str, float]  # reserved by charges in flight
    left: dict[str, float]  # below zero if calls have used more than they reserved
    by_label: dict[str, dict[str, float]]  # label -> unit -> amount settled under it
    accounts: dict[str, dict[str, float]]  # open account -> unit -> amount left in it

    def __str__(self) -> str:
        units = {unit: None for unit in UNITS_FIRST if unit in self.limits or unit in self.spent}
        units |= dict.fromkeys(sorted({**self.limits, **self.spent}))
        parts = [
            _of_unit(self.spent.get(unit, 0.0), unit, self.limits.get(unit))
            for unit in units
            if unit in self.limits or self.spent.get(unit)
        ]
        sentence = f"Spent {_listed(parts) or 'nothing yet'}"
        held = {unit: amount for unit, amount in self.held.items() if amount > 0}
        if calls := held.get("calls"):
            return f"{sentence}; {_of_unit(calls, 'calls')} {_are(calls)} in flight."
        if held:
            reserved = _listed([_of_unit(amount, unit) for unit, amount in sorted(held.items())])
            return f"{sentence}; reserved: {reserved}."
        return f"{sentence}."


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _of_unit(spent: float, unit: str, limit: float | None = None) -> str:
    """Return an amount for a person, such as `12 of 20 calls`."""
    one = unit.removesuffix("s")
    if limit is None:
        return count(spent, one, unit)
    return f"{figure(spent)} of {count(limit, one, unit)}"


def _are(amount: float) -> str:
    return "is" if amount == 1 else "are"


class SharedBudget:
    """The accounts of one tree.

    The same name on the same store means the same budget, in every process.  All of it expires
    `ttl_s` seconds after its last change.  A charge that is not settled within `lease_s` seconds
    (of the server's time) has lapsed: it counts as spent in full.  Amounts are doubles, stored with
    all digits, so the rounding error of a million charges is below a billionth of the limit.
    """

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
        """Create the root account, "", with its limits by unit.  Later calls change nothing.

        A unit without a limit is only counted.  Raises InvalidValue, StoreUnavailable.
        """
        self._store.call(self._call(_OPEN, _amounts(limits)), on_outage="patient")

    def carve(self, account: str, share: float = 1.0, *, of: str = "") -> dict[str, float]:
        """Move a share (0 to 1) of the free amount of an account into a new one.

        Returns the amounts of the new account by unit.  A later call moves nothing and returns the
        same amounts, also after the account was folded.  If the account `of` was folded, the share
        comes from its nearest open ancestor.  Raises InvalidValue, StoreUnavailable.
        """
        if not 0 <= share <= 1:
            raise InvalidValue("share", share, "must be from 0 to 1")
        [amounts] = self._store.call(
            self._call(_CARVE, _named("account", account), share, of), on_outage="patient"
        )
        return _unpacked(self._known(amounts, of))

    def fold(self, account: str) -> None:
        """Move all amounts of an account to its nearest open ancestor, with its charges in flight.

        Later charges to the account count on that ancestor.  A second call does nothing.  Raises
        InvalidValue, StoreUnavailable.
        """
        [folded] = self._store.call(
            self._call(_FOLD, _named("account", account)), on_outage="patient"
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
        """Reserve all amounts of an account before a call, or none.

        The id of a charge in flight returns that charge.  The id of a charge that has lapsed makes
        a new one, with the id in the answer.  With `again` the charge of this id lapses now: its
        holder is gone, and may have used the amounts.

        - ``wait``: it fits if charges in flight on this account use less than they reserved;
          retry soon.
        - ``exhausted``: it cannot fit, whatever they use.

        Amounts carved out of the account are not in it until they are folded.  Raises InvalidValue,
        StoreUnavailable.
        """
        args = (_named("id", id), account, _amounts(amounts), self._lease_ms, int(again))
        [answer] = self._store.call(self._call(_CHARGE, *args), on_outage="patient")
        name, *reasons = self._known(answer, account)
        if not reasons:
            return Charge(name.decode(), "granted")
        state, unit = min(reasons)  # by name, so `exhausted` comes before `wait`
        return Charge(name.decode(), state.decode(), unit.decode())

    def settle(self, charge_id: str, used: Mapping[str, float], *, label: str = "") -> bool:
        """Replace the reserved amounts of a charge by the amounts used.

        Returns whether that changed anything: only the first call does.  A unit that is not named
        was not used; more than the reserved amount is counted in full.  A charge that has lapsed is
        corrected.  With a label, the amounts are also summed under it.  While Redis is away nothing
        changes: the reserved amounts stay counted.  Raises InvalidValue.
        """
        try:
            [settled] = self._store.call(
                self.settling(charge_id, used, label=label), on_outage="patient"
            )
        except StoreUnavailable:
            return False
        return bool(settled)

    def settling(self, charge_id: str, used: Mapping[str, float], *, label: str = "") -> Call:
        """Return the call that settles a charge, see `settle`; it answers 1, or 0 for no change."""
        return self._call(_SETTLE, charge_id, _amounts(used), label)

    def withdraw(self, charge_id: str) -> None:
        """Give back all amounts of a charge, because no call was made."""
        self.settle(charge_id, {})

    # --- reading -------------------------------------------------------------------------------

    def status(self) -> Spending:
        """Return the amounts so far.  Before the budget is open it has no limits.

        Raises StoreUnavailable.
        """
        [[raw_accounts, raw_labels]] = self._store.call(self._call(_STATUS), on_outage="patient")
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
    """Return unit -> amount as JSON for a script.  Raises InvalidValue."""
    for unit, amount in amounts.items():
        if not (isinstance(amount, int | float) and 0 <= amount < float("inf")):
            raise InvalidValue(unit, amount, "must be a finite number of at least 0")
    return json.dumps({unit: float(amount) for unit, amount in amounts.items()})


def _unpacked(amounts: bytes) -> dict[str, Any]:
    """Return the amounts in a script's JSON, in which a whole number has no point."""
    unpacked: dict[str, Any] = json.loads(amounts, parse_int=float)
    return unpacked


def _by_name(pairs: list[bytes]) -> dict[str, dict[str, Any]]:
    """Return a dict of the fields and JSON values that HGETALL returned."""
    return {
        name.decode(): _unpacked(value) for name, value in zip(pairs[::2], pairs[1::2], strict=True)
    }


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for unit, amount in part.items():
            total[unit] = total.get(unit, 0.0) + amount
    return total
