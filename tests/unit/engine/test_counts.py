"""The metrics of one node: items, outcomes, retries and cache reads."""

from __future__ import annotations

import pytest

from resilience.breaker import CircuitBreaker
from resilience.bucket import Rate, TokenBucket
from resilience.bulkhead import Bulkhead
from resilience.retry import RetryBudget
from resilience.single_flight import SingleFlight
from rlm_tasks.engine.counts import count_node
from rlm_tasks.jobs.splitting import Reason
from rlm_tasks.ledger.records import Child, Report
from tests.unit.exposed_metrics import REPORT, ExposedMetrics, count, exposed, folder
from tests.unit.world import World, world

__all__ = ["exposed", "folder", "world"]


def test_a_node_counts_its_items_by_outcome_and_their_mean_time(
    exposed: ExposedMetrics,
) -> None:
    count(REPORT)

    assert exposed["rlm_items_total"] == {
        "operation=sum,outcome=done": 90,
        "operation=sum,outcome=failed": 6,
        "operation=sum,outcome=skipped": 4,
    }
    assert exposed["rlm_nodes_total"] == {"operation=sum,reason=done": 1}
    assert exposed["rlm_item_busy_seconds_total"] == {"operation=sum": 0.48}
    assert exposed["rlm_execution_time_ms_count"] == {"operation=sum": 96}
    assert exposed["rlm_execution_time_ms_sum"] == {"operation=sum": 480}
    buckets = exposed["rlm_execution_time_ms_bucket"]
    assert (buckets["le=1.0,operation=sum"], buckets["le=5.0,operation=sum"]) == (0, 96)
    assert exposed["rlm_node_duration_seconds_sum"] == {"operation=sum": 0.5}
    assert exposed["rlm_peak_memory_mb"] == {"": 2.0}


def test_items_that_are_only_validated_count_as_failed_or_not_at_all(
    exposed: ExposedMetrics,
) -> None:
    count(REPORT, validating=True)

    assert exposed["rlm_items_total"] == {"operation=sum,outcome=failed": 6}
    assert exposed["rlm_item_busy_seconds_total"] == {}


@pytest.mark.parametrize("reason", Reason)
def test_a_node_that_hands_over_work_counts_the_reason(
    exposed: ExposedMetrics, reason: Reason
) -> None:
    rest = [Child("k", 100, 200, 0, "", 0, "", reason)]
    count(Report(mid=100, done=100, kids=rest, why=reason), hi=200)
    count(Report(mid=200, done=100, why=reason), hi=200)

    assert exposed["rlm_nodes_total"] == {
        f"operation=sum,reason={reason.name.lower()}": 1,
        "operation=sum,reason=done": 1,
    }


def test_retried_items_are_counted_by_their_outcome_and_give_the_recovery_rate(
    exposed: ExposedMetrics,
) -> None:
    assert exposed["rlm_recovery_success_rate"] == {}
    count(REPORT, recovered=3, given_up=1)

    assert exposed["rlm_retries_total"] == {
        "operation=sum,outcome=recovered": 3,
        "operation=sum,outcome=given_up": 1,
    }
    assert exposed["rlm_recovery_success_rate"] == {"": 0.75}


def test_the_error_rate_covers_the_last_five_minutes(exposed: ExposedMetrics) -> None:
    assert exposed["rlm_error_rate"] == {"": 0.0}
    count(Report(mid=100, done=50, failed=list(range(50))))
    exposed.now = 60.0
    assert exposed["rlm_error_rate"] == {"": 0.5}
    exposed.now = 200.0
    count(Report(mid=100, done=100))
    assert exposed["rlm_error_rate"] == {"": 0.25}
    exposed.now = 370.0
    assert exposed["rlm_error_rate"] == {"": 0.0}, "the failures are older than five minutes"


def test_cache_reads_are_counted_as_hits_and_misses(exposed: ExposedMetrics) -> None:
    assert exposed["rlm_cache_hit_rate"] == {}
    count_node("sum", REPORT, 100, took_s=0.5, cache=(9, 1))

    assert exposed["rlm_cache_reads_total"] == {"outcome=hit": 9, "outcome=miss": 1}
    assert exposed["rlm_cache_hit_rate"] == {"": 0.9}


def test_each_decision_without_redis_is_counted_by_the_kind_of_its_guard(
    exposed: ExposedMetrics, world: World
) -> None:
    store = world.store()
    bucket = TokenBucket("llm", store, calls=Rate(10))
    bulkhead, breaker = Bulkhead("llm", store), CircuitBreaker("llm", store)
    bucket.acquire()
    store.lost = True
    bucket.acquire()
    bucket.acquire()
    bulkhead.acquire()
    breaker.call(lambda: 1)
    world.sleep(0.3)
    breaker.call(lambda: 1)
    RetryBudget("llm", store).spend()
    SingleFlight("llm", store).begin("question")

    counts = {"bucket": 2, "bulkhead": 1, "breaker": 2, "retry_budget": 1, "single_flight": 1}
    assert exposed["rlm_guard_alone_total"] == {
        f"guard={kind}": count for kind, count in counts.items()
    }
    store.lost = False
    world.sleep(2)
    assert store.alone()[0] == {}, "they are told when Redis has answered a guard again"
    bucket.acquire()
    world.sleep(60)
    assert store.alone() == (counts, 60.0)
