"""A user's view of a job that succeeds: results, order, progress, tree, and access by id."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlm_tasks import (
    Adaptive,
    Binary,
    Client,
    Files,
    JobRequest,
    Lines,
    NWay,
    Options,
    ResultTimeout,
    ResultTooLarge,
    Status,
)
from rlm_tasks.client.client import Client as PlainClient
from rlm_tasks.operations import registry
from tests.integration.conftest import client_of
from tests.support import wait_until

SHAPES: list[dict[str, Any]] = [
    {"type": "sequential"},
    {"type": "parallel", "chunk_size": 7},
    {"type": "parallel"},
    {"type": "recursive"},
    {"strategy": Binary(min_chunk_size=10)},
    {"strategy": NWay(split_factor=8, min_chunk_size=5)},
    {"strategy": Adaptive()},
    {"strategy": Adaptive(min_chunk_size=5, max_chunk_size=50)},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operation", ["echo", "collect"])
def test_outputs_come_in_item_order_under_every_strategy(
    client: Client, shape: dict[str, Any], operation: str
) -> None:
    items = [(i * 7919) % 1000 for i in range(200)]

    result = client.execute(operation=operation, items=items, timeout=30, **shape)

    assert result.output == items
    assert (result.status, result.done, result.failed_count, result.skipped) == (
        Status.SUCCEEDED,
        200,
        0,
        0,
    )
    assert list(result.successful) == list(range(200))


@pytest.mark.parametrize(
    ("shape", "nodes", "depth"),
    [
        ({"strategy": Binary(min_chunk_size=25)}, 1 + 8, 3),
        ({"strategy": NWay(split_factor=8, min_chunk_size=25)}, 1 + 8, 1),
        ({"type": "parallel", "chunk_size": 10}, 1 + 20, 1),
        ({"strategy": Binary(min_chunk_size=1, max_depth=2)}, 1 + 4, 2),
        ({"strategy": Adaptive(max_chunk_size=40, min_chunk_size=40)}, 1 + 5, 1),
    ],
    ids=str,
)
def test_split_bounds_determine_nodes_and_depth(
    client: Client, shape: dict[str, Any], nodes: int, depth: int
) -> None:
    result = client.execute(operation="sum", items=list(range(200)), timeout=30, **shape)

    assert result.output == sum(range(200))
    assert (result.metrics.nodes, result.metrics.max_depth) == (nodes, depth)


def test_a_tiny_job_runs_as_one_node(client: Client) -> None:
    result = client.execute(operation="sum", items=range(1000), timeout=30)

    assert (result.output, result.metrics.nodes, result.metrics.splits) == (499_500, 1, 0)


def test_a_job_without_items_returns_an_empty_result(client: Client) -> None:
    assert client.execute(operation="sum", items=[], timeout=30).output == 0
    assert client.execute(operation="echo", items=[], timeout=30).output == []


def test_a_job_splits_itself_over_the_free_slots(client: Client) -> None:
    items = [{"i": i, "ms": 5} for i in range(200)]

    result = client.execute(operation="spin_then_collect", items=items, timeout=30)

    assert result.output == list(range(200))
    assert result.metrics.splits >= 1
    workers = {node.worker for node in client.job(result.job_id).tree()}
    assert len(workers) == 1
    assert workers.pop().startswith("celery@")
    assert result.metrics.busy_ms >= 1000


def test_a_sequential_job_runs_one_node_at_a_time_in_order(client: Client) -> None:
    items = [{"i": i, "ms": 30} for i in range(70)]

    result = client.execute(
        operation="spin_then_collect", items=items, type="sequential", timeout=30
    )

    assert result.output == list(range(70))
    assert (result.metrics.splits, result.metrics.max_depth) == (0, 0)
    assert result.metrics.yields >= 1


def test_an_async_operation_keeps_many_items_in_flight(client: Client) -> None:
    result = client.execute(operation="pause", items=range(200), params={"ms": 50}, timeout=30)

    assert result.output == list(range(200))
    assert result.metrics.busy_ms < 200 * 50 / 4


def test_a_generator_of_unknown_length_is_streamed(client: Client) -> None:
    def lines() -> Iterator[str]:
        for i in itertools.count():
            if i == 30_000:
                return
            yield f"line {i % 3}"

    result = client.execute(operation="word_count", items=lines(), timeout=60)

    assert result.output == {"line": 30_000, "0": 10_000, "1": 10_000, "2": 10_000}
    assert result.total == 30_000


def test_a_generator_that_raises_leaves_no_job_and_no_keys(client: Client) -> None:
    def broken() -> Iterator[int]:
        yield from range(5000)
        raise RuntimeError("the source broke")

    before = {job.id for job in client.jobs(1000)}
    with pytest.raises(RuntimeError, match="the source broke"):
        client.submit(operation="sum", items=broken())

    assert {job.id for job in client.jobs(1000)} == before


def test_lines_and_files_are_sources_of_items(client: Client, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("".join(f"alpha {i % 2}\n" for i in range(5000)), encoding="utf-8")
    (tmp_path / "b.txt").touch()

    counted = client.execute(
        operation="word_count", items=Lines(text), type="parallel", chunk_size=700, timeout=30
    )
    found = client.execute(operation="echo", items=Files(str(tmp_path / "*.txt")), timeout=30)

    assert counted.output == {"alpha": 5000, "0": 2500, "1": 2500}
    assert found.output == [str(tmp_path / "b.txt"), str(text)]


def test_progress_tree_and_explain_describe_a_running_job(client: Client) -> None:
    job = client.submit(
        operation="spin_then_collect", items=[{"i": i, "ms": 10} for i in range(400)]
    )
    wait_until(lambda: job.progress().done > 20)

    seen = list(job.watch(interval_s=0.05))

    assert "runs on" in job.explain() or job.ready()
    fractions = [progress.fraction for progress in seen]
    assert fractions[-1] == 1.0
    assert len([fraction for fraction in fractions if 0 < fraction < 1]) >= 5
    assert job.result().output == list(range(400))
    nodes = job.tree()
    assert sum(node.worked for node in nodes if node.id != "merge") == 400
    assert job.explain() == "It succeeded: 400 of 400 items done, 0 failed, 0 skipped."


def test_a_partial_answer_covers_what_is_done(client: Client) -> None:
    job = client.submit(
        operation="spin_then_collect",
        items=[{"i": i, "ms": 40} for i in range(150)],
        type="sequential",
    )
    wait_until(lambda: job.partial().coverage > 0)

    partial = job.partial()
    job.cancel()

    assert 0 < partial.coverage < 1
    assert partial.output == [i for lo, hi in partial.ranges for i in range(lo, hi)]


def test_a_job_is_found_by_id_and_has_celerys_result_methods(client: Client) -> None:
    job = client.submit(operation="sum", items=range(10))
    again = client.job(job.id)

    assert again.get(timeout=30) == 45
    assert (again.state, again.ready(), again.successful()) == ("SUCCESS", True, True)
    assert job.id in {each.id for each in client.jobs()}


def test_batch_execute_answers_in_the_order_of_the_requests(client: Client) -> None:
    requests = [JobRequest(operation="sum", items=range(i)) for i in range(40)]

    results = client.batch_execute(requests, timeout=60)

    assert [result.output for result in results] == [sum(range(i)) for i in range(40)]


def test_the_context_has_job_id_index_and_params(client: Client) -> None:
    job = client.submit(operation="where", items=["a", "b"], params={"depth": 3})

    assert [row[:3] for row in job.get(timeout=30)] == [
        [job.id, 0, {"depth": 3}],
        [job.id, 1, {"depth": 3}],
    ]


def test_large_outputs_are_paged_and_can_be_iterated(
    server: Any, environment: dict[str, str], worker_pid: int
) -> None:
    from tests.integration.conftest import client_of

    with client_of({**environment, "RLM_MAX_RESULT_BYTES": "2000"}) as small:
        job = small.submit(
            operation="echo",
            items=[f"item {i * 7919 % 100_003}" for i in range(3000)],
            type="parallel",
            chunk_size=500,
        )
        with pytest.raises(ResultTooLarge, match="RLM_MAX_RESULT_BYTES=2000"):
            job.result(timeout=30)

        assert sum(1 for _ in job.outputs()) == 3000
        assert next(iter(job.outputs())) == "item 0"


@pytest.mark.parametrize("operation", ["echo", "collect"])
def test_the_limit_of_a_result_counts_its_bytes_unpacked(
    operation: str, server: Any, environment: dict[str, str], worker_pid: int
) -> None:
    from tests.integration.conftest import client_of

    limit = 1 << 20
    with client_of({**environment, "RLM_MAX_RESULT_BYTES": str(limit)}) as small:
        job = small.submit(operation=operation, items=["x" * 10_000] * 500)  # packs to a few KB
        job.wait(30)

        for read in (job.result, job.get, job.partial):
            with pytest.raises(ResultTooLarge) as caught:
                read()
            assert limit < caught.value.size <= 500 * 10_004
        refused = job.result(propagate=False)

    assert (refused.status, refused.output) == (Status.SUCCEEDED, None)
    assert refused.error is not None
    assert refused.error.code == "RESULT_TOO_LARGE"


def test_waiting_ends_after_its_timeout(client_without_worker: PlainClient) -> None:
    job = client_without_worker.submit(operation="sum", items=range(10))

    with pytest.raises(ResultTimeout, match="has not ended within"):
        job.result(timeout=0.2)

    assert "for a worker" in job.explain()
    assert job.status is Status.PENDING


def test_each_priority_has_its_own_queue(client: Client) -> None:
    options = Options(priority="high")
    job = client.submit(
        JobRequest(
            operation="sum", items=range(1000), strategy=Binary(min_chunk_size=100), options=options
        )
    )

    assert job.get(timeout=30) == 499_500
    spec = client.ledger.spec(job.id)
    assert spec is not None
    assert spec.queue == "test.high"


def test_urgent_jobs_come_first_and_others_keep_their_share(server: Any, logs: Path) -> None:
    from rlm_tasks.testing import embedded
    from tests.integration.conftest import client_of, environment_of

    environment = environment_of(server.url, "order")
    with client_of(environment) as own:
        jobs = [
            own.submit(operation="nap", items=[5], priority=each)
            for each in ("low", "normal", "high", "critical")
            for _ in range(3)
        ]
        with embedded.worker(environment, log=logs / "order.log", slots=1):
            for job in jobs:
                job.wait(30)
        began = [
            (int(own.ledger.facts(job.id)["started_ms"]), own.ledger.facts(job.id)["queue"])
            for job in jobs
        ]

    served = [queue.removeprefix("order.") for _, queue in sorted(began, key=lambda pair: pair[0])]
    # The weights are 8, 4, 2 and 1: the third high job comes before the first normal one, and that
    # before the first low one.
    assert served[:2] == ["critical"] * 2
    last = [
        max(at for at, each in enumerate(served) if each == priority)
        for priority in ("critical", "high", "normal", "low")
    ]
    assert last == sorted(last)


def test_chord_bodies_merge_finished_subtrees_while_the_rest_still_runs(client: Client) -> None:
    items = [{"i": i, "ms": 2000 if i == 15 else 5} for i in range(16)]
    job = client.submit(
        operation="spin_then_collect", items=items, strategy=Binary(min_chunk_size=2)
    )

    # Leaves have two items: a partial of eight can only come from the body of an outer chord.
    wait_until(lambda: (0, 8) in client.ledger.ranges(job.id), within_s=10)

    assert not job.ready()
    assert job.get(timeout=30) == list(range(16))


def test_an_operations_own_submit_takes_a_key_beside_options(
    client_without_worker: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlm_tasks.client.client.default_client", lambda: client_without_worker)
    operation, options = registry.get("sum"), Options(priority="high")

    first = operation.submit([1, 2], idempotency_key="once", options=options)
    second = operation.submit([1, 2], idempotency_key="once", options=options)

    assert first.id == second.id


def test_a_batch_of_a_hundred_leaves_no_more_than_five_jobs_unclaimed(
    environment: dict[str, str], worker_pid: int
) -> None:
    seen = [0]
    with client_of({**environment, "RLM_BATCH__MAX_SIZE": "5"}) as client:
        ended = threading.Event()

        def watch() -> None:
            while not ended.is_set():
                pipe = client.ledger.store.client.pipeline()  # all states of one moment
                for job in client.ledger.due.jobs(1000):
                    pipe.hget(client.ledger.keys.of(job).job, "state")
                seen.append(pipe.execute().count(b"pending"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        jobs = client.batch_submit([{"operation": "nap", "items": [5]}] * 100)
        ended.set()
        watcher.join()
        assert [job.get(timeout=60) for job in jobs] == [[5]] * 100

    assert max(seen) <= 5
