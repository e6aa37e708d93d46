"""The number of nodes of an operation that may run at once: by policy, pressure, urgency and
memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.bulkhead import URGENCY
from resilience.degradation import Level
from resilience.errors import InvalidValue, short_repr
from scheduler.allocation import (
    TIMEOUT_FACTORS,
    ExecutorPriority,
    Policies,
    ResourceAllocationPolicy,
    ResourceLimits,
    calculate_optimal_batch_size,
    may_start,
    priority_of,
    timeout_factor,
    workers_for,
)
from scheduler.settings import AllocationSettings

EXAMPLE = Path(__file__).parents[3] / "docs/examples/allocation_policies.json"
PRIORITIES = list(URGENCY)


def policy(**fields: Any) -> ResourceAllocationPolicy:
    return ResourceAllocationPolicy(
        **{"executor_id": "op", "min_workers": 4, "max_workers": 32, **fields}
    )


def allowed(
    about: ResourceAllocationPolicy, level: Level, priority: str = "normal", **host: Any
) -> int:
    return workers_for(
        about, level, **{"slots": 100, "available_mb": None, "priority": priority, **host}
    )


# --- shares -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "shares"),
    [
        ("critical", [32, 32, 32, 32, 32]),
        ("high", [32, 32, 25, 18, 11]),
        ("normal", [32, 25, 18, 11, 4]),
        ("low", [32, 18, 11, 4, 1]),
    ],
)
def test_the_share_of_each_priority_shrinks_from_max_workers_to_min_workers(
    priority: str, shares: list[int]
) -> None:
    assert [allowed(policy(), level, priority) for level in Level] == shares


@pytest.mark.parametrize(
    ("priority", "shares"),
    [
        ("critical", [32, 32, 32, 32, 32]),
        ("high", [32, 25, 18, 11, 4]),
        ("normal", [32, 18, 11, 4, 4]),
        ("low", [32, 11, 4, 4, 1]),
    ],
)
def test_memory_intensive_operations_shrink_one_level_earlier(
    priority: str, shares: list[int]
) -> None:
    assert [allowed(policy(is_memory_intensive=True), level, priority) for level in Level] == shares


def test_the_share_of_a_small_cluster_shrinks() -> None:
    """Without this rule 8 slots of a max_workers of 32 would all be used until an emergency."""
    assert [allowed(policy(), level, slots=8) for level in Level] == [8, 7, 6, 5, 4]
    assert [allowed(policy(), level, slots=3) for level in Level] == [3, 3, 3, 3, 3]


def test_with_no_published_slots_one_node_may_run() -> None:
    assert [allowed(policy(), level, slots=0) for level in Level] == [1] * 5


@pytest.mark.parametrize(
    ("available_mb", "nodes"),
    [(None, 32), (40_000.0, 32), (4096.0, 4), (4095.9, 3), (1024.0, 1), (100.0, 1), (0.0, 1)],
)
def test_memory_bounds_every_priority_and_always_leaves_one_node(
    available_mb: float | None, nodes: int
) -> None:
    about = policy(max_memory_mb=1024)

    assert {
        allowed(about, Level.NORMAL, each, available_mb=available_mb) for each in PRIORITIES
    } == {nodes}


def test_an_unknown_priority_is_refused() -> None:
    with pytest.raises(
        InvalidValue, match="priority='urgent': must be one of critical, high, normal, low"
    ):
        allowed(policy(), Level.NORMAL, "urgent")
    with pytest.raises(InvalidValue, match="priority='urgent'"):
        timeout_factor("urgent")


@pytest.mark.parametrize(
    ("operation", "by_job"),
    [
        ("critical", ["critical", "critical", "critical", "critical"]),
        ("high", ["critical", "high", "high", "high"]),
        ("normal", ["critical", "high", "normal", "low"]),
        ("low", ["low", "low", "low", "low"]),
    ],
)
def test_the_priority_of_an_operation_raises_or_lowers_that_of_its_jobs(
    operation: str, by_job: list[str]
) -> None:
    assert [priority_of(policy(priority=operation), job) for job in PRIORITIES] == by_job


# --- properties -------------------------------------------------------------------------------

policies = st.builds(
    lambda workers, memory, **rest: policy(
        min_workers=workers[0],
        max_workers=workers[1],
        min_memory_mb=memory[0],
        max_memory_mb=memory[1],
        **rest,
    ),
    st.tuples(st.integers(1, 100), st.integers(1, 100)).map(sorted),
    st.tuples(st.floats(1, 1e5), st.floats(1, 1e5)).map(sorted),
    priority=st.sampled_from(ExecutorPriority),
    is_memory_intensive=st.booleans(),
)
levels, jobs, slots = st.sampled_from(Level), st.sampled_from(PRIORITIES), st.integers(0, 200)
memory = st.none() | st.floats(0, 1e7)


@given(policies, levels, jobs, slots, memory)
def test_the_number_of_nodes_is_within_its_bounds(
    about: ResourceAllocationPolicy, level: Level, job: str, slots: int, available_mb: float | None
) -> None:
    found = allowed(about, level, job, slots=slots, available_mb=available_mb)
    unbound = allowed(about, level, job, slots=slots)

    assert 1 <= found <= unbound <= max(1, min(about.max_workers, slots))
    assert available_mb is None or found == 1 or found * about.max_memory_mb <= available_mb
    last = level is Level.EMERGENCY and priority_of(about, job) == "low"
    assert unbound >= min(about.min_workers, slots) or last


@given(policies, st.tuples(levels, levels).map(sorted), jobs, slots, memory)
def test_a_worse_level_never_allows_more(
    about: ResourceAllocationPolicy,
    pair: list[Level],
    job: str,
    slots: int,
    available_mb: float | None,
) -> None:
    better, worse = (
        allowed(about, level, job, slots=slots, available_mb=available_mb) for level in pair
    )

    assert worse <= better


@given(policies, levels, st.tuples(jobs, jobs), slots, memory)
def test_a_more_urgent_job_is_never_allowed_fewer(
    about: ResourceAllocationPolicy,
    level: Level,
    pair: tuple[str, str],
    slots: int,
    available_mb: float | None,
) -> None:
    urgent, patient = (
        allowed(about, level, job, slots=slots, available_mb=available_mb)
        for job in sorted(pair, key=URGENCY.__getitem__)
    )

    assert urgent >= patient


@given(policies, levels, jobs, slots, memory)
def test_a_more_urgent_operation_is_never_allowed_fewer(
    about: ResourceAllocationPolicy, level: Level, job: str, slots: int, available_mb: float | None
) -> None:
    found = [
        allowed(
            about.model_copy(update={"priority": each}),
            level,
            job,
            slots=slots,
            available_mb=available_mb,
        )
        for each in ExecutorPriority
    ]

    assert found == sorted(found, reverse=True)


@given(policies, levels, jobs, slots, st.tuples(st.floats(0, 1e7), st.floats(0, 1e7)).map(sorted))
def test_more_memory_never_allows_fewer(
    about: ResourceAllocationPolicy, level: Level, job: str, slots: int, pair: list[float]
) -> None:
    less, more = (allowed(about, level, job, slots=slots, available_mb=each) for each in pair)

    assert less <= more


@given(policies, levels, jobs, st.tuples(slots, slots).map(sorted))
def test_more_slots_never_allow_fewer(
    about: ResourceAllocationPolicy, level: Level, job: str, pair: list[int]
) -> None:
    fewer, more = (allowed(about, level, job, slots=each) for each in pair)

    assert fewer <= more


@given(policies, levels, slots)
def test_critical_operations_keep_their_share_at_every_level(
    about: ResourceAllocationPolicy, level: Level, slots: int
) -> None:
    about = about.model_copy(update={"priority": ExecutorPriority.CRITICAL})

    assert allowed(about, level, "low", slots=slots) == allowed(
        about, Level.NORMAL, "low", slots=slots
    )


# --- starting, time limits, batches -----------------------------------------------------------


def test_a_node_does_not_start_with_too_little_free_memory() -> None:
    about = policy(min_memory_mb=256)

    assert [may_start(about, each) for each in (None, 256.0, 4096.0)] == ["", "", ""]
    assert (
        may_start(about, 190.4)
        == "op starts with 256 MB free (min_memory_mb), and this host has 190 MB"
    )


def test_urgent_items_have_more_time() -> None:
    assert [timeout_factor(each) for each in PRIORITIES] == [2.0, 1.5, 1.0, 1.0]
    assert list(TIMEOUT_FACTORS) == PRIORITIES


@pytest.mark.parametrize(
    ("cpu", "memory", "size"),
    [
        (80.1, 0, 12),
        (0, 80.1, 12),
        (100, 100, 12),
        (80, 80, 50),
        (80, 49, 50),
        (49.9, 49.9, 100),
        (50, 49.9, 50),
        (49.9, 50, 50),
        (0, 0, 100),
    ],
)
def test_a_batch_of_50_is_12_under_load_and_100_without_load(
    cpu: float, memory: float, size: int
) -> None:
    assert calculate_optimal_batch_size(cpu, memory) == size


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(5, (5, 5, 10)), (24, (6, 24, 48)), (60, (15, 60, 100)), (200, (50, 200, 100))],
)
def test_batches_of_other_sizes_follow_the_same_formula(
    most: int, sizes: tuple[int, int, int]
) -> None:
    assert tuple(calculate_optimal_batch_size(load, load, most) for load in (90, 60, 10)) == sizes


# --- records ----------------------------------------------------------------------------------


def test_the_defaults_of_a_policy() -> None:
    assert ResourceAllocationPolicy(executor_id="D5-Q2").model_dump() == {
        "executor_id": "D5-Q2",
        "priority": "normal",
        "min_memory_mb": 256.0,
        "max_memory_mb": 1024.0,
        "min_workers": 2,
        "max_workers": 6,
        "is_memory_intensive": False,
    }


def test_the_defaults_of_limits() -> None:
    limits = ResourceLimits()

    assert (
        limits.max_memory_mb,
        limits.max_cpu_percent,
        limits.max_workers,
        limits.min_workers,
    ) == (4096, 85, 32, 4)
    assert ResourceLimits(maxMemoryMb=16384).max_memory_mb == 16384


def test_a_policy_accepts_other_names_of_its_fields() -> None:
    ours = policy(
        executor_id="D5-Q2",
        priority=ExecutorPriority.HIGH,
        min_memory_mb=1,
        is_memory_intensive=True,
    )
    theirs = {
        "priority": "high",
        "minMemoryMb": 1,
        "minWorkers": 4,
        "maxWorkers": 32,
        "isMemoryIntensive": True,
    }

    assert ResourceAllocationPolicy(executorId="D5-Q2", **theirs) == ours
    assert ResourceAllocationPolicy(operation="D5-Q2", **theirs) == ours


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"executor_id": ""}, "executor_id='': String should have at least 1 character"),
        (
            {"operation": "other"},
            "operation='other': is given twice, as operation and as executor_id",
        ),
        (
            {"priority": "urgent"},
            "priority='urgent': Input should be 'critical', 'high', 'normal' or 'low'",
        ),
        ({"min_memory_mb": 0}, "min_memory_mb=0: Input should be greater than 0"),
        ({"max_memory_mb": float("nan")}, "max_memory_mb=nan: Input should be a finite number"),
        ({"min_memory_mb": 2000}, "min_memory_mb=2000.0: must be at most max_memory_mb=1024.0"),
        ({"min_workers": 0}, "min_workers=0: Input should be greater than or equal to 1"),
        ({"min_workers": 33}, "min_workers=33: must be at most max_workers=32"),
        (
            {"workers": 3},
            "workers=3: unknown field; did you mean 'min_workers'?",
        ),
    ],
)
def test_a_wrong_policy_is_refused_with_field_value_and_advice(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidValue) as refused:
        policy(**fields)

    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_memory_mb": 0}, "max_memory_mb=0"),
        ({"max_cpu_percent": 101}, "max_cpu_percent=101"),
        ({"min_workers": 40}, "min_workers=40: must be at most max_workers=32"),
    ],
)
def test_wrong_limits_are_refused_with_field_value_and_advice(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidValue, match=said):
        ResourceLimits(**fields)


# --- the registry -----------------------------------------------------------------------------


def written(folder: Path, entries: Any) -> Path:
    path = folder / "policies.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return path


def test_without_a_policy_the_settings_hold_and_memory_is_no_bound() -> None:
    found = Policies().of("anything")

    assert (found.executor_id, found.priority, found.min_workers, found.max_workers) == (
        "anything",
        "normal",
        4,
        32,
    )
    assert may_start(found, 100.0) == ""
    assert allowed(found, Level.NORMAL, available_mb=4096.0) == 32
    assert (
        Policies(AllocationSettings(max_workers=8, min_workers=2)).of("anything").max_workers == 8
    )


def test_the_latest_policy_of_an_operation_counts_before_that_of_all_others() -> None:
    found = Policies()
    for about in (
        policy(executor_id="*", max_workers=7),
        policy(max_workers=8),
        policy(max_workers=9),
    ):
        found.register(about)

    assert (found.of("op").max_workers, found.of("other").max_workers) == (9, 7)
    assert found.of("other").executor_id == "other", "messages name the operation"


def test_the_policies_of_the_example_file() -> None:
    found = Policies()
    found.load(EXAMPLE)

    by_priority = {
        "critical": "D3-Q3 D4-Q2",
        "high": "D3-Q2 D4-Q1 D2-Q3 D5-Q2 D1-Q3",
        "normal": "D1-Q1 D6-Q5",
    }
    for priority, operations in by_priority.items():
        assert {found.of(each).priority for each in operations.split()} == {priority}
    intensive, budget = found.of("D5-Q2"), found.of("D1-Q3")
    assert (intensive.min_memory_mb, intensive.max_memory_mb, intensive.is_memory_intensive) == (
        256,
        1024,
        True,
    )
    assert (budget.min_memory_mb, budget.max_memory_mb, budget.is_memory_intensive) == (
        256,
        768,
        False,
    )
    assert {(each.min_workers, each.max_workers) for each in (intensive, budget)} == {(2, 6)}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"operation": "a"}, "policies='{path}': must hold a JSON list of objects"),
        ("[{", "policies='{path}': is not JSON: Expecting property name"),
        (["a"], "{path}, entry 1='a': must be an object"),
        (
            [{"operation": "a"}, {"operation": "b", "maxWorkers": 0}],
            "{path}, entry 2: maxWorkers=0: Input should be greater",
        ),
        (
            [{"operation": "a", "workers": 3}],
            "{path}, entry 1: workers=3: unknown field; did you mean",
        ),
        ([{"priority": "high"}], "{path}, entry 1: executor_id: is missing; ResourceAllocat"),
        (
            [{"operation": "a"}, {"operation": "b"}, {"executor_id": "a"}],
            "{path}, entry 3: executor_id='a': entry 1 has it; keep",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_entry_and_field(
    tmp_path: Path, entries: Any, said: str
) -> None:
    path, found = written(tmp_path, entries), Policies()

    with pytest.raises(InvalidValue) as refused:
        found.load(path)

    assert refused.value.field in said.format(path=path)
    shown = said.format(path=path).replace(repr(str(path)), short_repr(str(path)))
    assert str(refused.value).startswith(shown)
    assert found.of("a").max_workers == 32, "no entry of the file is used"


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="cannot be read: No such file"):
        Policies().load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidValue, match="is not JSON"):
        Policies().load(tmp_path / "binary.json")
