"""Measure how long critical work waits while all slots are busy, here and in plain Celery.

`tests.bench` calls it; begin with `preemption`.  Plain Celery uses priority queues.  On both sides
items of 100 ms keep the slots busy.  Here they run in nodes of up to a minute, there in chunks of
2 s.  A start is the time from the submit call to the first item.  Nothing asserts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from rlm_tasks import Adaptive, Client, Job
from rlm_tasks.testing import embedded
from tests.bench import by_priority
from tests.bench.guards import Measured
from tests.integration.conftest import client_of
from tests.support import wait_until

SUBMISSIONS = 100
SLOTS = 2
ITEM_S, CHUNK = 0.1, 20
TARGET_MS = 60_000
FIGURE_S = ITEM_S + 0.5
ENOUGH = 20_000
"""Number of low-priority items; more than the workers can finish during the measurement."""

Start = Callable[[], float]


def starts(start: Start, spread_s: float) -> list[float]:
    """Return the seconds that each submission took to start, the shortest first.

    A random pause of up to `spread_s` seconds precedes each submission.
    """
    random, found = Random(5), []
    for _ in range(SUBMISSIONS):
        time.sleep(random.uniform(0, spread_s))
        asked = time.time()
        found.append(start() - asked)
    return sorted(found)


def ours(client: Client) -> Iterator[Start]:
    """Keep all slots busy with a low-priority job; yield the start of a critical job."""
    low = client.submit(
        operation="bench_nap",
        items=[ITEM_S] * ENOUGH,
        priority="low",
        strategy=Adaptive(target_execution_time_ms=TARGET_MS),
    )

    def start() -> float:
        wait_until(lambda: running(low) == SLOTS)
        [began] = client.submit(operation="bench_began", items=[0], priority="critical").get(
            timeout=120
        )
        return float(began)

    yield start
    low.cancel()


def running(job: Job) -> int:
    """Return the number of slots that a job uses."""
    return sum(node.state == "running" for node in job.tree())


def plain(url: str) -> Iterator[Start]:
    """Keep all slots busy with chunks; yield the start of an urgent task."""
    by_priority.app.conf.update(broker_url=url, result_backend=url)
    # The first chunk is half as long, so that the slots do not all end at the same time.
    for items in (CHUNK // 2, *[CHUNK] * (ENOUGH // CHUNK)):
        by_priority.chunk.apply_async((items, ITEM_S), priority=by_priority.PATIENT)
    yield lambda: float(by_priority.began.apply_async(priority=by_priority.URGENT).get(timeout=120))
    by_priority.app.control.purge()


def preemption() -> Iterator[Measured]:
    """Measure both, one after the other, so that each has the machine to itself."""
    with embedded.server() as server, tempfile.TemporaryDirectory() as folder:
        environment = {
            "RLM_REDIS_URL": server.url,
            "RLM_NAMESPACE": "preemption",
            "RLM_OPERATIONS": "tests.bench.ops",
            "RLM_PRESSURE__ENABLED": "0",  # other load on the machine must not count
            "PYTHONPATH": str(Path.cwd()),
        }
        with (
            client_of(environment) as client,
            embedded.worker(environment, log=Path(folder) / "ours.log", slots=SLOTS),
        ):
            [mine] = [starts(start, 3 * ITEM_S) for start in ours(client)]
        with embedded.worker(
            environment, log=Path(folder) / "plain.log", app="tests.bench.by_priority", slots=SLOTS
        ):
            [theirs] = [starts(start, CHUNK * ITEM_S) for start in plain(server.url)]
    for name, nth in (("p50", 50), ("p95", 95), ("p99", 99)):
        a, b = mine[nth * SUBMISSIONS // 100 - 1], theirs[nth * SUBMISSIONS // 100 - 1]
        yield Measured(
            f"start of critical work, all slots busy, {name},"
            f" against queues by priority and chunks of {CHUNK * ITEM_S:g} s",
            f"{a * 1000:.0f} ms",
            f"{b * 1000:.0f} ms",
            f"{a / b:.3f}",
            f"<= {FIGURE_S * 1000:.0f} ms" if name == "p99" else "",
            a <= FIGURE_S if name == "p99" else None,
        )
