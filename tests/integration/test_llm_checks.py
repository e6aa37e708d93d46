"""`/models` does not decide about chat: whatever it answers, calls that succeed go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlm_tasks.client.client import Client
from rlm_tasks.testing import embedded, fake_provider
from tests.integration.conftest import one_provider
from tests.support import wait_until

INTERVAL_S = 0.5


@pytest.fixture(scope="module")
def platform(
    server: embedded.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Client, fake_provider.Running]]:
    """A client and its provider, whose worker checks twice a second."""
    often = {"RLM_LLM__HEALTH_EVERY_S": str(INTERVAL_S), "RLM_LLM__HEALTH_STRIKES": "2"}
    log = tmp_path_factory.mktemp("llm-checks") / "worker.log"
    with one_provider(server.url, "llm-checks", log, slots=1, **often) as both:
        yield both


def ask(client: Client, text: str) -> list[str]:
    params = {"prompt": "{item}", "max_tokens": 20}
    output: list[str] = client.execute(
        operation="llm.map", items=[text], params=params, timeout=60
    ).output
    return output


@pytest.mark.parametrize(
    ("status", "note"),
    [(401, "does not accept its key"), (403, "forbids"), (404, ""), (405, ""), (429, "")],
)
def test_a_refused_list_of_models_pauses_no_call(
    platform: tuple[Client, fake_provider.Running], status: int, note: str
) -> None:
    client, provider = platform
    checks = provider.answer_models(status)
    wait_until(lambda: provider.report()["checks"] >= checks + 3)

    [report] = client.endpoints()

    assert (report.healthy, report.strikes) == (True, 0)
    assert (note in report.why, bool(report.why)) == (True, bool(note))
    assert ask(client, f"after {status}") == [f"after {status}"]


def test_a_failing_list_of_models_pauses_no_call_while_calls_succeed(
    platform: tuple[Client, fake_provider.Running],
) -> None:
    client, provider = platform
    checks = provider.answer_models(500)
    number = 0
    while provider.report()["checks"] < checks + 4:
        number += 1
        assert ask(client, f"number {number}") == [f"number {number}"]
    [report] = client.endpoints()
    assert (report.healthy, report.strikes >= 2) == (True, True)
    assert report.why == "answers 500; but it answers calls"

    wait_until(lambda: not client.endpoints()[0].healthy)  # no call succeeds any more
    provider.answer_models(200)
    assert ask(client, "at last") == ["at last"]
