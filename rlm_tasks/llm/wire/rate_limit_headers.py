"""The limits that a provider sends in its headers, and the wait that it asks for with a 429.

`llm.endpoint` reads the limits of each answer with `rate_limits`, and the wait with `wait_s`.
Providers write times in many ways: a length, a date, a point in time, a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from resilience.faults import asked_wait_s, from_now_s, time_of

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
        _number(header("limit")), _number(header("remaining")), reset_s(header("reset"), now)
    )


# --- times ------------------------------------------------------------------------------------

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LENGTH = r"(\d{1,9}(?:\.\d{1,9})?)\s*(ms|s|m|h|d)"


def seconds(text: str) -> float | None:
    """Return a provider's text of a time, `3`, `12ms`, `1h2m3.5s`, in seconds; None for others."""
    if re.fullmatch(f"(?:{_LENGTH})+", text.strip()):
        return sum(float(count) * _UNITS[unit] for count, unit in re.findall(_LENGTH, text))
    return _number(text)


def reset_s(text: str, now: float) -> float | None:
    """Return the seconds until a limit is full again; None for an unknown text.

    It may be a length, or a point in time: ISO 8601, or seconds or milliseconds since 1970.
    """
    if (length := seconds(text)) is not None:
        return from_now_s(length, now)
    try:
        then = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        return None
    return max(0.0, then.timestamp() - now) if then.tzinfo else None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\s*\d{1,16}(\.\d{1,9})?\s*", text) else None


# --- the wait of a 429 ------------------------------------------------------------------------

_SPOKEN = re.compile(
    r"(?:try again|retry|wait|available|reset)\D{0,40}?\b((?:\d{1,9}(?:\.\d{1,9})?\s*"
    r"(?:ms|milliseconds?|s|secs?|seconds?|m|mins?|minutes?|h|hours?|d|days?)\b\s*)+|"
    r"(?:\d{1,9}(?:\.\d{1,9})?(?:ms|s|m|h|d))+)",
    re.IGNORECASE,
)
_WORDS = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(ms|milli|s|m|h|d)[a-z]*", re.IGNORECASE)
_RETRY_DELAY = re.compile(r'"retryDelay"\s*:\s*"([^"]{1,20})"')


def wait_s(headers: Mapping[str, str], body: bytes = b"", now: float = 0.0) -> float:
    """Return the seconds to wait after a 429, from its headers, or else from its words.

    `now` is the time in seconds since 1970; the ``Date`` of the answer comes before it.
    """
    every = _by_name(headers)
    now = time_of(every, now)
    if asked := asked_wait_s(every, now):
        return asked
    text = body[:20_000].decode(errors="replace")
    delay = _RETRY_DELAY.search(text)  # Google's
    return (
        _longest(_resets(every, now))
        or (seconds(delay[1]) if delay else None)
        or _spoken_s(text)
        or DEFAULT_WAIT_S
    )


def _resets(headers: Mapping[str, str], now: float) -> Iterable[float | None]:
    """Yield the seconds until each used-up limit is full again."""
    for unit in ("requests", "tokens"):
        for name in UNITS[unit]:
            state = _state_of(headers, name, now)
            if state.remaining == 0:
                yield state.reset_s
    # Without a unit: OpenRouter's, and those of a draft of the IETF.
    remaining, reset = (
        headers.get(f"x-ratelimit-{each}", headers.get(f"ratelimit-{each}", ""))
        for each in ("remaining", "reset")
    )
    if not _number(remaining):
        yield reset_s(reset, now)


def _longest(waits: Iterable[float | None]) -> float:
    return max((each for each in waits if each is not None), default=0.0)


def _spoken_s(text: str) -> float | None:
    """Return the wait in a sentence such as "Please try again in 1m20s"."""
    if not (found := _SPOKEN.search(text)):
        return None
    units = {**_UNITS, "milli": 0.001}
    return sum(float(count) * units[unit.lower()] for count, unit in _WORDS.findall(found[1]))
