"""The wait of a 429 in the dialects of providers and gateways."""

from __future__ import annotations

import pytest

from resilience.errors import RateLimited
from rlm_tasks.llm.wire.errors import ErrorResponse, error_of
from rlm_tasks.llm.wire.rate_limit_headers import DEFAULT_WAIT_S, LimitState, rate_limits, wait_s
from rlm_tasks.settings.llm import EndpointSettings

ENDPOINT = EndpointSettings(name="main", base_url="http://main/v1", key_env="MAIN_KEY")
NOW = 1_796_047_800.0  # 2026-11-30T14:10:00Z
DATE = {"date": "Mon, 30 Nov 2026 14:10:00 GMT"}
OTHER_CLOCK = NOW - 5000  # this machine's clock is wrong, so the answer's own Date must count
NONE_LEFT = {"x-ratelimit-remaining-requests": "0"}
OPENAI = (
    '{"error":{"message":"Rate limit reached for gpt-4.1 on tokens per min. Limit: 30000. %s"}}'
)

WAITS: dict[str, tuple[dict[str, str], str, float]] = {  # headers, body, seconds
    "seconds": ({"Retry-After": "2"}, "", 2),
    "fraction": ({"retry-after": "1.5"}, "", 1.5),
    "milliseconds": ({"retry-after-ms": "1500", "Retry-After": "2"}, "", 1.5),
    "date beside Date": ({"Retry-After": "Mon, 30 Nov 2026 14:10:42 GMT", **DATE}, "", 42),
    "date alone": ({"Retry-After": "Mon, 30 Nov 2026 14:10:03 GMT"}, "", 3),
    "date that is over": ({"Retry-After": "Mon, 30 Nov 2026 14:00:00 GMT"}, "", DEFAULT_WAIT_S),
    "Unix seconds in Retry-After": ({"Retry-After": "1796047830"}, "", 30),
    "Unix milliseconds in Retry-After": ({"Retry-After": "1796047830000"}, "", 30),
    "a day": ({"Retry-After": "86400"}, "", 86400),
    "minutes and seconds": ({**NONE_LEFT, "x-ratelimit-reset-requests": "6m0s"}, "", 360),
    "with the unit ms": (
        {**NONE_LEFT, "x-ratelimit-reset-requests": "120ms"},
        "",
        0.12,
    ),
    "hours": ({**NONE_LEFT, "x-ratelimit-reset-requests": "1h2m3.5s"}, "", 3723.5),
    "plain seconds": ({**NONE_LEFT, "x-ratelimit-reset-requests": "17"}, "", 17),
    "plain fraction": ({**NONE_LEFT, "x-ratelimit-reset-requests": "7.66"}, "", 7.66),
    "Unix seconds": ({**NONE_LEFT, "x-ratelimit-reset-requests": "1796047801"}, "", 1),
    "Unix seconds with a fraction": (
        {**NONE_LEFT, "x-ratelimit-reset-requests": "1796047802.5"},
        "",
        2.5,
    ),
    "Unix milliseconds": ({**NONE_LEFT, "x-ratelimit-reset-requests": "1796047804000"}, "", 4),
    "ISO 8601": ({**NONE_LEFT, "x-ratelimit-reset-requests": "2026-11-30T14:10:20Z"}, "", 20),
    "ISO 8601 with an offset": (
        {**NONE_LEFT, "x-ratelimit-reset-requests": "2026-11-30T15:10:20+01:00"},
        "",
        20,
    ),
    "the longer of two limits": (
        {
            **NONE_LEFT,
            "x-ratelimit-reset-requests": "2s",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "9s",
        },
        "",
        9,
    ),
    "a limit with some left does not count": (
        {"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "9h"},
        "",
        DEFAULT_WAIT_S,
    ),
    "Anthropic": (
        {
            "anthropic-ratelimit-input-tokens-remaining": "0",
            "anthropic-ratelimit-input-tokens-reset": "2026-11-30T14:10:12Z",
        },
        "",
        12,
    ),
    "Anthropic's requests": (
        {
            "anthropic-ratelimit-requests-remaining": "0",
            "anthropic-ratelimit-requests-reset": "2026-11-30T14:11:00Z",
        },
        "",
        60,
    ),
    "OpenRouter": (
        {
            "X-RateLimit-Limit": "20",
            "X-RateLimit-Remaining": "0",
            "X-RateLimit-Reset": "1796047830000",
        },
        "",
        30,
    ),
    "the draft of the IETF": ({"RateLimit-Remaining": "0", "RateLimit-Reset": "50"}, "", 50),
    "LiteLLM": ({"llm_provider-retry-after": "60"}, "", 60),
    "LiteLLM before OpenAI": (
        {
            "llm_provider-x-ratelimit-remaining-tokens": "0",
            "llm_provider-x-ratelimit-reset-tokens": "8s",
        },
        "",
        8,
    ),
    "a gateway's own wait counts first": (
        {"retry-after": "3", "llm_provider-retry-after": "60"},
        "",
        3,
    ),
    "Google": ({}, '{"error":{"details":[{"@type":"RetryInfo","retryDelay": "12s"}]}}', 12),
    "Google with a fraction": ({}, '[{"error":{"details":[{"retryDelay":"34.07s"}]}}]', 34.07),
    "a reset without its remaining": ({"x-ratelimit-reset-requests": "5s"}, "", 5),
    "Anthropic's reset without its remaining": (
        {"anthropic-ratelimit-requests-reset": "2026-11-30T14:10:12Z"},
        "",
        12,
    ),
    "a used-up limit counts before a reset without its remaining": (
        {**NONE_LEFT, "x-ratelimit-reset-requests": "2", "x-ratelimit-reset": "86400"},
        "",
        2,
    ),
    "less than none is left": (
        {"x-ratelimit-remaining-tokens": "-120", "x-ratelimit-reset-tokens": "5s"},
        "",
        5,
    ),
    "Groq": (
        {
            "retry-after": "2",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "2m59.56s",
        },
        "",
        2,
    ),
    "Cerebras": (
        {
            "x-ratelimit-remaining-tokens-minute": "0",
            "x-ratelimit-reset-tokens-minute": "11.38",
            "x-ratelimit-remaining-requests-day": "300",
            "x-ratelimit-reset-requests-day": "33011.38",
        },
        "",
        11.38,
    ),
    "Mistral": ({"ratelimitbysize-remaining": "0", "ratelimitbysize-reset": "31"}, "", 31),
    "Mistral's minute": (
        {"x-ratelimit-remaining-req-minute": "0", "x-ratelimit-reset-req-minute": "31"},
        "",
        31,
    ),
    "Together": ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "3"}, "", 3),
    "Azure in milliseconds": ({"x-ms-retry-after-ms": "1500"}, "", 1.5),
    "Azure's reset": ({**NONE_LEFT, "x-ratelimit-reset-requests": "10"}, "", 10),
    "one header of the IETF": ({"RateLimit": "limit=100, remaining=0, reset=50"}, "", 50),
    "one header of the newer IETF": ({"RateLimit": '"default";r=0;t=50'}, "", 50),
    "one header with some left": ({"RateLimit": '"default";r=3;t=50'}, "", DEFAULT_WAIT_S),
    "a unit in Retry-After": ({"Retry-After": "1m30s"}, "", 90),
    "words of a unit in Retry-After": ({"Retry-After": "2 seconds"}, "", 2),
    "ISO 8601 in Retry-After": ({"Retry-After": "2026-11-30T14:10:12Z"}, "", 12),
    "two headers of one name": ({"Retry-After": "5, 5"}, "", 5),
    "in quotes": ({"Retry-After": '"5"'}, "", 5),
    "a date of 1994's form": ({"Retry-After": "Monday, 30-Nov-26 14:10:12 GMT"}, "", 12),
    "a reset as a date of HTTP": (
        {**NONE_LEFT, "x-ratelimit-reset-requests": "Mon, 30 Nov 2026 14:10:12 GMT"},
        "",
        12,
    ),
    "ISO 8601 without a zone": (
        {**NONE_LEFT, "x-ratelimit-reset-requests": "2026-11-30T14:10:12"},
        "",
        12,
    ),
    "ISO 8601 with nanoseconds": (
        {**NONE_LEFT, "x-ratelimit-reset-requests": "2026-11-30T14:10:12.123456789Z"},
        "",
        12.1,
    ),
    "a length of ISO 8601": ({**NONE_LEFT, "x-ratelimit-reset-requests": "PT1M30S"}, "", 90),
    "Unix microseconds": ({**NONE_LEFT, "x-ratelimit-reset-requests": "1796047812000000"}, "", 12),
    "Unix nanoseconds": (
        {**NONE_LEFT, "x-ratelimit-reset-requests": "1796047812000000000"},
        "",
        12,
    ),
    "capitals and blanks": ({**NONE_LEFT, "x-ratelimit-reset-requests": "1H 2M"}, "", 3720),
    "a time that is over": ({"Retry-After": "1796047000"}, "", DEFAULT_WAIT_S),
    "LiteLLM before Anthropic": (
        {
            "llm_provider-anthropic-ratelimit-tokens-remaining": "0",
            "llm_provider-anthropic-ratelimit-tokens-reset": "2026-11-30T14:10:12Z",
        },
        "",
        12,
    ),
    "LiteLLM's own limit": ({}, "Remaining: 0. Limit resets at: 2026-11-30 14:10:12 UTC", 12),
    "a field of the body": ({}, '{"detail":"slow down","retry_after":12}', 12),
    "a field in milliseconds": ({}, '{"retry_after_ms": 1500}', 1.5),
    "Google's within a text": ({}, r'{"message":"{\"retryDelay\": \"17s\"}"}', 17),
    "Google with nested seconds": ({}, '{"retryDelay": {"seconds": 12}}', 12),
    "a field below zero": ({}, '{"retry_after": -5}', DEFAULT_WAIT_S),
    "words in milliseconds": ({}, "Try again in 20 milliseconds.", 0.02),
    "words in minutes and seconds": ({}, "Try again in 1 minute and 20 seconds.", 80),
    "words without a unit": ({}, '{"error":"Retry after 12."}', 12),
    "a number of attempts is no wait": ({}, "Retry after 3 attempts.", DEFAULT_WAIT_S),
    "OpenAI's words": ({}, OPENAI % "Please try again in 1m20s.", 80),
    "OpenAI's words in milliseconds": ({}, OPENAI % "Please try again in 120ms.", 0.12),
    "OpenAI's words with a fraction": ({}, OPENAI % "Please try again in 7.66s. Visit", 7.66),
    "Azure's words": ({}, "Please retry after 26 seconds.", 26),
    "words in minutes": ({}, "Try again in 2 minutes.", 120),
    "LiteLLM's words": ({}, "No deployments available, Try again in 5 seconds.", 5),
    "no word of a time": ({}, OPENAI % "Slow down.", DEFAULT_WAIT_S),
    "a limit in words is no wait": ({}, "Limit 30000 tokens. Used 29000.", DEFAULT_WAIT_S),
    "zero": ({"Retry-After": "0"}, "", DEFAULT_WAIT_S),
    "a negative number": ({"Retry-After": "-3"}, "", DEFAULT_WAIT_S),
    "words in Retry-After": ({"Retry-After": "soon"}, "", DEFAULT_WAIT_S),
    "nonsense": ({**NONE_LEFT, "x-ratelimit-reset-requests": "NaN"}, "\xff\x00", DEFAULT_WAIT_S),
    "digits without end": ({"Retry-After": "9" * 400}, "", DEFAULT_WAIT_S),
    "nothing": ({}, "", DEFAULT_WAIT_S),
}


@pytest.mark.parametrize(("headers", "body", "meant_s"), WAITS.values(), ids=WAITS)
def test_a_429_gives_the_wait_that_is_meant(
    headers: dict[str, str], body: str, meant_s: float
) -> None:
    now = OTHER_CLOCK if "date" in headers else NOW

    assert wait_s(headers, body.encode("latin-1"), now) == pytest.approx(meant_s, rel=0.1)
    found = error_of(ErrorResponse(429, headers, body.encode("latin-1"), now), ENDPOINT, ["key"])
    assert isinstance(found, RateLimited)
    assert found.retry_after_s == pytest.approx(meant_s, rel=0.1)


def test_limits_are_read_behind_a_gateway_and_in_anthropics_names() -> None:
    behind = rate_limits({"llm_provider-x-ratelimit-limit-requests": "300"})
    assert behind.requests == LimitState(300.0)

    input_binds = rate_limits(
        {
            "anthropic-ratelimit-input-tokens-limit": "40000",
            "anthropic-ratelimit-input-tokens-remaining": "10",
            "anthropic-ratelimit-output-tokens-limit": "8000",
            "anthropic-ratelimit-output-tokens-remaining": "7000",
            "anthropic-ratelimit-output-tokens-reset": "2026-11-30T14:10:12Z",
        },
        NOW,
    )
    assert input_binds.tokens == LimitState(40_000.0, 10.0, None)
