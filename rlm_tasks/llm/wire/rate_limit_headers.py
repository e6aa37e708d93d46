"""The limits that a provider sends in its headers, and the wait that it asks for with a 429.

`llm.endpoint` reads both.  Begin with `rate_limits` and `wait_s`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from resilience.faults import asked_wait_s

DEFAULT_WAIT_S = 1.0
"""The wait after a 429 without a retry time."""


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


def rate_limits(headers: Mapping[str, str]) -> RateLimitHeaders:
    """Return the limits of headers ``x-ratelimit-{limit,remaining,reset}-{requests,tokens}``.

    Times may have the forms that `seconds` reads.
    """

    def state_of(unit: str) -> LimitState:
        limit, remaining, reset = (
            headers.get(f"x-ratelimit-{each}-{unit}", "")
            for each in ("limit", "remaining", "reset")
        )
        return LimitState(_number(limit), _number(remaining), seconds(reset))

    return RateLimitHeaders(state_of("requests"), state_of("tokens"))


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float | None:
    """Return a provider's text of a time, `3`, `12ms`, `1h2m3.5s`, in seconds; None for others."""
    length = r"(\d{1,9}(?:\.\d{1,9})?)(ms|[smhd])"
    if re.fullmatch(f"(?:{length})+", text.strip()):
        return sum(float(count) * _UNITS[unit] for count, unit in re.findall(length, text))
    return _number(text)


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\s*\d{1,12}(\.\d{1,9})?\s*", text) else None


def wait_s(headers: Mapping[str, str]) -> float:
    """Return the seconds to wait after a 429, from its headers."""
    limits = rate_limits(headers)
    spent = [
        each.reset_s or 0.0 for each in (limits.requests, limits.tokens) if each.remaining == 0
    ]
    return asked_wait_s(headers) or max(spent, default=0.0) or DEFAULT_WAIT_S
