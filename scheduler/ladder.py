"""From measurements to a level: up at once, down one step at a time, and later where a step down
has proved premature.

Decides what of a sample is pressure, and how long a level lasts after its cause.  Refuses to know
how a sample is taken and what is done at a level."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import msgspec

from resilience.degradation import Level, level_of
from scheduler.sampling import Sample
from scheduler.settings import PressureSettings

WAITING_PCT = 40.0
"""CPU counts where some task waited for one for so much of the time, or the kernel does not tell.

Measured on 2 CPUs: 1 % with 2 computing processes, 8 to 36 % with one or two more that wake often,
as a main process and a Redis do, and use 10 to 60 % of a CPU; 51 % with 3 that compute, 88 to 100 %
with 4, and no more with 12. So this says that work waits, and the run queue how badly; single
seconds of a healthy host come to 65 %, too. """
CROWDED = (2.0, 3.0, 4.0, 6.0)
"""Beyond so many tasks per CPU it is ELEVATED to EMERGENCY: work takes so many times as long.

Measured on 2 CPUs, the larger with other work on the machine: 1.0 to 1.1 with 2 computing
processes, up to 1.6 with two more that wake often, 1.5 to 1.6 with 3, 2.0 to 2.4 with 4, 3.0 to 3.8
with 6, 4.5 to 5.4 with 8, 6.7 with 12. """
THROTTLED_PCT = (50.0, 67.0)
"""Waiting and throttled for so much of the time at which a quota that is used up is ELEVATED and
HIGH; it is never worse.

Of n tasks on a quota of q CPUs some wait for 1 - q/n of the time: work takes twice and three times
as long. """
STALLED_PCT = (10.0, 40.0, 60.0)
"""All tasks waiting for memory for so much of the time is HIGH to EMERGENCY; at 60 % systemd-oomd
kills (oomd.conf).
"""
TAU_S = 10.0
"""Load is smoothed over this before it may count as gone."""
RELAPSE_S = 1200.0
"""A step down that is undone within this was premature, and one that was is tried again after so
long.
"""


# --- what counts ------------------------------------------------------------------------------


def signals(sample: Sample, settings: PressureSettings) -> dict[str, float]:
    """Return each signal's name and how bad it is, in percent on the scale of
    `settings.thresholds`.

    ``memory`` is that of the sample.  ``memory stalls`` is 0 where the kernel does not tell.
    ``cpu`` is how busy it is, or, unless settings say so, what its queue comes to while work waits
    for it; 0 while it does not."""
    scale = (0.0, *settings.thresholds)
    stalls = _between(
        (0.0, *STALLED_PCT), (0.0, *settings.thresholds[1:]), sample.memory_stall_pct or 0.0
    )
    cpu = sample.cpu_pct if settings.cpu == "utilisation" else _waiting(sample, scale)
    return {"memory": sample.memory_pct, "cpu": cpu, "memory stalls": stalls}


def _waiting(sample: Sample, scale: Sequence[float]) -> float:
    waiting = sample.cpu_waiting_pct
    if waiting is not None and waiting < WAITING_PCT:
        return 0.0
    crowded = _between((0.0, *CROWDED), scale, sample.load_per_cpu or 0.0)
    throttled = min(
        waiting or 0.0, sample.throttled_pct
    )  # a period also ends early for lack of its last millisecond
    return max(crowded, _between((0.0, *THROTTLED_PCT), scale[:3], throttled))


def _between(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """Return the value at a point, on straight lines between those given, and the last one beyond
    them.
    """
    after = bisect_right(points, at)
    if after == len(points):
        return values[-1]
    start, end = points[after - 1], points[after]
    return values[after - 1] + (values[after] - values[after - 1]) * (at - start) / (end - start)


def in_words(signal: str, sample: Sample, settings: PressureSettings) -> str:
    """Return a signal and its value as a sentence's part: ``memory 87 % of 2048 MB``."""
    if signal == "memory":
        return f"memory {sample.memory_pct:.0f} % of {sample.memory_limit_mb:.0f} MB"
    if signal == "memory stalls":
        return f"all work waits for memory {sample.memory_stall_pct or 0:.0f} % of the time"
    if settings.cpu == "utilisation":
        return f"CPU {sample.cpu_pct:.0f} % busy"
    tasks = f"{sample.load_per_cpu or 0:.1f} tasks on each CPU"
    return (
        f"{tasks}, {sample.throttled_pct:.0f} % of the quota's periods cut short"
        if sample.throttled_pct
        else tasks
    )


# --- how long it lasts ------------------------------------------------------------------------


class LadderState(msgspec.Struct):
    """What a ladder must know of the steps before; plain data, to be kept elsewhere between two."""

    level: int = 0
    before: int = 0
    """The last load's level, by itself."""
    smooth: float = 0.0
    at: float | None = None
    low_since: float | None = None
    """Since when load is below what releases the level, for all that is known now ..."""
    calm_since: float | None = None
    """... and below what has proved premature, too."""
    released: int = 0
    """The level that was last stepped down from, when, and at what load; 0 after a step up."""
    released_at: float = 0.0
    released_load: float = 0.0
    premature: dict[int, float] = msgspec.field(default_factory=dict)
    """Level -> load at which stepping down from it proved premature."""


class Ladder:
    """The level of one percentage over time; a host's is the worst of its signals.

    Up: in one step of any height, at once to CRITICAL and EMERGENCY, to ELEVATED and HIGH with the
    second sample in a row. Down: by one level when the load, itself and smoothed, was `release_pct`
    below the level's threshold for `release_s`.  When it is back up within `RELAPSE_S` this was
    premature, because degraded work loads less, or because load varies: then it must fall
    `release_pct` further than it had, or be below the threshold for `RELAPSE_S`."""

    def __init__(self, settings: PressureSettings, state: LadderState | None = None) -> None:
        """`state` is changed by each step."""
        self._settings, self.state = settings, state if state is not None else LadderState()

    def step(self, percent: float | None, now: float) -> Level:
        """Return the level after a load at a time in seconds; a missing one (None, NaN) keeps
        it.
        """
        state = self.state
        if not self._settings.enabled:
            state.level = Level.NORMAL
        elif percent is not None and not math.isnan(percent):
            load = min(100.0, max(0.0, percent))
            self._smooth(load, now)
            self._move(load, now)
        return Level(state.level)

    def _smooth(self, load: float, now: float) -> None:
        state = self.state
        weight = 1.0 if state.at is None else -math.expm1(-max(0.0, now - state.at) / TAU_S)
        state.smooth += (load - state.smooth) * weight
        state.at = now

    def _move(self, load: float, now: float) -> None:
        state = self.state
        own = int(level_of(load, self._settings.thresholds))
        reached = own if own >= Level.CRITICAL else min(own, state.before)
        state.before = own
        if reached > state.level:
            self._rise(reached, now)
        elif state.level and self._is_over(max(load, state.smooth), now):
            self._fall(now)

    def _rise(self, level: int, now: float) -> None:
        state = self.state
        if state.released and now - state.released_at < RELAPSE_S:
            state.premature[state.released] = state.released_load
        elif state.released:  # that step has held, and so have those before it
            state.premature = {
                each: at for each, at in state.premature.items() if each < state.released
            }
        state.level, state.released, state.low_since, state.calm_since = level, 0, None, None

    def _is_over(self, load: float, now: float) -> bool:
        state, margin = self.state, self._settings.release_pct
        threshold = self._settings.thresholds[state.level - 1]
        premature = state.premature.get(state.level, threshold)
        state.low_since = _since(state.low_since, load < threshold - margin, now)
        state.calm_since = _since(state.calm_since, load < min(threshold, premature) - margin, now)
        return _lasted(state.calm_since, self._settings.release_s, now) or _lasted(
            state.low_since, RELAPSE_S, now
        )

    def _fall(self, now: float) -> None:
        state = self.state
        state.released, state.released_at, state.released_load = state.level, now, state.smooth
        state.level, state.low_since, state.calm_since = state.level - 1, None, None


def _since(since: float | None, holds: bool, now: float) -> float | None:
    """Return since when something holds; a clock that was set back starts anew."""
    return (now if since is None else min(since, now)) if holds else None


def _lasted(since: float | None, for_s: float, now: float) -> bool:
    return since is not None and now - since >= for_s


class HostVerdict(msgspec.Struct, frozen=True):
    """A host's level, how bad its worst signal is now, in percent, and what the level came from; ''
    for NORMAL.
    """

    level: Level
    percent: float
    why: str


class HostLadder:
    """A host's level: that of the worst of its signals, each on a ladder of its own.

    What one has taught of premature steps is not asked of another: a busy CPU says nothing of
    memory."""

    def __init__(self, settings: PressureSettings) -> None:
        self._settings = settings
        self._ladders = {name: Ladder(settings) for name in ("memory", "cpu", "memory stalls")}
        self._whys = dict.fromkeys(self._ladders, "")
        self._last = HostVerdict(Level.NORMAL, 0.0, "")

    def step(self, sample: Sample | None, now: float) -> HostVerdict:
        """Return the level after a sample; a missing one keeps it."""
        if sample is None:
            return self._last
        found: Mapping[str, float] = signals(sample, self._settings)
        levels = {name: self._step(name, found[name], sample, now) for name in self._ladders}
        worst = max(self._ladders, key=lambda name: (levels[name], found[name]))
        self._last = HostVerdict(
            levels[worst], max(found.values()), self._whys[worst] if levels[worst] else ""
        )
        return self._last

    def _step(self, name: str, percent: float, sample: Sample, now: float) -> Level:
        """Move one signal's ladder; what its level came from is said until something as bad is
        seen.
        """
        before = self._ladders[name].state.level
        level = self._ladders[name].step(percent, now)
        if level > before or level_of(percent, self._settings.thresholds) >= level:
            self._whys[name] = in_words(name, sample, self._settings)
        return level
