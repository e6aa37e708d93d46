"""The errors of a call to a model, as `llm.endpoint` raises them, read from a provider's words.

Users catch them; no message contains a part of the key or of the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from resilience.errors import Category, RateLimited, RlmError
from resilience.faults import asked_wait_s
from rlm_tasks.llm.wire.error_bodies import ErrorBody, one_line, read_error
from rlm_tasks.llm.wire.quotations import QUOTED, quotes
from rlm_tasks.llm.wire.rate_limit_headers import rate_limits, wait_in_body, wait_s

if TYPE_CHECKING:
    from rlm_tasks.llm.wire.answers import TokenUsage
    from rlm_tasks.settings.llm import EndpointSettings

A_DAY_S = 86_400.0
"""A quota that comes back after a shorter time is waited for."""
MOST_SHOWN = 200
"""The characters of a provider's message that an error shows."""


class UnusableAnswer(RlmError):
    """A response that is no answer: not JSON, empty, or cut off.  It may cost money.

    Has the `endpoint`, `why`, and the `usage` that it states.
    """

    code = "UNUSABLE_ANSWER"
    category = Category.TRANSIENT
    retryable = True
    trips = True
    http_status = 502
    when = "The provider, or a gateway before it, sent a damaged answer."
    remedy = "Look at the endpoint; the call is repeated by itself."

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
REFUSALS = {
    "UNAUTHORISED": ("The provider refuses the key.", "Correct the key of the endpoint."),
    "FORBIDDEN": ("The key has no right to the model or the call.", "Give the key the right."),
    "INSUFFICIENT_QUOTA": ("The account has no credit left.", "Pay, or raise its limit."),
    "MODEL_NOT_FOUND": (
        "The provider does not have the model.",
        "Correct `RLM_LLM__SMALL`, `RLM_LLM__MEDIUM` or `RLM_LLM__LARGE`.",
    ),
    "CONTEXT_LENGTH_EXCEEDED": (
        "Prompt and answer together are longer than the model's context.",
        "Make the item shorter, or lower `max_tokens`.",
    ),
    "REQUEST_TOO_LARGE": (
        "One call needs more tokens than the account may use in a minute.",
        "Make the item shorter, or raise the account's limit.",
    ),
    "CONTENT_FILTERED": ("A filter of the provider held the item back.", "Change the item."),
    "INVALID_REQUEST": ("The provider does not accept the question.", "Do what the message says."),
}
"""The code of each refusal -> its cause, and what to do."""
NO_ROOM = "; all max_tokens went into its reasoning, or none were left: raise max_tokens"


class NoAnswerText(RlmError):
    """An answer without a text: a refusal, a filter, a tool call, or nothing.

    It is the item's own fault, so it is not asked for again, and the endpoint is well.  `code` is
    REFUSED, CONTENT_FILTERED, TOOL_CALL or ANSWER_EMPTY.  Has the `model`.
    """

    category = Category.VALIDATION
    http_status = 502
    when = "The model or a filter of the provider refused the item."
    remedy = "Change the item or the prompt."

    def __init__(self, model: str, code: str, finish: str = "") -> None:
        self.model, self.code = model, code
        more = NO_ROOM if code == "ANSWER_EMPTY" and finish == "length" else ""
        super().__init__(f"model {model}: {FAULTS[code]}{more}")


class ProviderRefused(RlmError):
    """A refusal that will be the same at the next try, until a person acts.

    Has the `endpoint`, `why`, and the HTTP `status`.  `category` is AUTH, QUOTA or VALIDATION;
    `code` is CONTEXT_LENGTH_EXCEEDED if the prompt is too long.  `usage` is that of an answer which
    the error ended.
    """

    usage: TokenUsage | None = None
    said = ""  # the provider's own words in `why`
    http_status = 502
    when = "The key, the quota, the model or the size of the question is wrong."
    remedy = "Do what the message says; the same call fails again."

    def __init__(
        self, endpoint: str, category: Category, code: str, why: str, status: int = 0
    ) -> None:
        self.endpoint, self.category, self.code, self.why = endpoint, category, code, why
        self.status = status  # 0: no request was sent
        super().__init__(f"endpoint {endpoint}: {why}")


class ProviderDown(ConnectionError):
    """An endpoint that cannot be reached, or fails.

    Has the `endpoint`, `why`, and the time to wait as ``retry-after`` in `headers`.  `sent` says
    whether it got the question, so that it may bill the prompt; `usage` is that of an answer which
    the error ended.
    """

    usage: TokenUsage | None = None
    said = ""  # the provider's own words in `why`

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
    response: ErrorResponse,
    endpoint: EndpointSettings,
    private: Sequence[str],
    *,
    tokens: float = 0.0,
) -> Exception:
    """Return our error for a response.

    `private` are the key, then the texts of the question; no message of the error quotes them.
    `tokens` is the most that the call may use.
    """
    found = _Found(response, read_error(response.body), endpoint, tuple(private), tokens)
    if not found.status:
        return UnusableAnswer(endpoint.name, f"it is an error: {found.said}")
    for meaning in _MEANINGS:
        if (error := meaning(found)) is not None:
            if isinstance(error, ProviderDown | ProviderRefused):
                error.said = found.shown
            return error
    return found.refused("INVALID_REQUEST", f"refuses the question ({found.status}): {found.said}")


def without_words(error: ProviderDown | ProviderRefused) -> str:
    """Return why an endpoint failed or refused, without the provider's own words.

    Its words may quote a user of it, so no event, alert or report has them.
    """
    said = error.said
    return (
        error.why.replace(f"; it says: {said}", "").replace(f": {said}", "") if said else error.why
    )


def refused_parameter(response: ErrorResponse) -> str | None:
    """Return the name of the parameter that a provider refuses; None for another refusal.

    It is one of those that we send, such as "max_tokens" or "stream_options".
    """
    if not 400 <= response.status < 500 or response.status in (401, 402, 403, 404, 429):
        return None
    body = read_error(response.body)
    if not _REFUSES.search(body.words):
        return None
    names = (body.parameter.split(".")[0], *_PARAMETER.findall(body.words))
    return next((each for each in names if _PARAMETER.fullmatch(each)), None)


# --- the words of providers -------------------------------------------------------------------


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


_PARAMETER = _any(
    r"\b(?:max_tokens|max_completion_tokens|stream_options|stream|temperature|response_format)\b"
)
_REFUSES = _any(
    r"unsupported|not supported|does not support|no longer supported",
    r"unrecogni[sz]ed|unknown|unexpected|extraneous|extra (?:inputs|fields)|extra_forbidden",
    r"not permitted|not allowed|not a valid (?:field|parameter)|cannot find field",
)
_CONTEXT = _any(
    r"context_length_exceeded|exceed_context_size|contextwindowexceeded|string_above_max_length",
    r"maximum (?:context|model|prompt|input|sequence) length|max(?:imum)? context",
    r"(?:exceed\w*|longer than|too (?:long|large) for|larger than) .{0,60}"
    r"context(?:[ _-](?:length|size|window|limit))?",
    r"context[ _-](?:length|size|window|limit)\w* .{0,30}(?:exceed|too (?:small|short)|overflow)",
    r"(?:prompt|input|inputs|messages?|string)`? (?:is |are |was )?too long",
    r"(?:input|prompt) token count .{0,60}exceed|exceed\w* .{0,30}(?:token limit|max length)",
    r"exceed\w* the maximum number of (?:input )?tokens",
    r"`?inputs`? tokens \+ `?max_new_tokens`? must be|`?inputs`? must have less than",
    r"context the overflows|too many (?:input )?tokens|reduce the length of the",
    r"range of input length",
)
_FILTER = _any(
    r"content[ _-]?filter|responsible ?ai|content[ _]?policy|content management policy",
    r"prohibited_content|data_?inspection_?failed|moderation|guardrail|content exists risk",
    r"safety (?:system|filter|setting|reason|polic)|(?:blocked|due to|because of|for) safety",
    r"(?:input|prompt|message|request|content) (?:was|were|is|has been) (?:flagged|blocked)",
    r"usage polic|sensitive (?:words?|content)|considered high risk|^.*\bsafety$",
)
_QUOTA = _any(
    r"exceeded (?:your )?current quota|exceeded_current_quota|check your plan and billing",
    r"billing_?(?:hard_?limit|not_active)|hard limit has been reached|spend(?:ing)? limit",
    r"insufficient[ _](?:balance|credits?|funds)|credit balance is too low|arrearage|in arrears",
    r"(?:out of|all available|not enough|no more|more) credits|credits? (?:limit|exhausted)",
    r"budget has been exceeded|budget_?exceeded|exceeded_?budget|over budget",
    r"reached your specified (?:api )?usage limit|out of call volume quota|per[ _-]day",
    r"monthly (?:\w+ )?(?:credits|limit|quota)|account (?:is )?not active",
    r"quota (?:is |has been )?(?:exhausted|used up)",
)
_NEVER = _any(r"insufficient_quota|perday|quota exceeded .{0,300}limit: 0\b")
"""A quota that does not come back soon, whatever wait the body asks for."""
_WINDOW = _any(r"per(?:minute|second|hour)")
"""A limit of Google that is called a quota, but comes back by itself."""
_LARGE = _any(r"(?:request|payload|message|prompt) (?:is )?too large|request_?too_?large")
_REQUESTED = _any(r"limit:? ([\d,]*\d)\b.{0,40}requested:? ([\d,]*\d)")
_KEY = _any(
    r"(?:incorrect|invalid|no|missing|wrong|expired) (?:x-)?api[ _-]?key|invalid_api_key",
    r"api[ _]key (?:is )?(?:not (?:valid|found)|invalid|expired|missing)",
    r"api_key_(?:invalid|expired)|no_db_connection",
    r"unregistered callers|authentication_error|unauthenticated",
)
_MODEL_ACCESS = _any(
    r"model_access_denied|not allowed to access (?:this )?model|must be verified to use"
)
_LOCATION = _any(r"unsupported_country|location is not supported")
_MODEL = _any(
    r"model_not_found|deploymentnotfound|invalid_model\b|model_not_available|no such model",
    r"^model: |(?:unknown|invalid|unsupported) model\b|not a (?:valid|chat) model|model not exist",
    r"(?:model|deployment)s?\b.{0,160}\b(?:does not exist|not found|do(?:es)? not have access)",
)
_ENDED = _any(r"terminated|deactivated|disabled|suspended|banned|revoked")
_FORBIDDEN = (
    (
        _any(r"country|region|territory|location is not supported|geograph"),
        "does not serve this country or region",
        "call it from a supported one, or set another endpoint",
    ),
    (_ENDED, "has disabled the account, its key or the service", "ask the provider, and see {key}"),
    (
        _any(r"model|deployment"),
        "gives no access to the model",
        "allow the model for the project of {key}",
    ),
)
"""Words of a 403 -> the meaning, and what to do."""
_TEMPORARY = {408, 409, 423, 424, 425, 498, 499}
"""Statuses below 500 that may succeed at the next try."""


# --- the meaning of an error ------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """An error response with its words, while its meaning is looked for."""

    response: ErrorResponse
    body: ErrorBody
    endpoint: EndpointSettings
    private: tuple[str, ...]
    tokens: float

    @property
    def status(self) -> int:
        """The HTTP status, or the one in the body of a response without an error status."""
        return self.response.status if self.response.status >= 300 else self.body.status

    @cached_property
    def words(self) -> str:
        """The provider's words in small letters, without a whole text of the question."""
        words = self.body.words
        for each in self.private[1:]:
            if len(each) > QUOTED:
                words = words.replace(each.casefold(), "")
        return words

    @cached_property
    def headers(self) -> dict[str, str]:
        """The headers by names in small letters, with those that the body repeats."""
        own = {name.lower(): value for name, value in self.response.headers.items()}
        return {**self.body.headers, **own}

    @cached_property
    def asked_s(self) -> float | None:
        """The seconds to wait that the body asks for; None if it does not."""
        return wait_in_body(self.response.body, self.response.now)

    @cached_property
    def said(self) -> str:
        """The provider's message, in up to 200 characters, unless it quotes a private text."""
        if self.body.is_page:
            return "it answers with a page, as a web server or proxy does"
        if not self.body.message:
            return "without a reason"
        return self.shown or "its reason is hidden, because it quotes the question"

    @cached_property
    def shown(self) -> str:
        """The provider's message, in up to 200 characters; '' if it is none that may be shown."""
        message = "" if self.body.is_page else self.body.message
        if quotes(message[: 2 * MOST_SHOWN], self.private):
            return ""
        return message if len(message) <= MOST_SHOWN else f"{message[: MOST_SHOWN - 3]}..."

    def refused(
        self, code: str, why: str, category: Category = Category.VALIDATION
    ) -> ProviderRefused:
        return ProviderRefused(self.endpoint.name, category, code, why, self.status)


def _redirect(found: _Found) -> Exception | None:
    if found.status >= 400:
        return None
    # Without user, password and query, which may be secret.
    to = re.match(r"(https?://)?(?:[^/?#]*@)?([^?#]*)", found.headers.get("location", ""))
    shown = one_line("".join(each or "" for each in to.groups()))[:MOST_SHOWN] if to else ""
    where = f" to {shown}" if shown and not quotes(shown, found.private) else ""
    why = (
        f"redirects the call{where} ({found.status}), which is not followed; set its base_url to "
        "the address of the API itself"
    )
    return found.refused("INVALID_REQUEST", why)


def _quota(found: _Found) -> Exception | None:
    if found.status != 402 and not _is_quota(found):
        return None
    why = f"its quota is used up ({found.status}); waiting does not help, see plan and billing"
    return found.refused("INSUFFICIENT_QUOTA", why, Category.QUOTA)


def _is_quota(found: _Found) -> bool:
    """Return whether a quota is used up that does not come back within minutes."""
    words = found.words
    if _NEVER.search(words):
        return True
    is_soon = found.asked_s is not None and found.asked_s < A_DAY_S
    is_window = is_soon or _WINDOW.search(words)
    return not is_window and _QUOTA.search(words) is not None


def _too_large(found: _Found) -> Exception | None:
    if found.status not in (413, 429) or (found.status == 413 and _CONTEXT.search(found.words)):
        return None
    limit = rate_limits(found.headers).tokens.limit
    is_above = limit is not None and 0 < limit < found.tokens
    if not is_above and not _is_too_large(found):
        return None
    said = found.said
    if is_above:
        said = f"it allows {limit:,.0f} tokens at once, and the call may use {found.tokens:,.0f}"
    why = (
        f"the call is too large for its limits ({found.status}): {said}; lower max_tokens, split "
        "the item, or let the provider raise the limit"
    )
    return found.refused("REQUEST_TOO_LARGE", why)


def _is_too_large(found: _Found) -> bool:
    """Return whether the provider says that a call is larger than its limit ever is."""
    if amounts := _REQUESTED.search(found.words):
        limit, requested = (float(each.replace(",", "")) for each in amounts.groups())
        return requested > limit
    return found.status == 413 or _LARGE.search(found.words) is not None


def _busy(found: _Found) -> Exception | None:
    if found.status != 429:
        return None
    return RateLimited(
        f"endpoint {found.endpoint.name}",
        wait_s(found.headers, found.response.body, found.response.now),
        "the provider answered 429",
    )


def _key(found: _Found) -> Exception | None:
    is_key = found.status in (400, 403) and _KEY.search(found.words)
    if (found.status != 401 and not is_key) or _MODEL_ACCESS.search(found.words):
        return None
    why = f"it does not accept its key ({found.status}); see {found.endpoint.key_env}"
    if found.shown:  # behind a gateway it may be the gateway's own key for a provider
        why += f"; it says: {found.shown}"
    return found.refused("UNAUTHORISED", why, Category.AUTH)


def _any_access(words: str) -> bool:
    """Return whether words say with another status than 403 that a right is missing."""
    return bool(_MODEL_ACCESS.search(words) or _LOCATION.search(words))


def _forbidden(found: _Found) -> Exception | None:
    if found.status != 403 and not _any_access(found.words):
        return None
    what, advice = "forbids the call", "check the rights of {key}"
    if found.body.is_page:
        what, advice = "does not let the call through", "ask who runs its firewall or proxy"
    for pattern, *meaning in _FORBIDDEN:
        if pattern.search(found.words):
            what, advice = meaning
            break
    key = f"the key in {found.endpoint.key_env}"
    why = f"{what} ({found.status}): {found.said}; {advice.format(key=key)}"
    return found.refused("FORBIDDEN", why, Category.AUTH)


def _too_long(found: _Found) -> Exception | None:
    if not _CONTEXT.search(found.words):
        return None
    said = found.said if found.body.message else "the prompt is too long for the model"
    return found.refused(
        "CONTEXT_LENGTH_EXCEEDED", f"refuses the question ({found.status}): {said}"
    )


def _filtered(found: _Found) -> Exception | None:
    if found.status in (404, 408) or not _FILTER.search(found.words):
        return None
    if found.status == 403 and _ENDED.search(found.words):
        return None  # the account is closed, whatever the item is
    why = (
        f"a filter of it refuses the question ({found.status}): {found.said}; change the item or "
        "the prompt"
    )
    return found.refused("CONTENT_FILTERED", why)


def _unknown_model(found: _Found) -> Exception | None:
    if found.status == 404 and not _MODEL.search(found.words):
        url = found.endpoint.base_url or "OPENAI_BASE_URL"
        why = (
            f"refuses the question (404): {found.said}; does {url} have its right end, such as /v1?"
        )
        return found.refused("INVALID_REQUEST", why)
    if found.status in (400, 404, 422) and _MODEL.search(found.words):
        why = (
            f"does not have the model ({found.status}): {found.said}; set `models` of the endpoint "
            "to the names that it knows"
        )
        return found.refused("MODEL_NOT_FOUND", why)
    return None


def _failing(found: _Found) -> Exception | None:
    if found.status < 500 and found.status not in _TEMPORARY:
        return None
    # The model may have answered: a gateway lost it, or it is an error in place of an answer.
    sent = found.status in (502, 504) or found.response.status < 300
    said = f": {found.said}" if found.body.message else ""
    asked_s = asked_wait_s(found.headers, found.response.now)
    return ProviderDown(
        found.endpoint.name,
        f"answers {found.status}{said}",
        found.asked_s if asked_s is None else asked_s,
        sent=sent,
    )


_MEANINGS: tuple[Callable[[_Found], Exception | None], ...] = (
    *(_redirect, _quota, _too_large, _busy, _key, _filtered, _forbidden, _too_long),
    *(_unknown_model, _failing),
)
"""The meanings of an error, asked in this order."""
