"""The number of processes of a worker, and of workers of the cluster.

Rules, their limits, and an hour of each load trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.degradation import Level
from scheduler.autoscale import (
    GROW_BY,
    GROW_EVERY_S,
    IDLE_S,
    SHRINK_EVERY_S,
    Advice,
    ClusterAdvice,
    Load,
    PoolScaler,
)
from scheduler.forecast import HORIZON_S
from scheduler.settings import AutoscaleSettings

T0 = 1_800_000_000.0
LEVELS = list(Level)

# --- one worker's pool ------------------------------------------------------------------------


@dataclass
class Pool:
    """A pool that has the wanted size at once, with bounds of 1 and 8."""

    running: int = 1
    busy: int = 0
    queued: int = 0
    level: Level = Level.NORMAL
    most: int = 8
    least: int = 1
    now: float = T0
    scaler: PoolScaler = field(default_factory=PoolScaler)

    def step(self, after_s: float = 0.0) -> int:
        self.now += after_s
        self.running = self.scaler.wanted(
            self.now,
            running=self.running,
            busy=self.busy,
            queued=self.queued,
            level=self.level,
            most=self.most,
            least=self.least,
        )
        return self.running


@pytest.mark.parametrize("level", [Level.NORMAL, Level.ELEVATED])
def test_a_pool_grows_by_two_every_five_seconds_while_messages_wait(level: Level) -> None:
    pool = Pool(queued=100, level=level)

    assert [
        pool.step(),
        pool.step(4.9),
        pool.step(0.1),
        pool.step(5),
        pool.step(5),
        pool.step(5),
    ] == [3, 3, 5, 7, 8, 8]


def test_a_pool_grows_no_further_than_the_work_needs() -> None:
    assert Pool(running=2, busy=2, queued=1).step() == 3
    assert Pool(running=4, busy=1, queued=3).step() == 4


@pytest.mark.parametrize(
    ("level", "busy", "expected"),
    [
        (Level.NORMAL, 0, [8, 8, 8, 8]),  # idle for too short a time
        (Level.HIGH, 0, [8, 8, 8, 8]),
        (Level.CRITICAL, 0, [7, 7, 6, 5]),
        (Level.CRITICAL, 7, [7, 7, 7, 7]),
        (Level.EMERGENCY, 0, [1, 1, 1, 1]),
        (Level.EMERGENCY, 5, [5, 5, 5, 5]),
    ],
)
def test_under_pressure_a_pool_of_eight_holds_or_shrinks(
    level: Level, busy: int, expected: list[int]
) -> None:
    pool = Pool(running=8, busy=busy, queued=100 * (level > Level.NORMAL), level=level)

    assert [pool.step(after) for after in (0, 9.9, 0.1, 10)] == expected


def test_processes_not_needed_for_half_a_minute_are_given_up() -> None:
    pool = Pool(running=8, busy=2)
    steps = [pool.step(), pool.step(10)]
    pool.busy = 4
    steps += [pool.step(10)]
    pool.busy = 1
    steps += [pool.step(9.9), pool.step(0.1), pool.step(29.9), pool.step(30)]

    assert steps == [8, 8, 8, 8, 4, 4, 1], (
        "first down to the largest number that was needed at once"
    )


def test_a_pool_that_is_often_fully_busy_keeps_its_size() -> None:
    pool = Pool(running=4)
    for step in range(100):
        pool.busy = 4 * (step % 29 == 0)
        assert pool.step(1) == 4


def test_new_bounds_hold_at_once_except_for_busy_processes() -> None:
    assert Pool(running=8, busy=2, queued=9, most=4).step() == 4
    assert Pool(running=8, busy=6, queued=9, most=4).step() == 6
    assert Pool(running=1, least=3, level=Level.CRITICAL).step() == 3


def test_slots_include_the_processes_that_may_still_start() -> None:
    assert [PoolScaler.reach(running=2, level=level, most=8) for level in LEVELS] == [8, 8, 2, 2, 2]


@given(
    least=st.integers(1, 6),
    more=st.integers(0, 10),
    looks=st.lists(
        st.tuples(
            st.sampled_from(LEVELS), st.integers(0, 16), st.integers(0, 50), st.floats(0, 40)
        ),
        min_size=1,
        max_size=40,
    ),
)
def test_a_pool_stays_within_its_bounds_and_keeps_busy_processes(
    least: int, more: int, looks: list[tuple[Level, int, int, float]]
) -> None:
    pool = Pool(running=least, least=least, most=least + more)
    for level, busy, queued, after_s in looks:
        before = pool.running
        pool.level, pool.busy, pool.queued = level, min(busy, before), queued
        wanted = pool.step(after_s)

        assert pool.least <= wanted <= pool.most
        assert wanted >= pool.busy
        assert wanted <= before + (GROW_BY if level <= Level.ELEVATED else 0)
        assert level != Level.HIGH or wanted == before


@pytest.mark.parametrize("seed", range(3))
def test_an_hour_of_a_pool_under_changing_levels_and_work(seed: int) -> None:
    """Growth and shrinkage keep their pace while work and levels change, and all work is done."""
    random, pool, waited = Random(seed), Pool(), 0
    grown, shrunk = -math.inf, -math.inf
    for second in range(3600):
        if random.random() < 0.02:
            pool.level = random.choices(LEVELS, (8, 4, 2, 1, 1))[0]
        if random.random() < 0.05:
            pool.queued += random.randrange(60)
        pool.busy -= sum(random.random() < 0.5 for _ in range(pool.busy))
        started = min(pool.queued, pool.running - pool.busy)
        pool.busy, pool.queued = pool.busy + started, pool.queued - started
        before, wanted = pool.running, pool.step(1)
        if wanted > before:
            assert (second - grown, pool.level) >= (GROW_EVERY_S, Level.NORMAL)
            grown = second
        if wanted < before and pool.level == Level.CRITICAL:
            assert (second - shrunk, before - wanted) >= (SHRINK_EVERY_S, 1)
            shrunk = second
        waited += pool.queued > 0

    assert waited < 3600 * 0.9
    pool.level, pool.queued, pool.busy = Level.NORMAL, 0, 0
    for _ in range(int(3 * IDLE_S)):
        pool.step(1)
    assert pool.running == 1


# --- the cluster ------------------------------------------------------------------------------

CALM = Load(workers=4, cpu_pct=60, memory_pct=60)  # too much for three workers, no reason for five
IDLE = replace(CALM, cpu_pct=20, memory_pct=20)


@dataclass
class Cluster:
    """A cluster that gets samples; the state of the advice is stored between samples."""

    load: Load = CALM
    settings: AutoscaleSettings = field(default_factory=AutoscaleSettings)
    now: float = T0
    stored: bytes = b""

    def step(self, after_s: float = 0.0, **changes: float) -> Advice:
        self.now += after_s
        self.load = replace(self.load, **changes)  # type: ignore[arg-type]  # counts are ints
        state = (
            msgspec.json.decode(self.stored, type=ClusterAdvice) if self.stored else ClusterAdvice()
        )
        advice = state.decide(self.load, self.settings, self.now)
        self.stored = msgspec.json.encode(state)
        return advice


def test_a_calm_cluster_stays_as_it_is() -> None:
    cluster = Cluster()

    assert {cluster.step(5) for _ in range(2000)} == {Advice(4, "", changed=False)}


@pytest.mark.parametrize(
    ("changes", "after_s", "desired", "why"),
    [
        ({"cpu_pct": 75}, 299, 4, ""),
        ({"cpu_pct": 75}, 300, 5, "CPU at 75 % for 300 s"),
        ({"cpu_pct": 74.9}, 300, 4, ""),
        ({"memory_pct": 80}, 299, 4, ""),
        ({"memory_pct": 80}, 300, 5, "memory at 80 % for 300 s"),
        ({"memory_pct": 79.9}, 300, 4, ""),
        ({"queue_depth": 999}, 300, 4, ""),
        ({"queue_depth": 1000}, 0, 5, "1,000 messages wait"),
        ({"oldest_wait_s": 29.9}, 300, 4, ""),
        ({"oldest_wait_s": 30}, 0, 5, "a message has waited for 30 s"),
        (
            {"queue_depth": 2000, "oldest_wait_s": 60},
            0,
            5,
            "2,000 messages wait; a message has waited for 60 s",
        ),
    ],
)
def test_the_triggers_of_one_more_worker(
    changes: dict[str, float], after_s: float, desired: int, why: str
) -> None:
    cluster = Cluster()
    first = cluster.step(**changes)
    advice = cluster.step(after_s) if after_s else first

    assert (advice.desired, advice.why, advice.changed) == (desired, why, desired > 4)


@pytest.mark.parametrize("trigger", [{"cpu_pct": 90.0}, {"memory_pct": 90.0}])
def test_the_five_minutes_restart_after_a_dip_or_a_gap_in_the_samples(
    trigger: dict[str, float],
) -> None:
    dipped, unseen = Cluster(), Cluster()
    dipped.step(**trigger)
    dipped.step(295, cpu_pct=60, memory_pct=60)
    dipped.step(5, **trigger)
    unseen.step(**trigger)

    assert [dipped.step(after).desired for after in (299, 1)] == [4, 5]
    assert [unseen.step(after).desired for after in (301, 299, 1)] == [4, 4, 5]


def test_steps_are_ten_minutes_apart_and_wait_until_workers_have_started() -> None:
    cluster = Cluster()
    assert cluster.step(queue_depth=5000).desired == 5
    assert [cluster.step(after, workers=5).desired for after in (599, 1)] == [5, 6]
    assert [cluster.step(600).desired for _ in range(5)] == [6] * 5, (
        "the sixth worker has not started"
    )
    assert cluster.step(1, workers=6).desired == 7


def test_workers_stay_within_their_limits() -> None:
    busy, idle = Cluster(replace(CALM, queue_depth=5000)), Cluster(IDLE)
    up = [busy.step(600, workers=busy.step(600).desired).desired for _ in range(10)]
    down = [idle.step(100, workers=idle.step(100).desired).desired for _ in range(30)]

    assert max(up) == up[-1] == 10
    assert min(down) == down[-1] == 2


def test_limits_and_step_are_settings() -> None:
    cluster = Cluster(
        replace(CALM, queue_depth=5000),
        AutoscaleSettings(increment=3, max_workers=8, cooldown_s=60),
    )

    assert [cluster.step().desired, cluster.step(60, workers=7).desired] == [7, 8]


@pytest.mark.parametrize(("workers", "desired"), [(0, 2), (1, 2), (2, 2), (10, 10), (14, 10)])
def test_a_number_outside_the_limits_is_corrected_at_once(workers: int, desired: int) -> None:
    advice = Cluster(replace(CALM, workers=workers)).step()

    assert (advice.desired, advice.changed) == (desired, desired != workers)
    assert advice.why or not advice.changed


def test_fewer_workers_are_advised_after_five_minutes_of_low_load() -> None:
    cluster = Cluster(IDLE)

    assert {cluster.step(5).desired for _ in range(60)} == {4}, "295 s"
    assert cluster.step(5) == Advice(3, "3 workers can carry the load", changed=True)


def test_one_sample_of_load_restarts_the_five_minutes() -> None:
    cluster = Cluster(IDLE)
    cluster.step()
    cluster.step(290, cpu_pct=60)
    cluster.step(5, cpu_pct=20)

    assert [cluster.step(150).desired for _ in range(2)] == [4, 3]


def test_at_least_three_samples_must_agree() -> None:
    cluster = Cluster(IDLE)

    assert [cluster.step(300).desired for _ in range(3)] == [4, 4, 3]


def test_each_step_down_needs_five_minutes_of_low_load() -> None:
    cluster = Cluster(IDLE, AutoscaleSettings(cooldown_s=0))

    assert [cluster.step(100, workers=workers).desired for workers in (4, 4, 4, 4, 3, 3, 3, 3)] == [
        4,
        4,
        4,
        3,
        3,
        3,
        3,
        2,
    ]


def test_the_last_worker_stays() -> None:
    cluster = Cluster(replace(IDLE, workers=1), AutoscaleSettings(min_workers=1))

    assert {cluster.step(100).desired for _ in range(20)} == {1}


@pytest.mark.parametrize(
    ("changes", "desired"),
    [
        ({"cpu_pct": 50}, 3),  # three workers would be at 67 %
        ({"cpu_pct": 51}, 4),
        ({"memory_pct": 53}, 3),
        ({"memory_pct": 55}, 4),
        ({"queue_depth": 674}, 3),
        ({"queue_depth": 675}, 4),
        ({"oldest_wait_s": 20.2}, 3),
        ({"oldest_wait_s": 20.3}, 4),
        ({"workers": 0}, 4),  # no worker: nothing is known
        ({"workers": 2, "cpu_pct": 74}, 3),  # two of four have been lost, and three are enough
        ({"workers": 2, "queue_depth": 1000}, 4),  # three could carry it, but a trigger holds
    ],
)
def test_fewer_workers_are_advised_only_with_a_margin_of_load(
    changes: dict[str, float], desired: int
) -> None:
    cluster = Cluster()
    cluster.step()
    cluster.step(**{"cpu_pct": 20, "memory_pct": 20, **changes})

    assert [cluster.step(140).desired for _ in range(3)][-1] == desired


def test_a_step_up_is_not_taken_back_within_ten_minutes() -> None:
    cluster = Cluster()
    cluster.step(queue_depth=1000)
    cluster.step(5, workers=5, cpu_pct=20, memory_pct=20, queue_depth=0)

    assert [cluster.step(after).desired for after in (297, 297, 1)] == [5, 5, 4]


# --- forecasts --------------------------------------------------------------------------------

STEADY = Load(workers=2, cpu_pct=50, memory_pct=40, service_s=1.0, slots=8)


def after_minutes(load: Load, minutes: int = 5) -> Advice:
    cluster = Cluster(load)
    for _ in range(12 * minutes):
        advice = cluster.step(5, workers=load.workers)
    return advice


@pytest.mark.parametrize(
    ("changes", "desired"),
    [
        ({"arrivals_per_s": 5.5}, 2),  # 7.9 of 8 processes
        ({"arrivals_per_s": 5.7}, 3),
        (
            {"arrivals_per_s": 5.5, "queue_depth": 120},
            3,
        ),  # one more for the backlog, which is to be done in 120 s
        ({"arrivals_per_s": 2.85, "service_s": 2.0}, 3),
        ({"arrivals_per_s": 100.0}, 4),  # twice as many at most
        ({"arrivals_per_s": 100.0, "service_s": 0.0}, 2),  # the time of a message is not known
        ({"arrivals_per_s": 100.0, "slots": 0}, 2),
    ],
)
def test_workers_are_advised_for_the_forecast_load(changes: dict[str, float], desired: int) -> None:
    advice = after_minutes(replace(STEADY, **changes))  # type: ignore[arg-type]

    assert advice.desired == desired


def test_workers_that_the_forecast_needs_are_kept() -> None:
    quiet = replace(STEADY, workers=4, slots=16, cpu_pct=20)

    assert after_minutes(replace(quiet, arrivals_per_s=8.3), 8).desired == 3
    assert after_minutes(replace(quiet, arrivals_per_s=8.5), 8).desired == 4


@pytest.mark.parametrize("arrivals", [0.0, 500.0])
def test_a_single_sample_gives_no_forecast(arrivals: float) -> None:
    assert Cluster(replace(STEADY, arrivals_per_s=arrivals)).step().desired == 2


# --- load traces ------------------------------------------------------------------------------

LOOK_S, START_S, SLOTS = 5, 60, 4


def played(
    demand: Callable[[float], float], *, hours: float = 1.0, noise: float = 0.0, seed: int = 0
) -> list[tuple[float, int]]:
    """Return each change of the advice, (second, workers), on a cluster where a worker starts in a
    minute.

    `demand` is the number of busy processes; a message takes a second, and a worker has four
    processes.
    """
    random, cluster, backlog = Random(seed), Cluster(), 0.0
    workers, coming, changes = (
        max(2, math.ceil(demand(0) / 0.7 / SLOTS)),
        list[tuple[float, int]](),
        list[tuple[float, int]](),
    )
    for second in range(0, int(hours * 3600), LOOK_S):
        while coming and coming[0][0] <= second:
            workers = coming.pop(0)[1]
        arrivals, capacity = max(0.0, demand(second) * random.gauss(1, noise)), workers * SLOTS
        done = min(capacity, arrivals + backlog / LOOK_S)
        backlog += (arrivals - done) * LOOK_S
        advice = cluster.step(
            LOOK_S,
            workers=workers,
            cpu_pct=100 * done / capacity,
            memory_pct=40,
            queue_depth=int(backlog),
            oldest_wait_s=backlog / capacity,
            arrivals_per_s=arrivals,
            service_s=1.0,
            slots=capacity,
        )
        if advice.changed:
            changes.append((second, advice.desired))
            coming.append((second + START_S, advice.desired))
    return changes


def reversals(changes: list[tuple[float, int]], first: int) -> int:
    """Return the number of changes from growth to shrinkage or back."""
    sizes = [first, *(workers for _, workers in changes)]
    steps = [after - before for before, after in pairwise(sizes)]
    return sum((one > 0) != (other > 0) for one, other in pairwise(steps))


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("mean", [4.0, 5.6, 8.4, 12.0])
def test_noise_reverses_the_advice_at_most_twice_an_hour(mean: float, noise: float) -> None:
    first = max(2, math.ceil(mean / 0.7 / SLOTS))
    for seed in range(3):
        assert reversals(played(lambda _: mean, noise=noise, seed=seed), first) <= 2


@pytest.mark.parametrize(("upto", "workers"), [(7.0, 3), (8.3, 3), (11.0, 3)])
def test_a_step_in_demand_is_answered_within_the_horizon_and_one_sample(
    upto: float, workers: int
) -> None:
    at, advised = played(lambda second: 4 if second < 603 else upto)[0]

    assert advised == workers
    assert at - 603 <= HORIZON_S + LOOK_S


def test_a_step_that_needs_more_than_one_worker_is_met_after_the_cooldown() -> None:
    [(first, three), (second, more), *rest] = played(lambda second: 4 if second < 603 else 11)

    assert (three, more, rest) == (3, 5, [])
    assert second - first == 600


def test_workers_for_rising_demand_start_before_they_are_needed() -> None:
    """Demand grows by ten processes an hour; each worker is advised before the others are full."""
    changes = played(lambda second: 4 + second / 360)

    assert [workers for _, workers in changes] == [3, 4, 5, 6][: len(changes)]
    assert len(changes) >= 3
    for at, workers in changes:
        demand_when_started = 4 + (at + START_S) / 360
        assert demand_when_started <= 0.72 * SLOTS * (workers - 1)


def test_daily_demand_reverses_the_advice_once_at_each_peak_and_valley() -> None:
    demand = [10 + 8 * math.sin(2 * math.pi * second / 7200) for second in range(4 * 3600)]
    changes = played(lambda second: demand[int(second)], hours=4)

    assert reversals(changes, 4) == 4
    assert max(workers for _, workers in changes) in (6, 7)
    assert min(workers for _, workers in changes) == 2
