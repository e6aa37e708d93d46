"""A process whose memory has grown too much during model calls is replaced after its node."""

from __future__ import annotations

import json
from pathlib import Path

import psutil

from rlm_tasks.testing import embedded, fake_provider
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until


def test_an_oversized_process_is_replaced_without_repeated_calls(
    server: embedded.Server, tmp_path: Path
) -> None:
    with fake_provider.running() as provider:
        endpoints = [{"name": "main", "base_url": provider.base_url}]
        environment = environment_of(
            server.url,
            "llm-profile",
            OPENAI_API_KEY="sk-unit",
            RLM_LLM__ENDPOINTS=json.dumps(endpoints),
            RLM_LLM__MEMORY_WARN_MB="0.01",
            RLM_LLM__MEMORY_CRITICAL_MB="0.01",
            RLM_LLM__HEALTH_EVERY_S="3600",
        )
        params = {"prompt": "SUM: {item} 1", "max_tokens": 20}
        log = tmp_path / "worker.log"
        with (
            client_of(environment) as client,
            embedded.worker(environment, log=log, slots=1) as worker,
        ):
            [first] = psutil.Process(worker.pid).children()

            for start in (0, 10):
                result = client.execute(
                    operation="llm.map", items=[*range(start, start + 5)], params=params, timeout=60
                )
                assert result.output == [str(i + 1) for i in range(start, start + 5)]

            wait_until(lambda: not first.is_running())
            assert provider.report()["by_model"]["gpt-4.1-mini"]["answered"] == 10
        assert log.read_text().count("it will be replaced") >= 2, (
            "the next process is replaced, too"
        )
        assert "Traceback" not in log.read_text()
