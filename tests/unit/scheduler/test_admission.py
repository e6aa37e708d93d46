"""Admission of work: by pressure level, by the state of its queue, and by the number of jobs at
work.

Every denial has a retry time.
"""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.degradation import Level
from resilience.errors import Category, Denied
from resilience.keys import Keys
from scheduler.admission import (
    LATEST_S,
    SOONEST_S,
    Overloaded,
    QueueFull,
    WaitingRoom,
    full,
    shed,
    sheds,
)
from scheduler.queues import QueueReport
from scheduler.settings import AdmissionSettings
from tests.unit.world import World, world

__all__ = ["world"]

PRIORITIES = ("critical", "high", "normal", "low")
DEFAULTS = AdmissionSettings()
UNBOUNDED = AdmissionSettings(
    queue_depth=0, wait_critical_s=0, wait_high_s=0, wait_normal_s=0, wait_low_s=0
)
LEVELS = st.sampled_from(Level)
SECONDS = st.floats(0, 10_000)


def refusal(
    depth: int, age: float | None, priority: str = "normal", settings: AdmissionSettings = DEFAULTS
) -> QueueFull | None:
    return full(f"rlm.{priority}", priority, QueueReport(depth, age), settings)


# --- by level ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "refused"),
    [
        (Level.NORMAL, []),
        (Level.ELEVATED, []),
        (Level.HIGH, ["low"]),
        (Level.CRITICAL, ["normal", "low"]),
        (Level.EMERGENCY, ["high", "normal", "low"]),
    ],
)
def test_less_urgent_work_is_denied_first_and_critical_work_never(
    level: Level, refused: list[str]
) -> None:
    assert [priority for priority in PRIORITIES if sheds(priority, level)] == refused
    assert [priority for priority in PRIORITIES if shed(priority, level, 20.0)] == refused


def test_control_work_is_admitted_at_every_level() -> None:
    assert not any(sheds("control", level) for level in Level)


@pytest.mark.parametrize(
    ("priority", "level", "step_s", "retry_after_s"),
    [
        ("low", Level.HIGH, 20.0, 20.0),
        ("low", Level.CRITICAL, 20.0, 40.0),
        ("low", Level.EMERGENCY, 20.0, 60.0),
        ("normal", Level.EMERGENCY, 20.0, 40.0),
        ("high", Level.EMERGENCY, 20.0, 20.0),
        ("low", Level.EMERGENCY, 0.1, SOONEST_S),
        ("low", Level.EMERGENCY, 1000.0, LATEST_S),
        ("low", Level.HIGH, 1.2, 2.0),  # whole seconds, as HTTP's Retry-After has them
    ],
)
def test_the_retry_time_is_when_the_level_can_have_fallen_far_enough(
    priority: str, level: Level, step_s: float, retry_after_s: float
) -> None:
    error = shed(priority, level, step_s)

    assert error is not None
    assert error.retry_after_s == retry_after_s


def test_an_overload_error_names_the_level_that_admits_the_work() -> None:
    error = shed("normal", Level.EMERGENCY, 20.0)

    assert isinstance(error, Overloaded)
    assert isinstance(error, Denied)
    assert (error.code, error.category, error.retryable, error.guard) == (
        "OVERLOADED",
        Category.RESOURCE,
        True,
        "admission",
    )
    assert str(error) == (
        "admission: pressure is emergency, and normal jobs are accepted below critical; come "
        'back in 40 s. To wait instead, submit with overload="delay"; to accept all jobs, set '
        "RLM_PRESSURE__ENABLED=0"
    )


def test_an_overload_error_names_host_measure_and_limit() -> None:
    cause = "memory 97 % of 2048 MB on w1"

    error = shed("normal", Level.EMERGENCY, 20.0, cause=cause, thresholds=(65.0, 75.0, 85.0, 95.0))

    assert error is not None
    assert error.why == (
        "pressure is emergency (memory 97 % of 2048 MB on w1), and normal jobs are accepted below "
        "critical (85 %)"
    )


@given(
    priority=st.sampled_from(PRIORITIES), lower=LEVELS, higher=LEVELS, step_s=st.floats(0.001, 1000)
)
def test_a_higher_level_gives_a_later_retry_time(
    priority: str, lower: Level, higher: Level, step_s: float
) -> None:
    sooner, later = (shed(priority, level, step_s) for level in sorted((lower, higher)))

    if sooner:
        assert later is not None, "work denied at one level is denied at each higher level"
        assert SOONEST_S <= sooner.retry_after_s <= later.retry_after_s <= LATEST_S


# --- by queue ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "age", "refused"),
    [
        ("critical", 1e6, False),
        ("high", 10.0, False),
        ("high", 10.1, True),
        ("normal", 30.0, False),
        ("normal", 30.1, True),
        ("low", 60.0, False),
        ("low", 60.1, True),
        ("low", None, False),  # the age is not known
    ],
)
def test_a_queue_is_full_while_its_oldest_message_waits_for_too_long(
    priority: str, age: float | None, refused: bool
) -> None:
    assert bool(refusal(1, age, priority)) is refused


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize(
    ("depth", "refused"), [(0, False), (9_999, False), (10_000, True), (10_001, True)]
)
def test_a_queue_of_any_priority_is_full_at_its_bound(
    priority: str, depth: int, refused: bool
) -> None:
    assert bool(refusal(depth, None, priority)) is refused


@pytest.mark.parametrize("priority", PRIORITIES)
def test_a_bound_of_0_is_no_bound(priority: str) -> None:
    assert refusal(10**9, 10**9, priority, UNBOUNDED) is None


def test_each_bound_can_be_set() -> None:
    own = AdmissionSettings(queue_depth=3, wait_critical_s=2)

    assert refusal(2, 2.0, "critical", own) is None
    assert refusal(3, 0.0, "critical", own)
    assert refusal(2, 2.1, "critical", own)


@pytest.mark.parametrize(
    ("depth", "age", "retry_after_s"),
    [
        (10_000, None, SOONEST_S),
        (10_000, 20.0, SOONEST_S),  # 1 message too many, 500 are served a second
        (20_000, 20.0, 11.0),  # 10,001 messages too many, 1,000 are served a second
        (5, 45.0, 15.0),
        (5, 30.2, SOONEST_S),
        (5, 1e6, LATEST_S),
        (
            10_000,
            100.0,
            70.0,
        ),  # too many and too old: the later of both times counts
        (1_000_000, 100.0, 100.0),
    ],
)
def test_the_retry_time_is_when_enough_messages_have_been_served(
    depth: int, age: float | None, retry_after_s: float
) -> None:
    error = refusal(depth, age)

    assert error is not None
    assert error.retry_after_s == retry_after_s


@pytest.mark.parametrize(
    ("depth", "age", "why"),
    [
        (12_000, 3.0, "12,000 messages wait, the limit is 10,000"),
        (7, 45.4, "its oldest message waits for 45 s, the limit is 30 s"),
        (
            12_000,
            45.4,
            (
                "12,000 messages wait, the limit is 10,000; its oldest message waits for 45 s, the "
                "limit is 30 s"
            ),
        ),
    ],
)
def test_the_error_of_a_full_queue_names_the_queue_and_the_bound(
    depth: int, age: float, why: str
) -> None:
    error = refusal(depth, age)

    assert error is not None
    assert isinstance(error, Denied)
    assert (error.code, error.category, error.retryable, error.guard) == (
        "QUEUE_FULL",
        Category.RESOURCE,
        True,
        "queue rlm.normal",
    )
    assert str(error) == f"queue rlm.normal: {why}; come back in {error.retry_after_s:g} s"


_REPORTS = st.tuples(st.integers(0, 50_000), st.none() | SECONDS)


@given(reports=st.tuples(_REPORTS, _REPORTS), priority=st.sampled_from(PRIORITIES))
def test_a_fuller_queue_gives_a_later_retry_time(
    reports: tuple[tuple[int, float | None], ...], priority: str
) -> None:
    (d1, a1), (d2, a2) = reports
    less = refusal(min(d1, d2), min(a1 or 0.0, a2 or 0.0), priority)
    more = refusal(max(d1, d2), max(a1 or 0.0, a2 or 0.0), priority)

    if less:
        assert more is not None
        assert SOONEST_S <= less.retry_after_s <= more.retry_after_s <= LATEST_S


# --- places of jobs at work -------------------------------------------------------------------


def room(world: World, max_jobs: int) -> WaitingRoom:
    return WaitingRoom(world.store(), Keys("unit"), max_jobs)


def ended(world: World, *jobs: str) -> None:
    """Remove jobs from the index of open jobs, as CLOSE does."""
    world.client().zrem(Keys("unit").due, *jobs)


def test_the_first_jobs_get_a_place_and_the_next_gets_a_retry_time(world: World) -> None:
    door = room(world, 2)

    assert [door.crowded(job, "normal") for job in ("a", "b")] == [None, None]
    refused = door.crowded("c", "normal")
    assert refused is not None
    assert (refused.code, refused.retry_after_s) == ("QUEUE_FULL", 5.0)
    assert str(refused) == "jobs: all places are taken (max_jobs=2); come back in 5 s"
    assert door.crowded("a", "normal") is None, "a job keeps its place"
    assert door.places() == 0


def test_a_place_is_free_when_its_job_has_ended_or_was_never_opened(
    world: World,
) -> None:
    """A place that was given back is free, too."""
    door = room(world, 3)
    assert [door.crowded(job, "low") for job in "abc"] == [None] * 3

    ended(world, "b")
    door.leave(["c"])
    assert door.places() == 2
    assert world.client().zscore(Keys("unit").due, "a") == (world.now + 60) * 1000, (
        "a sweep drops a job that was not opened by then"
    )


def test_critical_jobs_are_neither_denied_nor_counted(world: World) -> None:
    door = room(world, 1)

    assert [door.crowded(str(each), "critical") for each in range(5)] == [None] * 5
    assert door.places() == 1


def test_without_a_bound_there_is_no_round_trip(world: World) -> None:
    store = world.store()
    door = WaitingRoom(store, Keys("unit"))

    assert [door.crowded(str(each), "low") for each in range(500)] == [None] * 500
    assert door.places() > 10**6
    assert store.round_trips == 0


def test_concurrent_clients_get_exactly_the_places_there_are(world: World) -> None:
    granted: list[str] = []

    def ask(client: int) -> None:
        door = room(world, 50)
        granted.extend(
            job
            for job in (f"{client}-{each}" for each in range(20))
            if door.crowded(job, "normal") is None
        )

    clients = [threading.Thread(target=ask, args=(each,)) for each in range(8)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert len(granted) == 50


def test_a_waiting_job_keeps_its_turn(world: World) -> None:
    door = room(world, 1)
    door.enter("unit.normal", {"a root": 1})
    door.enter("unit.normal", {"b root": 2})
    door.enter("unit.normal", {"a root": 3})

    assert door.call("unit.normal", 2) == ["a root", "b root"]
