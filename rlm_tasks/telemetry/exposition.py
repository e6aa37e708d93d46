"""What one worker exposes as Prometheus metrics: the counted files, and gauges read when asked."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlm_tasks.engine import counts
from rlm_tasks.engine.counts import CACHED, ITEMS, RETRIED
from rlm_tasks.llm import metrics as llm_metrics
from rlm_tasks.metrics.declared import DECLARED

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric as Family

logger = logging.getLogger(__name__)
ERRORS_OF_S = 300.0
"""The error rate is that of the items of the last five minutes."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """How a worker stands, as its main process knows."""

    total: int  # slots
    busy: int
    draining: bool
    level: int  # of pressure, 0 to 4: what it acts on
    memory_mb: float  # of its processes
    memory_level: int | None = None  # of its host's memory alone; None: it could not be measured
    breakers: Mapping[str, str] = field(
        default_factory=dict
    )  # service -> closed, half-open or open

    @property
    def free(self) -> int:
        """Slots that wait for work."""
        return 0 if self.draining else max(0, self.total - self.busy)


GAUGES = {
    "rlm_slots": "Slots of this worker, by state: busy or free. A worker that drains has none that is free.",
    "rlm_concurrency_level": "Slots that are busy.",
    "rlm_object_pool_utilization": "Busy share of the pool's processes, 0 to 1.",
    "rlm_memory_usage_mb": "Memory that the worker's processes hold; what they share counts in each.",
    "rlm_memory_pressure_level": "Level that the memory of this host alone comes to: 0 normal to 4 emergency.",
    "rlm_pressure_level": "Level that this worker acts on: 0 normal to 4 emergency.",
    "rlm_error_rate": "Failed share of the items that ended in the last five minutes, 0 to 1.",
    "rlm_recovery_success_rate": "Share of the items worth another try that ended well, 0 to 1, since the worker started.",
    "rlm_cache_hit_rate": "Share of the reads of stored items whose block was in memory, 0 to 1, since the worker started.",
    "rlm_circuit_breaker_state": "State of each service's breaker: 0 closed, 1 half-open, 2 open. None while Redis is away.",
    "rlm_draining": "Whether the worker drains: 1, else 0.",
}
"""Read from the main process when somebody asks, not counted."""
DECLARING = (counts, llm_metrics)
"""The modules that declare the metrics of every worker: they are exposed before anything is
counted.
"""
BREAKER_STATES = {"closed": 0.0, "half-open": 1.0, "open": 2.0}


def registry(
    folder: Path, standing: Callable[[], WorkerState], clock: Callable[[], float] = time.monotonic
) -> CollectorRegistry:
    """Return what one worker exposes.

    Where its owner runs prometheus_client in its multiprocess mode (``PROMETHEUS_MULTIPROC_DIR``),
    what that folder has, too."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    found = CollectorRegistry()
    found.register(_Exposed(folder, standing, clock))
    try:
        MultiProcessCollector(found)
    except ValueError:
        logger.debug(
            "PROMETHEUS_MULTIPROC_DIR is not set: what is exposed is what is declared here"
        )
    return found


class _Exposed:
    """Everything declared: what was counted in the folder, and how the worker stands."""

    def __init__(
        self, folder: Path, standing: Callable[[], WorkerState], clock: Callable[[], float]
    ) -> None:
        self._folder, self._standing = folder, standing
        self._errors = _ErrorRate(clock)

    def collect(self) -> Iterator[Family]:
        """Yield each metric, also one that nothing was counted of."""
        from prometheus_client.metrics_core import Metric as Family
        from prometheus_client.multiprocess import MultiProcessCollector

        counted = MultiProcessCollector(None, path=str(self._folder)).collect()
        found = {each.name: each for each in counted}
        for metric in DECLARED.values():
            found.setdefault(metric.family, Family(metric.family, metric.about, metric.type))
        yield from sorted(found.values(), key=lambda each: each.name)
        for name, samples in self._gauges(found).items():
            family = Family(name, GAUGES[name], "gauge")
            for labels, value in samples:
                family.add_sample(name, labels, value)
            yield family

    def _gauges(self, found: Mapping[str, Family]) -> dict[str, list[tuple[dict[str, str], float]]]:
        at, retried = self._standing(), _by_outcome(found.get(RETRIED.family))
        cached = _by_outcome(found.get(CACHED.family))
        rate = self._errors.of(_by_outcome(found.get(ITEMS.family)))
        return {
            "rlm_slots": [({"state": "busy"}, at.busy), ({"state": "free"}, at.free)],
            "rlm_concurrency_level": [({}, at.busy)],
            "rlm_object_pool_utilization": [
                ({}, min(1.0, at.busy / at.total) if at.total else 0.0)
            ],
            "rlm_memory_usage_mb": [({}, at.memory_mb)],
            "rlm_memory_pressure_level": [({}, at.memory_level)]
            if at.memory_level is not None
            else [],
            "rlm_pressure_level": [({}, at.level)],
            "rlm_error_rate": [({}, rate)],
            "rlm_recovery_success_rate": [({}, retried["recovered"] / retried.total())]
            if retried.total()
            else [],
            "rlm_cache_hit_rate": [({}, cached["hit"] / cached.total())] if cached.total() else [],
            "rlm_circuit_breaker_state": [
                ({"service": name}, BREAKER_STATES[state]) for name, state in at.breakers.items()
            ],
            "rlm_draining": [({}, float(at.draining))],
        }


def _by_outcome(family: Family | None) -> Tally[str]:
    found: Tally[str] = Tally()
    for sample in family.samples if family is not None else ():
        found[sample.labels["outcome"]] += int(sample.value)
    return found


class _ErrorRate:
    """The failed share of the items between now and the look that is five minutes old, or the
    oldest there was.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._looks: deque[tuple[float, int, int]] = deque([(clock(), 0, 0)])  # when, failed, ended

    def of(self, items: Tally[str]) -> float:
        now, failed = self._clock(), items["failed"]
        ended = failed + items["done"]
        with self._lock:
            self._looks.append((now, failed, ended))
            while self._looks[1][0] <= now - ERRORS_OF_S:
                self._looks.popleft()
            _, failed_before, ended_before = self._looks[0]
        return (failed - failed_before) / (ended - ended_before) if ended > ended_before else 0.0
