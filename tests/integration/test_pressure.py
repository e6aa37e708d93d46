"""Pressure on real workers: causes and effects of a level, and the monitor.

Other load on the machine really raises its level.  So a drill forces the level in most tests; the
others allow for such load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from resilience.degradation import Level
from resilience.errors import InvalidValue
from rlm_tasks import Client, Status
from rlm_tasks.client.job import Job
from rlm_tasks.operations import registry
from rlm_tasks.operations.policies import policies, policy_of
from rlm_tasks.results import Shaped
from rlm_tasks.testing import embedded
from scheduler.admission import Overloaded, QueueFull
from scheduler.allocation import workers_for
from scheduler.board import ClusterReport, HostReport
from scheduler.events import Event
from tests.integration.conftest import SLOTS, client_of, environment_of
from tests.support import wait_until

ALL_LEVELS = ("normal", "elevated", "high", "critical", "emergency")
REFUSED = {
    "normal": {},
    "elevated": {},
    "high": {"low": 20},
    "critical": {"normal": 20, "low": 40},
    "emergency": {"high": 20, "normal": 40, "low": 60},
}
"""Level -> priorities whose work is refused, and their retry time in seconds.

A level falls by one step in 20 s at the soonest."""
MONITOR_S = 1
LIMIT_MB = 1000
SLOW_MS = 200


@pytest.fixture(scope="module")
def settings_of(server: embedded.Server) -> Callable[..., dict[str, str]]:
    """A function that returns the environment of a platform of this module, by name."""

    def settings_of(name: str, **more: str) -> dict[str, str]:
        return environment_of(
            server.url,
            f"pressure-{name}",
            pressed=True,
            RLM_OPERATIONS="tests.integration.pressed_ops",
            **more,
        )

    return settings_of


@pytest.fixture(scope="module")
def plain(settings_of: Callable[..., dict[str, str]]) -> dict[str, str]:
    """The environment of a platform without beat, with the default rules of pressure."""
    return settings_of("plain", RLM_ALLOCATION__MIN_WORKERS="1")


@pytest.fixture(scope="module")
def client(plain: dict[str, str], logs: Path) -> Iterator[Client]:
    """A client of a worker without beat."""
    with embedded.worker(plain, log=logs / "pressure.log", slots=SLOTS), client_of(plain) as client:
        yield client


@pytest.fixture
def drilled(client: Client) -> Iterator[Client]:
    """The same client under a forced level: normal at first, until the test forces another."""
    force_level(client, "normal")
    yield client
    client.pressure.force("normal")


@pytest.fixture(scope="module")
def watched(settings_of: Callable[..., dict[str, str]], logs: Path) -> Iterator[Client]:
    """A client of a worker with two independent beats."""
    environment = settings_of(
        "watched",
        RLM_PRESSURE__MONITOR_S=str(MONITOR_S),
        RLM_PRESSURE__RELEASE_S="1",
        RLM_PRESSURE__MAX_MEMORY_MB=str(LIMIT_MB),
        RLM_ALERTS__SLOW_EXECUTION_MS=str(SLOW_MS),
    )
    plain_beat = ("-S", "celery.beat:Scheduler")
    with (
        beat(environment, logs / "beat-1.log", *plain_beat),
        beat(environment, logs / "beat-2.log", *plain_beat),
        embedded.worker(environment, log=logs / "watched.log", slots=SLOTS),
        client_of(environment) as client,
    ):
        yield client


def others_compute() -> bool:
    """Return whether other programs load this machine; then its level is rightly high."""
    return psutil.cpu_percent(interval=1.0) >= 75


@contextmanager
def beat(
    environment: Mapping[str, str], log: Path, *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a beat for the length of a block."""
    command = [sys.executable, "-m", "celery", "-A", "rlm_tasks", "beat", "-l", "INFO", *options]
    with log.open("wb") as output:
        process = embedded.start_worker(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        embedded.end(process, signal.SIGKILL)


@contextmanager
def new_client(environment: Mapping[str, str], **more: str) -> Iterator[Client]:
    """Yield a new client: an older one may use a level that it has read up to a second ago."""
    with client_of({**environment, **more}) as client:
        yield client


def force_level(client: Client, level: str) -> None:
    """Force a level, and wait until nodes run under it."""
    client.pressure.force(level)
    wait_until(lambda: run_under(client) == level)


def run_under(client: Client) -> str:
    [level] = client.execute(
        operation="under_level", items=[0], priority="critical", timeout=20
    ).output
    return str(level)


def host(client: Client) -> HostReport:
    [only] = client.status().hosts
    return only


def all_slots_run(client: Client, operation: str) -> None:
    wait_until(lambda: client.status().active == {operation: SLOTS})


# --- causes of a level ------------------------------------------------------------------------


def least_share(spans: Sequence[Sequence[float]]) -> float:
    """Return the smallest share of a processor over a second; a span is (seconds, CPU seconds).

    Ten spans are one second."""
    seconds = [spans[at : at + 10] for at in range(0, len(spans), 10)]
    return min(
        sum(each[1] for each in second) / sum(each[0] for each in second) for second in seconds
    )


def test_computing_on_every_slot_does_not_raise_the_level(client: Client) -> None:
    """Other load may take the processor: the level must be normal while items get 70 % of it."""
    job = client.submit(operation="compute", items=[0.1] * 100)

    levels = {client.status().level for _ in job.watch()}

    result, unpressed = job.result(), levels == {"normal"}
    assert {allowed for _, _, allowed in result.output} == {100} or not unpressed
    assert (unpressed and result.receipt == ()) or least_share(result.output) < 0.7, (
        levels,
        result.receipt,
    )


@contextmanager
def memory_filled(client: Client, percent: float, until: Path) -> Iterator[None]:
    """Fill the worker's memory to `percent` of its limit by a pool process, for a block."""
    sample = host(client).sample
    assert sample is not None
    assert sample.source == "processes"
    missing_mb = int(percent / 100 * LIMIT_MB - sample.memory_mb)
    job = client.submit(
        operation="hold", items=[missing_mb], priority="high", params={"until": str(until)}
    )
    try:
        yield
    finally:
        until.touch()
        job.result(timeout=20)


def test_full_memory_shapes_running_work_until_it_is_free_again(
    watched: Client, tmp_path: Path
) -> None:
    received: list[Event] = []
    watched.on("pressure.*", received.append)
    wait_until(lambda: bool(watched.status().hosts) and host(watched).sample is not None)
    beside = watched.submit(operation="limited", items=[0.05] * 2000)
    wait_until(lambda: beside.progress().done >= 5)

    with memory_filled(watched, 82, tmp_path / "over"):
        wait_until(lambda: host(watched).level >= Level.HIGH and "memory" in host(watched).why)
        wait_until(
            lambda: any(Level[each.level.upper()] >= Level.HIGH for each in beside.receipt())
        )
        wait_until(lambda: any(each.data["level"] == "high" for each in received))
        assert Level[watched.status().level.upper()] >= Level.HIGH
    beside.cancel()
    beside.wait(timeout=20)

    allowed = beside.partial().output
    shaped = [each.items for each in beside.receipt() if each.strategy == "reduce_entity_limits"]
    assert allowed[:5] == [100] * 5
    assert sum(shaped) == sum(each < 100 for each in allowed) > 0
    wait_until(
        lambda: host(watched).level == Level.NORMAL or "tasks on each CPU" in host(watched).why
    )
    wait_until(
        lambda: (
            any(
                Level[each.data["level"].upper()] < Level.HIGH
                for each in received
                if each.data["before"] == "high"
            )
            or "tasks on each CPU" in host(watched).why
        )
    )
    report = next(
        each
        for each in watched.pressure.history()
        if each.level >= Level.HIGH and each.why.startswith("memory")
    )
    assert report.why.endswith(f" % of {LIMIT_MB} MB on {host(watched).worker}")


def test_full_cpu_use_simplifies_work_if_utilisation_is_measured(
    settings_of: Callable[..., dict[str, str]], logs: Path
) -> None:
    environment = settings_of(
        "utilised", RLM_PRESSURE__CPU="utilisation", RLM_PRESSURE__RELEASE_S="1"
    )
    with (
        embedded.worker(environment, log=logs / "utilised.log", slots=SLOTS),
        client_of(environment) as client,
    ):
        job = client.submit(operation="thorough", items=[0.05] * 400)
        wait_until(lambda: bool(client.status().hosts) and host(client).level >= Level.CRITICAL)
        pressed = host(client)
        result = job.result(timeout=40)

        simple = [each for each in result.receipt if each.strategy == "use_simplified_methods"]
        assert pressed.why.startswith("CPU ")
        assert {each.level for each in simple} <= {"critical", "emergency"}
        assert sum(each.items for each in simple) == result.output.count("simple") > 0
        assert result.output.count("full") + result.output.count("simple") == 400
        wait_until(lambda: host(client).level < Level.CRITICAL or others_compute(), within_s=60)


# --- drills -----------------------------------------------------------------------------------


def test_a_drill_and_its_release_reach_nodes_soon(drilled: Client) -> None:
    began = time.monotonic()
    force_level(drilled, "critical")
    assert time.monotonic() - began < 3

    status = drilled.status()
    assert (status.level, status.forced, status.why) == ("critical", "critical", "it is forced")
    assert drilled.pressure.release()
    assert not drilled.pressure.release()
    wait_until(lambda: run_under(drilled) != "critical" or others_compute())


def test_a_drill_ends_by_itself(drilled: Client) -> None:
    drilled.pressure.force("emergency", for_s=1.5)
    assert drilled.status().forced == "emergency"

    wait_until(lambda: drilled.status().forced == "", within_s=5)
    assert drilled.pressure.level() != Level.EMERGENCY


def test_an_emergency_acts_within_a_running_node(drilled: Client, plain: dict[str, str]) -> None:
    with new_client(plain, RLM_NODE__TARGET_MS="60000") as client:
        job = client.submit(operation="limited", type="sequential", items=[0.05] * 40)
        wait_until(lambda: job.progress().done >= 5)
        drilled.pressure.force("emergency")
        result = job.result(timeout=30)

    before = result.output.count(100)
    assert result.metrics.nodes == 1
    assert result.output == [100] * before + [30] * (40 - before)
    assert 5 <= before < 40
    assert result.receipt == (Shaped("reduce_entity_limits", "emergency", 40 - before),)


def test_an_unknown_level_is_refused_with_a_list_of_levels(drilled: Client) -> None:
    with pytest.raises(InvalidValue) as refused:
        drilled.pressure.force("panic")

    assert (refused.value.field, refused.value.value) == ("level", "panic")
    assert ", ".join(ALL_LEVELS) in str(refused.value)
    assert drilled.status().forced == "normal"


# --- admission --------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_less_urgent_work_is_refused_first(
    drilled: Client, plain: dict[str, str], level: str
) -> None:
    drilled.pressure.force(level)
    refused: dict[str, Overloaded] = {}
    with new_client(plain) as client:
        for priority in ("critical", "high", "normal", "low"):
            try:
                client.execute(operation="stamp", items=[0], priority=priority, timeout=20)
            except Overloaded as error:
                refused[priority] = error

    assert {priority: each.retry_after_s for priority, each in refused.items()} == REFUSED[level]
    assert all(each.code == "OVERLOADED" for each in refused.values())


def test_a_batch_with_one_refused_job_enqueues_nothing(
    drilled: Client, plain: dict[str, str]
) -> None:
    drilled.pressure.force("high")
    before = {job.id for job in drilled.jobs()}
    with new_client(plain) as client, pytest.raises(Overloaded):
        client.batch_submit(
            {"operation": "stamp", "items": [0], "options": {"priority": priority}}
            for priority in ("critical", "low", "high")
        )

    assert {job.id for job in drilled.jobs()} == before


def delayed_job(client: Client, **fields: Any) -> Job:
    """Submit a job that waits for its admission, because of a drill."""
    client.pressure.force("high")
    return client.submit(operation="stamp", items=[0], priority="low", overload="delay", **fields)


def test_a_delayed_job_says_why_and_starts_at_its_time(
    drilled: Client, plain: dict[str, str]
) -> None:
    with new_client(plain, RLM_PRESSURE__RELEASE_S="1") as client:
        job = delayed_job(client)
        assert job.status is Status.PENDING
        assert "low jobs are accepted below high (75 %)" in job.explain()
        drilled.pressure.force("normal")

        assert job.result(timeout=20).metrics.waited_ms >= 1000


def test_a_key_names_one_job_even_while_it_is_delayed(
    drilled: Client, plain: dict[str, str]
) -> None:
    with new_client(plain, RLM_PRESSURE__RELEASE_S="1") as client:
        job = delayed_job(client, idempotency_key="one")
        again = delayed_job(client, idempotency_key="one")
        drilled.pressure.force("normal")

        assert again.id == job.id
        assert job.result(timeout=20).metrics.nodes == 1


def test_a_known_key_is_accepted_under_pressure(drilled: Client, plain: dict[str, str]) -> None:
    request = {
        "operation": "stamp",
        "items": [0],
        "options": {"priority": "low", "idempotency_key": "taken in"},
    }
    job = drilled.submit(request)
    job.result(timeout=20)
    drilled.pressure.force("high")

    with new_client(plain) as client:
        assert client.submit(request).id == job.id
        with pytest.raises(Overloaded):
            client.submit({**request, "options": {"priority": "low", "idempotency_key": "another"}})


def test_a_delayed_job_starts_with_the_monitors_next_measurement(watched: Client) -> None:
    """Without the monitor it would wait for one step of the default release, 20 s."""
    environment = {
        "RLM_REDIS_URL": watched.settings.redis_url,
        "RLM_NAMESPACE": watched.settings.namespace,
    }
    environment["RLM_OPERATIONS"] = ",".join(watched.settings.operations)
    wait_until(lambda: watched.status().monitored)
    with new_client(environment) as client:
        job = delayed_job(client)
        wait_until(lambda: run_under(watched) == "high")
        force_level(client, "normal")
        ordered = time.monotonic()
        job.result(timeout=20)
        assert time.monotonic() - ordered < 4 * MONITOR_S
        watched.pressure.release()


def queue_full_error(client: Client, **fields: Any) -> QueueFull | None:
    """Submit a job; return the error if the queue is full, None if it accepts the job."""
    try:
        client.submit(operation="stamp", items=[0], **fields)
    except QueueFull as error:
        return error
    return None


def test_a_queue_accepts_messages_up_to_its_depth_limit(
    settings_of: Callable[..., dict[str, str]],
) -> None:
    unserved = settings_of(
        "nobody", RLM_ADMISSION__QUEUE_DEPTH="3", RLM_ADMISSION__WAIT_NORMAL_S="0.01"
    )
    for _ in range(3):
        with new_client(unserved) as client:
            assert queue_full_error(client) is None, (
                "the age of messages does not count without a worker"
            )

    with new_client(unserved) as client:
        refused = queue_full_error(client)
        assert refused is not None
        assert queue_full_error(client, priority="high") is None, "each priority has its own queue"
        assert len(client.jobs()) == 4
    assert (refused.code, refused.why) == ("QUEUE_FULL", "3 messages wait, the limit is 3")
    assert refused.retry_after_s >= 1


def test_a_queue_with_too_old_messages_accepts_no_more(
    drilled: Client, plain: dict[str, str]
) -> None:
    with new_client(plain) as client:
        busy = client.submit(operation="nap", items=[4.0] * SLOTS, chunk_size=1)
        all_slots_run(client, "nap")
        client.submit(operation="nap", items=[0.0])
        waits_since = time.time()

    wait_until(lambda: time.time() - waits_since > 2.5)
    with new_client(plain, RLM_ADMISSION__WAIT_NORMAL_S="0.5") as client:
        refused, age_s = queue_full_error(client), time.time() - waits_since
    busy.cancel()

    assert refused is not None
    assert refused.code == "QUEUE_FULL"
    assert refused.why.startswith("its oldest message waits for")
    assert abs(refused.retry_after_s - (age_s - 0.5)) <= 1, (
        "the retry time assumes the queue's current speed"
    )


# --- the monitor ------------------------------------------------------------------------------


def test_without_beat_hosts_act_on_their_own(drilled: Client) -> None:
    status = drilled.status()

    assert not status.monitored
    assert drilled.pressure.history() == []
    assert [each.slots for each in status.hosts] == [SLOTS]
    drilled.pressure.release()
    wait_until(
        lambda: run_under(drilled) == drilled.status().level == Level(host(drilled).level).label
    )


def test_two_beats_cause_one_measurement_per_period(watched: Client, tmp_path: Path) -> None:
    """Measurements are taken even while every slot is busy."""
    over = tmp_path / "over"
    busy = watched.submit(
        operation="hold", items=[0] * SLOTS, chunk_size=1, params={"until": str(over)}
    )
    all_slots_run(watched, "hold")
    before = watched.pressure.history(1)[0].at
    waiting = watched.batch_submit([{"operation": "nap", "items": [0.0]}] * 3)

    def reports() -> list[ClusterReport]:
        later = [each for each in watched.pressure.history()[::-1] if each.at > before]
        return [each for each in later if each.queues["pressure-watched.normal"].depth >= 3]

    wait_until(lambda: len(reports()) > 1 and reports()[-1].at - reports()[0].at >= 5 * MONITOR_S)
    found = reports()
    assert watched.status().active == {"hold": SLOTS}
    over.touch()
    for each in (busy, *waiting):
        each.result(timeout=20)

    apart_s = [later.at - earlier.at for earlier, later in pairwise(found)]
    assert min(apart_s) >= 0.8 * MONITOR_S
    assert 0.8 <= (found[-1].at - found[0].at) / len(apart_s) / MONITOR_S <= 1.5
    assert {(each.hosts, each.slots) for each in found} == {(1, SLOTS)}
    assert set(found[0].queues) == {
        f"pressure-watched.{each}" for each in ("critical", "high", "normal", "low")
    }
    assert watched.status().monitored


def test_a_slow_item_causes_an_event_and_an_alert(watched: Client) -> None:
    received: list[Event] = []
    watched.on("execution.slow", received.append)
    wait_until(lambda: watched.status().monitored)  # the monitor sends alerts

    job = watched.submit(operation="dawdle", items=[0.0, 0.3, 0.0])
    job.result(timeout=20)

    def alerts() -> list[dict[str, Any]]:
        return [
            each
            for each in watched.alerts.summary()["recent_alerts"]
            if each["subject"] == "dawdle"
        ]

    wait_until(lambda: any(each.data["job"] == job.id for each in received) and bool(alerts()))
    [data] = [each.data for each in received if each.data["job"] == job.id and "index" in each.data]
    assert (data["operation"], data["index"]) == ("dawdle", 1)
    assert 300 <= data["duration_ms"] < 2000
    assert [(each["kind"], each["severity"]) for each in alerts()] == [
        ("execution.slow", "warning")
    ]
    assert watched.alerts.summary()["total_alerts"] >= 1


def test_a_standby_beat_takes_over_from_a_killed_one(
    settings_of: Callable[..., dict[str, str]], logs: Path
) -> None:
    environment = settings_of("redbeat", RLM_PRESSURE__MONITOR_S=str(MONITOR_S))
    acting, standing_by = logs / "redbeat-1.log", logs / "redbeat-2.log"
    with (
        embedded.worker(environment, log=logs / "redbeat.log", slots=1),
        client_of(environment) as client,
        beat(environment, acting) as first,
    ):
        wait_until(lambda: bool(client.pressure.history(1)))
        with beat(environment, standing_by, "-l", "DEBUG"):
            wait_until(lambda: "Acquiring lock" in standing_by.read_text(encoding="utf-8"))
            assert "Acquired lock" not in standing_by.read_text(encoding="utf-8")
            first.send_signal(signal.SIGKILL)
            first.wait()
            last = client.pressure.history(1)[0].at
            wait_until(lambda: client.pressure.history(1)[0].at > last, within_s=15)
            assert client.pressure.history(1)[0].at - last > 3 * MONITOR_S, (
                "no measurement was taken in between"
            )


# --- the status -------------------------------------------------------------------------------


def test_an_operations_figures_match_its_job(drilled: Client) -> None:
    result = drilled.execute(
        operation="every_third_fails", items=range(30), continue_on_error=True, timeout=20
    )
    assert result.failed_count == 10

    [figures] = [
        each for each in drilled.status().operations if each["executor_id"] == "every_third_fails"
    ]
    counted = {
        name: figures[name]
        for name in ("total_executions", "successful_executions", "failed_executions")
    }
    assert counted == {"total_executions": 30, "successful_executions": 20, "failed_executions": 10}
    assert (figures["success_rate_percent"], figures["circuit_breaker_state"]) == (66.67, "closed")
    assert 1 < figures["avg_memory_mb"] <= figures["peak_memory_mb"]


def test_the_status_shows_running_operations_and_strategies(drilled: Client) -> None:
    job = drilled.submit(operation="nap", items=[2.0] * SLOTS, chunk_size=1)
    all_slots_run(drilled, "nap")
    drilled.pressure.force("critical")

    status = drilled.status()

    assert status.strategies == [
        "reduce_entity_limits",
        "skip_optional_analysis",
        "disable_expensive_computations",
        "use_simplified_methods",
        "reduce_embedding_dimensions",
    ]
    assert status.resource_usage["worker_count"] == SLOTS
    as_json = json.loads(json.dumps(status.to_dict()))
    assert (as_json["level"], as_json["active"], as_json["hosts"][0]["slots"]) == (
        "critical",
        {"nap": SLOTS},
        SLOTS,
    )
    job.result(timeout=20)
    wait_until(lambda: drilled.status().active == {})


# --- limits on running nodes ------------------------------------------------------------------


def at_once(spans: Sequence[Sequence[float]]) -> int:
    """Return the largest number of spans (begin, end) that overlap."""
    return max(sum(began <= at < ended for began, ended in spans) for at, _ in spans)


def test_an_operation_of_one_worker_runs_one_node_at_a_time(drilled: Client) -> None:
    result = drilled.execute(operation="one_at_a_time", items=[0.1] * 10, chunk_size=1, timeout=30)

    assert result.done == 10
    assert at_once(result.output) == 1


def test_a_job_does_not_split_for_a_slot_it_may_not_use(drilled: Client) -> None:
    result = drilled.execute(operation="one_at_a_time", items=[0.05] * 30, timeout=30)

    assert at_once(result.output) == 1
    assert result.metrics.splits == 0


def test_the_place_of_a_killed_process_is_released(drilled: Client, tmp_path: Path) -> None:
    hangs = tmp_path / "pid"
    job = drilled.submit(
        operation="one_at_a_time",
        items=[-0.1] + [0.1] * 5,
        chunk_size=1,
        params={"hangs": str(hangs)},
    )
    wait_until(lambda: hangs.exists() and hangs.read_text(encoding="ascii") != "")

    os.kill(int(hangs.read_text(encoding="ascii")), signal.SIGKILL)
    killed = time.time()

    result = job.result(timeout=30)  # its lease would last for a minute
    assert result.done == 6
    assert at_once(result.output) == 1
    assert max(ended for _, ended in result.output) - killed < 20


@pytest.mark.parametrize(("priority", "most"), [("normal", 1), ("critical", 2)])
def test_under_high_pressure_the_priority_limits_an_operations_nodes(
    drilled: Client, priority: str, most: int
) -> None:
    """The platform has two slots, and the settings allow 1 to 32 workers."""
    force_level(drilled, "high")

    items = drilled.execute(
        operation="where_and_when", items=[0.2] * 8, chunk_size=1, priority=priority, timeout=30
    ).output

    policy = policy_of(registry.get("where_and_when"), policies(drilled.settings))
    allowed = workers_for(policy, Level.HIGH, slots=SLOTS, available_mb=None, priority=priority)
    assert at_once([span for _, *span in items]) == allowed == most


def test_a_node_that_needs_too_much_memory_is_parked_with_a_reason(drilled: Client) -> None:
    job = drilled.submit(operation="huge", items=[0])

    wait_until(
        lambda: "huge starts with 1e+09 MB free (min_memory_mb), and this host has" in job.explain()
    )
    assert [node.state for node in job.tree()] == ["parked"]
    job.cancel()
    assert job.wait(timeout=20) is Status.CANCELLED
