"""What is taken in under load: less urgent work is turned away first, and a queue that is full
takes nothing.

Decides whether a job fits now, and when to come back if it does not.  What was taken in once is
never dropped.  Refuses to know how a job is opened and what becomes of one that does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from resilience.degradation import Level
from resilience.errors import Category, Denied
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from scheduler.queues import QueueReport
from scheduler.settings import AdmissionSettings

SHED_FROM = {"low": Level.HIGH, "normal": Level.CRITICAL, "high": Level.EMERGENCY}
"""The level from which work of a priority is turned away; critical work never is (Google's SRE
book, Handling Overload).
"""
SOONEST_S, LATEST_S = 1.0, 300.0
PLACE_S = 5.0
"""When to come back for a place: nobody knows when a job will end."""
_FIRST_LOOK_MS = 60_000
"""A place whose job is not opened by then is free again: its client has died."""
_UNBOUNDED = 2**31
ROOM_TTL_S = 7 * 86_400

_PLACE = Script.load("scheduler", "place")


class Overloaded(Denied):
    """The platform is pressed too hard for work that is not more urgent; nothing was enqueued."""

    code = "OVERLOADED"
    category = Category.RESOURCE


class QueueFull(Denied):
    """A queue holds too much, or its work waits too long; nothing was enqueued."""

    code = "QUEUE_FULL"
    category = Category.RESOURCE


def sheds(priority: str, level: Level) -> bool:
    """Whether work of a priority is turned away at a level."""
    return priority in SHED_FROM and level >= SHED_FROM[priority]


def shed(priority: str, level: Level, step_s: float) -> Overloaded | None:
    """Return why a job of a priority is not taken in at a level; a level falls by one step in
    `step_s` at the soonest.
    """
    if not sheds(priority, level):
        return None
    steps = level - SHED_FROM[priority] + 1
    why = f"pressure is {level.label}, and {priority} work is taken in below {SHED_FROM[priority].label}"
    return Overloaded("admission", _between(steps * step_s), why)


def full(
    queue: str, priority: str, report: QueueReport, settings: AdmissionSettings
) -> QueueFull | None:
    """Return why a queue takes no further job.

    When to come back is an estimate: the queue goes on being served as fast as its oldest message
    came to the front."""
    depth, age, most, longest = (
        report.depth,
        report.oldest_s or 0.0,
        settings.queue_depth,
        settings.wait_s(priority),
    )
    lasts_s: dict[str, float] = {}
    if most and depth >= most:
        lasts_s[f"{depth} messages wait, of at most {most}"] = (depth - most + 1) * age / depth
    if longest and age > longest:
        lasts_s[f"its oldest message waits for {age:.0f} s, of at most {longest:g} s"] = (
            age - longest
        )
    if not lasts_s:
        return None
    return QueueFull(f"queue {queue}", _between(max(lasts_s.values())), "; ".join(lasts_s))


class WaitingRoom:
    """Jobs that were opened and are not taken in yet; their own time wakes them, should nobody
    call.

    With `max_jobs` it knows the places as well: so many jobs are at work at once, and critical ones
    beside them."""

    def __init__(self, store: Store, keys: Keys, max_jobs: int = 0) -> None:
        self._store, self._keys, self._max_jobs = store, keys, max_jobs

    def crowded(self, job: str, priority: str) -> QueueFull | None:
        """Give a job its place, which it leaves when it ends; or return why it has to wait.  Raises
        StoreUnavailable.
        """
        if not self._max_jobs or priority not in SHED_FROM or self._place(job)[0]:
            return None
        return QueueFull("jobs", PLACE_S, f"as many are at work as may be: {self._max_jobs}")

    def leave(self, jobs: Sequence[str]) -> None:
        """Give back the places of jobs that do not begin after all.  Raises StoreUnavailable."""
        if jobs:
            self._store.call(lambda client: client.zrem(self._keys.places, *jobs))

    def places(self) -> int:
        """Return how many jobs may begin now.  Raises StoreUnavailable."""
        return self._place("")[1] if self._max_jobs else _UNBOUNDED

    def _place(self, job: str) -> tuple[int, int]:
        call = Call(
            _PLACE,
            (self._keys.places, self._keys.due),
            (job, self._max_jobs, _FIRST_LOOK_MS, ROOM_TTL_S),
        )
        [(has, left)] = self._store.call(call)
        return has, left

    def enter(self, queue: str, waiters: Mapping[str, int]) -> None:
        """Let jobs wait to be called, each named by its job and first node, with the time in ms
        when it came.
        """
        key = self._keys.admission(queue)
        self._store.call(
            lambda client: (
                client.zadd(key, dict(waiters), nx=True),
                client.expire(key, ROOM_TTL_S),
            )
        )

    def call(self, queue: str, most: int) -> list[str]:
        """Take those out who came first.  Raises StoreUnavailable."""
        key = self._keys.admission(queue)
        return [
            name.decode() for name, _ in self._store.call(lambda client: client.zpopmin(key, most))
        ]


def _between(seconds: float) -> float:
    return float(math.ceil(min(LATEST_S, max(SOONEST_S, seconds))))
