"""Preemption: urgent work starts at once, since running nodes of less urgent jobs yield slots.

No more nodes yield than needed, and no item is lost."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rlm_tasks import Adaptive, Client
from rlm_tasks.client.job import Job
from rlm_tasks.messaging.dispatch import Dispatcher
from rlm_tasks.testing import embedded
from tests.integration.conftest import SLOTS, client_of, environment_of
from tests.support import wait_until

ITEM_S = 0.1
SETTLED_S = 0.6
"""After this time running nodes have sent two pulses."""
SUBMISSIONS = 100
MANY_SLOTS = 3
PREEMPTED = "more urgent work waits for a slot"
LONG = {
    "RLM_OPERATIONS": "tests.integration.pressed_ops,tests.integration.preempted_ops",
    "RLM_NODE__TARGET_MS": "60000",
    "RLM_PRESSURE__ENABLED": "0",  # a busy machine would run fewer nodes than there are slots
    "RLM_LEDGER__LEASE_S": "15",  # a busy machine must not lose a node, which would free its slot
    "RLM_LEDGER__GRACE_S": "5",
}


@pytest.fixture(scope="module")
def clients(
    server: embedded.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, Client]]:
    """The clients of two platforms of this module, by the number of slots of their workers."""
    with ExitStack() as stack:
        found = {}
        for slots in (SLOTS, MANY_SLOTS):
            environment = environment_of(server.url, f"preempt-{slots}", **LONG)
            log = tmp_path_factory.mktemp("preempt") / "worker.log"
            stack.enter_context(embedded.worker(environment, log=log, slots=slots))
            found[slots] = stack.enter_context(client_of(environment))
        yield found


@pytest.fixture
def client(clients: dict[int, Client]) -> Iterator[Client]:
    """A client of an idle worker."""
    yield clients[SLOTS]
    end_all(clients[SLOTS])


@pytest.fixture
def wide(clients: dict[int, Client]) -> Iterator[Client]:
    """A client of an idle worker with more slots."""
    yield clients[MANY_SLOTS]
    end_all(clients[MANY_SLOTS])


def end_all(client: Client) -> None:
    """Cancel running jobs, and wait until all slots are free."""
    jobs = [job for job in client.jobs(limit=1000) if not job.ready()]
    for job in jobs:
        job.cancel()
    for job in jobs:
        job.wait(timeout=10)


def running(job: Job) -> int:
    return sum(node.state == "running" for node in job.tree())


def root_runs(job: Job) -> bool:
    """Return whether a job's root still runs; at its end the slot goes to the first message."""
    return any(node.id == "root" and node.state == "running" for node in job.tree())


def wait_until_running(job: Job, slots: int) -> None:
    """Wait until a job runs on this number of slots."""
    wait_until(lambda: running(job) == slots)


def busy(
    client: Client, items: int | range, *, slots: int = SLOTS, item_s: float = ITEM_S, **fields: Any
) -> Job:
    """Fill slots with nodes that would run for a minute each; return their job."""
    each = [item_s] * items if isinstance(items, int) else items
    job = client.submit(
        **{"operation": "nap", "items": each, "priority": "low", "strategy": Adaptive(), **fields}
    )
    wait_until(lambda: running(job) == slots and (slots == 1 or not root_runs(job)))
    # A worker may publish its free slots a little later.
    wait_until(lambda: offered(client, "free") <= offered(client, "total") - slots)
    while (nodes := len(job.tree())) and slots > 1:
        wait_for_items(job, math.ceil(SETTLED_S / item_s) * slots)
        # Now no node is cut any more for a slot that was free a moment ago.
        if len(job.tree()) == nodes and running(job) == slots:
            break
    return job


def cut(job: Job) -> list[str]:
    """Return the worker of each node that has yielded."""
    return [node.worker for node in job.tree() if node.state == "cut" and node.why == PREEMPTED]


def yields(job: Job) -> int:
    return len(cut(job))


def wait_for_items(job: Job, items: int) -> None:
    """Wait until a job has done that many more items; a node can yield after each."""
    done = job.progress().done
    wait_until(lambda: job.progress().done >= done + items)


def offered(client: Client, which: str) -> int:
    """Return the number of slots that workers have published: "total" or "free"."""
    offers = client.ledger.store.client.hvals(client.ledger.keys.slots)
    return sum(json.loads(each)[which] for each in offers)


def at_once(intervals: Sequence[tuple[int, float, float]]) -> int:
    """Return the largest number of items that ran at the same time."""
    edges = sorted(
        [(began, 1) for _, began, _ in intervals] + [(ended, -1) for _, _, ended in intervals]
    )
    return max(sum(step for _, step in edges[: i + 1]) for i in range(len(edges)))


def test_critical_work_starts_within_an_item_while_every_slot_runs_long_nodes(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    low = busy(client, 2000)
    started = []

    for _ in range(SUBMISSIONS):
        wait_until_running(low, SLOTS)
        asked = time.time()
        [began] = client.submit(operation="stamp", items=[0], priority="critical").get(timeout=30)
        started.append(began - asked)

    late = sorted(started)
    with capsys.disabled():
        print(
            f"\ncritical starts: p50 {late[49]:.3f} s, p95 {late[94]:.3f} s,"
            f" p99 {late[98]:.3f} s, max {late[99]:.3f} s"
        )
    assert late[98] <= ITEM_S + 0.5
    assert SUBMISSIONS * 0.9 <= yields(low) <= SUBMISSIONS


# --- the number of nodes that yield -----------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_one_node_yields_for_each_critical_job_without_a_slot(wide: Client, k: int) -> None:
    low = busy(wide, 30_000, slots=MANY_SLOTS, item_s=0.02)

    jobs = wide.batch_submit(
        [{"operation": "nap", "items": [0.6], "options": {"priority": "critical"}}] * k
    )

    for job in jobs:
        assert job.get(timeout=20) == 1
    wait_until_running(low, MANY_SLOTS)
    wait_for_items(low, 30)
    assert yields(low) == min(k, MANY_SLOTS)


@pytest.mark.parametrize(("critical", "needed"), [(1, 0), (2, 1), (3, 2)])
def test_a_free_slot_is_used_before_a_node_yields(wide: Client, critical: int, needed: int) -> None:
    lows = [
        busy(wide, 600, slots=1, item_s=0.02, type="sequential", strategy=None)
        for _ in range(MANY_SLOTS - 1)
    ]
    wait_until(lambda: offered(wide, "free") == 1)

    jobs = wide.batch_submit(
        [{"operation": "nap", "items": [0.6], "options": {"priority": "critical"}}] * critical
    )

    for job in jobs:
        assert job.get(timeout=20) == 1
    for low in lows:
        wait_for_items(low, 10)
    assert sum(yields(low) for low in lows) == needed


def test_a_critical_job_takes_all_slots_it_can_use_and_gives_them_back(wide: Client) -> None:
    low = busy(wide, 30_000, slots=MANY_SLOTS, item_s=0.02)

    critical = wide.submit(
        operation="where_and_when", items=[0.2] * 15, strategy=Adaptive(), priority="critical"
    )
    intervals = critical.get(timeout=20)

    assert at_once(intervals) == MANY_SLOTS
    wait_until_running(low, MANY_SLOTS)
    wait_for_items(low, 30)
    assert yields(low) == MANY_SLOTS


@pytest.mark.parametrize(
    ("strategy", "uses", "needed"),
    [(None, MANY_SLOTS - 1, 0), (Adaptive(), MANY_SLOTS, 1)],
    ids=["it grows into free slots", "it plans for all slots"],
)
def test_a_critical_job_that_grows_uses_free_slots_before_a_node_yields(
    wide: Client, strategy: Adaptive | None, uses: int, needed: int
) -> None:
    low = busy(wide, 2000, slots=1, item_s=0.005, type="sequential", strategy=None)
    # A worker may publish a slot as free a little later.
    wait_until(lambda: offered(wide, "free") == MANY_SLOTS - 1)

    critical = wide.submit(
        operation="where_and_when", items=[0.2] * 10, strategy=strategy, priority="critical"
    )

    assert at_once(critical.get(timeout=20)) == uses
    assert yields(low) == needed


def test_each_critical_job_preempts_one_more_node(wide: Client) -> None:
    low = busy(wide, 30_000, slots=MANY_SLOTS, item_s=0.02)

    jobs = []
    for nth in range(1, MANY_SLOTS + 1):
        jobs.append(
            wide.submit(operation="nap", items=[0.05] * 600, type="sequential", priority="critical")
        )
        wait_until_running(jobs[-1], 1)
        wait_until_running(
            low, MANY_SLOTS - nth
        )  # a node may have just ended, and its slot takes the next one
        assert yields(low) == nth

    for job in jobs:
        job.cancel()
    wait_until_running(low, MANY_SLOTS)
    assert yields(low) == MANY_SLOTS


def test_high_work_starts_as_fast_right_after_critical_work(
    client: Client,
) -> None:
    low = busy(client, 20_000, item_s=0.02)
    started = []

    for _ in range(5):
        for priority in ("critical", "high"):
            wait_until_running(low, SLOTS)
            asked = time.time()
            job = client.submit(
                operation="stamp", items=[0], priority=priority, preempt_lower_priority=True
            )
            started.append(job.get(timeout=20)[0] - asked)

    assert sorted(started)[-2] <= 0.02 + 0.5, "a busy machine may delay one start"
    assert 8 <= yields(low) <= 10, "a slot may become free by itself, and no more than 10 yield"


# --- the nodes that yield ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("urgent", "option", "yielding"),
    [
        ("critical", None, {"high", "normal", "low"}),
        ("critical", False, set()),
        ("high", None, set()),
        ("high", True, {"normal", "low"}),
        ("normal", None, set()),
        ("normal", True, {"low"}),
        ("low", True, set()),
    ],
)
def test_only_less_urgent_nodes_yield_and_only_to_jobs_with_the_option(
    client: Client, urgent: str, option: bool | None, yielding: set[str]
) -> None:
    for priority in ("critical", "high", "normal", "low"):
        runs = busy(client, 8000, item_s=0.01, priority=priority, preempt_lower_priority=False)
        job = client.submit(
            operation="stamp", items=[0], priority=urgent, preempt_lower_priority=option
        )
        if priority in yielding:
            wait_until(job.ready)
        else:
            wait_for_items(runs, 60)
            assert not job.ready()
        assert yields(runs) == (priority in yielding), priority
        runs.cancel()
        wait_until(job.ready)


def test_any_less_urgent_node_yields_but_no_critical_one(wide: Client) -> None:
    priorities = ("critical", "normal", "low")
    jobs = {
        each: busy(
            wide, 2000, slots=1, item_s=0.01, type="sequential", strategy=None, priority=each
        )
        for each in priorities
    }

    critical = wide.batch_submit(
        [
            {
                "operation": "nap",
                "items": [0.05] * 600,
                "type": "sequential",
                "options": {"priority": "critical"},
            }
        ]
        * 2
    )
    for job in critical:
        wait_until_running(job, 1)
    wait_for_items(jobs["critical"], 100)

    assert {priority: yields(job) for priority, job in jobs.items()} == {
        "critical": 0,
        "normal": 1,
        "low": 1,
    }


def test_a_worker_that_does_not_serve_the_queue_does_not_yield(
    server: embedded.Server, tmp_path: Path
) -> None:
    name = "preempt-two"
    environment = environment_of(server.url, name, **LONG)
    with (
        embedded.worker(environment, log=tmp_path / "all.log", options=["-n", "all@test"]),
        embedded.worker(
            environment, log=tmp_path / "low.log", options=["-n", "low@test", "-Q", f"{name}.low"]
        ),
        client_of(environment) as client,
    ):
        # With 40,000 items no node ends during the test and leaves a slot free.
        low = busy(client, 40_000, slots=4, item_s=0.02)
        for _ in range(3):
            wait_until_running(low, 4)
            assert (
                client.submit(operation="nap", items=[0.05], priority="critical").get(timeout=20)
                == 1
            )
        wait_until_running(low, 4)
        jobs = client.batch_submit(
            [{"operation": "nap", "items": [0.5], "options": {"priority": "critical"}}] * 3
        )
        for job in jobs:
            assert job.get(timeout=20) == 1

        assert Counter(cut(low)) == {"all@test": 3 + 2}
        low.cancel()


# --- exactness --------------------------------------------------------------------------------


def preempted(client: Client, low: Job, times: int) -> None:
    """Make a job yield `times` times, each time with all slots busy."""
    for _ in range(times):
        wait_until_running(low, SLOTS)
        client.submit(operation="stamp", items=[0], priority="critical").get(timeout=20)


def journal(path: Path) -> list[tuple[int, float]]:
    """Return the items that ran: index and seconds."""
    return [
        (int(index), float(seconds))
        for index, seconds in (line.split() for line in path.read_text().splitlines())
    ]


def is_exact(low: Job, n: int, path: Path) -> float:
    """Wait for the end and compare the job with the journal; return the seconds of its items."""
    result = low.result(timeout=60)
    assert result.output == list(range(n))
    assert (result.done, result.failed_count, result.skipped) == (n, 0, 0)
    ran = journal(path)
    assert sorted(index for index, _ in ran) == list(range(n)), "each item ran once"
    return sum(seconds for _, seconds in ran)


@pytest.mark.parametrize(
    ("operation", "n", "item_s", "times"),
    [
        ("p_each", 600, 0.02, 30),
        ("p_each", 4000, 0.001, 8),
        ("p_batch", 300, 0.02, 8),
        ("p_async", 1000, 0.02, 8),
    ],
)
def test_every_item_runs_once_after_repeated_yields(
    client: Client, tmp_path: Path, operation: str, n: int, item_s: float, times: int
) -> None:
    path = tmp_path / "journal"
    low = busy(client, range(n), operation=operation, params={"s": item_s, "journal": str(path)})

    preempted(client, low, times)
    yielded = yields(low)
    alone_s = is_exact(low, n, path)

    assert times * 0.5 <= yielded <= times
    if operation != "p_async":  # the times of overlapping items do not add up
        assert low.result().metrics.busy_ms <= alone_s * 1000 + 50 * low.result().metrics.nodes


def test_sequential_items_keep_their_order_after_repeated_yields(
    client: Client, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in "ab"]
    lows = [
        busy(
            client,
            range(150),
            slots=1,
            operation="p_each",
            params={"s": 0.02, "journal": str(path)},
            type="sequential",
            strategy=None,
            priority=priority,
        )
        for path, priority in zip(paths, ("low", "normal"), strict=True)
    ]

    for _ in range(8):
        wait_until(lambda: sum(running(low) for low in lows) == SLOTS)
        client.submit(operation="stamp", items=[0], priority="critical").get(timeout=20)
    yielded = sum(yields(low) for low in lows)

    for low, path in zip(lows, paths, strict=True):
        is_exact(low, 150, path)
        assert [index for index, _ in journal(path)] == list(range(150)), "in order"
    assert yielded == 8


def test_a_validating_job_yields(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    low = busy(
        client,
        range(200),
        operation="p_checked",
        params={"s": 0.002, "journal": str(path)},
        validate_before_process=True,
    )

    preempted(client, low, 4)
    assert low.progress().phase == "validate"

    assert yields(low) == 4
    is_exact(low, 200, path)


# --- long items -------------------------------------------------------------------------------


@pytest.mark.parametrize(("item_s", "times"), [(0.001, 10), (1.5, 2)])
def test_critical_work_waits_for_one_item_and_half_a_second_at_most(
    client: Client, item_s: float, times: int
) -> None:
    low = busy(client, int(20 / item_s), item_s=item_s)
    started = []
    for _ in range(times):
        wait_until_running(low, SLOTS)
        asked = time.time()
        [began] = client.submit(operation="stamp", items=[0], priority="critical").get(timeout=30)
        started.append(began - asked)

    assert max(started) <= item_s + 0.5


def test_critical_work_waits_for_the_end_of_nodes_that_cannot_be_cut(
    client: Client, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in "ab"]
    lows = [
        client.submit(
            operation="p_each", items=[0], params={"s": 1.5, "journal": str(path)}, priority="low"
        )
        for path in paths
    ]
    for low in lows:
        wait_until_running(low, 1)

    critical = client.submit(operation="stamp", items=[0], priority="critical")
    [began] = critical.get(timeout=20)

    ended = [low.result(timeout=20).metrics for low in lows]
    assert all(metrics.nodes == 1 for metrics in ended), "no node was cut"
    assert [len(journal(path)) for path in paths] == [1, 1], "no item ran again"
    first_end = min(int(client.ledger.facts(low.id)["closed_ms"]) for low in lows) / 1000
    assert -0.1 < began - first_end < 0.5
    assert all(yields(low) == 0 for low in lows)


# --- lost broadcasts and cancelled jobs -------------------------------------------------------


def test_nodes_yield_within_a_second_when_the_broadcast_is_lost(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = busy(client, 2000)
    monkeypatch.setattr(Dispatcher, "ask_to_yield", lambda *_: None)
    started = []

    for _ in range(5):
        wait_until_running(low, SLOTS)
        asked = time.time()
        [began] = client.submit(operation="stamp", items=[0], priority="critical").get(timeout=30)
        started.append(began - asked)

    assert max(started) <= 1.0 + ITEM_S + 0.5
    assert yields(low) == 5


def test_a_critical_job_cancelled_before_its_start_costs_at_most_one_yield(client: Client) -> None:
    """A node still yields to the next critical job."""
    low = busy(client, 2000, item_s=0.05)

    client.submit(operation="stamp", items=[0], priority="critical").cancel()
    wait_for_items(low, 40)
    after_the_first = yields(low)
    assert after_the_first <= 1
    wait_until_running(low, SLOTS)
    began = time.time()
    [started] = client.submit(operation="stamp", items=[0], priority="critical").get(timeout=20)

    assert started - began <= 0.05 + 0.5
    wait_for_items(low, 40)
    assert yields(low) == after_the_first + 1
