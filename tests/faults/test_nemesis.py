"""A few random histories of the nemesis; `make nemesis` runs thousands of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.nemesis.__main__ import real_server, shrunk
from tests.faults.nemesis.histories import Outcome, run_history
from tests.faults.nemesis.network import Network


def broken(outcomes: list[Outcome]) -> dict[int, list[str]]:
    return {each.seed: each.violations for each in outcomes if each.violations}


def test_no_fault_of_network_server_or_clock_breaks_a_promise() -> None:
    outcomes = [run_history(seed) for seed in range(1, 13)]

    assert broken(outcomes) == {}
    assert sum(each.faults for each in outcomes) > 50


def test_no_fault_of_a_real_server_breaks_a_promise() -> None:
    with real_server() as server:
        outcomes = [run_history(seed, real=server) for seed in range(1, 7)]

    assert broken(outcomes) == {}
    assert sum(each.faults for each in outcomes) > 20


def test_a_seed_gives_the_same_history_again() -> None:
    first, second = (run_history(4) for _ in range(2))

    assert first.trace == second.trace
    assert first.faults > 0


def test_a_broken_ledger_is_found_and_its_history_is_shrunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = Network._execute

    def forgetful(self: Network, commands: Any, names: str) -> list[Any]:
        """Lose the partial of each node that a network fault hits."""
        if names.startswith("finish") and self.plan.drawn:
            args, options = commands[0]
            at = 3 + int(args[2]) + 3  # behind the keys: node, token, report, partial
            commands = [((*args[:at], b"", *args[at + 1 :]), options), *commands[1:]]
        return send(self, commands, names)

    monkeypatch.setattr(Network, "_execute", forgetful)
    found = next(each for each in map(run_history, range(1, 100)) if each.violations)
    smallest = shrunk(found)

    assert smallest.violations
    assert smallest.faults <= found.faults
