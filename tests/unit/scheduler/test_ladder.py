"""The pressure level of a host: the signals of a sample, when a level rises and how long it lasts.

Neither noise nor our own degradation makes the level swing.
"""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.degradation import CONSTRAINTS, Level
from scheduler.ladder import RELAPSE_S, HostLadder, Ladder, LadderState, in_words, signals
from scheduler.sampling import Sample
from scheduler.settings import PressureSettings

SETTINGS = PressureSettings()
LITERAL = PressureSettings(cpu="utilisation")
NORMAL, ELEVATED, HIGH, CRITICAL, EMERGENCY = Level


def sample(**signal: Any) -> Sample:
    """Return the sample of a calm host, with the given signals."""
    calm: dict[str, Any] = {
        "memory_pct": 20.0,
        "memory_mb": 1600.0,
        "memory_limit_mb": 8000.0,
        "available_mb": 6400.0,
        "source": "host",
        "cpu_waiting_pct": 0.0,
        "memory_stall_pct": 0.0,
        "load_per_cpu": 0.0,
    }
    return Sample(**(calm | signal))


def settled(settings: PressureSettings, **signal: Any) -> Level:
    """Return the level after two such samples."""
    ladder = HostLadder(settings)
    ladder.step(sample(**signal), 0)
    return ladder.step(sample(**signal), 1).level


def levels(
    *loads: float | None, settings: PressureSettings = SETTINGS, every_s: float = 1.0
) -> list[Level]:
    ladder = Ladder(settings)
    return [ladder.step(load, number * every_s) for number, load in enumerate(loads)]


def changes(found: list[Level]) -> int:
    return sum(before != after for before, after in pairwise([NORMAL, *found]))


# --- levels by percentage ---------------------------------------------------------------------

TABLE = [
    (0.0, NORMAL, 1.0),
    (64.9, NORMAL, 1.0),
    (65.0, ELEVATED, 0.8),
    (74.9, ELEVATED, 0.8),
    (75.0, HIGH, 0.8),
    (84.9, HIGH, 0.8),
    (85.0, CRITICAL, 0.5),
    (94.9, CRITICAL, 0.5),
    (95.0, EMERGENCY, 0.3),
    (100.0, EMERGENCY, 0.3),
]


@pytest.mark.parametrize(("percent", "level", "factor"), TABLE)
@pytest.mark.parametrize("of", ["memory_pct", "cpu_pct"])
def test_by_utilisation_the_level_is_the_worse_of_memory_and_cpu(
    of: str, percent: float, level: Level, factor: float
) -> None:
    assert settled(LITERAL, **{of: percent}) is level
    assert CONSTRAINTS[level].entity_limit_factor == factor


@pytest.mark.parametrize(("percent", "level", "_"), TABLE)
def test_by_default_memory_has_the_same_thresholds(percent: float, level: Level, _: float) -> None:
    assert settled(SETTINGS, memory_pct=percent) is level


# --- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "load"),
    [(0.0, 1.0), (15.0, 1.0), (36.0, 1.6), (65.0, 1.6), (39.9, 12.0)],
    ids=[
        "computing",
        "disturbed",
        "with a busy Redis",
        "for a second",
        "a crowd that does not wait",
    ],
)
def test_a_host_that_computes_on_all_cpus_without_waiting_is_normal(
    waiting: float, load: float
) -> None:
    assert settled(SETTINGS, cpu_pct=100.0, cpu_waiting_pct=waiting, load_per_cpu=load) is NORMAL


@pytest.mark.parametrize("waiting", [40.0, 100.0, None])
@pytest.mark.parametrize(
    ("load", "level"),
    [
        (1.9, NORMAL),
        (2.0, ELEVATED),
        (2.9, ELEVATED),
        (3.0, HIGH),
        (4.0, HIGH),
        (6.0, HIGH),
        (50.0, HIGH),
    ],
)
def test_while_work_waits_the_run_queue_gives_the_level(
    waiting: float | None, load: float, level: Level
) -> None:
    assert settled(SETTINGS, cpu_waiting_pct=waiting, load_per_cpu=load) is level


@pytest.mark.parametrize("load", [0.0, 3.0, 6.0, 100.0])
def test_a_busy_cpu_alone_refuses_no_jobs_by_default(load: float) -> None:
    ladder, busy = HostLadder(SETTINGS), {"cpu_pct": 100.0, "cpu_waiting_pct": 100.0}
    verdicts = [ladder.step(sample(**busy, load_per_cpu=load), second) for second in range(100)]

    assert max(each.level for each in verdicts) <= HIGH
    assert {(each.refusing, each.refusing_why) for each in verdicts} == {(NORMAL, "")}


def test_memory_refuses_jobs_on_a_host_whose_cpu_is_busy_as_well() -> None:
    ladder, busy = HostLadder(SETTINGS), {"cpu_waiting_pct": 100.0, "load_per_cpu": 9.0}
    ladder.step(sample(**busy, memory_pct=76.0), 0)
    verdict = ladder.step(sample(**busy, memory_pct=76.0), 1)

    assert (verdict.refusing, verdict.refusing_why) == (HIGH, "memory 76 % of 8000 MB")


def test_by_utilisation_a_busy_cpu_refuses_jobs() -> None:
    ladder = HostLadder(LITERAL)
    verdict = ladder.step(sample(cpu_pct=96.0), 0)

    assert (verdict.level, verdict.refusing) == (EMERGENCY, EMERGENCY)
    assert verdict.refusing_why == "CPU 96 % busy"


@pytest.mark.parametrize(
    ("throttled", "waiting", "level"),
    [
        (100.0, 5.0, NORMAL),
        (100.0, 49.0, NORMAL),
        (49.0, 100.0, NORMAL),
        (50.0, 50.0, ELEVATED),
        (67.0, 67.0, HIGH),
        (100.0, 100.0, HIGH),
        (100.0, None, NORMAL),
    ],
)
def test_an_exhausted_quota_is_high_at_most_and_only_while_work_waits(
    throttled: float, waiting: float | None, level: Level
) -> None:
    assert (
        settled(SETTINGS, throttled_pct=throttled, cpu_waiting_pct=waiting, load_per_cpu=0.5)
        is level
    )


@pytest.mark.parametrize(
    ("stalled", "level"),
    [
        (None, NORMAL),
        (5.0, NORMAL),
        (10.0, HIGH),
        (39.0, HIGH),
        (40.0, CRITICAL),
        (60.0, EMERGENCY),
        (100.0, EMERGENCY),
    ],
)
@pytest.mark.parametrize("settings", [SETTINGS, LITERAL])
def test_work_that_waits_for_memory_is_high_at_once(
    settings: PressureSettings, stalled: float | None, level: Level
) -> None:
    assert settled(settings, memory_stall_pct=stalled) is level


def test_signals_follow_other_thresholds() -> None:
    settings = PressureSettings(thresholds=(5.9, 27.3, 27.6, 52.7))

    found = signals(sample(cpu_waiting_pct=90.0, load_per_cpu=3.0, memory_stall_pct=40.0), settings)

    assert found == {"memory": 20.0, "cpu": 27.3, "memory stalls": 27.6}, (
        "exactly: a level begins at its threshold"
    )


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 64), st.floats(0, 100), st.floats(0, 64))
def test_signals_are_from_0_to_100_and_never_fall_with_more_waiting(
    waiting: float, stalled: float, load: float, more: float, tasks: float
) -> None:
    less = signals(
        sample(
            cpu_waiting_pct=min(waiting, more),
            memory_stall_pct=min(stalled, more),
            load_per_cpu=min(load, tasks),
        ),
        SETTINGS,
    )
    worse = signals(
        sample(
            cpu_waiting_pct=max(waiting, more),
            memory_stall_pct=max(stalled, more),
            load_per_cpu=max(load, tasks),
        ),
        SETTINGS,
    )

    assert all(0 <= less[name] <= worse[name] <= 100 for name in less)


# --- reasons ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "signal", "why"),
    [
        (SETTINGS, {"memory_pct": 87.4, "memory_limit_mb": 2048.0}, "memory 87 % of 2048 MB"),
        (LITERAL, {"cpu_pct": 91.0}, "CPU 91 % busy"),
        (SETTINGS, {"cpu_waiting_pct": 100.0, "load_per_cpu": 4.25}, "4.2 tasks on each CPU"),
        (
            SETTINGS,
            {"cpu_waiting_pct": 80.0, "load_per_cpu": 1.0, "throttled_pct": 90.0},
            "1.0 tasks on each CPU, 90 % of the quota's periods cut short",
        ),
        (SETTINGS, {"memory_stall_pct": 45.0}, "all work waits for memory 45 % of the time"),
    ],
)
def test_a_level_has_its_reason_in_words(
    settings: PressureSettings, signal: dict[str, float], why: str
) -> None:
    ladder = HostLadder(settings)
    ladder.step(sample(**signal), 0)

    assert ladder.step(sample(**signal), 1).why == why


def test_a_level_keeps_its_reason_and_normal_has_none() -> None:
    ladder = HostLadder(SETTINGS)
    raised = ladder.step(sample(memory_pct=90.0), 0)
    lasting = ladder.step(sample(), 1)
    ended = [ladder.step(sample(), 2.0 + second) for second in range(200)][-1]

    assert (raised.level, raised.percent) == (CRITICAL, 90)
    assert (lasting.level, lasting.percent, lasting.why) == (CRITICAL, 20, raised.why)
    assert (ended.level, ended.why) == (NORMAL, "")


def test_without_a_sample_a_host_keeps_its_level_and_reason() -> None:
    ladder = HostLadder(SETTINGS)
    assert ladder.step(None, 0).level is NORMAL
    raised = ladder.step(sample(memory_pct=90.0), 1)

    assert ladder.step(None, 2) == raised


def test_every_signal_has_words() -> None:
    for settings in (SETTINGS, LITERAL):
        words = {in_words(name, sample(), settings) for name in signals(sample(), settings)}
        assert len(words) == 3


# --- up and down ------------------------------------------------------------------------------


def test_elevated_and_high_take_two_samples_and_worse_levels_take_one() -> None:
    assert levels(70, 70) == [NORMAL, ELEVATED]
    assert levels(80, 80) == [NORMAL, HIGH]
    assert levels(70, 80, 80) == [NORMAL, ELEVATED, HIGH]
    assert levels(80, 60, 80, 60) == [NORMAL] * 4, "two consecutive samples are needed"
    assert levels(90) == [CRITICAL]
    assert levels(95) == [EMERGENCY]


def test_after_an_emergency_the_level_is_normal_within_two_minutes() -> None:
    found = levels(*[99] * 60, *[10] * 120)

    gone = found[60:]
    assert gone[19] is EMERGENCY, "not before the dwell time"
    assert [
        level for level, before in zip(gone, [EMERGENCY, *gone], strict=False) if level != before
    ] == [
        CRITICAL,
        HIGH,
        ELEVATED,
        NORMAL,
    ]
    assert gone.index(NORMAL) == pytest.approx(90, abs=6)


def test_a_level_lasts_until_load_is_below_its_threshold_by_the_margin() -> None:
    assert levels(90, *[80.5] * 3000)[-1] is CRITICAL
    assert levels(90, *[79.5] * 60)[-1] is HIGH


def test_one_high_sample_restarts_the_dwell_time() -> None:
    found = levels(90, *[60] * 18, 81, *[60] * 19)

    assert set(found) == {CRITICAL}
    assert levels(90, *[60] * 38)[-1] is not CRITICAL, "without it the level would have ended"


def test_a_missing_load_keeps_the_level() -> None:
    assert levels(None, math.nan, 90, None, math.nan) == [
        NORMAL,
        NORMAL,
        CRITICAL,
        CRITICAL,
        CRITICAL,
    ]
    assert levels(90, *[10] * 60, math.nan)[-1] is ELEVATED, "the state of the ladder is unchanged"


def test_load_beyond_100_percent_lasts_no_longer_than_100_percent() -> None:
    assert levels(*[100] * 30, *[10] * 120) == levels(*[900, math.inf] * 15, *[10, -math.inf] * 60)


def test_switched_off_every_level_is_normal() -> None:
    assert levels(99, 99, settings=PressureSettings(enabled=False)) == [NORMAL, NORMAL]


def test_a_clock_that_was_set_back_delays_a_step_by_the_dwell_at_most() -> None:
    ladder = Ladder(SETTINGS)
    ladder.step(99, 10_000)
    for second in range(10):
        ladder.step(10, 10_001 + second)

    found = [ladder.step(10, 5000 + second) for second in range(30)]

    assert CRITICAL in found


@given(
    st.lists(st.one_of(st.floats(-50, 300), st.floats(90, 97), st.none()), max_size=60),
    st.integers(0, 60),
)
def test_a_ladder_continues_from_a_stored_state(loads: list[float | None], stop: int) -> None:
    whole, first = Ladder(SETTINGS), Ladder(SETTINGS)
    expected = [whole.step(load, 10.0 * at) for at, load in enumerate(loads)]

    found = [first.step(load, 10.0 * at) for at, load in enumerate(loads[:stop])]
    kept = msgspec.json.decode(msgspec.json.encode(first.state), type=LadderState)
    second = Ladder(SETTINGS, kept)
    found += [second.step(load, 10.0 * (stop + at)) for at, load in enumerate(loads[stop:])]

    assert found == expected


def test_a_state_with_a_premature_step_survives_json() -> None:
    ladder = Ladder(SETTINGS)
    for second, load in enumerate([96, *[70] * 40, 96]):
        ladder.step(load, second)

    assert ladder.state.premature == {4: pytest.approx(72, abs=3)}
    assert msgspec.json.decode(msgspec.json.encode(ladder.state), type=LadderState) == ladder.state


@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.none(), st.just(math.nan), st.floats(0, 100), st.sampled_from([10.0, 50.0])
            ),
            st.floats(0.1, 30),
        ),
        max_size=120,
    )
)
def test_a_level_falls_by_single_steps_after_the_dwell_time_and_rises_at_once(
    steps: list[tuple[float | None, float]],
) -> None:
    ladder, level, now, since, last = Ladder(SETTINGS), NORMAL, 0.0, 0.0, NORMAL
    for load, passed in steps:
        now += passed
        before, level = level, ladder.step(load, now)
        missing = load is None or math.isnan(load)
        if missing:
            assert level is before
        elif load is not None and load >= 95:
            assert level is EMERGENCY
        elif load is not None and load >= 85:
            assert level >= CRITICAL
        if level < before:
            assert level == before - 1
            assert now - since >= SETTINGS.release_s - 1e-6, (
                "since the last change and the last high load"
            )
            assert load is not None
            assert load < SETTINGS.thresholds[before - 1] - SETTINGS.release_pct
        if (
            not missing
            and load is not None
            and last
            and load >= SETTINGS.thresholds[last - 1] - SETTINGS.release_pct
        ):
            since = now
        if level != before:
            since = now
        last = level


# --- noise, and our own degradation -----------------------------------------------------------


def noisy_hour(mean: float, seed: int) -> tuple[Ladder, list[Level]]:
    random, ladder = Random(seed), Ladder(SETTINGS)
    return ladder, [ladder.step(random.gauss(mean, 5), second) for second in range(3600)]


@pytest.mark.parametrize("mean", [65, 75, 80, 85, 95])
def test_noise_around_a_threshold_changes_the_level_at_most_8_times_an_hour(mean: float) -> None:
    counts = [changes(noisy_hour(mean, seed)[1]) for seed in range(12)]

    assert max(counts) <= 8, counts


@pytest.mark.parametrize("mean", [65, 75, 80, 85, 95])
def test_two_minutes_after_an_hour_of_noise_the_level_is_normal(mean: float) -> None:
    ladder, _ = noisy_hour(mean, seed=1)

    assert [ladder.step(20, 3600 + second) for second in range(120)][-1] is NORMAL


@pytest.mark.parametrize("noise", [0, 3])
@pytest.mark.parametrize("base", [70, 80, 90, 100, 110, 120, 150, 200, 300])
def test_load_that_falls_by_our_own_degradation_makes_few_swings(base: float, noise: float) -> None:
    """Without memory of premature steps, a load of 110 % would change the level 326 times in this
    hour.
    """
    random, ladder, level, found = Random(1), Ladder(SETTINGS), NORMAL, []
    for second in range(3600):
        load = base * CONSTRAINTS[level].entity_limit_factor + random.gauss(0, noise)
        found.append(level := ladder.step(load, second))

    assert changes(found) <= 12
    assert level is not NORMAL


def test_a_premature_step_is_repeated_after_a_long_time_of_low_load() -> None:
    ladder = Ladder(SETTINGS)
    times = iter(range(10_000))
    for load in (96, *[70] * 30, 96):
        ladder.step(load, next(times))
    assert ladder.state.level == EMERGENCY

    held = [ladder.step(70, next(times)) for _ in range(int(RELAPSE_S))]

    assert set(held) == {EMERGENCY}, "the step at a load of 70 was premature"
    assert CRITICAL in [ladder.step(70, next(times)) for _ in range(30)]


def test_a_step_that_lasted_counts_as_the_first_again() -> None:
    ladder = Ladder(SETTINGS)
    times = iter(range(10_000))
    for load in (96, *[70] * 30, 96, *[50] * 30, *[70] * int(RELAPSE_S + 60)):
        ladder.step(load, next(times))
    assert ladder.state.premature, "it is still remembered"

    ladder.step(96, next(times))

    assert CRITICAL in [ladder.step(70, next(times)) for _ in range(40)], "as for the first time"
