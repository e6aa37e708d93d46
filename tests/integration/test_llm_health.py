"""A real worker checks the health of endpoints: an unhealthy one gets no calls.

Metrics, commands and Flower show endpoints and calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from rlm_tasks.cli import rlm
from rlm_tasks.client.client import Client
from rlm_tasks.flower.gauges import families
from rlm_tasks.requests import Budget, Options
from rlm_tasks.testing import embedded, fake_provider
from tests.integration.conftest import ROOT, client_of, environment_of
from tests.support import wait_until

MODEL = "gpt-4.1-mini"
KEY = "sk-not-to-be-seen"


@dataclass
class Platform:
    """A worker with two endpoints: `main` is down at first, `other` works."""

    client: Client
    environment: dict[str, str]
    main_port: int
    other: fake_provider.Running
    log: Path

    def is_healthy(self, name: str) -> bool:
        """Return whether workers have found an endpoint healthy, so that it gets calls."""
        return next(each.healthy for each in self.client.endpoints() if each.name == name)

    def add(self, *items: int, **options: Any) -> Any:
        """Run a job that adds 1 to each item by a model; return its result."""
        params = {"prompt": "SUM: {item} 1", "max_tokens": 20}
        return self.client.execute(
            operation="llm.map",
            items=[*items],
            params=params,
            options=Options(**options),
            timeout=60,
        )

    def counted(self, sample: str) -> dict[str, float]:
        """Return the values of a sample on the worker's /metrics, by the values of its labels."""
        port = self.environment["CELERY_WORKER_METRICS_PORT"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            found = text_string_to_metric_families(answer.read().decode())
            samples = [each for family in found for each in family.samples if each.name == sample]
        return {
            " ".join(value for _, value in sorted(each.labels.items())): each.value
            for each in samples
        }


@pytest.fixture(scope="module")
def platform(
    server: embedded.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    with ExitStack() as stack:
        other, port = stack.enter_context(fake_provider.running()), embedded.free_port()
        endpoints = [
            {
                "name": "main",
                "base_url": f"http://127.0.0.1:{port}/v1",
                "key_env": "MAIN_KEY",
                "weight": 2,
            },
            {
                "name": "other",
                "base_url": other.base_url,
                "key_env": "OTHER_KEY",
                "models": {MODEL: "theirs"},
            },
        ]
        environment = environment_of(
            server.url,
            "llm-health",
            RLM_LLM__ENDPOINTS=json.dumps(endpoints),
            MAIN_KEY=KEY,
            OTHER_KEY=KEY,
            RLM_LLM__HEALTH_EVERY_S="1",
            RLM_LLM__HEALTH_STRIKES="2",
            CELERY_WORKER_METRICS_PORT=str(embedded.free_port()),
        )
        log = tmp_path_factory.mktemp("llm-health") / "worker.log"
        client = stack.enter_context(client_of(environment))
        assert all(each.healthy and each.checked_s_ago is None for each in client.endpoints()), (
            "no worker has checked an endpoint yet"
        )
        stack.enter_context(embedded.worker(environment, log=log, slots=1))
        yield Platform(client, environment, port, other, log)


def test_an_unhealthy_endpoint_gets_no_calls_until_it_recovers(platform: Platform) -> None:
    wait_until(lambda: not platform.is_healthy("main"))

    assert platform.add(*range(10)).output == [str(i + 1) for i in range(10)]
    assert platform.other.report()["by_model"]["theirs"]["answered"] == 10
    assert platform.client.breakers.get("llm:main").status()["failure_count"] == 0, (
        "it was not called"
    )
    assert platform.counted("rlm_llm_calls_total") == {f"other {MODEL} ok": 10}

    with fake_provider.running(port=platform.main_port) as main:
        wait_until(lambda: platform.is_healthy("main"))
        wait_until(
            lambda: platform.add(1, 2).output == ["2", "3"] and main.report()["requests"] > 0
        )

    events = [
        each
        for each in reversed(platform.client.events.recent(name="endpoint.*"))
        if each.data["endpoint"] == "main"
    ]
    assert [each.name for each in events[:2]] == ["endpoint.ill", "endpoint.well"]
    assert platform.log.read_text().count("endpoint main is healthy again, and gets calls") == 1
    assert KEY not in platform.log.read_text()


def test_metrics_count_calls_tokens_money_and_saved_calls(platform: Platform) -> None:
    wait_until(lambda: not platform.is_healthy("main"))
    before = {
        name: platform.counted(f"rlm_llm_{name}")
        for name in ("tokens_total", "money_total", "call_seconds_count")
    }
    calls_before = platform.counted("rlm_llm_calls_total")[f"other {MODEL} ok"]
    counts_before, next_one = (
        platform.other.report()["by_model"]["theirs"],
        platform.other.report()["requests"] + 1,
    )
    platform.other.schedule(
        {"kind": "429", "from": next_one, "to": next_one, "headers": {"retry-after-ms": "10"}}
    )

    for _ in range(2):
        assert platform.add(100, 200, cache_results=True).output == ["101", "201"]
    spent = platform.add(1, 2, 3, budget=Budget(calls=1), continue_on_error=True)

    counts = platform.other.report()["by_model"]["theirs"]
    grown = {
        name: counts[name] - counts_before[name]
        for name in ("prompt_tokens", "completion_tokens", "answered")
    }
    after = {name: platform.counted(f"rlm_llm_{name}") for name in before}
    for kind in ("prompt", "completion"):
        key = f"{kind} {MODEL}"
        assert after["tokens_total"][key] - before["tokens_total"][key] == grown[f"{kind}_tokens"]
    money = after["money_total"][MODEL] - before["money_total"][MODEL]
    assert money == pytest.approx(
        grown["prompt_tokens"] * 0.4e-6 + grown["completion_tokens"] * 1.6e-6
    )
    assert (
        after["call_seconds_count"][MODEL] - before["call_seconds_count"][MODEL]
        == grown["answered"]
        == 3
    )
    calls = platform.counted("rlm_llm_calls_total")
    assert (calls[f"other {MODEL} ok"] - calls_before, calls[f"other {MODEL} rate_limited"]) == (
        3,
        1,
    )
    assert platform.counted("rlm_llm_shared_total")["cache"] == 2
    assert platform.counted("rlm_llm_budget_refusals_total")[""] >= 1
    assert spent.output == ["2"]


def test_client_command_and_flower_show_endpoints(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: not platform.is_healthy("main"))
    for name in ("MAIN_KEY", "OTHER_KEY"):
        monkeypatch.setenv(name, KEY)

    def printed(*arguments: str) -> str:
        done = CliRunner().invoke(
            rlm, arguments, obj=SimpleNamespace(app=platform.client.app), catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
        return done.stdout

    main, other = platform.client.endpoints()
    assert (main.host, main.models, main.weight, main.latency_ms, main.breaker) == (
        f"127.0.0.1:{platform.main_port}",
        (),
        2.0,
        None,
        "closed",
    )
    assert (main.healthy, main.why) == (False, "cannot be reached (ConnectError)")
    assert main.strikes >= 2
    assert (other.healthy, other.strikes, other.models, other.why) == (True, 0, (MODEL,), "")
    assert other.latency_ms
    assert "UNHEALTHY" in printed("endpoints")
    for reports in (
        json.loads(printed("endpoints", "--json")),
        json.loads(printed("endpoints", "--check", "--json")),
    ):
        assert [(each["name"], each["healthy"], each["why"]) for each in reports] == [
            ("main", False, main.why),
            ("other", True, ""),
        ]
    gauge = next(
        each for each in families(platform.client) if each.name == "rlm_llm_endpoint_healthy"
    )
    assert {each.labels["endpoint"]: each.value for each in gauge.samples} == {
        "main": 0,
        "other": 1,
    }


def test_limits_and_breakers_of_models_are_shown_without_importing_openai(
    platform: Platform,
) -> None:
    code = """
import json, sys
from rlm_tasks import Client
with Client() as client:
    limits = [[each.service, each.name] for each in client.limits()]
    breakers, endpoints = [*client.breakers.status()], len(client.endpoints())
print(json.dumps([limits, breakers, endpoints, "openai" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **platform.environment},
        capture_output=True,
        text=True,
        check=True,
    )

    limits, breakers, endpoints, imported = json.loads(done.stdout)
    assert {f"llm:{key}:{MODEL}" for key in ("MAIN_KEY", "OTHER_KEY")} <= {
        service for service, _ in limits
    }
    assert {name for service, name in limits if service == f"llm:MAIN_KEY:{MODEL}"} == {
        "requests",
        "tokens",
        "bytes",
    }
    assert {"llm:main", "llm:other"} <= {*breakers}
    assert (endpoints, imported) == (2, False)
