"""Holt's forecast at any times of observation, and the next pressure level that it expects."""

from __future__ import annotations

from itertools import accumulate
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.degradation import Level
from scheduler.forecast import ALPHA, BETA, BUCKET_S, LOAD_BUCKET_S, Holt, Rise, will_rise

T0 = 1_800_000_000.0


def holt_of(*seen: tuple[float, float], bucket_s: float = BUCKET_S) -> Holt:
    """Return a forecast that has observed (seconds since the start, value) in this order."""
    holt = Holt(bucket_s=bucket_s)
    for at, value in seen:
        holt.observe(value, T0 + at)
    return holt


def textbook(values: list[float], in_buckets: float) -> float:
    """Return the forecast of Holt's linear method for evenly spaced values; the first trend is that
    of the first two.
    """
    level, trend = values[1], values[1] - values[0]
    for value in values[2:]:
        before, level = level, ALPHA * value + (1 - ALPHA) * (level + trend)
        trend = BETA * (level - before) + (1 - BETA) * trend
    return level + in_buckets * trend


def test_without_observations_the_forecast_is_0() -> None:
    assert Holt().predict(60) == 0
    assert not Holt().settled


def test_at_even_times_it_equals_the_textbook_method() -> None:
    values = [10.0, 12.0, 9.0, 17.0, 16.0, 30.0, 28.0]
    holt = holt_of(*((BUCKET_S * i, value) for i, value in enumerate(values)))

    assert holt.predict(60) == pytest.approx(textbook(values, 60 / BUCKET_S))


@given(
    gaps=st.lists(st.floats(1, 4000), min_size=70, max_size=90),
    start=st.floats(-1000, 1000),
    slope=st.floats(-1, 1),
    in_s=st.floats(0, 600),
)
def test_a_straight_line_is_predicted_at_any_times_of_observation(
    gaps: list[float], start: float, slope: float, in_s: float
) -> None:
    times = list(accumulate(gaps))
    holt = holt_of(*((at, start + slope * at) for at in times))

    assert holt.settled
    assert holt.predict(in_s) == pytest.approx(
        start + slope * (times[-1] + in_s), abs=0.01, rel=1e-4
    )
    assert holt.slope == pytest.approx(slope, abs=1e-4)


def test_observations_of_one_bucket_are_averaged() -> None:
    many = holt_of((0, 10), (60, 20), (120, 28), (121, 32), (125, 24))
    one = holt_of((0, 10), (60, 20), (122, 28))

    assert many.slope == pytest.approx(one.slope)
    assert many.predict(0) == pytest.approx(one.predict(3)), "three seconds later"


def test_an_observation_counts_before_its_bucket_is_full() -> None:
    holt = holt_of((0, 10), (30, 10), (60, 10))
    before = holt.predict(0)
    holt.observe(100, T0 + 90)

    assert holt.predict(0) > before + 0.2 * 90


def test_after_a_long_pause_earlier_values_count_for_little() -> None:
    holt = holt_of(*((30.0 * i, 10.0 * i) for i in range(20)), (7200, 50))

    assert holt.predict(0) == pytest.approx(50, abs=1)
    assert abs(holt.slope) < 0.03, "the slope over the pause counts, not the one before it"


def test_there_is_no_trend_before_two_buckets_are_full() -> None:
    holt = holt_of((0, 10), (30, 40))

    assert (holt.settled, holt.slope, holt.predict(60)) == (False, 0, 40)
    holt.observe(40, T0 + 60)
    assert holt.settled
    assert holt.slope > 0


def test_a_clock_that_is_set_back_counts_as_standing_still() -> None:
    holt = holt_of(*((30.0 * i, float(i)) for i in range(10)), (-5000, 10), (271, 10))

    assert holt.last == T0 + 271
    assert holt.predict(60) == pytest.approx(11, abs=0.5)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(-1e6, 1e6)), max_size=30))
def test_a_forecast_continues_in_another_process(
    steps: list[tuple[float, float]],
) -> None:
    here, moved, now = Holt(), Holt(), T0
    for gap, value in steps:
        now += gap
        here.observe(value, now)
        moved = msgspec.json.decode(msgspec.json.encode(moved), type=Holt)
        moved.observe(value, now)

    assert moved == here
    assert moved.predict(60) == here.predict(60)


# --- the next level ---------------------------------------------------------------------------


def ramp(per_minute: float, upto: float, start: float = 40.0) -> tuple[Holt, float]:
    """Return a forecast and its last value: five constant minutes, then a rise up to a percentage,
    sampled every 5 s.
    """
    holt, at, value = Holt(bucket_s=LOAD_BUCKET_S), 0.0, start
    while value < upto:
        value = start + max(0.0, at - 300) * per_minute / 60
        holt.observe(value, T0 + at)
        at += 5
    return holt, value


@pytest.mark.parametrize(
    ("per_minute", "upto", "expected"),
    [
        (5, 61.0, Level.ELEVATED),
        (5, 70.9, Level.HIGH),
        (5, 82.0, Level.CRITICAL),
        (5, 92.0, Level.EMERGENCY),
        (5, 50.0, None),  # three minutes away
        (5, 95.5, None),  # there is no level above
        (10, 61.5, Level.ELEVATED),
    ],
)
def test_the_next_level_is_predicted_within_a_minute(
    per_minute: float, upto: float, expected: Level | None
) -> None:
    found = will_rise(*ramp(per_minute, upto))

    assert (found and found.level) == expected
    if found and expected:
        truly_s = (55 + 10 * expected - upto) * 60 / per_minute
        assert found.in_s == pytest.approx(truly_s, rel=0.5, abs=10)


def test_falling_or_constant_load_reaches_no_level() -> None:
    falling = holt_of(*((5.0 * i, 90 - i) for i in range(20)), bucket_s=LOAD_BUCKET_S)
    level = holt_of(*((5.0 * i, 64.9) for i in range(20)), bucket_s=LOAD_BUCKET_S)

    assert will_rise(falling, 71) is None
    assert will_rise(level, 64.9) is None
    assert will_rise(Holt(), 64.9) is None


def test_a_low_present_value_neither_hides_nor_causes_a_predicted_rise() -> None:
    above = holt_of(*((5.0 * i, 90.0) for i in range(40)), (200, 60), bucket_s=LOAD_BUCKET_S)
    rising, _ = ramp(5, 70)

    assert will_rise(above, 60) is None, "it has just fallen"
    assert will_rise(rising, 64) == Rise(Level.ELEVATED, 0), "the dip is noise"


def test_thresholds_and_time_may_be_given() -> None:
    holt, value = ramp(5, 61)

    assert will_rise(holt, value, within_s=10) is None
    assert will_rise(holt, value, thresholds=(30.0, 63.0, 85.0, 95.0)) == Rise(
        Level.HIGH, pytest.approx(24, abs=10)
    )


@pytest.mark.parametrize(
    ("mean", "deviation", "most_share"), [(50, 5, 0.005), (60, 2, 0.005), (62, 2, 0.01)]
)
def test_noise_below_a_threshold_raises_few_false_alarms(
    mean: float, deviation: float, most_share: float
) -> None:
    alarms, looks = 0, 0
    for seed in range(3):
        random, holt = Random(seed), Holt(bucket_s=LOAD_BUCKET_S)
        for look in range(720):
            value = min(64.9, random.gauss(mean, deviation))
            holt.observe(value, T0 + 5 * look)
            alarms, looks = alarms + (will_rise(holt, value) is not None), looks + 1

    assert alarms <= most_share * looks
