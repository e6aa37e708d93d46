"""How many processes a worker should have, and how many workers the cluster should.

Two decisions that are never mixed: `PoolScaler` divides the machine it runs on, so pressure makes
its pool smaller; `ClusterAdvice` adds machines, so pressure makes the cluster larger.  Refuses to
know who forks processes, and who starts workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from resilience.degradation import Level
from scheduler.forecast import HORIZON_S, Holt
from scheduler.settings import AutoscaleSettings

GROW_BY, GROW_EVERY_S = 2, 5.0
"""A pool grows no faster: new processes need a moment before pressure shows what they cost."""
SHRINK_EVERY_S = 10.0
"""A pool under critical pressure gives up a process this often."""
IDLE_S = 30.0
"""Processes that nobody has needed for this long are given up; Celery's own autoscaler waits as
long.
"""

VOTES, STEADY_S = 3, 300.0
"""Fewer workers are advised when that many looks in a row found too many, over this time
(Kubernetes' HPA).
"""
CLEARLY = 0.9
"""Fewer workers must be able to carry the load this far below every trigger (the tolerance of
Kubernetes' HPA).
"""
BUSY = 0.7
"""How busy processes are planned to be: beyond it, queues grow fast."""
DRAIN_S = 120.0
"""A backlog is to be gone after this."""
MOST_GROWTH = 2
"""A forecast never asks for more than this many times the workers there are."""


class PoolScaler:
    """How many processes one worker's pool should have, between ``--autoscale``'s bounds."""

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
        """Return the number of processes there should be.

        `queued` are the messages that wait for this worker, its share of its queues and what it
        holds itself.  A busy process is never to be ended, not even one above `most`; below `least`
        there is no choice."""
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
        """Return how many processes there may soon be.

        So many slots are to be on offer: a node that is cut on demand sends no message before it
        sees a free slot, and a pool that offers only the processes it has would never see a reason
        to grow."""
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
        """Return how many processes were not needed at any time of the last `IDLE_S`."""
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
    """What was seen of the whole cluster."""

    workers: int
    cpu_pct: float
    memory_pct: float
    queue_depth: int = 0  # messages that wait, of all queues
    oldest_wait_s: float = 0.0
    arrivals_per_s: float = 0.0  # messages, since the last look
    service_s: float = (
        0.0  # mean time of a message in a process; 0: not known, and nothing is forecast
    )
    slots: int = 0  # processes of all workers


@dataclass(frozen=True, slots=True)
class Advice:
    """How many workers there should be, and what speaks for more or for fewer; '' when nothing
    does.
    """

    desired: int
    why: str
    changed: bool


class ClusterAdvice(msgspec.Struct):
    """How many workers the cluster should have; plain data, kept in Redis between the looks of
    whoever watches.

    `now` is Redis's clock: looks may come from different hosts.
    """

    desired: int | None = None
    changed_at: float | None = None
    cpu_since: float | None = None  # at or above its trigger ever since
    memory_since: float | None = None
    spare_since: float | None = None  # fewer workers were recommended ever since, ...
    votes: int = 0  # ... so often
    looked_at: float | None = None
    arrivals: Holt = msgspec.field(default_factory=Holt)

    def decide(self, load: Load, settings: AutoscaleSettings, now: float) -> Advice:
        """Take in one look at the cluster and say how many workers there should be.

        One step at a time, `cooldown_s` apart.  A step that nobody has carried out is not followed
        by another."""
        before = load.workers if self.desired is None else self.desired
        desired = _within(settings, before)
        self._look(load, settings, now)
        wanted, why = self._recommended(load, settings, now, desired)
        self._vote(wanted < desired, now)
        cooled = self.changed_at is None or now - self.changed_at >= settings.cooldown_s
        if cooled and (wanted >= desired or self._agreed(now)):
            desired = wanted
        if changed := desired != before:
            self.changed_at, self.spare_since, self.votes = now, None, 0
            why = why or f"there are to be {settings.min_workers} to {settings.max_workers} workers"
        self.desired = desired
        return Advice(desired, why, changed)

    def _look(self, load: Load, settings: AutoscaleSettings, now: float) -> None:
        if self.looked_at is not None and now - self.looked_at > settings.sustained_s:
            # Nobody has watched: what was seen before may have ended and begun again.
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
            reasons.append(f"{needed} workers will be needed in {HORIZON_S:.0f} s")
        # Of no workers at all nobody would be left to ask for one again.
        fewer = _within(settings, max(1, desired - settings.increment))
        if not reasons and fewer < desired and needed <= fewer and _fits(load, settings, fewer):
            return fewer, f"{fewer} workers can carry the load"
        return _within(settings, max(more, forecast)), "; ".join(reasons)

    def _triggers(self, load: Load, settings: AutoscaleSettings, now: float) -> list[str]:
        lasted = f"for {settings.sustained_s:.0f} s"
        found = {
            f"CPU at {load.cpu_pct:.0f} % {lasted}": _lasted(self.cpu_since, settings, now),
            f"memory at {load.memory_pct:.0f} % {lasted}": _lasted(
                self.memory_since, settings, now
            ),
            f"{load.queue_depth} messages wait": load.queue_depth >= settings.queue_depth,
            f"a message has waited for {load.oldest_wait_s:.0f} s": load.oldest_wait_s
            >= settings.wait_s,
        }
        return [reason for reason, holds in found.items() if holds]

    def _needed(self, load: Load) -> int:
        """Return how many workers the arrivals of the next minute take, and the backlog besides; 0:
        not known.
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
    """Whether so many workers could carry the load; the work of those that leave goes to the
    others.
    """
    if not load.workers:
        return False
    limits = (settings.cpu_pct, settings.memory_pct, settings.queue_depth, settings.wait_s)
    seen = (load.cpu_pct, load.memory_pct, load.queue_depth, load.oldest_wait_s)
    return all(
        value * load.workers / workers < CLEARLY * limit
        for value, limit in zip(seen, limits, strict=True)
    )
