"""A short run of `tests.faults.llm`; as a program it runs longer, with eight processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlm_tasks.jobs.splitting import ROOT_PARTS_PER_SLOT
from tests.faults.llm import (
    STREAMED,
    Stage,
    against_limits,
    in_a_storm,
    on_a_budget,
    show,
    stage,
    through_faults,
)
from tests.support import wait_until

WINDOW_S = 1.5
GUARD_S = 0.1
"""Workers count a window this much longer: in a short window the default guard is too small for the
delays of a busy machine.
"""
LEAST_USE = 0.7
"""Lower than in the long run: calls in flight, the guard and the reserve for urgent calls are a
larger share of a short window.
"""
SLOTS = 2


@pytest.fixture(scope="module")
def on() -> Iterator[Stage]:
    """A provider with a limit of requests that a busy machine can reach, and one worker.

    The worker has two processes."""
    with stage("requests", WINDOW_S, scale=0.4, guard_s=GUARD_S, workers=1, slots=SLOTS) as own:
        yield own


def test_a_limit_is_used_up_and_never_exceeded(on: Stage) -> None:
    use = against_limits(on, 3)
    show(use)

    assert use.refused == 0, "no 429 after the first window"
    assert use.used >= LEAST_USE


def test_free_slots_do_not_cut_a_job_that_waits_for_its_limits(on: Stage) -> None:
    job = on.map(range(5000))
    wait_until(lambda: job.progress().done >= 40)
    nodes = job.progress().pending
    job.cancel()
    job.wait(20)
    print(f"{nodes} nodes run or wait")

    assert nodes <= (ROOT_PARTS_PER_SLOT + 1) * SLOTS, (
        "more nodes would take slots from other jobs, and get no more tokens"
    )


def test_a_budget_holds_to_within_one_call_when_processes_die(on: Stage) -> None:
    spent = on_a_budget(on, "tokens", 700.0, [0.4])
    show(spent)

    assert spent.counted <= spent.budget + spent.one_call
    assert spent.reported >= spent.counted, "no count is too low"
    assert spent.stopped == "budget"
    assert spent.merged, "all done items are merged, and nothing else"


def test_late_answers_are_charged_to_the_budget(on: Stage) -> None:
    spent = on_a_budget(on, "tokens", 600.0, late=True)
    show(spent)

    assert spent.counted <= spent.budget + spent.one_call
    assert spent.reported >= spent.counted, "a late answer costs its tokens, too"
    assert spent.merged


@pytest.mark.parametrize("seed", [1, 2])
def test_a_budget_holds_to_within_one_call_in_a_storm_of_odd_answers(on: Stage, seed: int) -> None:
    spent = in_a_storm(on, seed, 600.0)
    show(spent)

    assert spent.counted <= spent.budget + spent.one_call
    assert spent.reported >= spent.counted, "the provider bills no more than is counted"
    assert spent.merged, "each item is done, failed or skipped"


def test_a_budget_holds_to_within_one_call_in_a_storm_of_odd_streams() -> None:
    with stage(workers=1, slots=SLOTS, RLM_BREAKERS__ENABLED="0", **STREAMED) as on:
        spent = in_a_storm(on, 3, 600.0, "streamed")
    show(spent)

    assert spent.counted <= spent.budget + spent.one_call
    assert spent.reported >= spent.counted, "the provider bills no more than is counted"
    assert spent.merged, "each item is done, failed or skipped"


@pytest.mark.parametrize(
    ("operation", "items", "kills"),
    [("llm.map", 60, {0.2: "process", 0.5: "worker"}), ("llm.map_reduce", 24, {0.4: "process"})],
)
def test_answers_are_exact_after_faults_and_kills(
    on: Stage, operation: str, items: int, kills: dict[float, str]
) -> None:
    answers = through_faults(on, operation, items, kills, every=15)
    show(answers)

    assert (answers.wrong, answers.failed) == (0, 0)
    assert answers.kills == len(kills)
    assert len(answers.faults) >= 3, "calls have failed"
