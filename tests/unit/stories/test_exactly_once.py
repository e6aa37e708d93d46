"""Each item counts once and merges in order, for any shape of job and any order of messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlm_tasks import Adaptive, Binary, Conditions, JobRequest, NWay, Options, operation
from rlm_tasks.results import Status
from tests.unit.harness import Platform

_platform: list[Platform] = []


def _concatenated(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def _work(item: dict[str, Any]) -> list[int]:
    """Take the time of the item on the clock of the platform, then fail or answer."""
    _platform[-1].clock.now += item["ms"] / 1000
    if item["fails"]:
        raise ValueError(f"item {item['i']}")
    return [item["i"]]


operation("unit_merged", merge=_concatenated)(_work)
operation("unit_listed")(_work)


@operation("unit_batch", batch=True, merge=_concatenated)
def unit_batch(items: list[dict[str, Any]]) -> list[int]:
    """Work through a batch, which fails as a whole."""
    return [index for item in items for index in _work(item)]


@operation("unit_async", concurrency=3, merge=_concatenated)
async def unit_async(item: dict[str, Any]) -> list[int]:
    """Work through an item among others in flight."""
    return _work(item)


_SHAPES = st.one_of(
    st.builds(lambda: {"type": "sequential"}),
    st.builds(lambda size: {"type": "parallel", "chunk_size": size}, st.integers(1, 40)),
    st.builds(lambda: {"type": "recursive"}),
    st.builds(
        lambda size, depth: {"strategy": Binary(min_chunk_size=size, max_depth=depth)},
        st.integers(1, 30),
        st.integers(1, 10),
    ),
    st.builds(
        lambda k, size: {"strategy": NWay(split_factor=k, min_chunk_size=size)},
        st.integers(2, 9),
        st.integers(1, 30),
    ),
    st.builds(lambda size: {"strategy": Adaptive(min_chunk_size=size)}, st.integers(1, 10)),
    st.builds(
        lambda low, more, ms: {
            "strategy": Adaptive(
                min_chunk_size=low, max_chunk_size=low + more, target_execution_time_ms=ms
            )
        },
        st.integers(1, 10),
        st.integers(0, 30),
        st.integers(20, 2000),
    ),
)


@st.composite
def _jobs(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    n = draw(st.integers(0, 160))
    cost = draw(st.sampled_from([0, 1, 15, 120, 700]))
    fails = draw(st.sets(st.integers(0, max(n - 1, 0)), max_size=draw(st.sampled_from([0, 3, 40]))))
    items = [
        {"i": i, "ms": draw(st.integers(0, cost)) if cost else 0, "fails": i in fails}
        for i in range(n)
    ]
    name = draw(st.sampled_from(["unit_merged", "unit_listed", "unit_batch", "unit_async"]))
    return items, draw(_SHAPES), name


@settings(
    max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(job=_jobs(), seed=st.integers(0, 10_000))
def test_every_item_is_counted_once_and_merged_in_order(job: Any, seed: int) -> None:
    items, shape, name = job
    platform = Platform(seed)
    _platform.append(platform)
    request = JobRequest(
        operation=name, items=items, options=Options(continue_on_error=True), **shape
    )

    spec = platform.submit(request)
    facts = platform.run(spec)

    good = [item["i"] for item in items if not item["fails"]]
    output = platform.output(spec)
    all_fail = bool(items) and not good
    assert facts["state"] == (Status.FAILED if all_fail else Status.SUCCEEDED), facts
    assert (
        output if name != "unit_listed" else [index for part in output for index in part]
    ) == good
    assert (int(facts["done"]), int(facts["failed"]), int(facts["skipped"])) == (
        len(good),
        len(items) - len(good),
        0,
    )
    assert platform.ledger.failed_items(spec.job) == [item["i"] for item in items if item["fails"]]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    job=_jobs(),
    seed=st.integers(0, 10_000),
    stop_after=st.integers(0, 30),
    threshold=st.floats(0, 0.3),
)
def test_a_job_that_ends_early_accounts_for_every_item(
    job: Any, seed: int, stop_after: int, threshold: float
) -> None:
    items, shape, name = job
    platform = Platform(seed)
    _platform.append(platform)
    options = Options(continue_on_error=True, error_threshold=threshold)
    spec = platform.submit(JobRequest(operation=name, items=items, options=options, **shape))
    steps = iter(range(10_000))

    facts = platform.run(
        spec,
        lambda: next(steps) == stop_after and platform.ledger.stop(spec.job, "cancelled") and None,
    )

    failed = sum(item["fails"] for item in items)
    assert Status(facts["state"]).final, facts
    assert int(facts["done"]) + int(facts["failed"]) + int(facts["skipped"]) == len(items)
    if facts["state"] == Status.SUCCEEDED:
        assert failed <= threshold * len(items)
        assert int(facts["failed"]) == failed
    if facts["state"] == Status.FAILED:
        assert int(facts["failed"]) > threshold * len(items)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(job=_jobs(), seed=st.integers(0, 10_000), share=st.floats(0.1, 1.0))
def test_validation_and_early_termination_account_for_every_item(
    job: Any, seed: int, share: float
) -> None:
    items, shape, _ = job
    platform = Platform(seed)
    _platform.append(platform)
    conditions = Conditions(validate_before_process=True, early_termination_threshold=share)
    request = JobRequest(
        operation="unit_validated",
        items=items,
        options=Options(continue_on_error=True),
        conditions=conditions,
        **shape,
    )

    spec = platform.submit(request)
    facts = platform.run(spec)

    bad = sum(item["fails"] for item in items)
    all_fail = 0 < bad == len(items)
    assert facts["state"] == (Status.FAILED if all_fail else Status.SUCCEEDED), facts
    assert int(facts["failed"]) == bad
    assert int(facts["done"]) + int(facts["skipped"]) == len(items) - bad
    assert int(facts["done"]) >= min(len(items) - bad, share * len(items))
    assert platform.output(spec) == sorted(platform.output(spec))


def _valid(item: dict[str, Any]) -> None:
    if item["fails"]:
        raise ValueError("invalid")


@operation("unit_validated", merge=_concatenated, validate=_valid)
def unit_validated(item: dict[str, Any]) -> list[int]:
    """Answer with the index; items that validation refuses never reach it."""
    assert not item["fails"]
    _platform[-1].clock.now += item["ms"] / 1000
    return [item["i"]]
