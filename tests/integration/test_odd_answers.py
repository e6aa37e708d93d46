"""Each odd answer of the fake provider: the end of a call, the number of calls, and their cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from pydantic import SecretStr

from resilience.errors import RlmError
from resilience.faults import classify
from rlm_tasks.client.client import Client
from rlm_tasks.llm.endpoint import Endpoint
from rlm_tasks.llm.wire.answers import Answer, Question
from rlm_tasks.settings.llm import EndpointSettings
from rlm_tasks.testing import embedded
from rlm_tasks.testing.fake_provider import Running, running
from rlm_tasks.testing.odd_answers import ODD_ANSWERS
from tests.integration.conftest import client_of, environment_of

TEXT = "text"
CONTEXT, INVALID = "CONTEXT_LENGTH_EXCEEDED", "INVALID_REQUEST"
QUOTA, LARGE = "INSUFFICIENT_QUOTA", "REQUEST_TOO_LARGE"
REFUSED, FILTERED, TOOL, EMPTY = "REFUSED", "CONTENT_FILTERED", "TOOL_CALL", "ANSWER_EMPTY"
LATER, DOWN, LATE, UNUSABLE = (
    "RATE_LIMITED",
    "SERVICE_UNAVAILABLE",
    "TIMEOUT",
    "UNUSABLE_ANSWER",
)
REPEATED = {DOWN, LATE, UNUSABLE}
"""The codes of calls without an answer, which are made again."""
ATTEMPTS = 2
ENDS: dict[str, str] = {
    "context-openai": CONTEXT,
    "context-vllm": CONTEXT,
    "context-llama-cpp": CONTEXT,
    "context-anthropic": CONTEXT,
    "context-google": CONTEXT,
    "context-litellm": CONTEXT,
    "context-tgi": CONTEXT,
    "context-413": CONTEXT,
    "key-refused": "UNAUTHORISED",
    "no-credit": QUOTA,
    "forbidden-model": "FORBIDDEN",
    "forbidden-country": "FORBIDDEN",
    "model-not-found": "MODEL_NOT_FOUND",
    "path-not-found": INVALID,
    "method-refused": INVALID,
    "body-too-large": LARGE,
    "fastapi-422": INVALID,
    "detail-text": INVALID,
    "tgi-422": INVALID,
    "ollama-400": INVALID,
    "google-400": INVALID,
    "vllm-400": INVALID,
    "anthropic-400": INVALID,
    "openrouter-400": INVALID,
    "litellm-400": INVALID,
    "text-400": INVALID,
    "html-400": INVALID,
    "empty-400": INVALID,
    "quotes-prompt": INVALID,
    "filter-azure": FILTERED,
    "filter-openai": FILTERED,
    "schema-refused": TEXT,
    "temperature-refused": INVALID,
    "max-tokens-refused": TEXT,
    "stream-options-refused": TEXT,
    "redirect": INVALID,
    "wait-seconds": LATER,
    "wait-fraction": LATER,
    "wait-ms": LATER,
    "wait-date": LATER,
    "wait-date-with-date": LATER,
    "reset-length": LATER,
    "reset-minutes": LATER,
    "reset-unix": LATER,
    "reset-unix-ms": LATER,
    "reset-iso": LATER,
    "reset-anthropic": LATER,
    "reset-openrouter": LATER,
    "wait-litellm": LATER,
    "wait-google": LATER,
    "wait-words": LATER,
    "wait-html": LATER,
    "wait-unknown": LATER,
    "wait-a-day": LATER,
    "too-large": LARGE,
    "quota": QUOTA,
    "quota-litellm": QUOTA,
    "quota-google-day": QUOTA,
    "server-error": DOWN,
    "html-502": DOWN,
    "busy-503": DOWN,
    "timeout-504": DOWN,
    "cloudflare-520": DOWN,
    "overloaded-529": DOWN,
    "error-in-200": DOWN,
    "usage-missing": TEXT,
    "usage-null": TEXT,
    "usage-empty": TEXT,
    "usage-texts": TEXT,
    "usage-floats": TEXT,
    "usage-negative": TEXT,
    "usage-zeros": TEXT,
    "usage-absurd": TEXT,
    "usage-total-only": TEXT,
    "usage-prompt-and-total": TEXT,
    "usage-reasoning": TEXT,
    "usage-reasoning-in-total": TEXT,
    "usage-cached": TEXT,
    "usage-cached-deepseek": TEXT,
    "usage-input-output": TEXT,
    "usage-cost": TEXT,
    "cost-header": TEXT,
    "refused": REFUSED,
    "refused-parts": REFUSED,
    "refused-finish": REFUSED,
    "filtered": FILTERED,
    "filtered-google": FILTERED,
    "filtered-part": TEXT,
    "tool-call": TOOL,
    "function-call": TOOL,
    "reasoning-only": EMPTY,
    "reasoning-field": EMPTY,
    "reasoning-beside": TEXT,
    "empty-text": EMPTY,
    "blank": EMPTY,
    "null": EMPTY,
    "parts": TEXT,
    "thinking-parts": TEXT,
    "content-object": TEXT,
    "think-tags": TEXT,
    "fenced": TEXT,
    "prose": TEXT,
    "cut-text": TEXT,
    "cut-text-google": TEXT,
    "surrogate": TEXT,
    "emoji": TEXT,
    "nul": TEXT,
    "long": TEXT,
    "no-choices": UNUSABLE,
    "null-choices": UNUSABLE,
    "not-json": UNUSABLE,
    "empty-body": UNUSABLE,
    "other-json": UNUSABLE,
    "reset": DOWN,
    "reset-after-headers": UNUSABLE,
    "short-body": UNUSABLE,
    "cut-chunks": UNUSABLE,
    "silence": LATE,
    "chunked": TEXT,
    "informational": TEXT,
    "http-10": TEXT,
    "closed-after": TEXT,
    "gzip": TEXT,
    "one-byte": TEXT,
    "delta-null": TEXT,
    "delta-missing": TEXT,
    "choices-null": TEXT,
    "azure-first-event": TEXT,
    "usage-with-choice": TEXT,
    "error-event": TEXT,
    "unfinished": TEXT,
    "comments": TEXT,
    "crlf": TEXT,
    "no-done": TEXT,
    "bom": TEXT,
    "nan": TEXT,
    "json-instead": TEXT,
    "events-instead": TEXT,
}
"""How a call ends: with a text, or with the code of its failure."""
STREAMED = {"error-event": UNUSABLE, "unfinished": UNUSABLE}
"""The ends of streamed answers that differ."""
ASKED_TWICE = {"max-tokens-refused"}
ASKED_TWICE_IN_STREAMS = {*ASKED_TWICE, "stream-options-refused"}
"""A request that is made once more, in other words."""
EXACT = {
    *("usage-texts", "usage-floats", "usage-prompt-and-total", "usage-reasoning"),
    *("usage-reasoning-in-total", "usage-cached", "usage-cached-deepseek", "usage-input-output"),
    *("usage-cost", "cost-header", "usage-total-only"),
    *(name for name, end in ENDS.items() if ODD_ANSWERS[name].group in ("content", "stream")),
} - {name for name, end in ENDS.items() if end == UNUSABLE and name != "no-choices"}
"""The answers whose cost is known, so that the budget counts just what is billed."""
PRICES = {"input_price": 1000.0, "cached_price": 250.0, "output_price": 4000.0}


@pytest.fixture(scope="module")
def provider() -> Iterator[Running]:
    with running() as own:
        yield own


def test_the_table_of_ends_has_each_odd_answer_once() -> None:
    assert list(ENDS) == list(ODD_ANSWERS)
    assert len(ENDS) >= 90


@pytest.mark.parametrize("stream", [False, True])
def test_each_odd_answer_is_a_text_a_fault_or_an_error(provider: Running, stream: bool) -> None:
    async def end_of(endpoint: Endpoint, name: str) -> str:
        prompt = {"role": "user", "content": f"The water is warm today. ODD-ANSWER: {name}"}
        try:
            found = await endpoint.ask(Question("small", (prompt,), 50, 0.0))
        except RlmError as error:
            return classify(error).code
        except ConnectionError as error:
            return classify(error).code
        assert isinstance(found, Answer)
        return found.fault or TEXT

    async def all_ends() -> dict[str, str]:
        settings = EndpointSettings(name="main", base_url=provider.base_url, stream=stream)
        endpoint = Endpoint(settings, SecretStr("any"), timeout_s=2.0, per_host=20, idle_s=9.0)
        endpoint.open()
        try:
            found = await asyncio.gather(*(end_of(endpoint, name) for name in ODD_ANSWERS))
        finally:
            await endpoint.close()
        return dict(zip(ODD_ANSWERS, found, strict=True))

    ends = ENDS | (STREAMED if stream else {})
    assert {name: end for name, end in asyncio.run(all_ends()).items() if end != ends[name]} == {}


# --- through a worker -------------------------------------------------------------------------

WAITING = {name for name, end in ENDS.items() if end == LATER}
"""A pause holds all calls of its key; tests/integration/test_llm_pauses.py has them."""


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "stream"])
def client(
    request: pytest.FixtureRequest,
    provider: Running,
    server: embedded.Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Client, bool]]:
    """A client whose worker calls the provider, and whether the answers are streamed."""
    stream: bool = request.param
    main = {"name": "main", "base_url": provider.base_url, "key_env": "ANY", "stream": stream}
    environment = environment_of(
        server.url,
        f"odd-{stream}",
        ANY="any",
        RLM_BREAKERS__ENABLED="0",
        RLM_LLM__ENDPOINTS=json.dumps([main]),
        RLM_LLM__MODELS=json.dumps({"gpt-4.1-mini": {**PRICES, "tokens": 1e9}}),
        RLM_LLM__ATTEMPTS=str(ATTEMPTS),
        RLM_LLM__TIMEOUT_S="1",
    )
    with ExitStack() as stack:
        own = stack.enter_context(client_of(environment))
        log = tmp_path_factory.mktemp("odd") / "worker.log"
        stack.enter_context(embedded.worker(environment, log=log, slots=2))
        yield own, stream


def test_each_odd_answer_is_paid_as_billed_and_made_as_often_as_it_helps(
    client: tuple[Client, bool], provider: Running
) -> None:
    own, stream = client
    provider.reset()
    names = [name for name in ODD_ANSWERS if name not in WAITING]
    jobs = [
        own.submit(
            operation="llm.map",
            items=[f"The water is warm today. ODD-ANSWER: {name}"],
            params={"prompt": "{item}", "max_tokens": 50, "temperature": 0},
            options={"budget": {"money": 1000}, "continue_on_error": True},
        )
        for name in names
    ]

    wrong, exact = {}, EXACT - set(STREAMED) if stream else EXACT
    for name, job in zip(names, jobs, strict=True):
        result = job.result(timeout=90, propagate=False)
        end = (ENDS | (STREAMED if stream else {}))[name]
        found = result.failed[0].code if result.failed else TEXT
        bill = provider.report()["by_kind"][name]
        twice = ASKED_TWICE_IN_STREAMS if stream else ASKED_TWICE
        calls = ATTEMPTS if end in REPEATED else 2 if name in twice else 1
        assert result.spent is not None
        spent, billed = result.spent.spent.get("money", 0.0), _price(bill)
        if (found, bill["answered"]) != (end, calls):
            wrong[name] = (found, bill["answered"], "expected", end, calls)
        elif spent < billed - 1e-9 or (name in exact and spent > billed + 1e-9):
            wrong[name] = ("spent", spent, "billed", billed)
    assert wrong == {}


def _price(bill: dict[str, float]) -> float:
    """Return the money that the provider bills for the calls of one kind."""
    if bill["stated_money"]:
        return bill["stated_money"]
    fresh = bill["prompt_tokens"] - bill["cached_tokens"]
    return (
        fresh * PRICES["input_price"]
        + bill["cached_tokens"] * PRICES["cached_price"]
        + bill["completion_tokens"] * PRICES["output_price"]
    ) / 1e6
