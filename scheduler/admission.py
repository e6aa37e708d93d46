"""Admission under load: less urgent jobs are refused first, and a full queue accepts no job.

`rlm_tasks.client.admission` calls it at submit, and the monitor when delayed jobs may begin.  An
accepted job is never dropped.  Begin with `shed`, then `full`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from resilience.degradation import Level
from resilience.errors import Category, Denied, count
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from scheduler.queues import QueueReport
from scheduler.settings import AdmissionSettings

SHED_FROM = {"low": Level.HIGH, "normal": Level.CRITICAL, "high": Level.EMERGENCY}
"""The level from which jobs of a priority are refused; critical jobs never are (Google's SRE book,
Handling Overload).
"""
SOONEST_S, LATEST_S = 1.0, 300.0
"""Bounds of a retry time."""
PLACE_S = 5.0
"""Retry time while all places are taken: the end of a job cannot be predicted."""
_FIRST_SWEEP_MS = 60_000
"""A place becomes free again if its job is not open by then: its client has died."""
_UNBOUNDED = 2**31
ROOM_TTL_S = 7 * 86_400

_PLACE = Script.load("scheduler", "place")


class Overloaded(Denied):
    """The pressure is too high for a job of this priority; nothing was enqueued."""

    code = "OVERLOADED"
    category = Category.RESOURCE
    when = "A host has too little CPU or memory left for a job of this priority."
    remedy = (
        'Try again after `retry_after_s` seconds, submit with `overload="delay"`, or add workers.'
    )

    def __init__(self, guard: str, retry_after_s: float, why: str, *, noted: bool = False) -> None:
        super().__init__(guard, retry_after_s, why, noted=noted)
        self.args = (
            f'{self}. To wait instead, submit with overload="delay"; to accept all jobs, set '
            "RLM_PRESSURE__ENABLED=0",
        )


class QueueFull(Denied):
    """A queue holds too many messages, or they wait too long; nothing was enqueued."""

    code = "QUEUE_FULL"
    category = Category.RESOURCE
    when = "Workers take messages more slowly than clients send them, or no worker does."
    remedy = "Try again after `retry_after_s` seconds; start workers of the queue."


def sheds(priority: str, level: Level) -> bool:
    """Return whether jobs of a priority are refused at a level."""
    return priority in SHED_FROM and level >= SHED_FROM[priority]


def shed(
    priority: str,
    level: Level,
    step_s: float,
    *,
    cause: str = "",
    thresholds: Sequence[float] = (),
) -> Overloaded | None:
    """Return the error for a job that is refused at a level; None if the job is accepted.

    The retry time is the shortest in which the level can fall far enough, at `step_s` for a step.
    The error names the `cause`, which is a measured value of a host, and the limit in percent from
    the `thresholds` of the levels.
    """
    if not sheds(priority, level):
        return None
    steps = level - SHED_FROM[priority] + 1
    below = SHED_FROM[priority]
    measured = f" ({cause})" if cause else ""
    limit = f" ({thresholds[below - 1]:g} %)" if thresholds else ""
    why = (
        f"pressure is {level.label}{measured}, and {priority} jobs are accepted below "
        f"{below.label}{limit}"
    )
    return Overloaded("admission", _retry_time_s(steps * step_s), why)


def full(
    queue: str, priority: str, report: QueueReport, settings: AdmissionSettings
) -> QueueFull | None:
    """Return the error for a queue that accepts no further job; None if it accepts one.

    The retry time is an estimate: workers empty the queue at the rate at which its oldest message
    came to the front.
    """
    depth, age_s, most = report.depth, report.oldest_s or 0.0, settings.queue_depth
    longest_s = settings.wait_s(priority)
    lasts_s: dict[str, float] = {}  # reason -> the time for which it will hold
    if most and depth >= most:
        lasts_s[f"{count(depth, 'message waits', 'messages wait')}, the limit is {most:,}"] = (
            (depth - most + 1) * age_s / depth
        )
    if longest_s and age_s > longest_s:
        reason = f"its oldest message waits for {age_s:.0f} s, the limit is {longest_s:g} s"
        lasts_s[reason] = age_s - longest_s
    if not lasts_s:
        return None
    return QueueFull(f"queue {queue}", _retry_time_s(max(lasts_s.values())), "; ".join(lasts_s))


class WaitingRoom:
    """The jobs that are open and wait for admission, and the places of jobs at work.

    The monitor wakes waiting jobs; without a monitor each wakes at its own time.  With `max_jobs`
    above 0 a job also needs a place: up to `max_jobs` are at work at once, critical jobs not
    counted.
    """

    def __init__(self, store: Store, keys: Keys, max_jobs: int = 0) -> None:
        self._store, self._keys, self._max_jobs = store, keys, max_jobs

    def crowded(self, job: str, priority: str) -> QueueFull | None:
        """Give a job its place until it ends; return the error if all places are taken, else None.

        Raises StoreUnavailable.
        """
        if not self._max_jobs or priority not in SHED_FROM or self._take_place(job)[0]:
            return None
        return QueueFull("jobs", PLACE_S, f"all places are taken (max_jobs={self._max_jobs})")

    def leave(self, jobs: Sequence[str]) -> None:
        """Give back the places of jobs that will not begin.  Raises StoreUnavailable."""
        if jobs:
            self._store.call(lambda client: client.zrem(self._keys.places, *jobs))

    def places(self) -> int:
        """Return the number of jobs that may begin now.  Raises StoreUnavailable."""
        return self._take_place("")[1] if self._max_jobs else _UNBOUNDED

    def _take_place(self, job: str) -> tuple[int, int]:
        """Return 1 if the job has a place, else 0, and the number of free places.

        Without a job nothing is taken.
        """
        keys = (self._keys.places, self._keys.due)
        args = (job, self._max_jobs, _FIRST_SWEEP_MS)
        [(has, left)] = self._store.call(Call(_PLACE, keys, args))
        return has, left

    def enter(self, queue: str, waiters: Mapping[str, int]) -> None:
        """Add jobs to those that wait for a queue; a job that waits already keeps its turn.

        `waiters` has the time of arrival in ms of each job, under "<job> <first node>".  Raises
        StoreUnavailable.
        """
        key = self._keys.admission(queue)
        self._store.call(
            lambda client: (
                client.zadd(key, dict(waiters), nx=True),
                client.expire(key, ROOM_TTL_S),
            )
        )

    def call(self, queue: str, most: int) -> list[str]:
        """Remove up to `most` jobs in the order of arrival, and return their names.

        Raises StoreUnavailable.
        """
        key = self._keys.admission(queue)
        return [
            name.decode() for name, _ in self._store.call(lambda client: client.zpopmin(key, most))
        ]


def _retry_time_s(seconds: float) -> float:
    """Return whole seconds within the bounds, as HTTP's Retry-After has them."""
    return float(math.ceil(min(LATEST_S, max(SOONEST_S, seconds))))
