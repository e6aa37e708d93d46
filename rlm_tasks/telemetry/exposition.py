"""The Prometheus metrics of one worker: counters from files, and gauges read at each scrape.

`worker_port` serves the registry.  The pool's processes count in the files of a folder; the main
process provides the gauges.  Begin with `registry`.
"""

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
"""The error rate counts the items of the last five minutes."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """The present state of a worker, as its main process knows it."""

    total: int  # slots
    busy: int
    draining: bool
    level: int  # the pressure level that it acts on, 0 to 4
    memory_mb: float  # held by its processes
    memory_level: int | None = None  # by its host's memory alone; None: it could not be measured
    breakers: Mapping[str, str] = field(default_factory=dict)
    """Service -> closed, half-open or open."""

    @property
    def free(self) -> int:
        """Slots that wait for work."""
        return 0 if self.draining else max(0, self.total - self.busy)


GAUGES = {
    "rlm_slots": "Slots of this worker, by state: busy or free. While it drains, none is free.",
    "rlm_concurrency_level": "Slots that are busy.",
    "rlm_object_pool_utilization": "Busy share of the pool's processes, 0 to 1.",
    "rlm_memory_usage_mb": "Memory of the worker's processes; shared memory counts in each.",
    "rlm_memory_pressure_level": (
        "Level by the memory of this host alone: 0 normal to 4 emergency."
    ),
    "rlm_pressure_level": "Level that this worker acts on: 0 normal to 4 emergency.",
    "rlm_error_rate": "Failed share of the items that ended in the last five minutes, 0 to 1.",
    "rlm_recovery_success_rate": (
        "Share of the items worth a retry that recovered, 0 to 1, since the worker started."
    ),
    "rlm_cache_hit_rate": (
        "Share of the reads of stored items whose block was in memory, 0 to 1, since the worker "
        "started."
    ),
    "rlm_circuit_breaker_state": (
        "State of each service's breaker: 0 closed, 1 half-open, 2 open. None while Redis is away."
    ),
    "rlm_draining": "Whether the worker drains: 1, else 0.",
}
"""Gauges with their help texts; their values are read from the main process at each scrape."""
DECLARING = (counts, llm_metrics)
"""The modules with the metrics of every worker; imported so that each is exposed from the start."""
BREAKER_STATES = {"closed": 0.0, "half-open": 1.0, "open": 2.0}


def registry(
    folder: Path, state: Callable[[], WorkerState], clock: Callable[[], float] = time.monotonic
) -> CollectorRegistry:
    """Return the registry of one worker: the counters in `folder`, and the gauges of its state.

    If the app uses prometheus_client in its multiprocess mode (``PROMETHEUS_MULTIPROC_DIR``), the
    metrics of that folder are in it, too.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    found = CollectorRegistry()
    found.register(_Collector(folder, state, clock))
    try:
        MultiProcessCollector(found)
    except ValueError:
        logger.debug("PROMETHEUS_MULTIPROC_DIR is not set; only metrics declared here are exposed")
    return found


class _Collector:
    """All declared metrics: the counters in the folder, and the worker's gauges."""

    def __init__(
        self, folder: Path, state: Callable[[], WorkerState], clock: Callable[[], float]
    ) -> None:
        self._folder, self._state = folder, state
        self._errors = _ErrorRate(clock)

    def collect(self) -> Iterator[Family]:
        """Yield each metric, also one without a sample yet."""
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
        state, retried = self._state(), _by_outcome(found.get(RETRIED.family))
        cached = _by_outcome(found.get(CACHED.family))
        rate = self._errors.of(_by_outcome(found.get(ITEMS.family)))
        utilization = min(1.0, state.busy / state.total) if state.total else 0.0
        return {
            "rlm_slots": [({"state": "busy"}, state.busy), ({"state": "free"}, state.free)],
            "rlm_concurrency_level": [({}, state.busy)],
            "rlm_object_pool_utilization": [({}, utilization)],
            "rlm_memory_usage_mb": [({}, state.memory_mb)],
            "rlm_memory_pressure_level": [({}, state.memory_level)]
            if state.memory_level is not None
            else [],
            "rlm_pressure_level": [({}, state.level)],
            "rlm_error_rate": [({}, rate)],
            "rlm_recovery_success_rate": [({}, retried["recovered"] / retried.total())]
            if retried.total()
            else [],
            "rlm_cache_hit_rate": [({}, cached["hit"] / cached.total())] if cached.total() else [],
            "rlm_circuit_breaker_state": [
                ({"service": name}, BREAKER_STATES[each]) for name, each in state.breakers.items()
            ],
            "rlm_draining": [({}, float(state.draining))],
        }


def _by_outcome(family: Family | None) -> Tally[str]:
    found: Tally[str] = Tally()
    for sample in family.samples if family is not None else ():
        found[sample.labels["outcome"]] += int(sample.value)
    return found


class _ErrorRate:
    """The failed share of the items since the scrape five minutes ago, or since the oldest one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, threading.Lock()
        # Of each scrape: its time, and the items failed and ended until then.
        self._scrapes: deque[tuple[float, int, int]] = deque([(clock(), 0, 0)])

    def of(self, items: Tally[str]) -> float:
        now, failed = self._clock(), items["failed"]
        ended = failed + items["done"]
        with self._lock:
            self._scrapes.append((now, failed, ended))
            while self._scrapes[1][0] <= now - ERRORS_OF_S:
                self._scrapes.popleft()
            _, failed_before, ended_before = self._scrapes[0]
        return (failed - failed_before) / (ended - ended_before) if ended > ended_before else 0.0
