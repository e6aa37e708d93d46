"""A client's reports on performance and health: with a real worker, without one, without Redis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from rlm_tasks import Client, OptimizationConfig
from rlm_tasks.cli import rlm
from rlm_tasks.testing import embedded
from tests.integration.conftest import SLOTS, client_of, environment_of
from tests.support import wait_until


@pytest.fixture(scope="module")
def patient(environment: dict[str, str], worker_pid: int) -> Iterator[Client]:
    """A client of the session's worker with a long timeout, for slow answers of a busy machine."""
    modules = "tests.integration.ops,tests.integration.guarded_ops"
    with client_of({**environment, "RLM_GUARD_TIMEOUT_S": "5", "RLM_OPERATIONS": modules}) as own:
        yield own


def test_execute_with_monitoring_returns_metrics(patient: Client) -> None:
    result, metrics = patient.execute_with_monitoring(operation="nap", items=[20.0] * 4, timeout=60)

    assert result.output == [20.0] * 4
    assert metrics["execution_time_ms"] == result.metrics.execution_time_ms >= 40  # on two slots
    assert metrics["busy_ms"] >= 80
    assert metrics["memory_usage_mb"] == result.metrics.peak_memory_mb > 10
    assert metrics["items"] == 4


def test_stats_cover_executions_errors_and_memory(patient: Client) -> None:
    before = patient.get_optimization_stats()
    patient.execute(operation="fail_odd", items=range(10), continue_on_error=True, timeout=60)

    stats = patient.get_optimization_stats()

    assert stats["execution"]["executions"] == before["execution"]["executions"] + 10
    assert stats["execution"]["avg_time_ms"] > 0
    assert 0 <= stats["execution"]["concurrency_level"] <= SLOTS
    assert 0 < stats["errors"]["error_rate"] < 1
    assert stats["memory"]["usage_mb"] > 10
    assert stats["memory"]["pressure_level"] == "normal"
    assert stats["cache"] == {
        "hit_rate": 0.0,
        "lookups": 0,
        "note": "the platform has no result cache",
    }
    assert f"{stats['cache']['hit_rate']:.2%}" == "0.00%", "a figure, not None"
    json.dumps(stats)


def test_health_covers_the_whole_platform(patient: Client) -> None:
    brief = patient.health_check()
    assert (brief["status"], brief["why"], list(brief)) == (
        "ok",
        [],
        ["status", "why", "latency_ms"],
    )
    assert 0 < brief["latency_ms"] < 60_000

    patient.breakers.get("mail").call(lambda: None)
    # The worker's host reports once a second.
    wait_until(lambda: patient.health_check(detailed=True)["queues"]["test.normal"]["consumed"])
    health = patient.health_check({"detailed": True})

    assert health["status"] == "ok", health["why"]
    assert (health["slots"]["total"], len(health["workers"])) == (SLOTS, 1)
    assert health["pressure"]["level"] == "normal"
    [metered] = [each for each in health["quotas"] if each["service"] == "metered"]
    assert (metered["limit"], metered["fill"]) == (20.0, 0.0)
    assert health["circuit_breakers"]["mail"] == "closed"
    json.dumps(health)


def test_health_fails_without_a_worker_or_redis(client_without_worker: Client) -> None:
    health = client_without_worker.health_check(detailed=True)
    assert (health["status"], health["why"]) == ("failing", ["no worker reports: nothing runs"])
    client_without_worker.submit(operation="echo", items=[1])
    assert "nobody consumes" in client_without_worker.health_check(detailed=True)["why"][1]

    with client_of(environment_of("redis://:geheim@127.0.0.1:1/0", "nowhere")) as client:
        health = client.health_check(detailed=True)
    assert (health["status"], health["latency_ms"]) == ("failing", None)
    [why] = health["why"]
    assert why.startswith("Redis at redis://:***@127.0.0.1:1/0 does not answer (")


def test_an_open_breaker_degrades_health(server: embedded.Server) -> None:
    with client_of(environment_of(server.url, "shut", RLM_GUARD_TIMEOUT_S="5")) as client:
        breaker = client.create_circuit_breaker("mail", failure_threshold=1)
        with pytest.raises(ZeroDivisionError):
            breaker.call(lambda: 1 / 0)

        assert "the breaker of mail is open" in client.health_check(detailed=True)["why"]


# --- on the command line ----------------------------------------------------------------------


def test_the_command_translates_keys_and_refuses_unusable_values(
    client_without_worker: Client, tmp_path: Path
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(
            rlm,
            ["config", "optimization", *arguments],
            obj=SimpleNamespace(app=client_without_worker.app),
        )
        return done.exit_code, done.stdout, done.stderr

    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(OptimizationConfig(error_cache_size=33).export_config())
    bad.write_text('{"cache_compression": true, "error_cache_size": "x"}')

    code, out, _ = run(str(good))
    assert (code, "RLM_FAULT_PATTERNS=33" in out, "the platform has no result cache" in out) == (
        0,
        True,
        True,
    )
    code, out, _ = run("--json")
    assert (code, len(json.loads(out))) == (0, 28)
    code, out, err = run(str(bad))
    assert (code, out) == (2, "")
    assert "Error: error_cache_size='x': must be a whole number" in err
    assert "cache_compression=True: there is no cache" in err
