"""The limits that a provider sends in its headers, and the wait that it asks for with a 429.

`llm.endpoint` reads the limits of each answer with `rate_limits`, and the wait with `wait_s`.
Providers write times in many ways: a length, a date, a point in time, a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from resilience.faults import LENGTH, asked_wait_s, time_of, wait_in

DEFAULT_WAIT_S = 1.0
"""The wait after a 429 without a retry time."""
GATEWAY_PREFIX = "llm_provider-"
"""LiteLLM's proxy hands on the headers of the provider behind it under this prefix."""
UNITS = {
    "requests": ("requests",),
    "tokens": ("tokens", "input-tokens", "output-tokens"),  # the last two are Anthropic's
}
"""Our units -> those in the names of headers."""


@dataclass(frozen=True, slots=True)
class LimitState:
    """A provider's limit in its window, the remaining amount, and the seconds until it is full.

    None: the provider did not send it.
    """

    limit: float | None = None
    remaining: float | None = None
    reset_s: float | None = None


@dataclass(frozen=True, slots=True)
class RateLimitHeaders:
    """A provider's limits, from the headers of one answer."""

    requests: LimitState
    tokens: LimitState


UNSTATED = LimitState()


def rate_limits(headers: Mapping[str, str], now: float = 0.0) -> RateLimitHeaders:
    """Return the limits of headers such as ``x-ratelimit-remaining-tokens``.

    `now` is the time in seconds since 1970, for resets that are points in time.  Anthropic's names
    (``anthropic-ratelimit-tokens-remaining``) and those behind a gateway are read as well.
    """
    every = _by_name(headers)
    now = time_of(every, now)
    return RateLimitHeaders(_state(every, "requests", now), _state(every, "tokens", now))


def _by_name(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers by lower-case name; those of the answering server come before others."""
    own = {name.lower(): str(value).strip() for name, value in headers.items()}
    behind = {
        name.removeprefix(GATEWAY_PREFIX): value
        for name, value in own.items()
        if name.startswith(GATEWAY_PREFIX)
    }
    return {**behind, **own}


def _state(headers: Mapping[str, str], unit: str, now: float) -> LimitState:
    """Return the state of the limit that has the least left."""
    states = [_state_of(headers, name, now) for name in UNITS[unit]]
    known = [each for each in states if each != UNSTATED]
    return min(known, key=_left, default=UNSTATED)


def _left(state: LimitState) -> float:
    return float("inf") if state.remaining is None else state.remaining


def _state_of(headers: Mapping[str, str], unit: str, now: float) -> LimitState:
    def header(what: str) -> str:
        names = (f"x-ratelimit-{what}-{unit}", f"anthropic-ratelimit-{unit}-{what}")
        return next((headers[name] for name in names if name in headers), "")

    return LimitState(
        _number(header("limit")), _number(header("remaining")), wait_in(header("reset"), now)
    )


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\s*\d{1,16}(\.\d{1,9})?\s*", text) else None


# --- the wait of a 429 ------------------------------------------------------------------------

_SPOKEN = re.compile(
    r"(?:try again|retry|wait|available|reset|replenish)[^\d\n]{0,40}?"
    rf"(?:(?P<length>\b(?:{LENGTH}(?:\s|,|\band\b)*)+)"
    r"|(?P<point>\d{4}-\d\d-\d\d[T ][\d:]{8}(?:\.\d{1,9})?(?:Z| ?UTC|[+-]\d\d:\d\d)?)"
    r"|(?:\bin|\bafter|\bfor)\W{1,3}(?P<seconds>\d{1,6}(?:\.\d{1,3})?)(?!\.?\w|\s+\w))",
    re.IGNORECASE | re.ASCII,
)
"""A sentence such as "Please try again in 1m20s"."""
_FIELD = re.compile(
    r"retry[_-]?(?:after|delay|in)(?P<ms>_?ms|_?milliseconds)?(?:_?s|_?seconds)?\b"
    r"\W{1,9}(?:seconds\W{1,9})?(?<![-\d])(?P<value>[\w.:+-]{1,40})",
    re.IGNORECASE | re.ASCII,
)
"""A field of a body with the wait: ``retryDelay`` of Google, ``retry_after`` of others."""
_STRUCTURED = re.compile(r"\b(?:remaining|r)=(\d+).*?\b(?:reset|t)=(\d+)")
"""The single header RateLimit of the newer drafts of the IETF: ``"default";r=0;t=50``."""


def wait_s(headers: Mapping[str, str], body: bytes = b"", now: float = 0.0) -> float:
    """Return the seconds to wait after a 429, from its headers, or else from its words.

    `now` is the time in seconds since 1970; the ``Date`` of the answer comes before it.
    """
    every = _by_name(headers)
    now = time_of(every, now)
    return (
        asked_wait_s(every, now)
        or _reset_s(every, now)
        or wait_in_body(body, now)
        or DEFAULT_WAIT_S
    )


def _reset_s(headers: Mapping[str, str], now: float) -> float:
    """Return the seconds until the used-up limits are full again, 0 if no header states them.

    All names are read that have a `reset` and a `remaining`, such as those of
    ``x-ratelimit-reset-tokens-minute``.  A reset without its `remaining` counts if no limit is
    known to be used up.
    """
    used_up, unstated = [0.0], [0.0]
    for name, text in headers.items():
        if "limit" not in name or "reset" not in name.split("-"):
            continue
        left = headers.get(name.replace("reset", "remaining"), "")
        remaining = 0.0 if left.startswith("-") else _number(left)
        if not remaining:
            (unstated if remaining is None else used_up).append(wait_in(text, now) or 0.0)
    if structured := _STRUCTURED.search(headers.get("ratelimit", "")):
        used_up.append(0.0 if int(structured[1]) else float(structured[2]))
    return max(used_up) or max(unstated)


def wait_in_body(body: bytes, now: float) -> float | None:
    """Return the seconds that a body asks for, in a field or in words; None if it asks for none."""
    text = body[:20_000].decode(errors="replace")
    if found := _FIELD.search(text):
        wait = wait_in(found["value"], now, unit_s=0.001 if found["ms"] else 1.0)
        if wait is not None:
            return wait
    found = _SPOKEN.search(text)
    return wait_in(found["length"] or found["point"] or found["seconds"], now) if found else None
