"""A short run against a provider that counts; ``python -m tests.faults.llm`` runs for longer, with eight processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.llm import Stage, against_limits, beside_others, on_a_budget, p95, show, stage, through_faults

WINDOW_S = 1.0
GUARD_S = 0.1
"""A tenth of a short window, because two busy cores delay a request by more than the share that is left by default."""
LEAST_USE = 0.7
"""Of nine tenths: the calls in flight, and what is left to more urgent ones, weigh more in a short window."""


@pytest.fixture(scope="module")
def on() -> Iterator[Stage]:
    """A provider that counts tokens, and two workers of two processes."""
    with stage("tokens", WINDOW_S, guard_s=GUARD_S, slots=2) as own:
        yield own


def test_a_limit_of_tokens_is_used_up_and_never_exceeded(on: Stage) -> None:
    use = against_limits(on, 3)
    show(use)

    assert use.refused == 0, "no 429 after the first window"
    assert use.used >= LEAST_USE


def test_work_beside_a_job_that_waits_for_its_limits_finds_free_slots(on: Stage) -> None:
    found = beside_others(on, 1, 15, every_s=0.03)
    show(found)

    assert found.nodes <= 4 * 4 + 4, "free slots do not cut what waits for a limit: four parts a slot, as at first"
    assert p95(found.beside) <= 10 * p95(found.alone) + 50


def test_a_budget_holds_to_within_one_call_when_processes_die(on: Stage) -> None:
    spent = on_a_budget(on, "tokens", 1200.0, [0.4])
    show(spent)

    assert spent.counted <= spent.budget + spent.one_call
    assert spent.told >= spent.counted, "nothing is counted too low"
    assert spent.stopped == "budget"
    assert spent.merged, "what was done is merged, and nothing else"


def test_answers_that_come_too_late_are_paid_from_the_budget(on: Stage) -> None:
    spent = on_a_budget(on, "tokens", 600.0, late=True)
    show(spent)

    assert spent.counted <= spent.budget + spent.one_call
    assert spent.told >= spent.counted, "a call that nobody waited for has cost its tokens"
    assert spent.merged


@pytest.mark.parametrize(
    ("operation", "items", "kills"), [("llm.map", 150, {0.2: "process", 0.5: "worker"}), ("llm.map_reduce", 40, {0.5: "process"})]
)
def test_answers_are_exact_after_faults_and_kills(on: Stage, operation: str, items: int, kills: dict[float, str]) -> None:
    answers = through_faults(on, operation, items, kills)
    show(answers)

    assert (answers.wrong, answers.failed) == (0, 0)
    assert answers.kills == len(kills)
    assert len(answers.faults) >= 3, "calls have failed"
