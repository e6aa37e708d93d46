"""The soak test for one minute, for CI; `make soak` runs it longer, with a control."""

from __future__ import annotations

import pytest

from tests.faults.soak import show, storm


@pytest.mark.timeout(240)
def test_a_minute_of_the_soak_is_clean() -> None:
    with storm("platform", seed=3) as raging:
        report = raging.run(60, lambda _: None)
    show([report])

    assert report.clean, report
    assert report.right == report.jobs > 50
    assert sum(report.kills.values()) >= 20
    assert report.redis_restarts == 1
    assert report.doubled > 0
    assert report.redispatched > 0
    assert report.poisoned > 0, "some jobs had poisonous items"
    assert report.workers_gone == [], "no worker ends by itself when Redis restarts"
