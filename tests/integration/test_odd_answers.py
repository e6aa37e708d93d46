"""Each odd answer of the fake provider: the end of a call, the number of calls, and their cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from resilience.errors import RlmError
from resilience.faults import classify
from rlm_tasks.client.client import Client
from rlm_tasks.llm.endpoint import Endpoint
from rlm_tasks.llm.wire.answers import Answer, Question
from rlm_tasks.settings.llm import TIERS, EndpointSettings
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
    "usage-cached-anthropic": TEXT,
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
    "malformed-call": TOOL,
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
    "failed-half": UNUSABLE,
    "failed-vllm": UNUSABLE,
    "failed-deepseek": UNUSABLE,
    "failed-choice": DOWN,
    "raw-tab": TEXT,
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
    "cut-at-end": UNUSABLE,
    "open-end": LATE,
    "silence": LATE,
    "chunked": TEXT,
    "informational": TEXT,
    "http-10": TEXT,
    "closed-after": TEXT,
    "gzip": TEXT,
    "deflate": TEXT,
    "one-byte": TEXT,
    "slow-bytes": LATE,
    "delta-null": TEXT,
    "delta-missing": TEXT,
    "choices-null": TEXT,
    "azure-first-event": TEXT,
    "usage-with-choice": TEXT,
    "empty-event": TEXT,
    "null-event": TEXT,
    "whole-message-beside": TEXT,
    "whole-message-last": TEXT,
    "after-done": TEXT,
    "error-event-502": TEXT,
    "error-event-429": TEXT,
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
STREAMED = {
    "error-event": UNUSABLE,
    "error-event-502": DOWN,
    "error-event-429": UNUSABLE,
    "unfinished": UNUSABLE,
    "slow-bytes": TEXT,
    "short-body": TEXT,
    "cut-at-end": TEXT,
    "open-end": TEXT,
}
"""The ends of streamed answers that differ."""
ASKED_TWICE = {"max-tokens-refused"}
ASKED_TWICE_IN_STREAMS = {*ASKED_TWICE, "stream-options-refused"}
"""A request that is made once more, in other words."""
EXACT = {
    *("usage-texts", "usage-floats", "usage-prompt-and-total", "usage-reasoning"),
    *("usage-reasoning-in-total", "usage-cached", "usage-cached-deepseek", "usage-input-output"),
    "usage-cached-anthropic",
    *("usage-cost", "cost-header", "usage-total-only"),
    *(name for name, end in ENDS.items() if ODD_ANSWERS[name].group in ("content", "stream")),
} - {name for name, end in ENDS.items() if end in REPEATED and name != "no-choices"}
"""The answers whose cost is known, so that the budget counts just what is billed."""
MODELS = ("gpt-4.1-nano", "gpt-4.1-mini", "gpt-4.1")
CHANGED = {
    *("think-tags", "fenced", "prose", "filtered-part", "surrogate", "emoji", "nul", "long"),
    "raw-tab",
}
"""The answers whose text is not that of a good answer."""
PRICES = {"input_price": 1000.0, "cached_price": 250.0, "output_price": 4000.0}


@pytest.fixture(scope="module")
def provider() -> Iterator[Running]:
    with running() as own:
        yield own


def test_the_table_of_ends_has_each_odd_answer_once() -> None:
    assert list(ENDS) == list(ODD_ANSWERS)
    assert len(ENDS) >= 90
    assert max(len(odd.about) for odd in ODD_ANSWERS.values()) <= 80 - 36, "--list has 80 columns"


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
"""A pause holds all calls of its key."""


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
        RLM_LLM__MODELS=json.dumps({each: {**PRICES, "tokens": 1e9} for each in MODELS}),
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
    def tier_of(name: str) -> str:
        """A refused parameter is not sent again to its model, and without it streams lack usage."""
        return "small" if name in ASKED_TWICE_IN_STREAMS else "medium"

    own, stream = client
    provider.reset()
    names = [name for name in ODD_ANSWERS if name not in WAITING]
    items = [f"The water is warm today. ODD-ANSWER: {name}" for name in names]
    jobs = [
        own.submit(
            operation="llm.map",
            items=[item],
            params={"prompt": "{item}", "max_tokens": 50, "temperature": 0, "tier": tier_of(name)},
            options={"budget": {"money": 1000}, "continue_on_error": True},
        )
        for name, item in zip(names, items, strict=True)
    ]

    wrong, exact = {}, EXACT - set(STREAMED) if stream else EXACT
    for name, item, job in zip(names, items, jobs, strict=True):
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
        elif end == TEXT and name not in CHANGED and result.output != [item]:
            wrong[name] = ("text", result.output)
        elif spent < billed - 1e-9 or (name in exact and spent > billed + 1e-9):
            wrong[name] = ("spent", spent, "billed", billed)
    assert wrong == {}


@pytest.mark.parametrize("client", [False], ids=["whole"], indirect=True)
def test_an_item_waits_after_a_429_and_its_next_call_is_answered(
    client: tuple[Client, bool], provider: Running
) -> None:
    own, _ = client
    provider.reset()
    names = sorted(WAITING - {"wait-a-day"})
    items = {name: f"Warm water. ODD-ANSWER: {name} x1" for name in names}

    jobs = {  # each model has pauses of its own
        tier: own.submit(
            operation="llm.map",
            items=[items[name] for name in names[number::3]],
            params={"prompt": "{item}", "max_tokens": 50, "temperature": 0, "tier": tier},
            options={"budget": {"money": 1000}},
        )
        for number, tier in enumerate(TIERS)
    }
    results = [job.result(timeout=60) for job in jobs.values()]

    report = provider.report()
    assert [each.output for each in results] == [[*items.values()][n::3] for n in range(3)]
    calls = {name: each["answered"] for name, each in report["by_kind"].items()}
    assert calls == dict.fromkeys(names, 1)
    assert (report["requests"], report["answered"]) == (2 * len(names), len(names))
    spent = [each.spent.spent["money"] for each in results if each.spent is not None]
    assert sum(spent) == pytest.approx(_price(report))


def test_the_breaker_counts_no_answer_that_is_the_fault_of_its_item(
    provider: Running, server: embedded.Server, tmp_path: Path
) -> None:
    main = {"name": "main", "base_url": provider.base_url, "key_env": "ANY"}
    environment = environment_of(
        server.url,
        "odd-breakers",
        ANY="any",
        RLM_BREAKERS__FAILURE_THRESHOLD="1",
        RLM_LLM__ENDPOINTS=json.dumps([main]),
    )
    provider.reset()
    names = [name for name in ODD_ANSWERS if ENDS[name] not in {*REPEATED, LATER}]
    with ExitStack() as stack:
        own = stack.enter_context(client_of(environment))
        stack.enter_context(embedded.worker(environment, log=tmp_path / "worker.log", slots=1))
        result = own.execute(
            operation="llm.map",
            items=[f"Warm water. ODD-ANSWER: {name}" for name in names],
            params={"prompt": "{item}", "max_tokens": 50},
            continue_on_error=True,
            timeout=60,
        )
        breaker = own.breakers.status()["llm:main"]

    ends = dict.fromkeys(names, TEXT) | {names[each.index]: each.code for each in result.failed}
    assert {name: end for name, end in ends.items() if end != ENDS[name]} == {}
    assert (breaker["state"], breaker["last_failure_time"]) == ("closed", None)
    assert provider.report()["requests"] == len(names) + len(ASKED_TWICE), "nobody asked again"


# --- modes of the provider --------------------------------------------------------------------


def test_a_provider_has_modes_for_its_whole_run() -> None:
    long = {"messages": [{"role": "user", "content": "water " * 20}], "max_tokens": 20}
    refused = "context_length_exceeded"
    with running(context=40, models_status=403, always="usage-missing") as own:
        assert _post(own, long)["error"]["code"] == refused
        short = _post(own, {**long, "max_tokens": 5})
        assert (_post(own, long)["error"]["code"], own.report()["answered"]) == (refused, 1)
        assert _sent(own, "GET", "/v1/models")[0] == 403
    assert (short["choices"][0]["finish_reason"], "usage" in short) == ("stop", False)


def test_max_completion_tokens_bounds_an_answer_and_a_wrong_name_is_refused(
    provider: Running,
) -> None:
    asked = {"messages": [{"role": "user", "content": "The water is warm today"}]}
    wrong = {"messages": [{"role": "user", "content": "ODD-ANSWER: refussed"}]}

    assert _post(provider, {**asked, "max_completion_tokens": 1})["usage"]["completion_tokens"] == 1
    assert "no odd answer 'refussed'" in _post(provider, wrong)["error"]["message"]


def _post(provider: Running, question: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a response to a question."""
    return _sent(provider, "POST", "/v1/chat/completions", {"model": "small", **question})[1]


def _sent(
    provider: Running, method: str, path: str, content: Any = None
) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of a response."""
    with closing(HTTPConnection("127.0.0.1", provider.port)) as connection:
        headers = {"Authorization": "Bearer any"}
        connection.request(method, path, json.dumps(content), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


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
