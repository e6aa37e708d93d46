"""Autoscaling: the number of processes of a worker, and the number of workers of the cluster.

The two are computed apart.  `PoolScaler` divides one machine, so pressure makes its pool smaller;
`rlm_tasks.worker.autoscaler` calls it.  `ClusterAdvice` adds machines, so pressure makes the
cluster larger; the monitor calls it.  Begin with `PoolScaler.wanted`, then `ClusterAdvice.decide`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from resilience.degradation import Level
from resilience.errors import count
from scheduler.forecast import HORIZON_S, Holt
from scheduler.settings import AutoscaleSettings

GROW_BY, GROW_EVERY_S = 2, 5.0
"""A pool grows by up to 2 processes every 5 s: the cost of a new process shows in pressure only
after a moment.
"""
SHRINK_EVERY_S = 10.0
"""A pool under critical pressure ends one process this often."""
IDLE_S = 30.0
"""A process that was not needed for this long ends; Celery's own autoscaler waits as long."""

VOTES, STEADY_S = 3, 300.0
"""Fewer workers are advised after 3 measurements in a row that found too many, over 300 s (as in
Kubernetes' HPA).
"""
CLEARLY = 0.9
"""Fewer workers are advised only if they would stay below 90 % of every trigger (the tolerance of
Kubernetes' HPA).
"""
BUSY = 0.7
"""Planned utilisation of a process; above it, queues grow fast."""
DRAIN_S = 120.0
"""Planned time to work off a backlog."""
MOST_GROWTH = 2
"""A forecast asks for at most twice the present number of workers."""


class PoolScaler:
    """The number of processes that one worker's pool should have, within the bounds of
    ``--autoscale``.
    """

    def __init__(self) -> None:
        self._grown_at = self._shrunk_at = -math.inf
        self._spare_since, self._needed = math.inf, 0

    def wanted(
        self,
        now: float,
        *,
        running: int,
        busy: int,
        queued: int,
        level: Level,
        most: int,
        least: int,
    ) -> int:
        """Return the number of processes that the pool should have, from `least` to `most`.

        `queued` counts the messages that wait for this worker: its share of its queues, and the
        messages that it has prefetched.  The result is never below `busy`, even above `most`: a
        busy process must not end.
        """
        needed = min(most, busy + queued)
        spare = self._spare(now, needed, running)
        if level == Level.EMERGENCY:
            wanted = least
        elif level == Level.CRITICAL:
            wanted = running - self._shrinks(now)
        elif level == Level.HIGH:
            wanted = running
        elif needed > running:
            wanted = running + self._grows(now, needed - running)
        else:
            wanted = running - spare
        return max(busy, least, min(most, wanted))

    @staticmethod
    def reach(*, running: int, level: Level, most: int) -> int:
        """Return the number of processes that the pool may soon have, which is the number of slots
        to publish.

        A node that cuts on demand sends no message before it finds a free slot.  A pool that
        published only its present processes would never get a reason to grow.
        """
        return most if level <= Level.ELEVATED else running

    def _grows(self, now: float, by: int) -> int:
        if now - self._grown_at < GROW_EVERY_S:
            return 0
        self._grown_at = now
        return min(GROW_BY, by)

    def _shrinks(self, now: float) -> int:
        if now - self._shrunk_at < SHRINK_EVERY_S:
            return 0
        self._shrunk_at = now
        return 1

    def _spare(self, now: float, needed: int, running: int) -> int:
        """Return the number of processes that were never needed during the last `IDLE_S`."""
        if needed >= running:
            self._spare_since = math.inf
            return 0
        if self._spare_since == math.inf:
            self._spare_since, self._needed = now, 0
        self._needed = max(self._needed, needed)
        if now - self._spare_since < IDLE_S:
            return 0
        self._spare_since = math.inf
        return running - self._needed


@dataclass(frozen=True, slots=True)
class Load:
    """One measurement of the whole cluster."""

    workers: int
    cpu_pct: float
    memory_pct: float
    queue_depth: int = 0  # messages that wait, of all queues
    oldest_wait_s: float = 0.0
    arrivals_per_s: float = 0.0  # messages, since the last measurement
    service_s: float = 0.0  # mean time of a message in a process; 0: unknown, so no forecast
    slots: int = 0  # processes of all workers


@dataclass(frozen=True, slots=True)
class Advice:
    """The advised number of workers, and the reasons for more or for fewer; '' without a reason."""

    desired: int
    why: str
    changed: bool


class ClusterAdvice(msgspec.Struct):
    """The number of workers that the cluster should have: plain data, kept in Redis between two
    measurements.

    All times are of Redis's clock, because each measurement may come from another host.
    """

    desired: int | None = None
    changed_at: float | None = None
    cpu_since: float | None = None  # since then CPU is at or above its trigger
    memory_since: float | None = None  # since then memory is at or above its trigger
    spare_since: float | None = None  # since then each measurement recommends fewer workers
    votes: int = 0  # number of these measurements
    looked_at: float | None = None  # time of the last measurement
    arrivals: Holt = msgspec.field(default_factory=Holt)

    def decide(self, load: Load, settings: AutoscaleSettings, now: float) -> Advice:
        """Add one measurement of the cluster, and return the advice.

        The advice changes by one step at a time, at least `cooldown_s` apart.  No second step
        follows a step that was not carried out.
        """
        before = load.workers if self.desired is None else self.desired
        desired = _within(settings, before)
        self._observe(load, settings, now)
        wanted, why = self._recommended(load, settings, now, desired)
        self._vote(wanted < desired, now)
        cooled = self.changed_at is None or now - self.changed_at >= settings.cooldown_s
        if cooled and (wanted >= desired or self._agreed(now)):
            desired = wanted
        if changed := desired != before:
            self.changed_at, self.spare_since, self.votes = now, None, 0
            bounds = f"{settings.min_workers} to {settings.max_workers}"
            why = why or f"the number of workers must be {bounds}"
        self.desired = desired
        return Advice(desired, why, changed)

    def _observe(self, load: Load, settings: AutoscaleSettings, now: float) -> None:
        if self.looked_at is not None and now - self.looked_at > settings.sustained_s:
            # After a gap without measurements a condition may have ended and begun again.
            self.cpu_since = self.memory_since = self.spare_since = None
            self.votes = 0
        self.looked_at = now
        self.cpu_since = _since(self.cpu_since, load.cpu_pct >= settings.cpu_pct, now)
        self.memory_since = _since(self.memory_since, load.memory_pct >= settings.memory_pct, now)
        self.arrivals.observe(load.arrivals_per_s, now)

    def _recommended(
        self, load: Load, settings: AutoscaleSettings, now: float, desired: int
    ) -> tuple[int, str]:
        reasons, needed = self._triggers(load, settings, now), self._needed(load)
        more = max(desired, load.workers + settings.increment if reasons else 0)
        if (forecast := min(needed, MOST_GROWTH * load.workers)) > more:
            reasons.append(f"{count(needed, 'worker')} will be needed in {HORIZON_S:.0f} s")
        # At least one worker stays: without any, no monitor could ask for a worker again.
        fewer = _within(settings, max(1, desired - settings.increment))
        if not reasons and fewer < desired and needed <= fewer and _fits(load, settings, fewer):
            return fewer, f"{count(fewer, 'worker')} can carry the load"
        return _within(settings, max(more, forecast)), "; ".join(reasons)

    def _triggers(self, load: Load, settings: AutoscaleSettings, now: float) -> list[str]:
        lasted = f"for {settings.sustained_s:.0f} s"
        cpu = _lasted(self.cpu_since, settings, now)
        memory = _lasted(self.memory_since, settings, now)
        waits_long = load.oldest_wait_s >= settings.wait_s
        triggers = {
            f"CPU at {load.cpu_pct:.0f} % {lasted}": cpu,
            f"memory at {load.memory_pct:.0f} % {lasted}": memory,
            count(load.queue_depth, "message waits", "messages wait"): load.queue_depth
            >= settings.queue_depth,
            f"a message has waited for {load.oldest_wait_s:.0f} s": waits_long,
        }
        return [reason for reason, holds in triggers.items() if holds]

    def _needed(self, load: Load) -> int:
        """Return the number of workers that the arrivals of the next minute and the backlog need.

        0 means that it is unknown.
        """
        if not (self.arrivals.settled and load.service_s and load.slots and load.workers):
            return 0
        arriving = max(0.0, self.arrivals.predict(HORIZON_S)) * load.service_s / BUSY
        waiting = load.queue_depth * load.service_s / DRAIN_S
        return math.ceil((arriving + waiting) * load.workers / load.slots)

    def _vote(self, for_fewer: bool, now: float) -> None:
        self.spare_since = _since(self.spare_since, for_fewer, now)
        self.votes = self.votes + 1 if for_fewer else 0

    def _agreed(self, now: float) -> bool:
        return (
            self.votes >= VOTES
            and self.spare_since is not None
            and now - self.spare_since >= STEADY_S
        )


def _within(settings: AutoscaleSettings, workers: int) -> int:
    return max(settings.min_workers, min(settings.max_workers, workers))


def _since(since: float | None, holds: bool, now: float) -> float | None:
    return (now if since is None else since) if holds else None


def _lasted(since: float | None, settings: AutoscaleSettings, now: float) -> bool:
    return since is not None and now - since >= settings.sustained_s


def _fits(load: Load, settings: AutoscaleSettings, workers: int) -> bool:
    """Return whether this number of workers could carry the load; the work of removed workers goes
    to the others.
    """
    if not load.workers:
        return False
    limits = (settings.cpu_pct, settings.memory_pct, settings.queue_depth, settings.wait_s)
    values = (load.cpu_pct, load.memory_pct, load.queue_depth, load.oldest_wait_s)
    return all(
        value * load.workers / workers < CLEARLY * limit
        for value, limit in zip(values, limits, strict=True)
    )
