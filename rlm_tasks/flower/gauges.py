"""Metrics of the whole platform, on Flower's ``/metrics``.

`install` registers `Gauges`.  Only this process exposes them, so nothing is counted twice; each
worker exposes its own work (`telemetry.exposition`).  A thread reads the platform every few
seconds, so a scrape never waits for Redis.  Without Redis there is only ``rlm_up``.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from resilience.degradation import Level
from rlm_tasks.errors import RlmError
from rlm_tasks.telemetry.exposition import BREAKER_STATES, GAUGES

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client

logger = logging.getLogger(__name__)

READ_EVERY_S = 5.0
FIRST_READ_S = 1.0
"""The longest time that the first scrape waits for the first reading."""


class Gauges(Collector):
    """The latest reading of the platform, for Prometheus."""

    def __init__(self, client: Callable[[], Client]) -> None:
        self._client, self._lock = client, threading.Lock()
        self._has_read = threading.Event()
        self._thread: threading.Thread | None = None
        self._latest: list[GaugeMetricFamily] = []

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Return no names, so that registering does not start a reading."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the latest reading; the first call starts the thread."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._read_regularly, name="rlm-gauges", daemon=True
                )
                self._thread.start()
        self._has_read.wait(FIRST_READ_S)
        yield GaugeMetricFamily(
            "rlm_up", "1 when the platform's Redis answers.", value=float(bool(self._latest))
        )
        yield from self._latest

    def _read_regularly(self) -> None:
        client, pause = self._client(), threading.Event()
        while True:
            try:
                self._latest = list(families(client))
            except RlmError as error:
                logger.info("The platform's metrics cannot be read: %s", error)
                self._latest = []
            except Exception:  # the next reading may succeed
                logger.exception("The platform's metrics cannot be read")
                self._latest = []
            self._has_read.set()
            pause.wait(READ_EVERY_S)


def families(client: Client) -> Iterator[GaugeMetricFamily]:
    """Yield every metric of the cluster.  Raises StoreUnavailable and BrokerUnavailable."""
    yield from _of_pressure(client)
    yield from _of_work(client)
    yield _family(
        "rlm_circuit_breaker_state",
        GAUGES["rlm_circuit_breaker_state"],
        ("service",),
        [((name,), BREAKER_STATES[at["state"]]) for name, at in client.breakers.status().items()],
    )
    yield _family(
        "rlm_llm_endpoint_healthy",
        "1 while an endpoint of models gets calls, 0 while it is unhealthy.",
        ("endpoint",),
        [((each.name,), each.healthy) for each in client.endpoints()],
    )
    limits = client.limits()
    yield _family(
        "rlm_limit_fill",
        "Used share of a rate limit or a bulkhead, 0 to 1.",
        ("service", "limit"),
        [((each.service, each.name), each.fill) for each in limits],
    )
    yield _family(
        "rlm_limit_waiting_nodes",
        "Nodes in line for a bulkhead.",
        ("service", "limit"),
        [((each.service, each.name), each.waiting) for each in limits],
    )


def _of_pressure(client: Client) -> Iterator[GaugeMetricFamily]:
    status = client.status()
    slots, busy = sum(each.slots for each in status.hosts), sum(each.busy for each in status.hosts)
    yield _one(
        "rlm_cluster_pressure_level", "0 normal to 4 emergency.", Level[status.level.upper()]
    )
    yield _one(
        "rlm_cluster_monitored", "1 while a monitor runs, which beat starts.", status.monitored
    )
    yield _one("rlm_cluster_workers", "Workers that report.", len(status.hosts))
    yield _one(
        "rlm_cluster_desired_workers",
        "Workers that the cluster should have; 0: not known.",
        status.desired_workers,
    )
    if (
        status.monitored
        and (latest := client.pressure.history(1))
        and latest[0].redis_pct is not None
    ):
        about = "Used share of Redis' maxmemory, in percent; missing without a limit."
        yield _one("rlm_redis_memory_pct", about, latest[0].redis_pct)
    yield _family(
        "rlm_cluster_slots",
        "Slots of all workers.",
        ("state",),
        [(("busy",), busy), (("free",), max(0, slots - busy))],
    )
    yield _family(
        "rlm_operation_items",
        "Items an operation has run; counted anew after a month without a run.",
        ("operation", "outcome"),
        [
            ((each["executor_id"], outcome), each[count])
            for each in status.operations
            for outcome, count in (
                ("done", "successful_executions"),
                ("failed", "failed_executions"),
            )
        ],
    )


def _of_work(client: Client) -> Iterator[GaugeMetricFamily]:
    queues, consumers, open_jobs = client.queues(), client.pressure.consumers(), client.at_work()
    ages = [((name,), at.oldest_s) for name, at in queues.items() if at.oldest_s is not None]
    yield _family(
        "rlm_queue_messages",
        "Messages that wait.",
        ("queue",),
        [((name,), at.depth) for name, at in queues.items()],
    )
    yield _family(
        "rlm_queue_workers",
        "Workers that consume it.",
        ("queue",),
        [((name,), len(consumers.get(name, []))) for name in queues],
    )
    yield _family(
        "rlm_queue_oldest_seconds", "How long the oldest message has waited.", ("queue",), ages
    )
    nodes = Counter[tuple[str, str]]()
    for each in open_jobs:
        nodes.update(
            {
                (each.queue, "queued"): each.queued,
                (each.queue, "running"): each.running,
                (each.queue, "parked"): each.parked,
            }
        )
    yield _family(
        "rlm_nodes_open",
        "Nodes of open jobs, the first 200 of them.",
        ("queue", "state"),
        nodes.items(),
    )
    yield _family(
        "rlm_jobs",
        "Open jobs, the first 200 of them.",
        ("state",),
        [((state,), count) for state, count in Counter(each.state for each in open_jobs).items()],
    )


def _one(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, value=float(value))


def _family(
    name: str, about: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, about, labels=labels)
    for values, value in samples:
        family.add_metric(values, float(value))
    return family
