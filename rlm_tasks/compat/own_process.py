"""The memory and the CPU of the process that runs executors, and the pressure that follows.

`AdaptiveResourceManager` asks it, because executors run in its own process, which no worker
measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import psutil

from resilience.breaker_storage import resident_mb
from resilience.degradation import Level, level_of
from scheduler.allocation import ResourceLimits

MEASURE_EVERY_S = 1.0
"""The shortest time between two measurements of CPU: a shorter one says little."""


def _cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


class OwnProcess:
    """The load of this process."""

    def __init__(
        self,
        *,
        memory_mb: Callable[[], float] = resident_mb,
        cpu_s: Callable[[], float] = _cpu_s,
        clock: Callable[[], float] = time.monotonic,
        cpus: int | None = None,
    ) -> None:
        """`cpu_s` returns the seconds of CPU used so far; `cpus` None: those of this host."""
        self.memory_mb, self._cpu_s, self._clock = memory_mb, cpu_s, clock
        self._cpus = cpus or psutil.cpu_count() or 1
        self._measured = clock(), cpu_s()
        self._cpu_percent = 0.0

    def cpu_percent(self) -> float:
        """Return the share of the host's CPUs that this process used lately, in percent."""
        now, (at, used_s) = self._clock(), self._measured
        if now - at >= MEASURE_EVERY_S:
            self._measured = now, self._cpu_s()
            self._cpu_percent = (self._measured[1] - used_s) / (now - at) / self._cpus * 100
        return self._cpu_percent

    def unless(self, of_workers: Mapping[str, float], limits: ResourceLimits) -> dict[str, float]:
        """Return the load of the workers; without a worker, that of this process.

        It has cpu_percent of the host, memory_mb, memory_percent of the limit, and worker_count.
        """
        if of_workers["worker_count"]:
            return dict(of_workers)
        memory_mb = self.memory_mb()
        return {
            **of_workers,
            "cpu_percent": round(self.cpu_percent(), 1),
            "memory_mb": round(memory_mb, 1),
            "memory_percent": round(memory_mb / limits.max_memory_mb * 100, 1),
        }

    def level(self, limits: ResourceLimits) -> Level:
        """Return the pressure of this process, by its shares of the limits.

        CPU alone reaches HIGH at most, as in workers.
        """
        of_memory = level_of(self.memory_mb() / limits.max_memory_mb * 100)
        of_cpu = level_of(self.cpu_percent() / limits.max_cpu_percent * 100)
        return max(of_memory, min(Level.HIGH, of_cpu))
