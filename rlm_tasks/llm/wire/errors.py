"""The errors of a call to a model, as `llm.endpoint` raises them, read from a provider's words.

Users catch them; no message contains a part of the key or of the question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resilience.errors import Category, RateLimited, RlmError
from resilience.faults import asked_wait_s
from rlm_tasks.llm.wire.rate_limit_headers import wait_s

if TYPE_CHECKING:
    from rlm_tasks.llm.wire.answers import TokenUsage
    from rlm_tasks.settings.llm import EndpointSettings

_TEMPORARY = {408, 409, 425}  # statuses below 500 that may succeed at the next try
_QUOTED = 16  # a common text of this many characters is a quotation of the question


class UnusableAnswer(RlmError):
    """A response that is no answer: not JSON, empty, or cut off.  It may cost money.

    Has the `endpoint`, `why`, and the `usage` that it states.
    """

    code = "UNUSABLE_ANSWER"
    category = Category.TRANSIENT
    retryable = True
    trips = True

    def __init__(self, endpoint: str, why: str, usage: TokenUsage | None = None) -> None:
        self.endpoint, self.why, self.usage = endpoint, why, usage
        super().__init__(f"endpoint {endpoint}: its answer cannot be used ({why})")


FAULTS = {
    "REFUSED": "the model refused to answer; change the item or the prompt",
    "CONTENT_FILTERED": "a filter of the provider held the answer back; change the item or the "
    "prompt",
    "TOOL_CALL": "the model called a tool instead of writing a text; no tool was offered to it, "
    "so ask for a text in the prompt",
    "ANSWER_EMPTY": "the answer has no text",
}
"""The code of each answer without a text -> its cause, and what to do."""
NO_ROOM = "; all max_tokens went into its reasoning, or none were left: raise max_tokens"


class NoAnswerText(RlmError):
    """An answer without a text: a refusal, a filter, a tool call, or nothing.

    It is the item's own fault, so it is not asked for again, and the endpoint is well.  `code` is
    REFUSED, CONTENT_FILTERED, TOOL_CALL or ANSWER_EMPTY.  Has the `model`.
    """

    category = Category.VALIDATION

    def __init__(self, model: str, code: str, finish: str = "") -> None:
        self.model, self.code = model, code
        more = NO_ROOM if code == "ANSWER_EMPTY" and finish == "length" else ""
        super().__init__(f"model {model}: {FAULTS[code]}{more}")


class ProviderRefused(RlmError):
    """A refusal that will be the same at the next try, until a person acts.

    Has the `endpoint`, `why`, and the HTTP `status`.  `category` is AUTH, QUOTA or VALIDATION;
    `code` is CONTEXT_LENGTH_EXCEEDED if the prompt is too long.
    """

    def __init__(
        self, endpoint: str, category: Category, code: str, why: str, status: int = 0
    ) -> None:
        self.endpoint, self.category, self.code, self.why = endpoint, category, code, why
        self.status = status  # 0: no request was sent
        super().__init__(f"endpoint {endpoint}: {why}")


class ProviderDown(ConnectionError):
    """An endpoint that cannot be reached, or fails.

    Has the `endpoint`, `why`, and the time to wait as ``retry-after`` in `headers`.  `sent` says
    whether it got the question, so that it may bill the prompt.
    """

    def __init__(
        self, endpoint: str, why: str, wait_s: float | None = None, *, sent: bool = False
    ) -> None:
        self.endpoint, self.why, self.sent = endpoint, why, sent
        # `classify` reads the wait from there.
        self.headers = {} if wait_s is None else {"retry-after": f"{wait_s:.3f}"}
        super().__init__(f"endpoint {endpoint}: {why}")


# --- reading a provider's error ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """A response that reports an error, by its status, or in its body with the status 200."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    now: float = 0.0  # time of its arrival, in seconds since 1970


def error_of(
    response: ErrorResponse, endpoint: EndpointSettings, private: Sequence[str]
) -> Exception:
    """Return our error for a response; no message of it quotes one of the `private` texts."""
    name, status = endpoint.name, response.status
    error = _error_in(response.body)
    if status == 402 or "insufficient_quota" in (error.get("code"), error.get("type")):
        why = f"its quota is used up ({status}); waiting does not help, see plan and billing"
        return ProviderRefused(
            endpoint=name,
            category=Category.QUOTA,
            code="INSUFFICIENT_QUOTA",
            why=why,
            status=status,
        )
    if status == 429:
        return RateLimited(
            f"endpoint {name}",
            wait_s(response.headers, response.body, response.now),
            "the provider answered 429",
        )
    if status in (401, 403):
        why = f"it does not accept its key ({status}); see {endpoint.key_env}"
        return ProviderRefused(
            endpoint=name, category=Category.AUTH, code="UNAUTHORISED", why=why, status=status
        )
    if status < 300:
        return UnusableAnswer(name, _reason(error, private))
    if status in _TEMPORARY or status >= 500:
        sent = status in (502, 504)
        later_s = asked_wait_s(response.headers, response.now)
        return ProviderDown(name, f"answers {status}", later_s, sent=sent)
    code = (
        "CONTEXT_LENGTH_EXCEEDED"
        if error.get("code") == "context_length_exceeded"
        else "INVALID_REQUEST"
    )
    url = endpoint.base_url or "OPENAI_BASE_URL"
    where = f"; does {url} have its right end, such as /v1?" if status == 404 else ""
    why = f"refuses the question ({status}): {_reason(error, private)}{where}"
    return ProviderRefused(
        endpoint=name, category=Category.VALIDATION, code=code, why=why, status=status
    )


def refused_parameter(response: ErrorResponse) -> str | None:
    """Return the name of the parameter that a provider refuses; None for another refusal."""
    error = _error_in(response.body)
    unsupported = "unsupported" in str(error.get("message")).lower()
    return error.get("param") if unsupported and isinstance(error.get("param"), str) else None


def _error_in(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    error = found.get("error") if isinstance(found, dict) else None
    return error if isinstance(error, dict) else {}


def _reason(error: Mapping[str, Any], private: Sequence[str]) -> str:
    """Return the provider's message, up to 200 characters, unless it quotes a private text."""
    message = error.get("message")
    if not isinstance(message, str):
        return "without a reason"
    message = " ".join(message.split())[:200]
    pieces = {message[at : at + _QUOTED] for at in range(max(1, len(message) - _QUOTED + 1))}
    for text in (" ".join(each.split()) for each in private if each):
        if "\\" in message or text in message or any(piece in text for piece in pieces):
            return "its reason is hidden, because it quotes the question"
    return message
