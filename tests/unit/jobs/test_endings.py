"""Each final status has its words, its error and its name in Celery, in one table."""

from __future__ import annotations

import pytest
from celery import states

from rlm_tasks.errors import JobEnded
from rlm_tasks.jobs.endings import CAUSES, CELERY_STATES, ENDINGS, TONES, sentence
from rlm_tasks.results import Status

COUNTS = {"n": "9", "done": "5", "failed": "2", "skipped": "2"}
FINAL = [status for status in Status if status.final]


def test_each_final_status_has_an_ending_and_each_status_a_name_and_a_colour() -> None:
    assert list(ENDINGS) == FINAL
    assert set(CELERY_STATES) == set(TONES) == set(Status)


def test_celery_agrees_on_the_states_of_ended_jobs() -> None:
    assert set(CELERY_STATES.values()) <= states.ALL_STATES
    assert {status for status in Status if CELERY_STATES[status] in states.READY_STATES} == set(
        FINAL
    )


def test_each_error_of_an_ended_job_belongs_to_one_ending() -> None:
    raised = [ending.error for ending in ENDINGS.values() if ending.error is not None]

    assert sorted(each.__name__ for each in raised) == sorted(
        each.__name__ for each in JobEnded.__subclasses__()
    )
    assert [status for status, ending in ENDINGS.items() if ending.error is None] == [
        Status.SUCCEEDED
    ]


@pytest.mark.parametrize(
    ("facts", "begins"),
    [
        ({"state": "succeeded"}, "It succeeded: 5 of 9 items done, 2 failed, 2 skipped."),
        ({"state": "succeeded", "stop": "early"}, "It succeeded early because enough of its items"),
        (
            {"state": "succeeded", "stop": "budget"},
            "It succeeded early because its budget is spent",
        ),
        ({"state": "failed", "stop": "failed"}, "It failed because too many items failed: 5 of 9"),
        ({"state": "failed", "stop": "failed", "failed": "1"}, "It failed because an item failed:"),
        ({"state": "expired", "stop": "expired"}, "It expired because its timeout passed: 5 of 9"),
        ({"state": "cancelled", "stop": "cancelled"}, "It was cancelled: 5 of 9 items done"),
        (
            {"state": "cancelled", "stop": "cancelled", "stop_ms": "1764597731000"},
            "It was cancelled at 2025-12-01 14:02:11 UTC: 5 of 9 items done",
        ),
        (
            {"state": "expired", "stop": "expired", "stop_ms": "1764597731000"},
            "It expired at 2025-12-01 14:02:11 UTC because its timeout passed: 5 of 9",
        ),
        (
            {"state": "expired", "closed_ms": "1764597731000"},
            "It expired at 2025-12-01 14:02:11 UTC: 5 of 9",
        ),
        (
            {"state": "failed", "stop": "failed", "error": '{"type":"KeyError","message":"3"}'},
            "It failed because KeyError: 3 (5 of 9 items done, 2 failed, 2 skipped).",
        ),
    ],
    ids=str,
)
def test_the_sentence_says_the_cause_once_and_the_counts(
    facts: dict[str, str], begins: str
) -> None:
    assert sentence(COUNTS | facts).startswith(begins)


@pytest.mark.parametrize(
    ("later_s", "when"),
    [
        (0.2, "200 ms ago (14:02:11 UTC)"),
        (180, "3 min ago (14:02:11 UTC)"),
        (2 * 86_400, "2 d ago (2025-12-01 14:02:11 UTC)"),
    ],
)
def test_a_cancelled_job_says_how_long_ago_and_by_whom(later_s: float, when: str) -> None:
    facts = {**COUNTS, "state": "cancelled", "stop": "cancelled", "stop_by": "anna@web-1"}
    facts["stop_ms"] = "1764597731000"

    found = sentence(facts, 1764597731000 + int(later_s * 1000))

    assert found.startswith(f"It was cancelled {when} by anna@web-1: 5 of 9 items done")


def test_causes_are_those_that_the_ledger_stops_a_job_for() -> None:
    assert {*CAUSES} == {"early", "budget", *(s.value for s in FINAL if s is not Status.SUCCEEDED)}
