"""Calls over real HTTP: to the fake provider, and to servers with malformed answers."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import pytest
from pydantic import SecretStr

from resilience.errors import CallTimeout, Category, RateLimited, RlmError
from resilience.faults import classify, wait_in
from rlm_tasks.llm.endpoint import Endpoint
from rlm_tasks.llm.wire.answers import Answer, Question, TokenUsage, estimated_tokens
from rlm_tasks.llm.wire.errors import ProviderDown, ProviderRefused, UnusableAnswer
from rlm_tasks.llm.wire.rate_limit_headers import LimitState, RateLimitHeaders, rate_limits
from rlm_tasks.settings.llm import EndpointSettings
from rlm_tasks.testing import embedded
from rlm_tasks.testing.fake_provider import Running, running
from tests.support import wait_until

T = TypeVar("T")
KEY = "sk-very-secret-0123456789"
PROMPT = "The patient is Ada Lovelace, born in December 1815. How old may she be?"
WORDS = "The patient is Ada Lovelace, born in December 1815. How old may"
UNSAID = LimitState()


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with running(latency=0.01) as provider:
        yield provider


@pytest.fixture
def provider(shared: Running) -> Running:
    """The shared provider, without faults and with counts of 0."""
    shared.schedule()
    shared.reset()
    return shared


def question(text: str = PROMPT, **about: Any) -> Question:
    return Question(
        **{
            "model": "small",
            "messages": ({"role": "user", "content": text},),
            "max_tokens": 50,
            **about,
        }
    )


def at(
    base_url: str,
    run: Callable[[Endpoint], Awaitable[T]],
    *,
    timeout_s: float = 30.0,
    per_host: int = 10,
    key: str = KEY,
    learn: Callable[[str, RateLimitHeaders], None] | None = None,
    **about: Any,
) -> T:
    """Run a coroutine with an endpoint of this URL, and return its result."""

    async def main() -> T:
        settings = EndpointSettings(name="main", base_url=base_url, key_env="MAIN_KEY", **about)
        endpoint = Endpoint(
            settings,
            SecretStr(key),
            timeout_s=timeout_s,
            per_host=per_host,
            idle_s=60.0,
            learn=learn,
        )
        try:
            return await run(endpoint)
        finally:
            await endpoint.close()

    return asyncio.run(main())


def asked(base_url: str, about: Question | None = None, **options: Any) -> Answer:
    return at(base_url, lambda endpoint: endpoint.ask(about or question()), **options)


def error_of(base_url: str, about: Question | None = None, **options: Any) -> Exception:
    """Return the error of a call; assert that its texts have neither the key nor the prompt."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - it is returned
        asked(base_url, about, **options)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None
    texts = "".join(
        [
            *traceback.format_exception(error),
            repr(error),
            str(error),
            repr(vars(error)),
            repr(error.args),
        ]
    )
    assert not {secret for secret in (KEY[:12], "Ada", "Lovelace") if secret in texts}
    return error


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_its_text_its_cost_and_its_time(provider: Running, stream: bool) -> None:
    answer = asked(provider.base_url, stream=stream)

    assert answer.text == WORDS
    assert answer.finish == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        estimated_tokens(PROMPT),
        estimated_tokens(WORDS),
    )
    assert answer.limits == RateLimitHeaders(UNSAID, UNSAID)
    assert answer.latency_s > 0.008
    seen = provider.report()
    assert (seen["prompt_tokens"], seen["completion_tokens"]) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_answer_has_the_finish_reason_length(provider: Running, stream: bool) -> None:
    answer = asked(provider.base_url, question(max_tokens=3), stream=stream)

    assert (answer.text, answer.finish, answer.usage.completion_tokens) == (WORDS[:12], "length", 3)


def test_a_question_sends_its_schema_and_the_endpoints_model_name(provider: Running) -> None:
    schema = {"type": "object", "properties": {"total": {"type": "integer"}}}

    answer = asked(
        provider.base_url,
        question("SUM: 1 2", schema=schema, temperature=0.0),
        models={"small": "theirs-1"},
    )

    assert json.loads(answer.text) == {"total": 3}
    assert list(provider.report()["by_model"]) == ["theirs-1"]


MEANINGS: list[tuple[str, type[Exception], Category, str]] = [
    ("400", ProviderRefused, Category.VALIDATION, "CONTEXT_LENGTH_EXCEEDED"),
    ("401", ProviderRefused, Category.AUTH, "UNAUTHORISED"),
    ("404", ProviderRefused, Category.VALIDATION, "MODEL_NOT_FOUND"),
    ("422", ProviderRefused, Category.VALIDATION, "INVALID_REQUEST"),
    ("quota", ProviderRefused, Category.QUOTA, "INSUFFICIENT_QUOTA"),
    ("429", RateLimited, Category.RATE_LIMITED, "RATE_LIMITED"),
    ("500", ProviderDown, Category.TRANSIENT, "SERVICE_UNAVAILABLE"),
    ("503", ProviderDown, Category.TRANSIENT, "SERVICE_UNAVAILABLE"),
    ("timeout", CallTimeout, Category.TIMEOUT, "TIMEOUT"),
    ("garbage", UnusableAnswer, Category.TRANSIENT, "UNUSABLE_ANSWER"),
    ("empty", UnusableAnswer, Category.TRANSIENT, "UNUSABLE_ANSWER"),
    ("cut", UnusableAnswer, Category.TRANSIENT, "UNUSABLE_ANSWER"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "error", "category", "code"), MEANINGS, ids=[each[0] for each in MEANINGS]
)
def test_each_fault_becomes_an_error_of_the_platform_without_secrets(
    provider: Running,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    error: type[Exception],
    category: Category,
    code: str,
    stream: bool,
) -> None:
    caplog.set_level(logging.DEBUG)
    provider.schedule({"kind": kind})

    raised = error_of(
        provider.base_url, stream=stream, timeout_s=1.0 if kind == "timeout" else 30.0
    )

    assert type(raised) is error
    fault = classify(raised)
    assert (fault.category, fault.code) == (category, code)
    assert fault.retryable == (error is not ProviderRefused)
    if error in (ProviderDown, CallTimeout):
        assert fault.trips
    wait_until(lambda: bool(provider.report()["faults"]))
    assert provider.report()["faults"] == {kind: 1}  # one call: the endpoint does not retry
    assert caplog.records  # the HTTP client has logged
    assert not [secret for secret in (KEY, "Ada") if secret in caplog.text]


def test_an_error_repeats_the_providers_message_unless_it_has_secrets(
    provider: Running,
) -> None:
    provider.schedule({"kind": "400"})
    assert str(error_of(provider.base_url)) == (
        "endpoint main: refuses the question (400):"
        " This model's maximum context length is exceeded."
    )
    provider.schedule({"kind": "422"})
    assert str(error_of(provider.base_url)).endswith(
        "(422): its reason is hidden, because it quotes the question"
    )
    assert str(error_of(provider.base_url, question("Ada"))).endswith(
        "(422): its reason is hidden, because it quotes the question"
    )
    for long in ("Ada " * 90, "Ada \u0416 " * 90):  # the provider quotes the second one escaped
        assert str(error_of(provider.base_url, question(long))).endswith("quotes the question")


@pytest.mark.parametrize(
    "key", ["", " ", "sk-very-secret-0123456789\u2026", "sk-very-secret-0123456789\nb"]
)
def test_a_key_unfit_for_a_header_is_refused_with_its_variables_name(key: str) -> None:
    error = error_of("http://127.0.0.1:1/v1", key=key)

    assert isinstance(error, ProviderRefused)
    assert error.category == Category.AUTH
    assert (
        str(error)
        == "endpoint main: MAIN_KEY holds no key; set it, to any text if the endpoint needs no key"
    )


def test_a_question_that_cannot_be_encoded_is_refused(provider: Running) -> None:
    error = error_of(provider.base_url, question(f"{PROMPT}\ud800"))

    assert isinstance(error, ProviderRefused)
    assert error.category == Category.VALIDATION
    assert provider.report()["requests"] == 0


def test_an_endpoint_without_a_listener_is_down() -> None:
    error = error_of(f"http://127.0.0.1:{embedded.free_port()}/v1")

    assert isinstance(error, ProviderDown)
    assert classify(error).trips


# --- retry times ------------------------------------------------------------------------------

DATES = {"Date": "Tue, 01 Jul 2025 10:00:00 GMT", "Retry-After": "Tue, 01 Jul 2025 10:00:42 GMT"}
SPENT = {
    "x-ratelimit-remaining-requests": "0",
    "x-ratelimit-reset-requests": "6m0s",
    "x-ratelimit-reset-tokens": "9h",
}
WAITS: list[tuple[dict[str, str], float]] = [
    ({"Retry-After": "7"}, 7.0),
    ({"Retry-After": "1", "retry-after-ms": "250"}, 0.25),
    (DATES, 42.0),
    (SPENT, 360.0),
    # It does not say which limit is used up.
    ({"x-ratelimit-reset-requests": "12ms", "x-ratelimit-reset-tokens": "1.5s"}, 1.5),
    ({"Retry-After": "soon"}, 1.0),
    ({"Retry-After": "0"}, 1.0),  # otherwise the call would be retried without a pause
    ({}, 1.0),
]


@pytest.mark.parametrize(("headers", "wait_s"), WAITS)
def test_a_429_gives_the_retry_time_in_any_of_its_forms(
    provider: Running, headers: dict[str, str], wait_s: float
) -> None:
    provider.schedule({"kind": "429", "headers": headers})

    error = error_of(provider.base_url)

    assert isinstance(error, RateLimited)
    assert error.retry_after_s == pytest.approx(wait_s)
    assert error.guard == "endpoint main"


def test_a_503_may_give_a_retry_time(provider: Running) -> None:
    provider.schedule({"kind": "503", "headers": {"Retry-After": "20"}})

    assert classify(error_of(provider.base_url)).retry_after_s == 20.0


@pytest.mark.parametrize(
    ("text", "length_s"),
    [
        ("3", 3),
        ("0s", 0),
        ("1s", 1),
        ("6m0s", 360),
        ("12ms", 0.012),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400),
        *((each, None) for each in ("", "-1s", "soon", "1x", "1" * 400)),
    ],
)
def test_durations_are_parsed_in_the_providers_formats(text: str, length_s: float | None) -> None:
    assert wait_in(text, 0.0) == (None if length_s is None else pytest.approx(length_s))


def test_rate_limit_headers_are_parsed_for_requests_and_tokens() -> None:
    headers = {
        "x-ratelimit-limit-requests": "3500",
        "x-ratelimit-remaining-tokens": "89999.5",
        "x-ratelimit-reset-tokens": "?",
    }

    assert rate_limits(headers) == RateLimitHeaders(
        LimitState(3500.0, None, None), LimitState(None, 89999.5, None)
    )


def test_a_caller_that_waits_the_retry_time_passes_the_sliding_window() -> None:
    window_s, most = 0.3, 5
    with running(window=window_s, requests=most, tokens=400) as provider:

        async def insist(endpoint: Endpoint) -> tuple[list[Answer], int]:
            answers: list[Answer] = []
            refused = 0
            while len(answers) < 4 * most:
                try:
                    answers.append(
                        await endpoint.ask(
                            question("one two", max_tokens=100 if len(answers) % 2 else 5)
                        )
                    )
                except RateLimited as limited:
                    refused += 1
                    await asyncio.sleep(limited.retry_after_s)
            return answers, refused

        answers, refused = at(provider.base_url, insist)
        seen = provider.report()

    assert (seen["answered"], seen["refused"]) == (len(answers), refused)
    times = [arrival for arrival, _ in seen["taken"]]
    assert len(times) == 4 * most
    assert all(
        later - earlier >= window_s for earlier, later in zip(times, times[most:], strict=False)
    )
    assert refused <= len(answers)  # after each wait a call passed
    assert {used for _, used in seen["taken"]} == {4}  # the reservations are settled to the use
    first = answers[0].limits
    assert first.requests.limit == most
    assert first.tokens.limit == 400
    assert first.requests.remaining == most - 1
    assert first.tokens.remaining == 400 - 4
    assert first.requests.reset_s == pytest.approx(window_s, abs=window_s)


def test_too_many_tokens_are_refused_like_too_many_requests() -> None:
    with running(window=60, tokens=100) as provider:
        asked(provider.base_url, question("one", max_tokens=99))  # it uses two tokens
        error = error_of(provider.base_url, question(max_tokens=82))

    assert isinstance(error, RateLimited)
    assert 0 < error.retry_after_s <= 60


# --- connections ------------------------------------------------------------------------------


def test_fifty_calls_at_once_share_ten_connections(provider: Running) -> None:
    async def fifty(endpoint: Endpoint) -> list[Answer]:
        return await asyncio.gather(*(endpoint.ask(question(f"{n % 5} apples")) for n in range(50)))

    answers = at(provider.base_url, fifty, per_host=10)

    assert [each.text for each in answers] == [f"{n % 5} apples" for n in range(50)]
    seen = provider.report()
    assert seen["answered"] == 50
    assert 1 <= seen["most_in_flight"] <= 10
    assert 1 <= seen["connections_opened"] <= 10
    assert seen["prompts"] == {"distinct": 5, "most_answered": 10}


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_is_reused(provider: Running, stream: bool) -> None:
    async def several(endpoint: Endpoint) -> None:
        provider.schedule({"kind": "500", "from": 3, "to": 3})
        for _ in range(6):
            with suppress(ProviderDown):
                await endpoint.ask(question())

    at(provider.base_url, several, stream=stream)

    assert provider.report()["connections_opened"] == 1


@pytest.mark.parametrize(
    ("stream", "rule"),
    [
        (False, {"kind": "timeout"}),
        (False, {"kind": "slow", "seconds": 60}),
        (True, {"kind": "slow", "seconds": 60}),
    ],
)
def test_a_call_that_is_cancelled_leaves_nothing_open(
    provider: Running, stream: bool, rule: dict[str, Any]
) -> None:
    provider.schedule(rule)

    async def cancelled(endpoint: Endpoint) -> list[Answer]:
        calls = [asyncio.ensure_future(endpoint.ask(question())) for _ in range(8)]
        await asyncio.to_thread(wait_until, lambda: provider.report()["in_flight"] == 4)
        for call in calls:
            call.cancel()
        assert all(
            isinstance(each, asyncio.CancelledError)
            for each in await asyncio.gather(*calls, return_exceptions=True)
        )
        await asyncio.to_thread(wait_until, lambda: provider.report()["connections"] == 0)
        provider.schedule()
        return await asyncio.gather(*(endpoint.ask(question()) for _ in range(8)))

    assert len(at(provider.base_url, cancelled, per_host=4, stream=stream)) == 8


def test_waiting_for_a_connection_does_not_count_for_the_timeout(provider: Running) -> None:
    provider.schedule({"kind": "slow", "seconds": 0.2})

    async def five(endpoint: Endpoint) -> list[Answer]:
        return await asyncio.gather(*(endpoint.ask(question()) for _ in range(5)))

    answers = at(provider.base_url, five, per_host=1, timeout_s=1.5)

    assert sum(each.latency_s for each in answers) > 1.5


def test_a_stream_may_last_longer_than_the_limit_of_its_pauses(provider: Running) -> None:
    provider.schedule({"kind": "slow", "seconds": 0.25})
    assert asked(provider.base_url, stream=True, timeout_s=1.8).latency_s > 1.8

    provider.schedule({"kind": "slow", "seconds": 60})
    error = error_of(provider.base_url, stream=True, timeout_s=0.3)
    assert isinstance(error, CallTimeout)
    assert str(error) == "endpoint main ran longer than its limit of 0.3 s and was stopped"


# --- health checks ----------------------------------------------------------------------------


def test_a_check_does_not_wait_for_calls(provider: Running) -> None:
    provider.schedule({"kind": "timeout"})

    async def check_beside(endpoint: Endpoint) -> float:
        call = asyncio.ensure_future(endpoint.ask(question()))
        await asyncio.to_thread(wait_until, lambda: provider.report()["in_flight"] == 1)
        took_s = await endpoint.check(20.0)
        call.cancel()
        return took_s

    assert 0 < at(provider.base_url, check_beside, per_host=1) < 20


def test_a_check_raises_the_errors_of_a_call(provider: Running) -> None:
    with pytest.raises(ProviderDown):
        at(f"http://127.0.0.1:{embedded.free_port()}/v1", lambda endpoint: endpoint.check(20.0))
    with pytest.raises(ProviderRefused, match=r"refuses the question \(404\)"):
        at(f"http://127.0.0.1:{provider.port}/elsewhere", lambda endpoint: endpoint.check(20.0))


# --- malformed answers ------------------------------------------------------------------------


def answered_with(body: str, *, stream: bool = False) -> Answer | Exception:
    """Call a server that always answers with this body; return the answer, or the error."""

    async def main() -> Answer:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # The answer must not begin before the end of the request.
            await reader.readuntil(b'"include_usage":true' if stream else b"}]")
            kind = "text/event-stream" if stream else "application/json"
            head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"
            writer.write(f"{head}{body}".encode())
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            settings = EndpointSettings(name="main", base_url=url, stream=stream)
            endpoint = Endpoint(settings, SecretStr(KEY), timeout_s=30.0, per_host=1, idle_s=1.0)
            try:
                return await endpoint.ask(question())
            finally:
                await endpoint.close()

    try:
        return asyncio.run(main())
    except RlmError as error:
        return error


@pytest.mark.parametrize("usage", ["", ',"usage":null', ',"usage":{}'])
def test_missing_usage_is_told_as_missing(usage: str) -> None:
    whole = '{"choices":[{"message":{"content":"forty-two!"}}]' + usage + "}"
    part = '{"choices":[{"delta":{"content":"forty-two!"},"finish_reason":"stop"}]' + usage + "}"

    for answer in (
        answered_with(whole),
        answered_with(f"data: {part}\n\ndata: [DONE]\n\n", stream=True),
    ):
        assert isinstance(answer, Answer)
        assert (answer.text, answer.finish) == ("forty-two!", "stop")
        assert answer.usage == TokenUsage()


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        '{"error":{"message":"Ada"}}',
        '{"choices":null}',
        '{"choices":[]}',
        '{"choices":["Ada"]}',
    ],
)
def test_a_body_that_is_no_answer_is_unusable(body: str) -> None:
    error = answered_with(body)

    assert isinstance(error, UnusableAnswer)
    assert "Ada" not in str(error)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "data: [DONE]\n\n",
        'data: {"choices":[{"delta":{"content":"Ada"}}]}\n\n',  # it has no end
        'data: {"choices":[{"delta":{"content":"Ada"}}]}\n\ndata: [DONE]\n\n',
        'data: {"choices":[{"delta":"Ada"}]}\n\n',
        'data: {"choices":7}\n\n',
        "data: 7\n\n",
        'data: {"error":{"message":"Ada"}}\n\n',
        "data: \ufffd{Ada\n\n",
    ],
)
def test_a_stream_that_is_no_answer_is_unusable(body: str) -> None:
    error = answered_with(body, stream=True)

    assert isinstance(error, UnusableAnswer)
    assert "Ada" not in str(error)


PARTS = '[{"type":"thinking","thinking":"Ada"},{"type":"text","text":"so"},{"text":" it is"}]'
LOOSE: list[tuple[str, str, str, str]] = [  # message, finish reason, text, fault
    ("null", "stop", "", "ANSWER_EMPTY"),
    ('{"content":null}', "stop", "", "ANSWER_EMPTY"),
    ('{"content":" \\n"}', "stop", " \n", "ANSWER_EMPTY"),
    ('{"content":"","reasoning_content":"Ada"}', "length", "", "ANSWER_EMPTY"),
    ('{"content":null,"refusal":"Ada"}', "stop", "", "REFUSED"),
    ('{"content":[{"type":"refusal","refusal":"Ada"}]}', "stop", "", "REFUSED"),
    ('{"content":""}', "refusal", "", "REFUSED"),
    ('{"content":""}', "content_filter", "", "CONTENT_FILTERED"),
    ('{"content":""}', "SAFETY", "", "CONTENT_FILTERED"),
    ('{"tool_calls":[{"id":"1"}]}', "tool_calls", "", "TOOL_CALL"),
    ('{"content":null,"function_call":{"name":"f"}}', "stop", "", "TOOL_CALL"),
    ('{"content":["so"," it is"]}', "stop", "so it is", ""),
    (f'{{"content":{PARTS}}}', "stop", "so it is", ""),
    ('{"content":{"type":"text","text":"so"}}', "stop", "so", ""),
    ('{"content":"so \\ud83d","tool_calls":[]}', "stop", "so \ufffd", ""),
    ('{"content":"\\ud83d\\ude00","logprobs":NaN}', "stop", "\U0001f600", ""),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("message", "finish", "text", "fault"), LOOSE)
def test_a_text_is_found_in_any_form_and_its_lack_has_a_code(
    message: str, finish: str, text: str, fault: str, stream: bool
) -> None:
    name = "delta" if stream else "message"
    body = f'{{"choices":[{{"{name}":{message},"finish_reason":"{finish}"}}]}}'

    answer = answered_with(f"data: {body}\n\n" if stream else f"\ufeff{body}", stream=stream)

    assert isinstance(answer, Answer)
    assert (answer.text, answer.fault) == (text, fault)


def test_a_whole_body_in_place_of_a_stream_is_read_and_events_in_place_of_a_body() -> None:
    whole = '{"choices":[{"message":{"content":"so"},"finish_reason":"stop"}]}'
    events = (
        'data: {"choices":[{"delta":{"role":"assistant"}}]}\r\n\r\n: still here\r\n\r\n'
        'data: {"choices":null}\r\n\r\ndata: {"choices":[{"delta":null}]}\r\n\r\n'
        'data: {"choices":[{"delta":{"content":"so"},"finish_reason":"stop"}]}\r\n\r\n'
        'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":1}}'
    )

    for body, stream in ((whole, True), (f"\n\n{whole}", True), (events, False), (events, True)):
        answer = answered_with(body, stream=stream)
        assert isinstance(answer, Answer)
        assert (answer.text, answer.finish) == ("so", "stop")
        assert answer.usage.prompt_tokens == (7 if body is events else None)


# --- addresses and limits ---------------------------------------------------------------------


@contextmanager
def answering(status: int, headers: dict[str, str], body: bytes) -> Iterator[str]:
    """Run a server that gives each question the same response; return its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_the_error_names_its_address(
    provider: Running, status: int
) -> None:
    new = f"{provider.base_url}/chat/completions"

    with answering(status, {"Location": f"{new}?key={KEY}"}, b"<html>Moved</html>") as url:
        error = error_of(url)

    assert isinstance(error, ProviderRefused)
    assert f"redirects the call to {new} ({status}), which is not followed" in str(error)
    assert provider.report()["requests"] == 0


def test_a_page_in_place_of_an_answer_names_the_url_to_check() -> None:
    with answering(200, {}, b"<!DOCTYPE html><title>Welcome</title>") as url:
        error = error_of(url)

    assert isinstance(error, UnusableAnswer)
    assert "it is a page, not JSON; does base_url have its right end" in str(error)


@pytest.mark.parametrize(("limit", "kind"), [("500", RateLimited), ("60", ProviderRefused)])
def test_the_limits_in_the_headers_of_a_429_are_learned(
    provider: Running, limit: str, kind: type[Exception]
) -> None:
    learned: list[tuple[str, float | None]] = []
    provider.schedule({"kind": "429", "headers": {"x-ratelimit-limit-tokens": limit}})

    error = error_of(
        provider.base_url, learn=lambda model, limits: learned.append((model, limits.tokens.limit))
    )

    assert type(error) is kind
    assert learned == [("small", float(limit))]


# --- processes --------------------------------------------------------------------------------


def test_nothing_is_imported_before_the_first_call() -> None:
    code = (
        "import rlm_tasks.llm.endpoint, sys;"
        "print({'openai', 'httpx2', 'pydantic', 'celery'} & set(sys.modules))"
    )

    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        == b"set()\n"
    )


@pytest.mark.parametrize("cause", ["its stdin closes", "SIGTERM"])
def test_a_fake_provider_ends_quietly(cause: str) -> None:
    command = [sys.executable, "-m", "rlm_tasks.testing.fake_provider", "--stdin"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"at ")
        if cause == "SIGTERM":
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        process.stdin.close()
        process.wait(60)
        assert (process.returncode, process.stderr.read()) == (0, b"")


def test_an_invalid_schedule_is_refused(provider: Running) -> None:
    with pytest.raises(ValueError, match="kind"):
        provider.schedule({"kind": "boredom"})
    with pytest.raises(embedded.NotStarted), running(port="none"):
        pass
