"""The errors of providers, in the dialect of each, and their meaning to us."""

from __future__ import annotations

import json
from typing import Any

import pytest

from resilience.errors import Category, RateLimited
from resilience.faults import classify
from rlm_tasks.llm.wire.errors import (
    ErrorResponse,
    ProviderDown,
    ProviderRefused,
    UnusableAnswer,
    error_of,
    refused_parameter,
)
from rlm_tasks.settings.llm import EndpointSettings

ENDPOINT = EndpointSettings(name="main", base_url="https://llm.test/v1", key_env="MAIN_KEY")
KEY = "sk-proj-Zx81qPwT4mNv7"
PROMPT = "Describe the otter that Ada Lovelace painted in Marylebone."


def body_of(body: Any) -> bytes:
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()


def meaning(
    status: int, body: Any, *private: str, tokens: float = 0.0, **headers: str
) -> Exception:
    """Return our error for a response; `private` are texts of the question."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return error_of(
        ErrorResponse(status, named, body_of(body)),
        ENDPOINT,
        [KEY, *(private or (PROMPT,))],
        tokens=tokens,
    )


def error(message: str, code: Any = None, type: str = "invalid_request_error", **more: Any) -> Any:
    """Return a body of OpenAI's form."""
    return {"error": {"message": message, "type": type, "param": None, "code": code, **more}}


LONG = "CONTEXT_LENGTH_EXCEEDED"
FILTERED = "CONTENT_FILTERED"
LARGE = "REQUEST_TOO_LARGE"
QUOTA = "INSUFFICIENT_QUOTA"
KEYLESS, FORBIDDEN = "UNAUTHORISED", "FORBIDDEN"
INVALID, MODEL = "INVALID_REQUEST", "MODEL_NOT_FOUND"
RAW = json.dumps(error("This model's maximum context length is 32768 tokens.", 400))
GOOGLE_TEXT = (
    "You exceeded your current quota, please check your plan and billing details. For more "
    "information on this error, head to: https://ai.google.dev/gemini-api/docs/rate-limits."
)


def google(code: int, message: str, status: str, *details: Any) -> Any:
    return [{"error": {"code": code, "message": message, "status": status, "details": [*details]}}]


def per(window: str) -> Any:
    return {
        "@type": "type.googleapis.com/google.rpc.QuotaFailure",
        "violations": [{"quotaId": f"GenerateRequestsPer{window}PerProjectPerModel-FreeTier"}],
    }


RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "17s"}
BLOCKED = {
    "error": {
        "message": "The response was filtered due to the prompt triggering Azure OpenAI's content "
        "management policy.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}},
    }
}

REFUSALS: dict[str, tuple[int, Any, str, str]] = {
    # a prompt that is too long
    "openai": (
        400,
        error(
            "This model's maximum context length is 8192 tokens. However, your messages resulted "
            "in 9000 tokens.",
            "context_length_exceeded",
        ),
        LONG,
        "maximum context length is 8192 tokens",
    ),
    "openai by code alone": (400, error("", "context_length_exceeded"), LONG, "prompt is too long"),
    "azure": (
        400,
        {
            "error": {
                "code": "context_length_exceeded",
                "message": "Input tokens exceed the configured limit of 272000 tokens.",
            }
        },
        LONG,
        "272000",
    ),
    "vllm of old": (
        400,
        {
            "object": "error",
            "message": "This model's maximum context length is 2048 tokens. However, you requested "
            "3000 tokens (2900 in the messages, 100 in the completion).",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
        LONG,
        "2048",
    ),
    "vllm": (
        400,
        error(
            "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
            400,
            "BadRequestError",
        ),
        LONG,
        "4096",
    ),
    "llama.cpp": (
        400,
        {
            "error": {
                "code": 400,
                "message": "the request exceeds the available context size. try increasing it",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 5000,
                "n_ctx": 4096,
            }
        },
        LONG,
        "available context size",
    ),
    "llama.cpp with 500": (
        500,
        error("the request exceeds the available context size", 500, "server_error"),
        LONG,
        "available context size",
    ),
    "llama-cpp-python": (
        400,
        error("Requested tokens (3000) exceed context window of 2048"),
        LONG,
        "2048",
    ),
    "anthropic": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "prompt is too long: 210000 tokens > 200000 maximum",
            },
        },
        LONG,
        "210000 tokens > 200000 maximum",
    ),
    "anthropic with max_tokens": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "input length and `max_tokens` exceed context limit: 190000 + 20000 > "
                "200000, decrease input length or `max_tokens` and try again",
            },
        },
        LONG,
        "190000 + 20000",
    ),
    "google": (
        400,
        google(
            400,
            "The input token count (1200000) exceeds the maximum number of tokens allowed "
            "(1048576).",
            "INVALID_ARGUMENT",
        ),
        LONG,
        "(1048576)",
    ),
    "litellm": (
        400,
        error(
            "litellm.ContextWindowExceededError: litellm.BadRequestError: "
            "ContextWindowExceededError: AzureException - Too much. Received Model Group=gpt-4\n"
            "Available Model Group Fallbacks=None",
            "400",
            None,  # type: ignore[arg-type]  # `param` is null on the wire
        ),
        LONG,
        "(400): Too much",
    ),
    "ollama": (400, {"error": "the input length exceeds the context length"}, LONG, "input length"),
    "mistral": (
        400,
        {
            "object": "error",
            "message": "Prompt contains 40000 tokens and 0 draft tokens, too large for model with "
            "32768 maximum context length",
            "type": "invalid_request_error",
            "code": "3051",
        },
        LONG,
        "40000 tokens",
    ),
    "groq": (
        400,
        error("Please reduce the length of the messages or completion.", "context_length_exceeded"),
        LONG,
        "reduce the length",
    ),
    "tgi": (
        422,
        {
            "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. "
            "Given: 5000 `inputs` tokens and 20 `max_new_tokens`",
            "error_type": "validation",
        },
        LONG,
        "Given: 5000",
    ),
    "tgi with 413": (
        413,
        {"error": "`inputs` must have less than 1024 tokens. Given: 2000", "error_type": "x"},
        LONG,
        "Given: 2000",
    ),
    "sglang": (
        400,
        {
            "object": "error",
            "message": "The input (5000 tokens) is longer than the model's context length (4096).",
        },
        LONG,
        "5000 tokens",
    ),
    "xai": (
        400,
        {
            "code": "Client specified an invalid argument",
            "error": "This model's maximum prompt length is 131072 but the request contains 200000 "
            "tokens.",
        },
        LONG,
        "131072",
    ),
    "openrouter": (
        400,
        {
            "error": {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {"raw": RAW, "provider_name": "Some"},
            }
        },
        LONG,
        "32768 tokens",
    ),
    "bedrock": (400, {"message": "Input is too long for requested model."}, LONG, "too long"),
    # content that a filter refuses
    "azure's filter": (400, BLOCKED, FILTERED, "change the item"),
    "openai's filter": (
        400,
        error(
            "Your request was rejected as a result of our safety system.",
            "content_policy_violation",
        ),
        FILTERED,
        "safety system",
    ),
    "google's filter": (
        400,
        google(400, "The prompt was blocked: PROHIBITED_CONTENT", "INVALID_ARGUMENT"),
        FILTERED,
        "PROHIBITED_CONTENT",
    ),
    "litellm's filter": (
        400,
        error("litellm.ContentPolicyViolationError: AzureException - no", "400"),
        FILTERED,
        "no",
    ),
    "openrouter's moderation": (
        403,
        {
            "error": {
                "code": 403,
                "message": "Your chosen model requires moderation and your input was flagged",
                "metadata": {"reasons": ["violence"], "flagged_input": "Ada Lovelace painted"},
            }
        },
        FILTERED,
        "input was flagged",
    ),
    "anthropic's filter": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "Output blocked by content filtering policy",
            },
        },
        FILTERED,
        "content filtering policy",
    ),
    # keys and rights
    "a wrong key": (
        401,
        error(f"Incorrect API key provided: {KEY[:8]}***{KEY[-4:]}.", "invalid_api_key"),
        KEYLESS,
        "does not accept its key (401); see MAIN_KEY",
    ),
    "litellm's wrong key for its provider": (
        401,
        error(
            "litellm.AuthenticationError: AuthenticationError: OpenAIException - Invalid API Key",
            "401",
            "authentication_error",
        ),
        KEYLESS,
        "does not accept its key (401); see MAIN_KEY; it says: ",
    ),
    "google's wrong key": (
        400,
        google(
            400,
            "API key not valid. Please pass a valid API key.",
            "INVALID_ARGUMENT",
            {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"},
        ),
        KEYLESS,
        "does not accept its key (400)",
    ),
    "a model without access": (
        403,
        error("Project `proj_1` does not have access to model `gpt-5`", "model_not_found"),
        FORBIDDEN,
        "no access to the model (403): Project `proj_1` does not have access to model `gpt-5`",
    ),
    "litellm's model without access": (
        401,
        error(
            "team not allowed to access model. This team can only access models=['a']",
            "401",
            "team_model_access_denied",
        ),
        FORBIDDEN,
        "no access to the model (401)",
    ),
    "a model for verified organisations": (
        404,
        error("Your organization must be verified to use the model `o3`.", "model_not_found"),
        FORBIDDEN,
        "no access to the model (404)",
    ),
    "google's country": (
        400,
        google(400, "User location is not supported for the API use.", "FAILED_PRECONDITION"),
        FORBIDDEN,
        "does not serve this country or region (400)",
    ),
    "anthropic's unknown model": (
        404,
        {"type": "error", "error": {"type": "not_found_error", "message": "model: claude-9"}},
        MODEL,
        "does not have the model (404): model: claude-9",
    ),
    "google's day behind litellm": (
        429,
        error(
            "litellm.RateLimitError: VertexAIException - "
            + json.dumps(google(429, GOOGLE_TEXT, "RESOURCE_EXHAUSTED", per("Day"), RETRY)[0]),
            "429",
            "throttling_error",
        ),
        QUOTA,
        "used up (429)",
    ),
    "an unsupported country": (
        403,
        error(
            "Country, region, or territory not supported",
            "unsupported_country_region_territory",
            "request_forbidden",
        ),
        FORBIDDEN,
        "does not serve this country or region (403)",
    ),
    "a disabled account": (
        403,
        error("Your account has been deactivated.", "account_deactivated"),
        FORBIDDEN,
        "has disabled the account, its key or the service (403)",
    ),
    "an account closed by policy": (
        403,
        error(
            "Your access was terminated due to violation of our usage policies.",
            "access_terminated",
        ),
        FORBIDDEN,
        "has disabled the account, its key or the service (403)",
    ),
    "a 403 of google": (
        403,
        google(403, "The caller does not have permission", "PERMISSION_DENIED"),
        FORBIDDEN,
        "forbids the call (403): The caller does not have permission; check the rights of the key",
    ),
    "a firewall": (
        403,
        "<!DOCTYPE html><html><title>Just a moment</title></html>",
        FORBIDDEN,
        "does not let the call through (403): it answers with a page",
    ),
    # a quota that is used up
    "openai's quota": (
        429,
        error("You exceeded your current quota.", "insufficient_quota", "insufficient_quota"),
        QUOTA,
        "its quota is used up (429); waiting does not help",
    ),
    "openai's hard limit": (
        400,
        error("Billing hard limit has been reached", "billing_hard_limit_reached"),
        QUOTA,
        "used up (400)",
    ),
    "litellm's text of a quota": (
        429,
        error(
            "litellm.RateLimitError: RateLimitError: OpenAIException - You exceeded your current "
            "quota, please check your plan and billing details.",
            "429",
            "throttling_error",
        ),
        QUOTA,
        "used up (429)",
    ),
    "litellm's budget": (
        400,
        error(
            "Budget has been exceeded! Current cost: 1.2, Max budget: 1.0", "400", "budget_exceeded"
        ),
        QUOTA,
        "used up (400)",
    ),
    "litellm's budget with 429": (
        429,
        error("ExceededBudget: User=u over budget. Spend=2, Budget=1", "429", "budget_exceeded"),
        QUOTA,
        "used up (429)",
    ),
    "google's day": (
        429,
        google(429, GOOGLE_TEXT, "RESOURCE_EXHAUSTED", per("Day"), RETRY),
        QUOTA,
        "used up (429)",
    ),
    "google's free tier without the model": (
        429,
        google(
            429,
            f"{GOOGLE_TEXT} * Quota exceeded for metric: requests, limit: 0 Please retry in 17.2s.",
            "RESOURCE_EXHAUSTED",
            RETRY,
        ),
        QUOTA,
        "used up (429)",
    ),
    "anthropic's credit": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "Your credit balance is too low to access the Anthropic API.",
            },
        },
        QUOTA,
        "used up (400)",
    ),
    "openrouter's credits": (
        402,
        {"error": {"code": 402, "message": "Insufficient credits."}},
        QUOTA,
        "used up (402)",
    ),
    "openrouter's credits with 200": (
        200,
        {"error": {"code": 402, "message": "Insufficient credits."}},
        QUOTA,
        "used up (402)",
    ),
    "deepseek's balance": (402, error("Insufficient Balance"), QUOTA, "used up (402)"),
    # a call that is larger than a limit
    "openai's tokens a minute": (
        429,
        error(
            "Request too large for gpt-4o in organization org-1 on tokens per min (TPM): Limit "
            "30000, Requested 36278. The input or output tokens must be reduced.",
            "rate_limit_exceeded",
            "tokens",
        ),
        LARGE,
        "Limit 30000, Requested 36278",
    ),
    "groq's tokens a minute": (
        413,
        error(
            "Request too large for model `llama` on tokens per minute (TPM): Limit 6,000, "
            "Requested 10,000, please reduce your message size and try again.",
            "rate_limit_exceeded",
            "tokens",
        ),
        LARGE,
        "lower max_tokens, split the item",
    ),
    "anthropic's size": (
        413,
        {
            "type": "error",
            "error": {"type": "request_too_large", "message": "Request exceeds the maximum size"},
        },
        LARGE,
        "maximum size",
    ),
    "nginx's size": (
        413,
        "<html><title>413 Request Entity Too Large</title></html>",
        LARGE,
        "it answers with a page",
    ),
    # a model, an address, or a field
    "openai's unknown model": (
        404,
        error(
            "The model `gpt-9` does not exist or you do not have access to it.", "model_not_found"
        ),
        MODEL,
        "does not have the model (404): The model `gpt-9` does not exist",
    ),
    "azure's unknown deployment": (
        404,
        {
            "error": {
                "code": "DeploymentNotFound",
                "message": "The API deployment for this resource does not exist.",
            }
        },
        MODEL,
        "set `models` of the endpoint",
    ),
    "ollama's unknown model": (404, {"error": "model 'llama9' not found"}, MODEL, "llama9"),
    "openrouter's unknown model": (
        400,
        {"error": {"message": "foo/bar is not a valid model ID", "code": 400}},
        MODEL,
        "foo/bar",
    ),
    "fastapi's unknown path": (
        404,
        {"detail": "Not Found"},
        INVALID,
        "Not Found; does https://llm.test/v1 have its right end, such as /v1?",
    ),
    "a page in place of a path": (404, "<html>no</html>", INVALID, "it answers with a page"),
    "no body": (404, "", INVALID, "without a reason; does https://llm.test/v1"),
    "fastapi's field": (
        422,
        {
            "detail": [
                {
                    "type": "string_type",
                    "loc": ["body", "messages", 0, "content"],
                    "msg": "Input should be a valid string",
                    "input": PROMPT,
                }
            ]
        },
        INVALID,
        "(422): body.messages.0.content: Input should be a valid string",
    ),
    "mistral's field": (
        422,
        {
            "object": "error",
            "message": {
                "detail": [
                    {
                        "type": "less_than_equal",
                        "loc": ["body", "temperature"],
                        "msg": "Input should be less than or equal to 1.5",
                        "input": 2,
                    }
                ]
            },
        },
        INVALID,
        "body.temperature: Input should be less than or equal to 1.5",
    ),
    "fastapi's text": (422, {"detail": "Unknown role 'robot'"}, INVALID, "Unknown role 'robot'"),
    "tgi's field": (
        422,
        {
            "error": "Input validation error: `temperature` must be strictly positive",
            "error_type": "validation",
        },
        INVALID,
        "`temperature` must be strictly positive",
    ),
    "plain text": (400, "max_tokens must be above 0\n", INVALID, "max_tokens must be above 0"),
    "a page": (400, "<!doctype HTML><p>secret", INVALID, "it answers with a page"),
    "nothing": (400, "", INVALID, "refuses the question (400): without a reason"),
    "a schema": (
        400,
        error("Invalid schema for response_format 'answer': 'type' is required", param="x"),
        INVALID,
        "Invalid schema for response_format 'answer'",
    ),
    "max_tokens above the model's": (
        400,
        error("max_tokens is too large: 50000. This model supports at most 16384 tokens."),
        INVALID,
        "at most 16384",
    ),
    # redirects
    **{
        f"a redirect {status}": (
            status,
            "<html>Moved</html>",
            INVALID,
            f"redirects the call ({status})",
        )
        for status in (301, 302, 307, 308)
    },
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_has_the_code_of_its_cause_and_the_providers_words(name: str) -> None:
    status, body, code, words = REFUSALS[name]

    found = meaning(status, body)

    assert isinstance(found, ProviderRefused)
    assert (found.code, classify(found).retryable) == (code, False)
    assert words in str(found)
    category = {
        QUOTA: Category.QUOTA,
        KEYLESS: Category.AUTH,
        FORBIDDEN: Category.AUTH,
    }.get(code, Category.VALIDATION)
    assert found.category == category
    assert len(str(found)) < 450
    assert str(found).isprintable()
    assert not [each for each in (KEY[:7], KEY[-4:], "Lovelace", "secret") if each in str(found)]


WAITS: dict[str, tuple[int, Any, float]] = {
    "openai": (
        429,
        error(
            "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Used 29000, "
            "Requested 1500. Please try again in 1s.",
            "rate_limit_exceeded",
            "tokens",
        ),
        1.0,
    ),
    "google's minute": (
        429,
        google(429, GOOGLE_TEXT, "RESOURCE_EXHAUSTED", per("Minute"), RETRY),
        17.0,
    ),
    "google's minute without a time": (
        429,
        google(429, GOOGLE_TEXT, "RESOURCE_EXHAUSTED", per("Minute")),
        1.0,
    ),
    "google's minute behind litellm": (
        429,
        error(
            "litellm.RateLimitError: VertexAIException - "
            + json.dumps(google(429, GOOGLE_TEXT, "RESOURCE_EXHAUSTED", per("Minute"), RETRY)[0]),
            "429",
            "throttling_error",
        ),
        17.0,
    ),
    "groq's day": (
        429,
        error(
            "Rate limit reached on tokens per day (TPD): Limit 100000, Used 99900, Requested 500. "
            "Please try again in 1h5m45.6s."
        ),
        3945.6,
    ),
    "google's minute in words": (
        429,
        error(f"{GOOGLE_TEXT} Please retry in 26.5s.", 429, "RESOURCE_EXHAUSTED"),
        26.5,
    ),
    "words that begin with the same letter as minutes": (
        429,
        error("Rate limit reached. Please try again in 20 milliseconds."),
        0.02,
    ),
    "a limit of 0 or -1 is none": (
        429,
        {"error": {"metadata": {"headers": {"x-ratelimit-limit-tokens": "0"}}}},
        1.0,
    ),
    "a quota that comes back soon": (429, error("Quota exhausted. Try again in 2 minutes."), 120.0),
    "azure": (
        429,
        {
            "error": {
                "code": "429",
                "message": "Requests have exceeded token rate limit of your current pricing tier. "
                "Please retry after 6 seconds. Please go here: https://aka.ms/oai/quotaincrease",
            }
        },
        6.0,
    ),
    "tgi": (429, {"error": "Model is overloaded", "error_type": "overloaded"}, 1.0),
    "openrouter with 200": (
        200,
        {
            "error": {
                "code": 429,
                "message": "Rate limited",
                "metadata": {"headers": {"Retry-After": "9"}},
            }
        },
        9.0,
    ),
    "a page": (429, "<html>slow down</html>", 1.0),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_rate_limit_that_waiting_mends_is_waited_for(name: str) -> None:
    status, body, wait_s = WAITS[name]

    found = meaning(status, body, tokens=1500)

    assert isinstance(found, RateLimited)
    assert found.retry_after_s == pytest.approx(wait_s)


def test_a_call_above_the_limit_in_the_headers_of_a_429_is_refused() -> None:
    def answered(tokens: float) -> Exception:
        return meaning(
            429, error("Rate limit reached"), tokens=tokens, x_ratelimit_limit_tokens="30000"
        )

    assert isinstance(answered(30_000), RateLimited)
    found = answered(36_278)
    assert isinstance(found, ProviderRefused)
    assert (found.code, found.category) == (LARGE, Category.VALIDATION)
    assert "it allows 30,000 tokens at once, and the call may use 36,278" in str(found)


DOWN: dict[str, tuple[int, Any, bool, str]] = {
    "500": (
        500,
        error("Internal error", None, "server_error"),
        False,
        "answers 500: Internal error",
    ),
    "502 with a page": (502, "<html><h1>Bad Gateway</h1></html>", True, "answers 502"),
    "503": (503, {"error": "loading model"}, False, "answers 503: loading model"),
    "504": (504, "upstream timed out", True, "answers 504: upstream timed out"),
    "529 of anthropic": (
        529,
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
        False,
        "answers 529: Overloaded",
    ),
    "424 of tgi": (424, {"error": "Request failed", "error_type": "generation"}, False, "424"),
    "an event of anthropic": (
        200,
        'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Busy"}}',
        True,
        "answers 529: Busy",
    ),
    "an event of vllm": (
        200,
        error("engine died", 500, "InternalServerError"),
        True,
        "answers 500: engine died",
    ),
    "openrouter with 200": (
        200,
        {"error": {"code": 502, "message": "Provider returned error", "metadata": {"raw": "oops"}}},
        True,
        "answers 502: Provider returned error; oops",
    ),
}


@pytest.mark.parametrize("name", DOWN)
def test_a_failing_endpoint_is_asked_again_and_says_whether_it_got_the_question(name: str) -> None:
    status, body, sent, words = DOWN[name]

    found = meaning(status, body)

    assert isinstance(found, ProviderDown)
    assert (found.sent, classify(found).trips) == (sent, True)
    assert words in str(found)


def test_an_error_without_a_status_in_an_answer_is_no_answer() -> None:
    found = meaning(200, {"error": {"message": "Something odd"}})

    assert isinstance(found, UnusableAnswer)
    assert "Something odd" in str(found)


def test_a_redirect_names_the_address_without_its_query() -> None:
    found = meaning(301, "", Location=f"https://user:{KEY}@new.test/v1/x?key={KEY}")

    assert "redirects the call to https://new.test/v1/x (301), which is not followed" in str(found)


def test_a_message_is_one_printable_line_of_at_most_200_characters() -> None:
    found = meaning(400, error("a\u202e\x00 b\n" + "word " * 100))

    assert isinstance(found, ProviderRefused)
    shown = found.why.removeprefix("refuses the question (400): ")
    assert shown.startswith("a b word word")
    assert (len(shown), shown[-3:]) == (200, "...")


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        "{" * 9,
        b"\xff\xfe\x00".decode("latin1"),
        "null",
        "[[]]",
        '{"error": {"error": {}}}',
        '"text"',
        "9" * 5000,
    ],
)
def test_any_body_is_read(body: str) -> None:
    assert isinstance(meaning(400, body), ProviderRefused)


# --- parameters -------------------------------------------------------------------------------

EXTRA = {
    "type": "extra_forbidden",
    "loc": ["body", "stream_options"],
    "msg": "Extra inputs are not permitted",
    "input": {"include_usage": True},
}
PARAMETERS: list[tuple[int, Any, str | None]] = [
    (
        400,
        error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            "unsupported_parameter",
            param="max_tokens",
        ),
        "max_tokens",
    ),
    (
        400,
        error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead."
        ),
        "max_tokens",
    ),
    (400, error("Unrecognized request argument supplied: stream_options"), "stream_options"),
    (400, error("Unknown parameter: 'stream_options'.", "unknown_parameter"), "stream_options"),
    (422, {"detail": [EXTRA]}, "stream_options"),
    (422, {"object": "error", "message": {"detail": [EXTRA]}}, "stream_options"),
    (
        400,
        {"object": "error", "message": f"[{str(EXTRA)[:-1]}}}]", "type": "BadRequestError"},
        "stream_options",
    ),
    (400, error("stream_options: Extra inputs are not permitted"), "stream_options"),
    (400, error("property 'stream_options' is unsupported"), "stream_options"),
    (
        400,
        google(
            400,
            'Invalid JSON payload received. Unknown name "stream_options": Cannot find field.',
            "INVALID_ARGUMENT",
        ),
        "stream_options",
    ),
    (
        422,
        "Failed to deserialize the JSON body into the target type: unknown field `stream_options`",
        "stream_options",
    ),
    (
        400,
        error("litellm.UnsupportedParamsError: x does not support parameters: ['stream_options']"),
        "stream_options",
    ),
    (400, error("max_completion_tokens is not supported", None), "max_completion_tokens"),
    (
        400,
        error("max_tokens is too large: 50000. It supports at most 16384.", param="max_tokens"),
        None,
    ),
    (400, error("Invalid type for 'max_tokens': expected an integer"), None),
    (400, error("This model's maximum context length is 5 tokens, max_tokens is 9"), None),
    (403, error("max_tokens is not allowed"), None),
    (500, error("max_tokens is not supported"), None),
    (400, "", None),
]


@pytest.mark.parametrize(("status", "body", "name"), PARAMETERS)
def test_a_refused_parameter_is_recognised(status: int, body: Any, name: str | None) -> None:
    assert refused_parameter(ErrorResponse(status, {}, body_of(body))) == name


# --- hidden messages ------------------------------------------------------------------------

HIDDEN = "its reason is hidden, because it quotes the question"
LIMIT = "This model's maximum context length is 8192 tokens."
GERMAN = "Größe der Straße: 12 Meter, gemessen von Frau Müller"
SHOWN = [
    (LIMIT, "x"),
    (LIMIT, "length"),
    (LIMIT, "Maximum context"),
    (LIMIT, "8192"),
    (LIMIT, "the"),
    (LIMIT, "Ada"),
    (LIMIT, "\\"),
    (LIMIT, "???"),
    (LIMIT, ""),
    (LIMIT, "My log says: this model's maximum context length is 4096 tokens. Why?"),
    ("Invalid path C:\\temp", PROMPT),
    ("Unsupported value: 'temperature'", "Which temperature has the sea?"),
    ("The adamant server says no", "Ada"),
]
QUOTED = [
    (f"Cannot process: {PROMPT}", PROMPT),
    (f"Cannot process: {PROMPT.upper()}", PROMPT),
    (f"Cannot process: {' '.join(PROMPT)}", PROMPT),
    ("Cannot process: ...that Ada Lovelace painted...", PROMPT),
    ("Invalid input 'x'", "x"),
    ('Invalid input "length"', "length"),
    ("Invalid content: Ada", "Ada"),
    ("Ada", "Ada"),
    ("The word Lovelace is bad", "lovelace"),
    ("The name `Lovelace` is bad", PROMPT),
    ("Secret plan is refused", "secret plan"),
    (f"Bad: {json.dumps(GERMAN)}", GERMAN),
    (f"Bad: {json.dumps(json.dumps(GERMAN))}", GERMAN),
    (f"Bad: {GERMAN.encode()!r}", GERMAN),
    (f"Bad: {GERMAN!a}", GERMAN),
    (f"Bad: {GERMAN.encode('ascii', 'replace').decode()}", GERMAN),
    ("Bad: Gr&ouml;&szlig;e der Stra&szlig;e", GERMAN),
    ("Bad: Gr%C3%B6%C3%9Fe%20der%20Stra%C3%9Fe", GERMAN),
    ("Bad: the otter that\\\\nAda painted", "the otter that\nAda painted"),
    ("\u5bc6\u7801\u662f\u8702\u871c\u4e0d\u884c", "\u6211\u7684\u5bc6\u7801\u662f\u8702\u871c"),
    (f"{LIMIT} You sent: Ann: maximum context length is", "Ann: maximum context length is"),
]


def said(message: str, prompt: str) -> str:
    return str(meaning(400, error(message), prompt))


@pytest.mark.parametrize(("message", "prompt"), SHOWN)
def test_a_message_that_does_not_quote_the_question_is_shown(message: str, prompt: str) -> None:
    assert message in said(message, prompt)


@pytest.mark.parametrize(("message", "prompt"), QUOTED)
def test_a_message_that_quotes_the_question_is_hidden(message: str, prompt: str) -> None:
    assert HIDDEN in said(message, prompt)


@pytest.mark.parametrize(
    "quote", [KEY, KEY.upper(), KEY[4:12], KEY[-4:], f"sk-...{KEY[-4:]}", "sk-pr****", KEY[:8]]
)
def test_a_message_with_a_part_of_the_key_is_hidden(quote: str) -> None:
    assert HIDDEN in said(f"You sent {quote} to us", "x")
    assert HIDDEN in str(meaning(403, error(f"The key {quote} may not do that"), "x"))
    assert HIDDEN in str(meaning(503, error(f"The key {quote} is odd"), "x"))


@pytest.mark.parametrize("key", ["sk-litellm-master-Zx81", "litellm-master"])
def test_a_key_that_contains_a_providers_name_hides_only_messages_with_the_key(key: str) -> None:
    def shown(message: str) -> str:
        response = ErrorResponse(400, {}, body_of(error(message)))
        return str(error_of(response, ENDPOINT, [key, PROMPT], tokens=0.0))

    message = "The LiteLLM master has no such project"
    assert message in shown(message)
    for quote in (key, key.upper(), f"a{key}b"):
        assert HIDDEN in shown(f"litellm: {quote} is wrong")
