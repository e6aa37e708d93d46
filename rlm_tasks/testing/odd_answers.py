"""The odd answers that real providers, gateways and inference servers give, by name.

The fake provider gives them by its schedule (`{"kind": "refused"}`), or to a prompt that asks for
one: ``ODD-ANSWER: refused``.  With ``ODD-ANSWER: refused x2`` only the first two calls of that
prompt get it, and the next one a good answer.

Begin with `ODD_ANSWERS`.  `odd_responses` has the functions that make them.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlm_tasks.testing.odd_responses import (
    NOTHING_SAID,
    Make,
    answer,
    as_json,
    ends_with,
    event,
    failure,
    first,
    gateway_error,
    lost,
    no_text,
    openai,
    raw,
    reasoned,
    refuses,
    usage_of,
    wait,
    with_message,
)

ASKS_FOR = re.compile(r"ODD-ANSWER: ([\w-]+)(?: x(\d+))?")
"""A prompt that asks for an odd answer, for all calls or for the first ones."""


@dataclass(frozen=True, slots=True)
class OddAnswer:
    """One odd answer: its group, its description, and how it is made."""

    group: str
    about: str
    make: Make


_LIMIT = {
    "error": {"message": "Rate limit reached.", "type": "requests", "code": "rate_limit_exceeded"}
}
_NONE_LEFT = {"x-ratelimit-remaining-requests": "0"}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
_HTML = "<!doctype html><html><head><title>Bad gateway</title></head><body>nginx</body></html>"
_LONG = (
    "This model's maximum context length is 8192 tokens. However, your messages resulted in 9999"
)

# --- the table --------------------------------------------------------------------------------

_TABLE: dict[str, dict[str, tuple[str, Make]]] = {
    "4xx": {
        "context-openai": (
            "the prompt is too long",
            openai(400, _LONG, "context_length_exceeded"),
        ),
        "context-vllm": (
            "the same in vLLM's words",
            failure(400, {"object": "error", "message": _LONG, "code": 400}),
        ),
        "context-llama-cpp": (
            "the same in llama.cpp's words",
            failure(
                400,
                {
                    "error": {
                        "code": 400,
                        "message": "the request exceeds the available context size",
                        "type": "exceed_context_size_error",
                    }
                },
            ),
        ),
        "context-anthropic": (
            "the same in Anthropic's words",
            failure(
                400,
                {
                    "type": "error",
                    "error": {
                        "type": "invalid_request_error",
                        "message": "prompt is too long: 210000 tokens > 200000 maximum",
                    },
                },
            ),
        ),
        "context-google": (
            "the same in Google's words, in a list",
            failure(
                400,
                [
                    {
                        "error": {
                            "code": 400,
                            "status": "INVALID_ARGUMENT",
                            "message": "The input token count (9999) exceeds the maximum number of "
                            "tokens allowed (8192).",
                        }
                    }
                ],
            ),
        ),
        "context-litellm": (
            "the same behind LiteLLM",
            openai(400, f"litellm.ContextWindowExceededError: BadRequest: {_LONG}", "400"),
        ),
        "context-tgi": (
            "the same in TGI's words, with the status 422",
            failure(
                422,
                {
                    "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be "
                    "<= 4096. Given: 9000 `inputs` tokens",
                    "error_type": "validation",
                },
            ),
        ),
        "context-413": (
            "the same with the status 413",
            openai(413, "Prompt is too long.", "413"),
        ),
        "key-refused": (
            "the key is wrong",
            openai(401, "Incorrect API key.", "invalid_api_key"),
        ),
        "no-credit": (
            "the account has no money",
            openai(402, "Insufficient credits.", "402"),
        ),
        "forbidden-model": (
            "the project has no access to the model",
            openai(403, "Project does not have access to model.", "model_not_found"),
        ),
        "forbidden-country": (
            "the country is not served",
            openai(403, "Country, region, or territory not supported", "unsupported_country"),
        ),
        "model-not-found": ("there is no such model", openai(404, "No such model.", "model")),
        "path-not-found": ("there is no such path, told by a page", failure(404, _HTML)),
        "method-refused": ("the method is refused", failure(405, {"detail": "Method Not Allowed"})),
        "body-too-large": ("the request has too many bytes", failure(413, _HTML)),
        "fastapi-422": (
            "FastAPI's list of mistakes",
            failure(
                422,
                {
                    "detail": [
                        {
                            "type": "extra_forbidden",
                            "loc": ["body", "top_q"],
                            "msg": "Extra inputs are not permitted",
                        }
                    ]
                },
            ),
        ),
        "detail-text": ("an error as a text in `detail`", failure(422, {"detail": "Bad tokens."})),
        "tgi-422": ("TGI's form of an error", failure(422, {"error": "Bad.", "error_type": "x"})),
        "ollama-400": ("Ollama's form of an error", failure(400, {"error": "invalid format"})),
        "google-400": (
            "Google's form of an error",
            failure(400, [{"error": {"code": 400, "message": "Bad field.", "status": "INVALID"}}]),
        ),
        "vllm-400": (
            "vLLM's form of an error",
            failure(400, {"object": "error", "message": "Bad field.", "type": "BadRequestError"}),
        ),
        "anthropic-400": (
            "Anthropic's form of an error",
            failure(400, {"type": "error", "error": {"type": "invalid", "message": "Bad field."}}),
        ),
        "openrouter-400": (
            "OpenRouter's form of an error",
            failure(
                400,
                {
                    "error": {
                        "code": 400,
                        "message": "Provider returned error",
                        "metadata": {"raw": '{"error":{"message":"Bad field."}}'},
                    }
                },
            ),
        ),
        "litellm-400": (
            "LiteLLM's form",
            openai(400, "litellm.BadRequestError: Bad.", "400"),
        ),
        "text-400": ("an error in plain words", failure(400, "Bad field.")),
        "html-400": ("an error told by a page", failure(400, _HTML)),
        "empty-400": ("an error without a body", failure(400, "")),
        "quotes-prompt": ("an error that quotes the prompt", openai(422, "Bad: {question}")),
        "filter-azure": (
            "Azure's filter refuses the prompt",
            openai(
                400,
                "The response was filtered due to the prompt triggering Azure OpenAI's content "
                "management policy.",
                "content_filter",
                innererror={"code": "ResponsibleAIPolicyViolation"},
            ),
        ),
        "filter-openai": (
            "OpenAI's filter refuses the prompt",
            openai(
                400, "Your request was rejected by our safety system.", "content_policy_violation"
            ),
        ),
        "schema-refused": (
            "a schema is not supported",
            refuses("response_format", "Invalid parameter: 'response_format' is not supported."),
        ),
        "temperature-refused": (
            "only one temperature is supported",
            openai(400, "Unsupported value: 'temperature'.", param="temperature"),
        ),
        "max-tokens-refused": (
            "only max_completion_tokens is known",
            refuses(
                "max_tokens",
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.",
            ),
        ),
        "stream-options-refused": (
            "stream_options are not known",
            refuses("stream_options", "Unsupported parameter: 'stream_options'."),
        ),
        "redirect": ("the path has moved", failure(301, "", {"Location": "/v2/chat/completions"})),
    },
    "429": {
        "wait-seconds": ("seconds to wait", wait({"Retry-After": "1"}, _LIMIT)),
        "wait-fraction": ("a fraction of seconds", wait({"Retry-After": "1.0"}, _LIMIT)),
        "wait-ms": ("milliseconds", wait({"retry-after-ms": "1000"}, _LIMIT)),
        "wait-date": ("a date alone", wait({"Retry-After": "{date}"})),
        "wait-date-with-date": (
            "a date beside the time of the answer",
            wait({"Retry-After": "{date}", "Date": "{now}"}),
        ),
        "reset-length": (
            "the time until a limit is full",
            wait({**_NONE_LEFT, "x-ratelimit-reset-requests": "1s"}),
        ),
        "reset-minutes": (
            "the same in minutes and seconds",
            wait({**_NONE_LEFT, "x-ratelimit-reset-requests": "0m1s"}),
        ),
        "reset-unix": (
            "the same as seconds since 1970",
            wait({**_NONE_LEFT, "x-ratelimit-reset-requests": "{unix}"}),
        ),
        "reset-unix-ms": (
            "the same as milliseconds since 1970",
            wait({**_NONE_LEFT, "x-ratelimit-reset-requests": "{unix-ms}"}),
        ),
        "reset-iso": (
            "the same as a date of ISO 8601",
            wait({**_NONE_LEFT, "x-ratelimit-reset-requests": "{iso}"}),
        ),
        "reset-anthropic": (
            "Anthropic's headers",
            wait(
                {
                    "anthropic-ratelimit-input-tokens-remaining": "0",
                    "anthropic-ratelimit-input-tokens-reset": "{iso}",
                }
            ),
        ),
        "reset-openrouter": (
            "OpenRouter's headers",
            wait({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "{unix-ms}"}),
        ),
        "wait-litellm": (
            "the wait of the provider behind LiteLLM",
            wait({"llm_provider-retry-after": "1"}, _LIMIT),
        ),
        "wait-google": (
            "Google's wait in the body",
            wait({}, {"error": {"code": 429, "details": [{"retryDelay": "1s"}]}}),
        ),
        "wait-words": (
            "the wait in a sentence",
            wait({}, {"error": {"message": "Rate limit reached. Please try again in 1s."}}),
        ),
        "wait-html": ("a page without a wait", wait({}, _HTML)),
        "wait-unknown": ("no wait at all", wait({}, _LIMIT)),
        "wait-a-day": ("a day to wait", wait({"Retry-After": "86400"}, _LIMIT)),
        "too-large": (
            "it is above the limit, so no wait helps",
            openai(
                429,
                "Request too large for gpt-4.1 on tokens per min (TPM): Limit 30000, Requested "
                "36278.",
                "rate_limit_exceeded",
                type="tokens",
            ),
        ),
        "quota": (
            "the quota is used up",
            openai(429, "You exceeded your current quota.", "insufficient_quota"),
        ),
        "quota-litellm": (
            "the same behind LiteLLM",
            openai(
                429,
                "litellm.RateLimitError: RateLimitError: OpenAIException - You exceeded your "
                "current quota, please check your plan and billing details.",
                "429",
                type="throttling_error",
            ),
        ),
        "quota-google-day": (
            "Google's quota of a day",
            failure(
                429,
                {
                    "error": {
                        "code": 429,
                        "status": "RESOURCE_EXHAUSTED",
                        "message": "You exceeded your current quota.",
                        "details": [{"violations": [{"quotaId": "GenerateRequestsPerDay-Free"}]}],
                    }
                },
            ),
        ),
    },
    "5xx": {
        "server-error": ("the server failed", openai(500, "The server had an error.")),
        "html-502": ("a gateway lost the model", gateway_error(502, _HTML)),
        "busy-503": ("busy, with a time", failure(503, "Overloaded.", {"Retry-After": "0.2"})),
        "timeout-504": ("a gateway gave up waiting", gateway_error(504, "upstream timed out")),
        "cloudflare-520": ("a status of a network", failure(520, _HTML)),
        "overloaded-529": ("Anthropic is overloaded", failure(529, '{"type":"overloaded_error"}')),
        "error-in-200": (
            "an error with the status 200",
            raw(as_json({"error": {"message": "Upstream failed.", "code": 502}}), billed=False),
        ),
    },
    "usage": {
        "usage-missing": ("no usage", answer(usage=lambda _: NOTHING_SAID)),
        "usage-null": ("usage is null", answer(usage=lambda _: None)),
        "usage-empty": ("usage is empty", answer(usage=lambda _: {})),
        "usage-texts": (
            "numbers as texts",
            answer(usage=lambda asked: {name: str(each) for name, each in usage_of(asked).items()}),
        ),
        "usage-floats": (
            "numbers with a point",
            answer(
                usage=lambda asked: {name: each * 1.0 for name, each in usage_of(asked).items()}
            ),
        ),
        "usage-negative": (
            "negative numbers",
            answer(usage=lambda _: {"prompt_tokens": -5, "completion_tokens": -5000}),
        ),
        "usage-zeros": (
            "zeros for a real answer",
            answer(usage=lambda _: {"prompt_tokens": 0, "completion_tokens": 0}),
        ),
        "usage-absurd": (
            "far too large a number",
            answer(usage=lambda asked: {**usage_of(asked), "completion_tokens": 1e18}),
        ),
        "usage-total-only": (
            "the total alone",
            answer(usage=lambda asked: {"total_tokens": usage_of(asked)["total_tokens"]}),
        ),
        "usage-prompt-and-total": (
            "prompt and total",
            answer(
                usage=lambda asked: {
                    "prompt_tokens": asked.prompt,
                    "total_tokens": usage_of(asked)["total_tokens"],
                }
            ),
        ),
        "usage-reasoning": (
            "tokens of reasoning as a part of the answer",
            answer(
                usage=lambda asked: {
                    **usage_of(asked, asked.completion + 30),
                    "completion_tokens_details": {"reasoning_tokens": 30},
                },
                completion=lambda asked: asked.completion + 30,
            ),
        ),
        "usage-reasoning-in-total": (
            "reasoning in the total alone (Gemini)",
            answer(
                usage=lambda asked: {
                    **usage_of(asked),
                    "total_tokens": asked.prompt + asked.completion + 30,
                },
                completion=lambda asked: asked.completion + 30,
            ),
        ),
        "usage-cached": (
            "half of the prompt came from the cache",
            answer(
                usage=lambda asked: {
                    **usage_of(asked),
                    "prompt_tokens_details": {"cached_tokens": asked.prompt // 2},
                },
                cached=lambda asked: asked.prompt // 2,
            ),
        ),
        "usage-cached-anthropic": (
            "Anthropic's words: the input is without it",
            answer(
                usage=lambda asked: {
                    "input_tokens": asked.prompt - asked.prompt // 2,
                    "output_tokens": asked.completion,
                    "cache_read_input_tokens": asked.prompt // 2,
                },
                cached=lambda asked: asked.prompt // 2,
            ),
        ),
        "usage-cached-deepseek": (
            "the same in DeepSeek's words",
            answer(
                usage=lambda asked: {
                    **usage_of(asked),
                    "prompt_cache_hit_tokens": asked.prompt // 2,
                },
                cached=lambda asked: asked.prompt // 2,
            ),
        ),
        "usage-input-output": (
            "the names of other interfaces",
            answer(
                usage=lambda asked: {
                    "input_tokens": asked.prompt,
                    "output_tokens": asked.completion,
                }
            ),
        ),
        "usage-cost": (
            "a price beside the tokens (OpenRouter)",
            answer(usage=lambda asked: {**usage_of(asked), "cost": 0.25}, money=0.25),
        ),
        "cost-header": (
            "a price in a header (LiteLLM)",
            answer(headers={"x-litellm-response-cost": "0.125"}, money=0.125),
        ),
    },
    "content": {
        "refused": ("the model refuses", no_text(refusal="I can't help with that.")),
        "refused-parts": (
            "the model refuses in a part of the content",
            answer(lambda _: {"content": [{"type": "refusal", "refusal": "No."}]}),
        ),
        "refused-finish": ("the end says that it refuses", no_text(finish="refusal")),
        "filtered": ("a filter held all back", no_text(finish="content_filter")),
        "filtered-google": ("the same in Google's words", no_text(finish="SAFETY")),
        "filtered-part": (
            "a filter cut the text",
            answer(lambda text: {"content": text[:6]}, finish="content_filter"),
        ),
        "tool-call": (
            "a tool call in place of a text",
            no_text(tool_calls=[_CALL], finish="tool_calls"),
        ),
        "function-call": (
            "the same in an older form",
            no_text(function_call=_CALL["function"], finish="function_call"),
        ),
        "malformed-call": (
            "a tool call that is none (Gemini)",
            no_text(finish="MALFORMED_FUNCTION_CALL"),
        ),
        "reasoning-only": ("reasoning used up max_tokens", reasoned()),
        "reasoning-field": (
            "the same, with the reasoning in a field",
            reasoned(reasoning_content="Let me see"),
        ),
        "reasoning-beside": (
            "reasoning beside a text",
            answer(lambda text: {"content": text, "reasoning_content": "Let me see"}),
        ),
        "empty-text": ("an empty text", answer(lambda _: {"content": ""})),
        "blank": ("a text of spaces", answer(lambda _: {"content": " \n"})),
        "null": ("no text", no_text()),
        "parts": (
            "the text in parts",
            answer(lambda text: {"content": [{"type": "text", "text": text}]}),
        ),
        "thinking-parts": (
            "reasoning and text in parts (Mistral)",
            answer(
                lambda text: {
                    "content": [
                        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]},
                        {"type": "text", "text": text},
                    ]
                }
            ),
        ),
        "content-object": (
            "the text in an object",
            answer(lambda text: {"content": {"type": "text", "text": text}}),
        ),
        "think-tags": (
            "reasoning in tags before the text",
            answer(lambda text: {"content": f"<think>Hm</think>{text}"}),
        ),
        "fenced": (
            "a fence around the text",
            answer(lambda text: {"content": f"```json\n{text}\n```"}),
        ),
        "prose": (
            "words around the text",
            answer(lambda text: {"content": f"Here it is: {text}\nAnything else?"}),
        ),
        "cut-text": ("max_tokens cut the text", answer(finish="length")),
        "cut-text-google": ("the same in Google's words", answer(finish="MAX_TOKENS")),
        "failed-half": (
            "the model failed on the way (OpenRouter)",
            answer(lambda text: {"content": text[:6]}, finish="error"),
        ),
        "failed-vllm": (
            "the same in vLLM's words",
            answer(lambda text: {"content": text[:6]}, finish="abort"),
        ),
        "failed-deepseek": (
            "the same in DeepSeek's words",
            answer(lambda text: {"content": text[:6]}, finish="insufficient_system_resource"),
        ),
        "failed-choice": (
            "the same with an error in the choice",
            answer(
                lambda _: {"content": ""},
                finish="error",
                edit=lambda body: body.replace(
                    b'"finish_reason": "error"',
                    b'"finish_reason": "error", "error": {"code": 502, "message": "Failed."}',
                ),
            ),
        ),
        "raw-tab": (
            "a tab in the text as it is",
            answer(
                lambda text: {"content": f"{text}\tNext"},
                edit=lambda body: body.replace(b"\\t", b"\t"),
            ),
        ),
        "surrogate": (
            "half of a character",
            answer(lambda text: {"content": f"{text} \ud83d"}),
        ),
        "emoji": (
            "a character in two halves",
            answer(lambda text: {"content": text + "\U0001f600"}),
        ),
        "nul": ("a character 0", answer(lambda text: {"content": f"{text}\x00"})),
        "long": ("a text of a megabyte", answer(lambda text: {"content": text + "x" * 2**20})),
        "no-choices": (
            "no choices",
            lambda asked: raw(as_json({"choices": [], "usage": usage_of(asked)}))(asked),
        ),
        "null-choices": ("choices are null", raw(b'{"choices": null}')),
        "not-json": ("a page with the status 200", raw(_HTML.encode())),
        "empty-body": ("no body", raw(b"")),
        "other-json": ("JSON of another kind", raw(b"[1, 2]")),
    },
    "connection": {
        "reset": ("the connection ends before the answer", lost("reset", prompt=True)),
        "reset-after-headers": ("it ends after the headers", lost("headers", whole=True)),
        "short-body": ("the body is shorter than it says", lost("short", whole=True)),
        "cut-chunks": ("half of the chunks are missing", lost("cut-chunks", whole=True)),
        "cut-at-end": (
            "all but the end of the body",
            lost("cut-at-end", whole=True),
        ),
        "open-end": (
            "the same, and the connection stays open",
            lost("open-end", whole=True),
        ),
        "silence": ("no answer comes", lost("silence", whole=True)),
        "chunked": ("the body comes in chunks", answer(wire="chunked")),
        "informational": ("another response comes before it", answer(wire="informational")),
        "http-10": ("the server is an old one", answer(wire="http-1.0")),
        "closed-after": ("the connection ends after it", answer(wire="close")),
        "gzip": (
            "the body is packed",
            answer(headers={"Content-Encoding": "gzip"}, edit=gzip.compress),
        ),
        "deflate": (
            "the body is packed in another way",
            answer(headers={"Content-Encoding": "deflate"}, edit=zlib.compress),
        ),
        "one-byte": ("each byte comes alone", answer(wire="one-byte")),
        "slow-bytes": ("each byte comes alone, for three seconds", answer(wire="slow-bytes")),
    },
    "stream": {
        "delta-null": (
            "an event with the delta null",
            answer(events=lambda events: [*events[:2], event(None), *events[2:]]),
        ),
        "delta-missing": (
            "an event without a delta",
            answer(events=lambda events: [*events[:2], {"choices": [{"index": 0}]}, *events[2:]]),
        ),
        "choices-null": (
            "an event with the choices null",
            answer(events=lambda events: [*events[:2], {"choices": None}, *events[2:]]),
        ),
        "azure-first-event": (
            "a first event about filters",
            answer(events=first({"choices": [], "prompt_filter_results": [{}]})),
        ),
        "usage-with-choice": (
            "the usage in an event with a choice",
            answer(
                events=lambda events: [
                    {**each, "choices": [{"index": 0, "delta": {}}]} if "usage" in each else each
                    for each in events
                ]
            ),
        ),
        "empty-event": (
            "an event without data",
            answer(edit=lambda body: body.replace(b"data: {", b"data:\n\ndata: {")),
        ),
        "null-event": (
            "an event whose data are null",
            answer(edit=lambda body: body.replace(b"data: {", b"data: null\n\ndata: {")),
        ),
        "whole-message-beside": (
            "the text so far beside each delta",
            answer(events=with_message),
        ),
        "whole-message-last": (
            "the whole text again in the last event",
            answer(events=lambda events: [*events[:-2], *with_message(events)[-2:]]),
        ),
        "after-done": (
            "words after the end",
            answer(edit=lambda body: body.replace(b"[DONE]\n\n", b"[DONE]\n\ndata: bye\n\n")),
        ),
        "error-event-502": (
            "a gateway's error in the middle",
            answer(events=ends_with({"message": "Upstream failed.", "code": 502})),
        ),
        "error-event-429": (
            "a limit that ends an answer",
            answer(events=ends_with({"message": "Slow down.", "code": 429})),
        ),
        "error-event": (
            "an error in the middle",
            answer(events=ends_with({"message": "Upstream failed."})),
        ),
        "unfinished": ("no event has an end", answer(events=lambda events: events[:3])),
        "comments": (
            "comments between the events",
            answer(edit=lambda body: body.replace(b"data: {", b": alive\n\ndata: {")),
        ),
        "crlf": ("lines end in CR LF", answer(edit=lambda body: body.replace(b"\n", b"\r\n"))),
        "no-done": (
            "no [DONE] at the end",
            answer(edit=lambda body: body.replace(b"data: [DONE]\n\n", b"")),
        ),
        "bom": ("a byte-order mark", answer(edit=lambda body: b"\xef\xbb\xbf" + body)),
        "nan": (
            "a number that JSON does not know",
            answer(edit=lambda body: body.replace(b'"index": 0', b'"index": 0, "p": NaN')),
        ),
        "json-instead": (
            "a whole answer in place of a stream",
            lambda asked: answer()(replace(asked, stream=False)),
        ),
        "events-instead": (
            "a stream in place of a whole answer",
            lambda asked: answer()(replace(asked, stream=True)),
        ),
    },
}

ODD_ANSWERS: Mapping[str, OddAnswer] = {
    name: OddAnswer(group, about, make)
    for group, entries in _TABLE.items()
    for name, (about, make) in entries.items()
}
"""Every odd answer by its name."""
