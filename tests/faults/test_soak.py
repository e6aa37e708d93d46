"""The soak test until enough has happened, for CI; `make soak` runs it longer, with a control."""

from __future__ import annotations

import pytest

from tests.faults.soak import Report, show, storm


def enough(report: Report) -> bool:
    """Return whether the storm has had its jobs, kills and restart."""
    return (
        report.right > 50
        and sum(report.kills.values()) >= 20
        and report.redis_restarts > 0
        and report.doubled > 0
    )


@pytest.mark.timeout(300)
def test_a_short_soak_is_clean() -> None:
    with storm("platform", seed=3) as raging:
        report = raging.run(180, lambda _: None, enough)
    show([report])

    assert report.clean, report
    assert report.right == report.jobs > 50
    assert sum(report.kills.values()) >= 20
    assert report.redis_restarts > 0
    assert report.doubled > 0
    assert report.redispatched > 0
    assert report.poisoned > 0, "some jobs had poisonous items"
    assert report.workers_gone == [], "no worker ends by itself when Redis restarts"
