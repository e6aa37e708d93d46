"""Plans: they tile a range within their bounds; a running node yields for one reason at a time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resilience.errors import InvalidValue
from rlm_tasks import estimate_optimal_chunk_size
from rlm_tasks.jobs.splitting import (
    MAX_FANOUT,
    RULES,
    Fork,
    Leaf,
    NodeProgress,
    Part,
    Reason,
    Shape,
    evenly,
    isolate,
    leaves,
    may_fan_out,
    plan,
    share_out,
    should_yield,
    tapered,
)

SHAPES = st.builds(
    Shape,
    st.sampled_from(["sequential", "flat", "tree"]),
    factor=st.integers(2, 12),
    min_chunk=st.integers(1, 50),
    plan_min=st.integers(1, 50),
    max_chunk=st.sampled_from([0, 50, 400]),
    max_depth=st.integers(1, 10),
    eager=st.booleans(),
)


def tiles(part: Part) -> bool:
    """Return whether the parts of every fork tile its range, in order."""
    if isinstance(part, Leaf):
        return True
    edges = [(inner.lo, inner.hi) for inner in part.parts]
    joined = all(a[1] == b[0] for a, b in itertools.pairwise(edges))
    return (
        joined and (edges[0][0], edges[-1][1]) == (part.lo, part.hi) and all(map(tiles, part.parts))
    )


@given(
    shape=SHAPES,
    lo=st.integers(0, 1000),
    size=st.integers(1, 100_000),
    depth=st.integers(0, 9),
    slots=st.integers(1, 64),
)
@example(shape=Shape("tree", factor=11, max_depth=3), lo=0, size=1001, depth=0, slots=31)
def test_a_plan_tiles_its_range_within_its_bounds(
    shape: Shape, lo: int, size: int, depth: int, slots: int
) -> None:
    planned = plan(shape, lo, lo + size, depth, slots)

    found = leaves(planned)
    assert tiles(planned)
    assert all(leaf.hi > leaf.lo for leaf in found)
    assert len(found) <= MAX_FANOUT
    if shape.mode == "tree":
        assert all(leaf.depth <= max(shape.max_depth, depth) for leaf in found)
        assert (
            isinstance(planned, Leaf) or min(leaf.hi - leaf.lo for leaf in found) >= shape.plan_min
        )


@pytest.mark.parametrize(
    ("n", "smallest", "nodes", "depth"),
    [(1000, 100, 8, 3), (1024, 1, 512, 9), (199, 100, 1, 0), (200, 100, 2, 1)],
)
def test_a_binary_plan_halves_down_to_the_smallest_chunk(
    n: int, smallest: int, nodes: int, depth: int
) -> None:
    planned = plan(Shape("tree", 2, smallest, smallest, eager=True), 0, n, 0, 1)

    assert len(leaves(planned)) == nodes
    assert max(leaf.depth for leaf in leaves(planned)) == depth


def test_a_planned_tree_has_at_most_twice_as_many_nodes_as_leaves() -> None:
    def count(part: Part) -> int:
        return 1 + sum(map(count, part.parts)) if isinstance(part, Fork) else 1

    for factor in (2, 3, 8):
        planned = plan(Shape("tree", factor, 1, 1, eager=True), 0, 1000, 0, 1)
        assert count(planned) <= 2 * len(leaves(planned)) - 1


def test_a_fixed_chunk_size_is_exact_and_wide_fan_outs_are_grouped() -> None:
    shape = Shape("flat", max_chunk=10, exact=True, max_depth=1, eager=True)

    assert [leaf.hi - leaf.lo for leaf in leaves(plan(shape, 0, 35, 0, 2))] == [10, 10, 10, 5]
    groups = leaves(plan(shape, 0, 25_000, 0, 2))
    assert len(groups) == 3
    assert all(leaf.lo % 10 == 0 for leaf in groups)
    assert all(isinstance(plan(shape, leaf.lo, leaf.hi, leaf.depth, 2), Fork) for leaf in groups)


def test_a_lazy_plan_makes_about_four_parts_per_slot() -> None:
    assert len(leaves(plan(Shape("flat", 4), 0, 10_000, 0, 3))) == 12
    assert len(leaves(plan(Shape("tree", 2, 1, 100), 0, 10_000, 0, 3))) == 16
    assert len(leaves(plan(Shape("flat", 4, min_chunk=3000), 0, 10_000, 0, 3))) == 3


@given(lo=st.integers(0, 100), size=st.integers(1, 500), count=st.integers(1, 500))
def test_even_parts_differ_by_one_at_most(lo: int, size: int, count: int) -> None:
    parts = evenly(lo, lo + size, min(count, size))

    sizes = {hi - lo for lo, hi in parts}
    assert max(sizes) - min(sizes) <= 1
    assert (parts[0][0], parts[-1][1]) == (lo, lo + size)


@given(lo=st.integers(0, 100), size=st.integers(1, 500), count=st.integers(1, 500))
def test_tapered_parts_tile_and_become_smaller(lo: int, size: int, count: int) -> None:
    parts = tapered(lo, lo + size, min(count, size))

    sizes = [hi - low for low, hi in parts]
    assert len(parts) == min(count, size)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert (parts[0][0], parts[-1][1]) == (lo, lo + size)
    assert min(sizes) >= 1
    assert all(first >= second - 1 for first, second in itertools.pairwise(sizes))


def test_suspects_are_isolated() -> None:
    assert [(leaf.lo, leaf.hi) for leaf in leaves(isolate(0, 10, 2, [4]))] == [
        (0, 4),
        (4, 5),
        (5, 10),
    ]
    assert [(leaf.lo, leaf.hi) for leaf in leaves(isolate(0, 10, 2, [0, 9]))] == [
        (0, 1),
        (1, 9),
        (9, 10),
    ]


def progress(**changed: object) -> NodeProgress:
    """Return the progress of a node in mid-run, with some fields changed."""
    facts: dict[str, object] = {"done": 50, "rest": 50, "elapsed_ms": 100.0, "depth": 1}
    return NodeProgress(**{**facts, **changed})  # type: ignore[arg-type]  # fields of the right types


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"order": "stop", "rest": 0}, Reason.STOPPED),
        ({"order": "stop", "draining": True}, Reason.STOPPED),
        ({"order": "flush"}, Reason.FLUSH),
        ({"draining": True}, Reason.DRAINING),
        ({"draining": True, "rest": 0}, None),
        ({"elapsed_ms": 1000.0}, Reason.TARGET),
        ({"elapsed_ms": 1000.0, "done": 5}, None),
        ({"elapsed_ms": 4000.0, "done": 5}, Reason.TARGET),
        ({"done": 80}, Reason.FULL),
    ],
    ids=str,
)
def test_a_node_yields_for_its_most_urgent_reason(
    changed: dict[str, object], reason: Reason | None
) -> None:
    assert should_yield(Shape("flat", 4, min_chunk=10, max_chunk=80), progress(**changed)) == reason


def having(**fields: object) -> set[Reason]:
    """Return the reasons whose rows have these values."""
    return {
        reason
        for reason, rule in RULES.items()
        if all(getattr(rule, name) == value for name, value in fields.items())
    }


def test_every_reason_has_its_row_in_the_table() -> None:
    assert set(RULES) == set(Reason)
    assert having(children="none") == {Reason.STOPPED}


def test_a_boundary_stops_at_once_or_may_put_the_cut_off() -> None:
    """Each reason that `should_yield` returns is either urgent or may be put off, never both."""
    at_a_boundary = {Reason.STOPPED, Reason.FLUSH, Reason.DRAINING, Reason.PREEMPTED}

    assert having(urgent=True) == at_a_boundary
    assert having(may_be_put_off=True) == {Reason.TARGET, Reason.FULL}


def test_an_isolated_item_leaves_its_neighbours_to_other_nodes() -> None:
    assert having(isolates=True) == {Reason.ISOLATE, Reason.RETRY}
    assert having(isolates=True) < having(children="many")


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        ({}, True),
        ({"rest": 1}, False),
        ({"depth": 3}, False),
        ({"rest": 5}, False),
        ({"elapsed_ms": 1.0}, False),
    ],
    ids=str,
)
def test_the_rest_is_shared_when_it_is_worth_a_message(
    changed: dict[str, object], answer: bool
) -> None:
    assert may_fan_out(Shape("flat", 4, min_chunk=3, max_depth=3), progress(**changed)) is answer


def test_sequential_jobs_and_short_rests_are_not_shared() -> None:
    assert not may_fan_out(Shape("sequential"), progress())
    assert len(share_out(Shape("flat", 4), progress(elapsed_ms=60.0), 50, 100, 1).parts) == 2
    assert len(share_out(Shape("flat", 4), progress(elapsed_ms=900.0), 50, 100, 1).parts) == 4
    assert len(share_out(Shape("flat", 4), progress(elapsed_ms=900.0), 50, 100, 7).parts) == 8


def test_the_estimated_chunk_size() -> None:
    assert (
        estimate_optimal_chunk_size(
            total_items=10_000, estimated_item_processing_time_ms=5, target_parallelism=8
        )
        == 1250
    )
    assert estimate_optimal_chunk_size(100, 0.1, 8) == 100
    with pytest.raises(InvalidValue, match="total_items=0: Input should be greater than or equal"):
        estimate_optimal_chunk_size(0, 5, 8)
    with pytest.raises(InvalidValue, match="target_parallelism: is missing"):
        estimate_optimal_chunk_size(100, 5)
    with pytest.raises(InvalidValue, match="totalItem"):
        estimate_optimal_chunk_size(
            {"totalItem": 1, "estimatedItemProcessingTimeMs": 5, "targetParallelism": 8}
        )


def test_a_chunk_size_is_estimated_for_a_dict_as_the_documents_write_it() -> None:
    about = {"totalItems": 10000, "estimatedItemProcessingTimeMs": 5, "targetParallelism": 8}

    assert estimate_optimal_chunk_size(about) == 1250
