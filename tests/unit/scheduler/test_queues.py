"""Reports on queues: their age and their priority."""

from __future__ import annotations

import pytest

from scheduler.queues import QueueReport, ages, priority_of


def test_only_known_ages_count() -> None:
    reports = {"a.low": QueueReport(3, 7.5), "a.high": QueueReport(3), "a.normal": QueueReport(0)}

    assert ages(reports) == {"a.low": 7.5}


@pytest.mark.parametrize(
    ("queue", "priority"),
    [
        ("rlm.high", "high"),
        ("my-team_2.low", "low"),
        ("eu.prod.critical", "critical"),
        ("rlm.control", "control"),
        ("celery", "normal"),
        ("mail.outgoing", "normal"),
        ("low-high", "normal"),
    ],
)
def test_a_queue_is_as_urgent_as_its_last_name_says(queue: str, priority: str) -> None:
    assert priority_of(queue) == priority
