"""The resource usage of operations, summed over all workers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from scheduler.usage import OperationUsage, Usage
from tests.unit.world import CountingStore, World, world

__all__ = ["world"]

NODE = {"done": 1, "failed": 0, "busy_us": 1000, "memory_kb": 1024}
"""The counts of one small node."""


class Worker:
    """One process that counts its nodes."""

    def __init__(self, world: World) -> None:
        self.store: CountingStore = world.store()
        self.usage = Usage(self.store, Keys("unit"))

    def ran(self, operation: str, **about: int) -> Any:
        [answer] = self.store.call(self.usage.tally(operation, **{**NODE, **about}))
        return answer


@pytest.fixture
def worker(world: World) -> Worker:
    """The first worker of a platform."""
    return Worker(world)


def test_the_usage_of_an_operation_as_a_dict(
    worker: Worker,
) -> None:
    worker.ran("D3-Q3", done=100, failed=2, busy_us=102 * 2_450_500, memory_kb=1024 * 1024)
    worker.ran("D3-Q3", done=45, failed=3, busy_us=48 * 2_450_500, memory_kb=614)

    assert worker.usage.of("D3-Q3").to_dict() == {
        "executor_id": "D3-Q3",
        "total_executions": 150,
        "successful_executions": 145,
        "failed_executions": 5,
        "success_rate_percent": 96.67,
        "avg_memory_mb": 512.3,
        "peak_memory_mb": 1024.0,
        "avg_duration_ms": 2450.5,
    }


def test_the_usage_of_an_operation_that_never_ran_is_all_zero(worker: Worker) -> None:
    assert worker.usage.of("nobody's") == OperationUsage("nobody's")
    assert worker.usage.of("nobody's").to_dict() == {
        "executor_id": "nobody's",
        "total_executions": 0,
        "successful_executions": 0,
        "failed_executions": 0,
        "success_rate_percent": 0.0,
        "avg_memory_mb": 0.0,
        "peak_memory_mb": 0.0,
        "avg_duration_ms": 0.0,
    }
    assert worker.usage.all() == [], "reading does not create an entry"


@pytest.mark.parametrize(
    ("done", "failed", "percent"),
    [(1, 0, 100.0), (0, 1, 0.0), (1, 2, 33.33), (2, 1, 66.67), (1, 10**6, 0.0)],
)
def test_the_success_rate_has_two_decimals(done: int, failed: int, percent: float) -> None:
    assert OperationUsage("x", done + failed, done, failed).success_rate_percent == percent


def test_a_node_without_items_adds_memory_only(worker: Worker) -> None:
    worker.ran("empty", done=0, busy_us=0, memory_kb=2048)

    assert worker.usage.of("empty") == OperationUsage(
        "empty", avg_memory_mb=2.0, peak_memory_mb=2.0
    )


def test_the_peak_is_the_highest_of_all_nodes(worker: Worker) -> None:
    for memory_kb in (2048, 10_240, 3072):
        worker.ran("sum", memory_kb=memory_kb)

    assert (worker.usage.of("sum").peak_memory_mb, worker.usage.of("sum").avg_memory_mb) == (
        10.0,
        5.0,
    )


def test_workers_are_summed_and_operations_are_separate(world: World, worker: Worker) -> None:
    another = Worker(world)
    worker.ran("sum", done=2)
    another.ran("sum", done=3, failed=1)
    another.ran("count", done=5)

    for each in (worker, another):
        found = {
            usage.executor_id: (usage.successful_executions, usage.failed_executions)
            for usage in each.usage.all()
        }
        assert found == {"count": (5, 0), "sum": (5, 1)}
        assert list(found) == ["count", "sum"], "sorted by name"
        assert each.usage.all() == [each.usage.of("count"), each.usage.of("sum")]


def test_platforms_of_other_names_are_separate(worker: Worker) -> None:
    worker.ran("sum")

    assert Usage(worker.store, Keys("another")).all() == []


def test_counting_a_node_and_reading_all_are_one_round_trip_each(worker: Worker) -> None:
    for operation in ("a", "b", "c"):
        worker.ran(operation)
    assert worker.store.round_trips == 3

    worker.usage.all()

    assert worker.store.round_trips == 4, "besides the read of their names"


def test_without_redis_reading_raises_an_error(worker: Worker) -> None:
    worker.store.lost = True

    with pytest.raises(StoreUnavailable):
        worker.usage.of("sum")


_NODES = st.lists(
    st.fixed_dictionaries(
        {
            "done": st.integers(0, 10**6),
            "failed": st.integers(0, 10**6),
            "busy_us": st.integers(0, 10**10),
            "memory_kb": st.integers(0, 10**8),
        }
    ),
    min_size=1,
    max_size=8,
)


@given(nodes=_NODES)
@settings(max_examples=40)
def test_sums_are_exact_over_any_workers_in_any_order(nodes: list[dict[str, int]]) -> None:
    workers = [Worker(world) for world in [World()] for _ in range(2)]
    for at, node in enumerate(nodes):
        workers[at % 2].ran("sum", **node)

    usage = workers[0].usage.of("sum")
    done, failed, busy_us, memory_kb = (
        sum(node[name] for node in nodes) for name in ("done", "failed", "busy_us", "memory_kb")
    )

    assert (usage.total_executions, usage.successful_executions, usage.failed_executions) == (
        done + failed,
        done,
        failed,
    )
    assert usage.peak_memory_mb == pytest.approx(
        max(node["memory_kb"] for node in nodes) / 1024, abs=0.051
    )
    assert usage.avg_memory_mb == pytest.approx(memory_kb / 1024 / len(nodes), abs=0.051)
    assert usage.avg_duration_ms == pytest.approx(busy_us / 1000 / max(done + failed, 1), abs=0.001)
