"""Metrics and probes of real workers.

Meanwhile processes are recycled and killed, and the server goes away."""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlm_tasks import Binary, Client, NWay
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

SLOTS = 2


@dataclass
class Scraped:
    """A worker with a metrics port, and its client."""

    port: int
    client: Client
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path
    temporary: Path

    def get(self, path: str, **headers: Any) -> tuple[int, str]:
        """Return status and body of an answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  # of this machine
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def samples(self, name: str) -> Counter[tuple[str, ...]]:
        """Return the values of a sample by its label values, in the order of the labels' names."""
        text = self.get("/metrics")[1]
        found = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]
        return Counter(
            {tuple(value for _, value in sorted(each.labels.items())): each.value for each in found}
        )

    def answers(self, path: str, status: int, body: str) -> bool:
        """Return whether the answer has this status and body."""
        return self.get(path) == (status, body + "\n")


class Workers:
    """Starts workers with a metrics port each, on one server."""

    def __init__(self, server: embedded.Server, folder: Path, stack: ExitStack) -> None:
        self.server, self._folder, self._stack, self._started = server, folder, stack, 0

    def start(self, *options: str, port: int = 0, slots: int = SLOTS, **variables: str) -> Scraped:
        """Start a worker in a private namespace, by default on a free port."""
        self._started += 1
        name, port = f"scraped-{self._started}", port or embedded.free_port()
        temporary, log = self._folder / name, self._folder / f"{name}.log"
        temporary.mkdir()
        operations = ",".join(
            f"tests.integration.{each}" for each in ("ops", "guarded_ops", "scraped_ops")
        )
        environment = environment_of(
            self.server.url, name, RLM_OPERATIONS=operations, TMPDIR=str(temporary), **variables
        )
        options = (f"--metrics-port={port}", *options)
        client = self._stack.enter_context(client_of(environment))
        process = self._stack.enter_context(
            embedded.worker(environment, log=log, options=options, slots=slots)
        )
        return Scraped(port, client, environment, process, log, temporary)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A starter of workers, on a server that a test may stop."""
    with embedded.server() as own, ExitStack() as stack:
        yield Workers(own, tmp_path_factory.mktemp("scraped"), stack)


@pytest.fixture(scope="module")
def scraped(workers: Workers) -> Scraped:
    """A worker without faults, until the last test stops its server."""
    return workers.start()


def test_counters_stay_exact_when_processes_are_recycled_and_killed(
    workers: Workers, tmp_path: Path
) -> None:
    scraped = workers.start("--max-tasks-per-child=3")
    client, seen = scraped.client, Counter[tuple[str, ...]]()
    deadly = [{"i": i, "marker": str(tmp_path / "died") if i == 9 else ""} for i in range(20)]
    for _ in range(2):
        client.execute(operation="fail_odd", items=range(10), continue_on_error=True, timeout=60)
        client.execute(
            operation="collect",
            items=range(40),
            strategy=NWay(split_factor=4, min_chunk_size=10),
            timeout=60,
        )
        now = scraped.samples("rlm_items_total")
        assert all(now[each] >= value for each, value in seen.items()), "no counter decreases"
        seen = now
    client.execute(
        operation="die_once", items=deadly, strategy=Binary(min_chunk_size=5), timeout=60
    )
    client.execute(
        operation="checked",
        items=[1, 0, 2],
        validate_before_process=True,
        continue_on_error=True,
        timeout=60,
    )
    client.execute(operation="echo", items=[None, 1, "", 2], skip_if_empty=True, timeout=60)

    done = {
        ("collect", "done"): 80,
        ("fail_odd", "done"): 10,
        ("fail_odd", "failed"): 10,
        ("die_once", "done"): 20,
        ("checked", "done"): 2,
        ("checked", "failed"): 1,
        ("echo", "done"): 2,
        ("echo", "skipped"): 2,
    }
    wait_until(lambda: scraped.samples("rlm_items_total") == done)
    assert (tmp_path / "died").exists()
    ran = scraped.samples("rlm_execution_time_ms_count")
    assert (ran["collect",], ran["fail_odd",], ran["die_once",]) == (80, 20, 20)
    nodes = scraped.samples("rlm_nodes_total")
    assert nodes["collect", "planned"] == 2
    assert nodes["collect", "done"] >= 8
    assert scraped.samples("rlm_node_duration_seconds_count").total() == nodes.total()
    assert scraped.samples("rlm_peak_memory_mb")[()] > 10
    [folder] = scraped.temporary.glob("rlm-metrics-*")
    assert len(list(folder.iterdir())) <= 3 * SLOTS, "files by slot, not by process"
    scraped.process.kill()  # no other test needs it


def test_health_reports_quotas_latency_and_slots(scraped: Scraped) -> None:
    status, body = scraped.get("/health")
    health = json.loads(body)

    assert (status, health["status"], health["why"]) == (200, "ok", [])
    assert 0 < health["latency"]["redis_ms"] < 10_000
    assert health["slots"]["total"] == SLOTS
    assert health["pressure"]["level"] == "normal"
    [metered] = [each for each in health["quotas"] if each["service"] == "metered"]
    assert (metered["name"], metered["limit"], metered["used"], metered["fill"]) == (
        "requests",
        20.0,
        0.0,
        0.0,
    )
    assert health["circuit_breakers"]["fragile"] == "closed"
    assert scraped.samples("rlm_circuit_breaker_state")["fragile",] == 0
    assert json.loads(scraped.get("/health?detailed=false")[1]) == {"status": "ok", "why": []}
    assert scraped.get("/") == (404, "there are /metrics, /livez, /readyz, /health\n")


def test_every_path_but_probes_needs_the_key(workers: Workers) -> None:
    key = "geheimer-schlüssel"
    guarded = workers.start(slots=1, RLM_API_KEY=f"{key}\n")
    right = {"Authorization": f"Bearer {key}".encode()}

    refused = (401, "send the key of RLM_API_KEY: Authorization: Bearer, or X-API-Key\n")
    wrong: list[dict[str, Any]] = [
        {},
        {"Authorization": "Bearer geheim"},
        {"Authorization": f"Basic {key}".encode()},
        {"X-API-Key": ""},
    ]
    for path in ("/metrics", "/health", "/health?detailed=false", "/elsewhere"):
        assert [guarded.get(path, **headers) for headers in wrong] == [refused] * len(wrong)
    assert [guarded.get(path) for path in ("/livez", "/readyz")] == [(200, "ok\n")] * 2
    assert "rlm_slots" in guarded.get("/metrics", **right)[1]
    assert json.loads(guarded.get("/health", **{"X-API-Key": key.encode()})[1])["status"] == "ok"
    assert key not in guarded.log.read_text()


def test_a_draining_worker_is_alive_but_not_ready(scraped: Scraped) -> None:
    assert scraped.get("/readyz") == (200, "ok\n")
    control = scraped.client.app.control

    control.broadcast("rlm_drain")
    wait_until(lambda: scraped.answers("/readyz", 503, "it drains"))
    assert scraped.get("/livez") == (200, "ok\n")
    assert scraped.samples("rlm_slots") == {("busy",): 0, ("free",): 0}
    control.broadcast("rlm_resume")
    wait_until(lambda: scraped.answers("/readyz", 200, "ok"))


def test_a_taken_port_is_logged_once_and_the_worker_still_works(
    workers: Workers, scraped: Scraped
) -> None:
    other = workers.start(port=scraped.port, slots=1)

    assert other.client.execute(operation="sum", items=range(10), timeout=30).output == 45
    lines = [line for line in other.log.read_text().splitlines() if "metrics" in line]
    assert len(lines) == 1
    assert (
        f"Port {scraped.port} of 127.0.0.1 is taken: this worker goes on without metrics and probes"
        in lines[0]
    )
    assert "CELERY_WORKER_METRICS_PORT" in lines[0]
    assert len(list(other.temporary.glob("rlm-metrics-*"))) == 1
    other.process.send_signal(signal.SIGQUIT)
    other.process.wait(30)
    assert list(other.temporary.glob("rlm-metrics-*")) == [], "a cold shutdown leaves no files"
    assert scraped.get("/livez") == (200, "ok\n"), "the first worker still has the port"


def test_a_worker_answers_until_its_last_item_has_ended(workers: Workers, tmp_path: Path) -> None:
    ending, end = workers.start(slots=1), tmp_path / "end"
    job = ending.client.submit(operation="wait_for_file", items=[str(end)])
    wait_until(lambda: ending.samples("rlm_concurrency_level")[()] == 1)

    ending.process.send_signal(signal.SIGTERM)
    wait_until(lambda: ending.answers("/readyz", 503, "it drains"))
    assert ending.get("/livez") == (200, "ok\n")
    end.touch()
    assert job.get(timeout=30) == [str(end)]
    ending.process.wait(30)
    assert list(ending.temporary.glob("rlm-metrics-*")) == []
    with pytest.raises(urllib.error.URLError):
        ending.get("/livez")


def test_metrics_of_operations_and_requests_are_exported(scraped: Scraped) -> None:
    request_metrics = {"scraped.letters": 100, "script": "latin"}
    assert scraped.client.execute(
        operation="read_letters",
        items=["abc", "de", "αβγδ"],
        options={"emit_metrics": request_metrics},
        timeout=30,
    ).output == [3, 2, 4]

    wait_until(lambda: scraped.samples("scraped_letters_total") == {("latin",): 105, ("other",): 4})
    assert 0 <= scraped.samples("rlm_cache_hit_rate")[()] < 1, "something was read"


def test_a_solo_pool_exports_item_and_process_metrics(workers: Workers) -> None:
    solo = workers.start("-P", "solo", slots=1)
    solo.client.execute(operation="sum", items=range(10), timeout=30)

    wait_until(lambda: solo.samples("rlm_items_total") == {("sum", "done"): 10})
    assert solo.samples("process_resident_memory_bytes")[()] > 10 * 2**20
    assert solo.get("/livez") == (200, "ok\n")


def test_a_worker_without_redis_is_alive_but_not_ready(workers: Workers, scraped: Scraped) -> None:
    away = "it is not connected to its broker, or does not consume yet"
    scraped.client.execute(operation="sum", items=range(10), timeout=60)

    workers.server.stop()
    wait_until(lambda: scraped.answers("/readyz", 503, away))
    assert scraped.get("/livez") == (200, "ok\n")
    status, body = scraped.get("/health")
    assert (status, json.loads(body)["status"]) == (503, "failing")
    assert scraped.samples("rlm_items_total")["sum", "done"] == 10, (
        "counters are exported without Redis"
    )
    workers.server.start()

    wait_until(lambda: scraped.answers("/readyz", 200, "ok"), 60)
    assert scraped.client.execute(operation="sum", items=range(10), timeout=60).output == 45
