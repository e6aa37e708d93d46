"""The pressure level of measurements: it rises at once, and falls one step at a time.

A level lasts longer if an earlier step down was premature.  Each worker calls `HostLadder` once a
second, and the monitor calls `Ladder` for queues and Redis.  Begin with `signals`, then
`Ladder.step`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import msgspec

from resilience.degradation import Level, level_of
from scheduler.sampling import Sample
from scheduler.settings import PressureSettings

WAITING_PCT = 40.0
"""CPU counts only if some task waited for a CPU during this share of the time, or if the kernel
does not report it.

Measured on 2 CPUs:

- 1 % with 2 computing processes;
- 8 to 36 % with one or two more that wake often and use 10 to 60 % of a CPU (main process,
  Redis);
- 51 % with 3 computing processes, 88 to 100 % with 4, and no more with 12.

So this share shows that work waits, and the run queue shows how badly.  Single seconds of a healthy
host reach 65 %, too.
"""
CROWDED = (2.0, 3.0)
"""Tasks per CPU at which ELEVATED and HIGH begin: work takes that many times as long.

It is never worse, because slow work is no reason to refuse work.

Measured on 2 CPUs, the larger values with other work on the machine:

- 1.0 to 1.1 with 2 computing processes, up to 1.6 with two more that wake often;
- 1.5 to 1.6 with 3, 2.0 to 2.4 with 4, 3.0 to 3.8 with 6, 4.5 to 5.4 with 8, 6.7 with 12.
"""
THROTTLED_PCT = (50.0, 67.0)
"""Shares of the time, waiting and throttled, at which an exhausted CPU quota is ELEVATED and HIGH;
it is never worse.

With n tasks on a quota of q CPUs some task waits for 1 - q/n of the time.  At these shares work
takes twice and three times as long.
"""
STALLED_PCT = (10.0, 40.0, 60.0)
"""Shares of the time in which all tasks wait for memory that are HIGH to EMERGENCY; at 60 %
systemd-oomd kills (oomd.conf).
"""
TAU_S = 10.0
"""Time constant of the smoothed load, which must fall before a level falls."""
RELAPSE_S = 1200.0
"""A step down was premature if it is undone within this time; a premature step is tried again after
this time.
"""


# --- signals ----------------------------------------------------------------------------------


def signals(sample: Sample, settings: PressureSettings) -> dict[str, float]:
    """Return the value of each signal, in percent on the scale of `settings.thresholds`.

    - ``memory``: the sample's percentage.
    - ``memory stalls``: 0 if the kernel does not report them.
    - ``cpu``: with ``utilisation`` the busy share.  Else the length of the run queue while work
      waits for a CPU, and 0 while it does not.
    """
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
    crowded = _between((0.0, *CROWDED), scale[:3], sample.load_per_cpu or 0.0)
    # A period counts as throttled even if only its last millisecond was missing.
    throttled = min(waiting or 0.0, sample.throttled_pct)
    return max(crowded, _between((0.0, *THROTTLED_PCT), scale[:3], throttled))


def _between(points: Sequence[float], values: Sequence[float], point: float) -> float:
    """Return the value at a point by linear interpolation; beyond the last point the last value."""
    after = bisect_right(points, point)
    if after == len(points):
        return values[-1]
    start, end = points[after - 1], points[after]
    rise = values[after] - values[after - 1]
    return values[after - 1] + rise * (point - start) / (end - start)


def in_words(signal: str, sample: Sample, settings: PressureSettings) -> str:
    """Return a signal and its value as a part of a sentence: ``memory 87 % of 2048 MB``."""
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


# --- levels -----------------------------------------------------------------------------------


class LadderState(msgspec.Struct):
    """The state of a ladder between two steps: plain data, which the caller may store."""

    level: int = 0
    before: int = 0
    """Level of the last load alone."""
    smooth: float = 0.0
    """Smoothed load."""
    at: float | None = None
    """Time of the last load."""
    low_since: float | None = None
    """Since then the load is `release_pct` below the level's threshold."""
    calm_since: float | None = None
    """Since then it is also `release_pct` below the load of the last premature step."""
    released: int = 0
    """Level before the last step down; 0 after a step up."""
    released_at: float = 0.0
    """Time of that step."""
    released_load: float = 0.0
    """Smoothed load at that step."""
    premature: dict[int, float] = msgspec.field(default_factory=dict)
    """Level -> load at which a step down from it was premature."""


class Ladder:
    """The level of one percentage over time.

    Up: in one step of any height.  CRITICAL and EMERGENCY begin at once, ELEVATED and HIGH with the
    second sample in a row.

    Down: by one level.  For `release_s` the load and the smoothed load must be `release_pct` below
    the level's threshold.

    A step down was premature if the level is back within `RELAPSE_S`: degraded work causes less
    load, or the load varies.  The next time the load must fall `release_pct` further than at the
    premature step, or stay `release_pct` below the threshold for `RELAPSE_S`.
    """

    def __init__(self, settings: PressureSettings, state: LadderState | None = None) -> None:
        """`state` is changed in place by each step."""
        self._settings, self.state = settings, state if state is not None else LadderState()

    def step(self, percent: float | None, now: float) -> Level:
        """Add a load in percent at a time in seconds, and return the level; a missing load (None,
        NaN) keeps the level.
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
        present = int(level_of(load, self._settings.thresholds))
        reached = present if present >= Level.CRITICAL else min(present, state.before)
        state.before = present
        if reached > state.level:
            self._rise(reached, now)
        elif state.level and self._is_over(max(load, state.smooth), now):
            self._fall(now)

    def _rise(self, level: int, now: float) -> None:
        state = self.state
        if state.released and now - state.released_at < RELAPSE_S:
            state.premature[state.released] = state.released_load
        elif state.released:  # the last step down has held, and so have the steps before it
            state.premature = {
                above: load for above, load in state.premature.items() if above < state.released
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
    """Return the time since when something holds; a clock that was set back restarts it."""
    return (now if since is None else min(since, now)) if holds else None


def _lasted(since: float | None, for_s: float, now: float) -> bool:
    return since is not None and now - since >= for_s


class HostVerdict(msgspec.Struct, frozen=True):
    """A host's level, the present value of its worst signal in percent, and the reason for the
    level; '' for NORMAL.

    Jobs are refused by `refusing`, the level of all signals but CPU, for the reason `refusing_why`.
    With ``utilisation`` CPU counts as well.
    """

    level: Level
    percent: float
    why: str
    refusing: Level = Level.NORMAL
    refusing_why: str = ""


class HostLadder:
    """A host's level: the highest level of its signals, each on a separate ladder.

    Premature steps of one signal do not count for another: a busy CPU says nothing about memory.
    """

    def __init__(self, settings: PressureSettings) -> None:
        self._settings = settings
        self._ladders = {name: Ladder(settings) for name in ("memory", "cpu", "memory stalls")}
        self._refusing = [
            name for name in self._ladders if name != "cpu" or settings.cpu == "utilisation"
        ]
        self._whys = dict.fromkeys(self._ladders, "")
        self._last = HostVerdict(Level.NORMAL, 0.0, "")

    def step(self, sample: Sample | None, now: float) -> HostVerdict:
        """Add a sample, and return the verdict; a missing sample keeps the last verdict."""
        if sample is None:
            return self._last
        values: Mapping[str, float] = signals(sample, self._settings)
        levels = {name: self._step(name, values[name], sample, now) for name in self._ladders}
        worst = max(levels, key=lambda name: (levels[name], values[name]))
        refusing = max(self._refusing, key=lambda name: (levels[name], values[name]))
        self._last = HostVerdict(
            level=levels[worst],
            percent=max(values.values()),
            why=self._why(worst, levels),
            refusing=levels[refusing],
            refusing_why=self._why(refusing, levels),
        )
        return self._last

    def _why(self, name: str, levels: Mapping[str, Level]) -> str:
        return self._whys[name] if levels[name] else ""

    def _step(self, name: str, percent: float, sample: Sample, now: float) -> Level:
        """Move one signal's ladder; its reason is replaced only by a value that is as bad."""
        before = self._ladders[name].state.level
        level = self._ladders[name].step(percent, now)
        if level > before or level_of(percent, self._settings.thresholds) >= level:
            self._whys[name] = in_words(name, sample, self._settings)
        return level
