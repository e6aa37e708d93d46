"""Budgets of a tree of jobs: charges, the leases of dead holders, and accounts that are carved and
folded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from resilience.budget import Charge, SharedBudget, Spending
from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from tests.unit.world import World, world

__all__ = ["world"]

LEASE_S = 8.0


def opened(world: World, **limits: float) -> SharedBudget:
    budget = SharedBudget("job-7", world.store(), lease_s=LEASE_S)
    budget.open(limits)
    return budget


def answer_of(charge: Charge) -> tuple[str, str]:
    return charge.state, charge.limited_by


def test_settling_replaces_a_reservation_once(world: World) -> None:
    budget = opened(world, tokens=1000, money=2.5)
    charge = budget.charge("call-1", {"tokens": 800, "money": 0.5, "calls": 1})

    assert charge == Charge("call-1", "granted")
    assert charge
    assert budget.status().held == {"tokens": 800, "money": 0.5, "calls": 1}
    settled = [
        budget.settle(charge.id, {"tokens": used, "money": 0.25, "calls": 1}, label="small")
        for used in (700, 1)
    ]
    assert settled == [True, False]
    assert budget.status() == Spending(
        limits={"tokens": 1000, "money": 2.5},
        spent={"tokens": 700, "money": 0.25, "calls": 1},
        held={"tokens": 0, "money": 0, "calls": 0},
        left={"tokens": 300, "money": 2.25},
        by_label={"small": {"tokens": 700, "money": 0.25, "calls": 1}},
        accounts={"": {"tokens": 300, "money": 2.25}},
    )


def test_the_first_limits_hold_for_every_process(world: World) -> None:
    ours, theirs, other = (
        opened(world, tokens=10),
        opened(world, tokens=1000),
        SharedBudget("job-8", world.store()),
    )
    assert ours.charge("a", {"tokens": 10})

    assert answer_of(theirs.charge("b", {"tokens": 1})) == ("wait", "tokens")
    assert theirs.status().limits == {"tokens": 10}
    assert other.status() == Spending({}, {}, {}, {}, {}, {})
    assert str(other.status()) == "Spent nothing yet."


def test_a_charge_that_is_made_again_is_counted_beside_the_first(world: World) -> None:
    """`again=True` says that the first charge is lost; settling the first corrects it."""
    budget = opened(world, tokens=20)
    gone = budget.charge("a", {"tokens": 8})

    second = budget.charge("a", {"tokens": 8}, again=True)
    assert (second.id, bool(second)) == ("a~2", True)
    assert (budget.status().spent, budget.status().held) == ({"tokens": 8}, {"tokens": 8})
    assert answer_of(budget.charge("a", {"tokens": 8}, again=True)) == ("exhausted", "tokens")

    assert budget.settle(gone.id, {"tokens": 3})  # the first charge was not lost after all
    assert budget.status().left == {"tokens": 9}


def test_without_limits_every_charge_is_granted_and_counted(world: World) -> None:
    budget = opened(world)
    assert budget.carve("child") == {}
    budget.settle(budget.charge("a", {"tokens": 1e12}, account="child").id, {"tokens": 2e12})
    assert budget.charge("b", {"tokens": 5})

    spending = budget.status()
    assert (spending.limits, spending.left, spending.spent, spending.held) == (
        {},
        {},
        {"tokens": 2e12},
        {"tokens": 5},
    )


def test_the_same_id_is_the_same_charge(world: World) -> None:
    budget = opened(world, tokens=10)

    assert [budget.charge("a", {"tokens": 8}) for _ in range(3)] == [Charge("a", "granted")] * 3
    assert budget.status().held == {"tokens": 8}


def test_a_denial_names_the_unit_that_can_never_suffice_first(world: World) -> None:
    budget = opened(world, calls=1, money=5, tokens=100)
    assert budget.charge("a", {"calls": 1, "tokens": 50})
    before = world.dump()

    assert answer_of(budget.charge("b", {"tokens": 10, "calls": 1})) == ("wait", "calls")
    assert answer_of(budget.charge("b", {"tokens": 51, "calls": 1})) == ("wait", "calls")
    assert answer_of(budget.charge("b", {"tokens": 101, "calls": 1})) == ("exhausted", "tokens")
    assert world.dump() == before, "a denial changes nothing"


@pytest.mark.parametrize(
    ("used", "then"),
    [
        (3, ("granted", "")),
        (10, ("exhausted", "tokens")),
        (30, ("exhausted", "tokens")),
        (None, ("granted", "")),
    ],
)
def test_a_waiting_charge_is_decided_when_the_call_in_flight_settles(
    world: World, used: float | None, then: tuple[str, str]
) -> None:
    budget = opened(world, tokens=10)
    budget.charge("a", {"tokens": 10})
    assert answer_of(budget.charge("b", {"tokens": 7})) == ("wait", "tokens")
    if used is None:
        budget.withdraw("a")
    else:
        budget.settle("a", {"tokens": used})

    assert answer_of(budget.charge("b", {"tokens": 7})) == then


def test_the_reservation_of_a_dead_process_is_spent_when_its_lease_ends(world: World) -> None:
    budget = opened(world, tokens=10)
    budget.charge("dead", {"tokens": 8})
    world.sleep(LEASE_S - 0.001)
    assert answer_of(budget.charge("b", {"tokens": 3})) == ("wait", "tokens")
    world.sleep(0.001)

    assert answer_of(budget.charge("b", {"tokens": 3})) == ("exhausted", "tokens")
    assert budget.charge("b", {"tokens": 2})
    spending = budget.status()
    assert (spending.spent, spending.held, spending.by_label) == ({"tokens": 8}, {"tokens": 2}, {})


@pytest.mark.parametrize("used", [0.0, 5.0, 12.0])
def test_a_late_holder_corrects_the_amount_that_was_counted_for_it(
    world: World, used: float
) -> None:
    budget = opened(world, tokens=10)
    budget.charge("late", {"tokens": 8})
    world.sleep(5 * 86400)

    assert [budget.settle("late", {"tokens": used}, label="large") for _ in range(2)] == [
        True,
        False,
    ]
    assert budget.status().spent == {"tokens": used}
    assert budget.status().left == {"tokens": 10 - used}
    assert budget.status().by_label == {"large": {"tokens": used}}


def test_a_call_repeated_after_its_holder_died_is_counted_twice(world: World) -> None:
    budget = opened(world, tokens=30)
    first = budget.charge("a", {"tokens": 8})
    world.sleep(LEASE_S)
    again, asked = (budget.charge("a", {"tokens": 8}) for _ in range(2))

    assert (first.id, again.id, asked) == ("a", "a~2", again)
    assert (budget.status().spent, budget.status().held) == ({"tokens": 8}, {"tokens": 8})
    world.sleep(LEASE_S)
    assert budget.charge("a", {"tokens": 1}).id == "a~3"
    budget.settle(first.id, {"tokens": 5})
    budget.settle(again.id, {"tokens": 6})
    assert budget.status().spent == {"tokens": 11}, "each holder settles its own"


def test_one_call_counts_a_limited_number_of_lapsed_charges(world: World) -> None:
    budget, runs = opened(world, tokens=250), []
    for number in range(250):
        budget.charge(str(number), {"tokens": 1})
    world.sleep(LEASE_S)
    for _ in range(3):
        assert not budget.charge("late", {"tokens": 1}), (
            "lapsed charges that are not yet counted are still held"
        )
        runs.append(world.client().zcard(Keys("unit").spending("job-7")[3]))

    assert runs == [150, 50, 0]
    assert budget.status().spent == {"tokens": 250}


def test_an_account_below_zero_denies_only_charges_of_that_unit(world: World) -> None:
    budget = opened(world, tokens=10, calls=5)
    budget.settle(budget.charge("a", {"tokens": 10, "calls": 1}).id, {"tokens": 15, "calls": 1})

    assert budget.status().left == {"tokens": -5, "calls": 4}
    assert budget.carve("child", 0.5) == {"tokens": 0, "calls": 2}
    assert answer_of(budget.charge("b", {"tokens": 1, "calls": 1})) == ("exhausted", "tokens")
    assert budget.charge("b", {"tokens": 0, "calls": 1})


# --- accounts ---------------------------------------------------------------------------------


def test_carving_an_account_moves_its_share_once(world: World) -> None:
    budget = opened(world, tokens=100)
    budget.charge("a", {"tokens": 20})

    assert [budget.carve("x", 0.25), budget.carve("x", 1.0), budget.carve("y", 0.5, of="x")] == [
        {"tokens": 20},
        {"tokens": 20},
        {"tokens": 10},
    ]
    assert budget.status().accounts == {
        "": {"tokens": 60},
        "x": {"tokens": 10},
        "y": {"tokens": 10},
    }
    assert answer_of(budget.charge("b", {"tokens": 11}, account="x")) == ("exhausted", "tokens"), (
        "other accounts have enough, this one has not"
    )
    budget.fold("x")
    assert budget.carve("x") == {"tokens": 20}, "the same share as the first time"
    assert budget.status().accounts == {"": {"tokens": 70}, "y": {"tokens": 10}}


def test_folding_returns_the_rest_and_the_charges_in_flight_to_the_parent(world: World) -> None:
    budget = opened(world, tokens=100)
    budget.carve("x", 0.5)
    budget.settle(budget.charge("a", {"tokens": 5}, account="x").id, {"tokens": 5})
    budget.charge("b", {"tokens": 20}, account="x")
    budget.charge("dead", {"tokens": 10}, account="x")
    for _ in range(2):
        budget.fold("x")
    assert budget.status().accounts == {"": {"tokens": 65}}
    assert budget.status().held == {"tokens": 30}

    budget.settle("b", {"tokens": 1})
    assert budget.charge("c", {"tokens": 84}, account="x"), "it counts on the parent"
    world.sleep(LEASE_S)
    spending = budget.status()
    assert (spending.spent, spending.held, spending.left) == (
        {"tokens": 100},
        {"tokens": 0},
        {"tokens": 0},
    )


def test_an_account_with_folded_parents_belongs_to_the_nearest_open_one(world: World) -> None:
    budget = opened(world, tokens=16)
    for child, parent in (("x", ""), ("y", "x"), ("z", "y")):
        budget.carve(child, 0.5, of=parent)
    budget.fold("y")
    assert budget.status().accounts == {"": {"tokens": 8}, "x": {"tokens": 6}, "z": {"tokens": 2}}
    assert answer_of(budget.charge("a", {"tokens": 7}, account="y")) == ("exhausted", "tokens"), (
        "by the limit of x"
    )
    budget.fold("x")
    assert budget.carve("w", 0.5, of="y") == {"tokens": 7}
    budget.fold("z")

    assert budget.status().accounts == {"": {"tokens": 9}, "w": {"tokens": 7}}
    assert budget.charge("a", {"tokens": 9}, account="z")


def test_any_text_may_be_the_name_of_an_account(world: World) -> None:
    odd = 'a "b"/{c}:~|\\ \u00fc\U0001f600'
    budget = SharedBudget(odd, world.store())
    budget.open({odd: 1})
    budget.carve(odd)
    charge = budget.charge(odd, {odd: 1}, account=odd)
    assert budget.charge("b", {odd: 1}, account=odd).limited_by == odd
    budget.settle(charge.id, {odd: 1}, label=odd)
    budget.fold(odd)

    assert (charge.id, budget.status().by_label) == (odd, {odd: {odd: 1}})


# --- money ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "count"), [(0.3, 3), (1.0, 10), (2.3, 23)])
def test_amounts_of_a_tenth_fill_a_limit_exactly(world: World, limit: float, count: int) -> None:
    budget = opened(world, money=limit)
    for number in range(count):
        charge = budget.charge(str(number), {"money": 0.1})
        assert charge, "binary rounding does not matter"
        budget.settle(charge.id, {"money": 0.1})

    assert answer_of(budget.charge("more", {"money": 1e-6})) == ("exhausted", "money")


def test_amounts_keep_every_digit(world: World) -> None:
    third, budget = 1 / 3, opened(world, money=0.1 + 0.2)

    assert budget.status().limits == {"money": 0.1 + 0.2}
    assert budget.carve("x", third) == {"money": (0.1 + 0.2) * third}
    budget.settle(budget.charge("a", {"calls": third}).id, {"calls": 2 / 3}, label="m")
    assert budget.status().by_label == {"m": {"calls": 2 / 3}}


def test_rounding_leaves_nothing_in_flight(world: World) -> None:
    budget = opened(world, money=10.0)
    prices = {"a": 0.1, "b": 0.2}
    for id, price in prices.items():
        budget.charge(id, {"money": price})
    for id in prices:
        budget.withdraw(id)

    assert 0.1 + 0.2 - 0.1 - 0.2 > 0
    assert budget.status().held == {"money": 0}


def test_many_prices_add_up_without_rounding_errors(world: World) -> None:
    budget, total = opened(world, money=5000.0), Fraction(0)
    for number in range(200):
        account = budget.carve(f"x{number}", 1 / 3) and f"x{number}"
        price = 0.1 + number * 1e-7
        budget.charge(str(number), {"money": 3 * price}, account=account)
        budget.settle(str(number), {"money": price})
        budget.fold(account)
        total += Fraction(price)

    spending = budget.status()
    assert spending.spent["money"] == pytest.approx(float(total), rel=1e-13)
    assert spending.left["money"] == pytest.approx(float(5000 - total), rel=1e-13)
    assert spending.held == {"money": 0}


# --- calls of Redis ---------------------------------------------------------------------------


def every_call(budget: SharedBudget) -> list[Callable[[], object]]:
    """Return one call of each method, in an order in which every call has an effect."""
    return [
        lambda: budget.open({"tokens": 10}),
        lambda: budget.carve("x", 0.5),
        lambda: budget.charge("a", {"tokens": 1}, account="x"),
        lambda: budget.settle("a", {"tokens": 1}, label="m"),
        lambda: budget.charge("b", {"tokens": 1}),
        lambda: budget.withdraw("b"),
        lambda: budget.charge("c", {"tokens": 1}),
        lambda: budget.fold("x"),
    ]


def test_each_call_is_one_round_trip(world: World) -> None:
    store = world.store()
    budget = SharedBudget("job-7", store)
    calls = [*every_call(budget), budget.status]
    for call in calls:
        call()

    assert store.round_trips == len(calls)


def test_each_change_renews_the_expiry_of_every_key(world: World) -> None:
    client, keys = world.client(), Keys("unit").spending("job-7")
    for call in every_call(SharedBudget("job-7", world.store(), ttl_s=3600)):
        call()
        assert [key for key in client.scan_iter() if client.ttl(key) < 3000] == []
        for key in client.scan_iter():
            client.expire(key, 60)

    assert sorted(key.decode() for key in client.scan_iter()) == sorted(keys)
    assert all(key.startswith("unit:{spending:job-7}:") for key in keys), (
        "one script may use them together"
    )


def test_settling_can_share_a_round_trip_with_other_calls(world: World) -> None:
    budget, store = opened(world, tokens=10), world.store()
    budget.charge("a", {"tokens": 5})
    budget.charge("b", {"tokens": 5})
    calls = [budget.settling(id, {"tokens": 1}, label="m") for id in ("a", "b", "a")]

    assert store.call(*calls) == [1, 1, 0]
    assert store.round_trips == 1
    assert budget.status().by_label == {"m": {"tokens": 2}}


def test_without_redis_nothing_is_charged_and_reservations_stay_counted(world: World) -> None:
    store = world.store()
    budget, other = SharedBudget("job-7", store), opened(world, tokens=10)
    budget.charge("a", {"tokens": 5})
    store.lost = True
    for call in (
        lambda: budget.open({}),
        lambda: budget.carve("x"),
        lambda: budget.fold("x"),
        lambda: budget.charge("b", {"tokens": 1}),
        budget.status,
    ):
        with pytest.raises(StoreUnavailable):
            call()
    assert budget.settle("a", {"tokens": 1}) is False
    budget.withdraw("a")

    assert other.status().held == {"tokens": 5}


@pytest.mark.parametrize("amount", [-1, float("nan"), float("inf"), "5", None])
def test_a_wrong_amount_is_refused(world: World, amount: Any) -> None:
    budget = opened(world, tokens=10)
    for call in (
        budget.open,
        lambda wrong: budget.charge("a", wrong),
        lambda wrong: budget.settle("a", wrong),
    ):
        with pytest.raises(InvalidValue, match=r"tokens=.*: must be a finite number of at least 0"):
            call({"tokens": amount})


def test_unknown_accounts_empty_names_and_wrong_shares_are_refused(world: World) -> None:
    budget, unopened = opened(world, tokens=10), SharedBudget("job-8", world.store())
    unknown = "account='x': budget job-7 has no such account: open the budget, or carve it, first"
    for message, call in [
        (unknown, lambda: budget.charge("a", {"tokens": 1}, account="x")),
        (unknown, lambda: budget.fold("x")),
        (unknown, lambda: budget.carve("y", of="x")),
        ("account='': budget job-8 has no such account", lambda: unopened.charge("a", {})),
        ("account='': must not be empty", lambda: budget.carve("")),
        ("account='': must not be empty", lambda: budget.fold("")),
        ("id='': must not be empty", lambda: budget.charge("", {})),
        ("share=1.5: must be from 0 to 1", lambda: budget.carve("y", 1.5)),
        ("share=nan: must be from 0 to 1", lambda: budget.carve("y", float("nan"))),
        ("ttl_s=0: must be above 0", lambda: SharedBudget("job-7", world.store(), ttl_s=0)),
        ("lease_s=-1: must be above 0", lambda: SharedBudget("job-7", world.store(), lease_s=-1)),
    ]:
        with pytest.raises(InvalidValue, match=message):
            call()
    assert unopened.settle("a", {"tokens": 1}) is False


# --- against an oracle ------------------------------------------------------------------------

Amounts = dict[str, Fraction]
CLOSE = Fraction(1, 10**9)
LIMITS = {"tokens": 64.0, "money": 20.0}
IDS, NUMBERS = st.sampled_from("abcdefgh"), st.integers(0, 5)
AMOUNTS = st.dictionaries(
    st.sampled_from(["tokens", "money", "calls"]), st.integers(0, 96).map(lambda n: Fraction(n, 16))
)
"""Sixteenths, and shares of one half: no sum of them is rounded within one example.
"""


def nothing() -> Amounts:
    return defaultdict(Fraction)


def add(sums: Amounts, amounts: Mapping[str, Fraction], sign: int = 1) -> None:
    for unit, amount in amounts.items():
        sums[unit] += sign * amount


def as_floats(amounts: Amounts) -> dict[str, float]:
    return {unit: float(amount) for unit, amount in amounts.items()}


def without_zeros(amounts: Mapping[str, float]) -> dict[str, float]:
    return {unit: amount for unit, amount in amounts.items() if amount}


@dataclass
class Account:
    """An account as the oracle sees it."""

    parent: str
    got: Amounts
    free: Amounts
    held: Amounts = field(default_factory=nothing)
    spent: Amounts = field(default_factory=nothing)
    folded: bool = False

    def add_free(self, amounts: Mapping[str, Fraction], sign: int = 1) -> None:
        add(
            self.free, {unit: amount for unit, amount in amounts.items() if unit in self.free}, sign
        )


@dataclass
class Reserved:
    """A charge that is granted and not yet settled."""

    account: str
    amounts: Amounts
    until: float
    lapsed: bool = False


class Oracle:
    """The rules of a budget, in plain Python and exact numbers."""

    def __init__(self) -> None:
        root = {unit: Fraction(limit) for unit, limit in LIMITS.items()}
        self.accounts = {"": Account("", root, dict(root))}
        self.charges: dict[str, Reserved] = {}
        self.settled: list[tuple[Amounts, Amounts]] = []  # reserved, used
        self.by_label: dict[str, Amounts] = defaultdict(nothing)

    def nearest_open(self, name: str) -> str:
        while self.accounts[name].folded:
            name = self.accounts[name].parent
        return name

    def open_account(self, name: str) -> Account:
        return self.accounts[self.nearest_open(name)]

    def lapse(self, now: float) -> None:
        for each in self.charges.values():
            if not each.lapsed and each.until <= now:
                each.lapsed = True
                add(self.open_account(each.account).held, each.amounts, -1)
                add(self.open_account(each.account).spent, each.amounts)

    def carve(self, name: str, share: Fraction, of: str) -> None:
        parent = self.open_account(of)
        got = {unit: max(Fraction(0), free) * share for unit, free in parent.free.items()}
        parent.add_free(got, -1)
        self.accounts[name] = Account(self.nearest_open(of), got, dict(got))

    def fold(self, name: str) -> None:
        account = self.accounts[name]
        account.folded = True
        parent = self.open_account(name)
        for sums, amounts in (
            (parent.free, account.free),
            (parent.held, account.held),
            (parent.spent, account.spent),
        ):
            add(sums, amounts)

    def next_id(self, id: str) -> str:
        """Return the id under which a charge is made; a lapsed charge keeps its own id."""
        names = (id if number == 1 else f"{id}~{number}" for number in range(1, 100))
        return next(
            name for name in names if name not in self.charges or not self.charges[name].lapsed
        )

    def denials(self, amounts: Amounts, account: Account) -> list[tuple[str, str]]:
        """Return the reasons to deny a charge, the worst first."""
        short = {
            unit: amount * (1 - CLOSE)
            for unit, amount in amounts.items()
            if unit in account.free and amount
        }
        return sorted(
            ("exhausted" if least > account.free[unit] + account.held[unit] else "wait", unit)
            for unit, least in short.items()
            if least > account.free[unit]
        )

    def reserve(self, id: str, amounts: Amounts, account: str, until: float) -> None:
        self.open_account(account).add_free(amounts, -1)
        add(self.open_account(account).held, amounts)
        self.charges[id] = Reserved(account, amounts, until)

    def settle(self, id: str, used: Amounts, label: str) -> None:
        charge = self.charges.pop(id)
        account = self.open_account(charge.account)
        add(account.spent if charge.lapsed else account.held, charge.amounts, -1)
        account.add_free(charge.amounts)
        account.add_free(used, -1)
        add(account.spent, used)
        self.settled.append((charge.amounts, used))
        if label:
            add(self.by_label[label], used)


class BudgetMachine(RuleBasedStateMachine):
    """A budget of two processes, beside the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.world = pytest.MonkeyPatch(), World()
        self.world.install(self.patch)
        self.budgets, self.oracle, self.turn = (
            [opened(self.world, **LIMITS) for _ in range(2)],
            Oracle(),
            0,
        )

    def teardown(self) -> None:
        self.patch.undo()

    @property
    def budget(self) -> SharedBudget:
        """The budget of each process in turn."""
        self.turn += 1
        return self.budgets[self.turn % 2]

    def account(self, number: int) -> str:
        """Return the name of one of the accounts so far, by any number; mostly a recent one."""
        return list(self.oracle.accounts)[-1 - number % len(self.oracle.accounts)]

    @rule(share=st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(1)]), number=NUMBERS)
    def carve(self, share: Fraction, number: int) -> None:
        name, of = f"account-{len(self.oracle.accounts)}", self.account(number)
        self.oracle.carve(name, share, of)
        assert self.budget.carve(name, float(share), of=of) == self.oracle.accounts[name].got
        if of:
            assert self.budget.carve(of) == self.oracle.accounts[of].got, (
                "the same share as the first time"
            )

    @rule(number=NUMBERS)
    def fold(self, number: int) -> None:
        name = self.oracle.nearest_open(self.account(number))
        if name:
            self.oracle.fold(name)
            self.budget.fold(name)
            self.budget.fold(name)

    @rule(wanted=st.lists(st.tuples(IDS, AMOUNTS, NUMBERS), min_size=2, max_size=6))
    def charge(self, wanted: list[tuple[str, Amounts, int]]) -> None:
        for id, amounts, number in wanted:
            name, account = self.oracle.next_id(id), self.account(number)
            right = Charge(name, "granted")
            if name not in self.oracle.charges:
                if denials := self.oracle.denials(amounts, self.oracle.open_account(account)):
                    right = Charge(name, *denials[0])
                else:
                    self.oracle.reserve(name, amounts, account, self.world.now + LEASE_S)
            assert self.budget.charge(id, as_floats(amounts), account=account) == right

    @precondition(lambda self: self.oracle.charges)
    @rule(number=NUMBERS, used=AMOUNTS, label=st.sampled_from(["", "small", "large"]))
    def settle(self, number: int, used: Amounts, label: str) -> None:
        id = list(self.oracle.charges)[number % len(self.oracle.charges)]
        self.oracle.settle(id, used, label)
        assert [self.budget.settle(id, as_floats(used), label=label) for _ in range(2)] == [
            True,
            False,
        ]

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]))
    def pass_time(self, seconds: float) -> None:
        self.world.sleep(seconds)
        self.oracle.lapse(self.world.now)

    @invariant()
    def state_equals_that_of_the_oracle(self) -> None:
        spending, open_ones = (
            self.budget.status(),
            {n: a for n, a in self.oracle.accounts.items() if not a.folded},
        )
        assert spending.limits == LIMITS
        assert spending.accounts == {name: account.free for name, account in open_ones.items()}
        assert spending.by_label == self.oracle.by_label
        for part in ("spent", "held", "free"):
            total = nothing()
            for account in open_ones.values():
                add(total, getattr(account, part))
            assert without_zeros(
                getattr(spending, "left" if part == "free" else part)
            ) == without_zeros(total)

    @invariant()
    def no_amount_is_lost(self) -> None:
        spending, counted, beyond = self.budget.status(), nothing(), nothing()
        for charge in self.oracle.charges.values():
            add(counted, charge.amounts)
        for reserved, used in self.oracle.settled:
            add(counted, used)
            add(
                beyond,
                {
                    unit: max(Fraction(0), amount - reserved.get(unit, 0))
                    for unit, amount in used.items()
                },
            )
        for unit, amount in counted.items():
            assert spending.spent.get(unit, 0.0) + spending.held.get(unit, 0.0) == amount
        for unit, limit in LIMITS.items():
            assert spending.spent[unit] + spending.held[unit] + spending.left[unit] == limit, (
                "carving and folding keep all of it"
            )
            assert counted[unit] <= limit + beyond[unit] + Fraction(1, 10**6)


TestAgainstAnOracle = BudgetMachine.TestCase
TestAgainstAnOracle.settings = settings(max_examples=30, stateful_step_count=40)


@pytest.mark.parametrize(
    ("limits", "spent", "held", "sentence"),
    [
        (
            {"calls": 20.0},
            {"money": 0.0123, "tokens": 4310.0, "calls": 12.0},
            {"calls": 2.0, "tokens": 800.0},
            "Spent 12 of 20 calls, 4,310 tokens and 0.0123 money; 2 calls are in flight.",
        ),
        ({}, {"calls": 1.0, "tokens": 1.0}, {"calls": 1.0}, "1 call and 1 token; 1 call is in"),
        ({"tokens": 6000.0}, {}, {}, "Spent 0 of 6,000 tokens."),
        ({"calls": 1.0}, {"calls": 1.0}, {}, "Spent 1 of 1 call."),
        ({}, {"calls": 9.0, "repairs": 2.0, "money": 0.0}, {}, "Spent 9 calls and 2 repairs."),
        ({"money": 1.0}, {"money": 0.00000044}, {}, "Spent 0.00000044 of 1 money."),
        ({}, {"money": 0.000006}, {}, "Spent 0.000006 money."),
        ({}, {"money": 1e-12}, {}, "Spent 1e-12 money."),
        ({"money": 12.5}, {"money": 3.14159}, {}, "Spent 3.14 of 12.50 money."),
        ({}, {"calls": 0.1 + 0.2}, {}, "Spent 0.3 calls."),
        ({"pages": 5.0}, {"pages": 2.0}, {"pages": 1.0}, "Spent 2 of 5 pages; reserved: 1 page."),
    ],
)
def test_spending_as_a_sentence(
    limits: dict[str, float], spent: dict[str, float], held: dict[str, float], sentence: str
) -> None:
    assert sentence in str(Spending(limits, spent, held, {}, {}, {}))
    assert len(str(Spending(limits, spent, held, {}, {}, {}))) <= 80
