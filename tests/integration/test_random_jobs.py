"""At least 200 random jobs on a real worker: every item counts once, in order, for any strategy."""

from __future__ import annotations

from random import Random
from typing import Any

from rlm_tasks import Adaptive, Binary, Client, JobRequest, NWay
from rlm_tasks.jobs.splitting import leaves, plan

JOBS, AT_ONCE = 210, 30


def _shape(random: Random) -> dict[str, Any]:
    return random.choice(
        [
            {"type": "sequential"},
            {"type": "parallel", "chunk_size": random.randint(1, 30)},
            {"strategy": Binary(min_chunk_size=random.randint(2, 12))},
            {
                "strategy": Binary(
                    min_chunk_size=random.randint(2, 12), max_depth=random.randint(2, 5)
                )
            },
            {
                "strategy": NWay(
                    split_factor=random.randint(2, 5), min_chunk_size=random.randint(2, 8)
                )
            },
            {"strategy": NWay(split_factor=3, min_chunk_size=random.randint(2, 8))},
            {"strategy": Adaptive(max_chunk_size=random.randint(3, 30), min_chunk_size=2)},
            {"strategy": Adaptive(target_execution_time_ms=random.choice([20, 100]))},
        ]
    )


def _planned(request: dict[str, Any]) -> int:
    """Return the planned number of nodes of a request; 0 if it depends on the items' time."""
    shape = JobRequest.parse(request).shape(1000.0)
    return len(leaves(plan(shape, 0, len(request["items"]), 0, 1))) if shape.eager else 0


def test_two_hundred_random_jobs_count_every_item_once_and_in_order(client: Client) -> None:
    random = Random(20_261)
    results = []
    for start in range(0, JOBS, AT_ONCE):
        wanted = []
        for _ in range(start, start + AT_ONCE):
            n, ms, bad = (
                random.randint(20, 120),
                random.choice([0, 0, 0.2, 2]),
                random.choice([0, 0, 0.1]),
            )
            items = [
                {"i": i, "ms": random.uniform(0, ms), "fails": random.random() < bad}
                for i in range(n)
            ]
            wanted.append(
                {
                    "operation": "spin_then_collect",
                    "items": items,
                    "options": {"continueOnError": True},
                    **_shape(random),
                }
            )
        for request, result in zip(wanted, client.batch_execute(wanted, timeout=100), strict=True):
            good = [item["i"] for item in request["items"] if not item["fails"]]
            assert result.output == (good or []), request
            assert list(result.successful) == good
            assert (result.done, result.failed_count, result.skipped) == (
                len(good),
                result.total - len(good),
                0,
            )
            results.append((_planned(request), result))

    assert len(results) >= 200
    # For the other jobs the number of nodes depends on time.
    split = [result.metrics.nodes for planned, result in results if planned > 3]
    assert len(split) >= 100
    assert min(split) > 3
    assert sum(result.metrics.max_depth >= 2 for _, result in results) >= 50
