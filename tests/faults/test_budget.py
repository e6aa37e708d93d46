"""Sixteen processes spend one budget as fast as they can; some are killed with a reservation."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Container, Iterator, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random

import pytest
import redis

from resilience.budget import Charge, SharedBudget
from resilience.store import Store
from rlm_tasks.testing import embedded
from tests.support import wait_until

PROCESSES, KILLED = 16, range(1, 7)
TOKENS = 48_000
MOST = 100
"""The largest reservation in tokens; the first call of process 0 exceeds its own by this number."""
PRICE = 0.1
NAMESPACE = "budget"


@pytest.fixture(scope="module")
def private_server() -> Iterator[embedded.Server]:
    """A server without the keys of other tests."""
    with embedded.server() as server:
        yield server


@pytest.fixture
def store(private_server: embedded.Server) -> Iterator[Store]:
    """An empty store, with a timeout that a busy machine does not exceed."""
    with redis.Redis.from_url(private_server.url) as client:
        client.flushall()
    found = Store(private_server.url, namespace=NAMESPACE)
    yield found
    found.client.close()


def spend(
    budget: SharedBudget, number: int, account: str, dies_at: int, journal: Path, start: Barrier
) -> None:
    """Use tokens until none are left; write each use to the journal when it is made."""
    random, made = Random(number), 0
    start.wait()
    with journal.open("w", buffering=1) as lines:
        for _ in ("its own account", "the rest of other accounts"):
            while charge := reserve(
                budget, f"{number}:{made}", reserved := random.randint(1, MOST), account
            ):
                made += 1
                used = (
                    reserved + MOST
                    if number == 0 and made == 1
                    else reserved - random.randint(0, reserved // 3)
                )
                if made == dies_at and number % 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                print(used, file=lines)
                if made == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                assert budget.settle(
                    charge.id, {"tokens": used, "calls": 1, "money": used * PRICE}, label="model"
                )
            if account:
                budget.fold(account)


def reserve(budget: SharedBudget, id: str, tokens: int, account: str) -> Charge:
    """Charge again until the answer is final, and return it."""
    while (
        charge := budget.charge(id, {"tokens": tokens, "calls": 1}, account=account)
    ).state == "wait":
        time.sleep(0.002)  # the rate of the charges
    return charge


def run(
    budget: SharedBudget, accounts: Sequence[str], killed: Container[int], folder: Path
) -> list[int]:
    """Let one process spend from each account; return the tokens that each call used."""
    fork = multiprocessing.get_context("fork")
    start, journals = (
        fork.Barrier(len(accounts)),
        [folder / str(number) for number in range(len(accounts))],
    )
    deaths = [2 + number if number in killed else 0 for number in range(len(accounts))]
    arguments = zip(range(len(accounts)), accounts, deaths, journals, strict=True)
    spenders = [
        fork.Process(target=spend, args=(budget, *each, start), daemon=True) for each in arguments
    ]
    for each in spenders:
        each.start()
    for each in spenders:
        each.join()
    assert [each.exitcode for each in spenders] == [
        -signal.SIGKILL if dies_at else 0 for dies_at in deaths
    ]
    return [int(line) for journal in journals for line in journal.read_text().splitlines()]


@pytest.mark.parametrize("killed", [(), KILLED], ids=["nobody killed", "some killed"])
@pytest.mark.parametrize("apart", [True, False], ids=["own accounts", "one account"])
def test_sixteen_processes_spend_a_budget_up_and_never_more(
    store: Store, tmp_path: Path, apart: bool, killed: Container[int]
) -> None:
    budget = SharedBudget("tree", store, lease_s=0.5 if killed else 120.0)
    budget.open({"tokens": TOKENS})
    accounts = [f"child-{number}" if apart else "" for number in range(PROCESSES)]
    for left, account in zip(range(PROCESSES, 0, -1), filter(None, accounts), strict=False):
        assert budget.carve(account, 1 / left) == {"tokens": TOKENS / PROCESSES}

    used = run(budget, accounts, killed, tmp_path)
    wait_until(lambda: budget.status().held["tokens"] == 0)
    for account in filter(None, accounts):
        budget.fold(account)  # a dead process does not

    really, found = sum(used), budget.status()
    print(
        f"{len(used)} calls used {really} of {TOKENS} tokens, {found.spent['tokens']:g} are counted"
    )
    assert really <= TOKENS + MOST, "one call may use more than it has reserved"
    assert found.spent["tokens"] + found.left["tokens"] == TOKENS
    assert found.accounts == {"": found.left}
    if killed:
        assert really <= found.spent["tokens"] <= really + len(KILLED) * MOST
    else:
        assert really >= 0.95 * TOKENS
        assert (found.spent["tokens"], found.spent["calls"]) == (really, len(used))
        assert found.spent["money"] == pytest.approx(really * PRICE, rel=1e-12)
        assert found.by_label == {"model": pytest.approx(found.spent, rel=1e-12)}


def test_a_charge_costs_as_much_with_many_in_flight_as_with_none(store: Store) -> None:
    budget, costs = SharedBudget("tree", store), []
    budget.open({"calls": 10_000})
    for in_flight in (0, 400):
        for number in range(in_flight):
            assert budget.charge(str(number), {"calls": 1})
        store.client.config_resetstat()
        assert budget.charge("one more", {"calls": 1})
        assert budget.settle("one more", {"calls": 1})
        costs.append(sum(about["calls"] for about in store.client.info("commandstats").values()))

    assert costs[0] == costs[1], "number of commands of the server, with those of scripts"
