"""The limit of an endpoint's calls in flight, over all processes of a real worker.

The provider makes two answers at once, as a server of one's own does; further questions wait there.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import redis

from resilience.keys import Keys
from rlm_tasks.client.client import Client
from rlm_tasks.client.job import Job
from rlm_tasks.telemetry.limit_reports import LimitReport
from rlm_tasks.testing import embedded, fake_provider
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

SLOTS, LATENCY_S, TIMEOUT_S, PROCESSES = 2, 0.1, 1.5, 4
"""With ten calls of each process in flight, a call would take 2 s."""
ENDPOINTS = {"adapts": "auto", "one": 1, "pair": 2, "free": None}
"""Endpoint -> its limit; each has a model of the same name."""


@dataclass
class Stage:
    """A provider, a worker with four processes, and a client."""

    provider: fake_provider.Running
    client: Client
    redis: redis.Redis
    worker: int

    def submit(self, model: str, n: int, first: int = 0) -> Job:
        """Submit a job with calls to the endpoint of a model."""
        tier = {"adapts": "small", "one": "medium", "pair": "large"}[model]
        return self.client.submit(
            operation="llm.map",
            items=[str(number) for number in range(first, first + n)],
            params={"prompt": f"{model} SUM: {{item}}", "max_tokens": 20, "tier": tier},
        )

    def limit(self, endpoint: str) -> LimitReport:
        """Return the limit of an endpoint, as a client sees it."""
        [found] = [
            each
            for each in self.client.limits()
            if (each.service, each.name) == (f"llm:{endpoint}", "in flight")
        ]
        return found

    def owners(self, endpoint: str) -> list[int]:
        """Return the process of each permit."""
        permits = self.redis.zrange(Keys("in-flight").bulkhead(f"llm:{endpoint}")[0], 0, -1)
        return [int(str(each).partition("|")[0].rpartition(":")[2]) for each in permits]


@pytest.fixture(scope="module")
def shared_stage(
    server: embedded.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    with ExitStack() as stack:
        provider = stack.enter_context(fake_provider.running(latency=LATENCY_S, slots=SLOTS))
        endpoints = [
            {
                "name": name,
                "base_url": provider.base_url,
                "models": {name: name},
                "in_flight": in_flight,
            }
            for name, in_flight in ENDPOINTS.items()
        ]
        environment = environment_of(
            server.url,
            "in-flight",
            OPENAI_API_KEY="any",
            RLM_LLM__ENDPOINTS=json.dumps(endpoints),
            RLM_LLM__SMALL="adapts",
            RLM_LLM__MEDIUM="one",
            RLM_LLM__LARGE="pair",
            RLM_LLM__TOKENS="10000000",
            RLM_LLM__REQUESTS="100000",
            RLM_LLM__HEALTH_EVERY_S="3600",
            RLM_LLM__TIMEOUT_S=str(TIMEOUT_S),
        )
        log = tmp_path_factory.mktemp("in-flight") / "worker.log"
        client = stack.enter_context(client_of(environment))
        worker = stack.enter_context(embedded.worker(environment, log=log, slots=PROCESSES))
        yield Stage(provider, client, redis.Redis.from_url(server.url), worker.pid)


@pytest.fixture
def stage(shared_stage: Stage) -> Stage:
    """The shared stage, with a provider without faults and with counts of 0."""
    shared_stage.provider.schedule()
    shared_stage.provider.reset()
    return shared_stage


def test_a_server_with_two_slots_answers_sixty_calls_without_a_time_out(stage: Stage) -> None:
    """A call that timed out would be made again."""
    jobs = [stage.submit("adapts", 15, first=15 * number) for number in range(PROCESSES)]
    outputs = [output for job in jobs for output in job.result(timeout=60).output]

    report = stage.provider.report()
    assert outputs == [str(number) for number in range(60)]
    assert report["requests"] == report["by_model"]["adapts"]["answered"] == 60
    assert 2 <= stage.limit("adapts").limit < 30
    assert stage.limit("adapts").used == 0


def test_a_fixed_limit_holds_over_all_processes(stage: Stage) -> None:
    jobs = [stage.submit("pair", 20), stage.submit("pair", 20, first=20)]
    outputs = [output for job in jobs for output in job.result(timeout=60).output]

    assert outputs == [str(number) for number in range(40)]
    assert stage.provider.report()["most_in_flight"] == 2
    assert stage.limit("pair") == LimitReport("llm:pair", "in flight", 0.0, 2.0, 0.0)


def test_explain_names_the_endpoint_and_its_limit(stage: Stage) -> None:
    stage.provider.schedule({"kind": "slow", "every": 1, "seconds": 0.1})
    first, second = stage.submit("one", 4), stage.submit("one", 4, first=4)

    wait_until(
        lambda: any(
            "the endpoint one has its limit of 1 call in flight" in job.explain()
            for job in (first, second)
        )
    )
    for job in (first, second):
        assert job.result(timeout=60).failed_count == 0
    assert stage.provider.report()["most_in_flight"] == 1


def test_the_permits_of_a_killed_process_come_back(stage: Stage) -> None:
    """Their leases last a minute, longer than this test may take."""
    stage.provider.schedule({"kind": "timeout", "every": 1, "to": 2})
    job = stage.submit("pair", 6)
    wait_until(lambda: len(stage.owners("pair")) == 2)

    for pid in set(stage.owners("pair")):
        os.kill(pid, signal.SIGKILL)

    assert job.result(timeout=40).output == [str(number) for number in range(6)]
    assert stage.owners("pair") == []


def test_an_endpoint_without_a_limit_shows_none(stage: Stage) -> None:
    shown = {each.service for each in stage.client.limits() if each.name == "in flight"}

    assert {"llm:adapts", "llm:one", "llm:pair"} <= shown
    assert "llm:free" not in shown
