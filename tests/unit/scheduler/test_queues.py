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
def test_the_last_part_of_its_name_is_the_priority_of_a_queue(queue: str, priority: str) -> None:
    assert priority_of(queue) == priority
