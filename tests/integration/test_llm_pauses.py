"""Pauses that a provider asks for: a real worker waits as long as is meant, and can be released."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from resilience.bucket import HOLD_MOST_S
from rlm_tasks.cli import rlm
from rlm_tasks.client.client import Client
from rlm_tasks.testing import embedded, fake_provider
from tests.integration.conftest import one_provider
from tests.support import wait_until

LIMIT = "llm:MAIN_KEY:gpt-4.1-mini"


@pytest.fixture(scope="module")
def shared(
    server: embedded.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Client, fake_provider.Running]]:
    """A client, and the provider that its worker calls."""
    log = tmp_path_factory.mktemp("llm-pauses") / "worker.log"
    with one_provider(server.url, "llm-pauses", log, slots=2) as both:
        yield both


@pytest.fixture
def platform(
    shared: tuple[Client, fake_provider.Running],
) -> tuple[Client, fake_provider.Running]:
    """The shared client and provider, without failures and counts."""
    shared[1].schedule()
    shared[1].reset()
    return shared


def run(client: Client, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(rlm, words, obj=SimpleNamespace(app=client.app))
    return result.exit_code, result.output


def test_a_reset_at_a_point_in_time_is_not_taken_for_a_length(
    platform: tuple[Client, fake_provider.Running],
) -> None:
    client, provider = platform
    headers = {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": str(int(time.time()) + 2),
    }
    provider.schedule({"kind": "429", "to": 1, "headers": headers})

    result = client.execute(
        operation="llm.map", items=["one", "two"], params={"prompt": "{item}"}, timeout=60
    )

    assert result.output == ["one", "two"]
    assert provider.report()["faults"] == {"429": 1}, "nobody asked again before the time"


def test_a_pause_of_a_day_is_bounded_told_and_released(
    platform: tuple[Client, fake_provider.Running],
) -> None:
    client, provider = platform
    provider.schedule({"kind": "429", "headers": {"Retry-After": "86400"}})
    job = client.submit(operation="llm.map", items=["one", "two"], params={"prompt": "{item}"})
    wait_until(lambda: "asked for a pause until" in job.explain())
    provider.schedule()
    held = {each.service: each.hold_s for each in client.limits()}

    assert 0 < held[LIMIT] <= HOLD_MOST_S
    assert f"rate limit {LIMIT}: its provider asked for a pause until" in job.explain()
    code, said = run(client, "limits")
    assert (code, "held by the provider" in " ".join(said.split())) == (0, True)
    code, said = run(client, "limits", "release", "llm:OTHER")
    assert (code != 0, LIMIT in said) == (True, True)
    assert job.progress().done == 0

    code, said = run(client, "limits", "release", LIMIT)

    assert (code, said.startswith(f"The pause of {LIMIT} has ended")) == (0, True)
    assert job.result(timeout=60).output == ["one", "two"]
    assert client.release_limit(LIMIT) == 0.0


HOPELESS = {
    "too-large": "REQUEST_TOO_LARGE",
    "quota": "INSUFFICIENT_QUOTA",
    "quota-litellm": "INSUFFICIENT_QUOTA",
    "quota-google-day": "INSUFFICIENT_QUOTA",
}


def test_a_429_that_waiting_does_not_mend_fails_its_item_and_holds_nobody(
    platform: tuple[Client, fake_provider.Running],
) -> None:
    client, provider = platform
    prompts = [f"{name} ODD-ANSWER: {name}" for name in HOPELESS]

    result = client.execute(
        operation="llm.map",
        items=[*prompts, "one", "two"],
        params={"prompt": "{item}", "max_tokens": 50},
        options={"continue_on_error": True},
        timeout=60,
    )

    assert result.output == ["one", "two"]
    assert [each.code for each in result.failed] == [*HOPELESS.values()]
    assert provider.report()["requests"] == 6, "each question was asked once"
    assert {each.hold_s for each in client.limits() if each.service == LIMIT} == {0}


def test_a_call_above_the_limit_that_a_429_names_fails_and_a_smaller_one_does_not(
    platform: tuple[Client, fake_provider.Running],
) -> None:
    client, provider = platform
    provider.schedule({"kind": "429", "to": 1, "headers": {"x-ratelimit-limit-tokens": "600"}})

    def run_with(max_tokens: int) -> list[str]:
        params = {"prompt": "{item}", "max_tokens": max_tokens, "tier": "small"}
        job = client.submit(operation="llm.map", items=["one"], params=params)
        result = job.result(timeout=60, propagate=False)
        return [*(result.output or []), *(each.code for each in result.failed)]

    assert run_with(1000) == ["REQUEST_TOO_LARGE"]
    assert run_with(20) == ["one"]
    assert provider.report()["requests"] == 2
