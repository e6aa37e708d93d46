"""The words of a provider about an error, read from its body in any of the known dialects.

`errors` begins with `read_error`.  Known are OpenAI, Azure, OpenRouter, LiteLLM, vLLM, llama.cpp,
FastAPI, Mistral, TGI, Ollama, Google, Anthropic, plain text, and pages in HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_CHARS = 4000
"""The characters of a message that are read."""
_MESSAGES = (
    *("message", "Message", "error", "detail", "details", "errors", "msg", "error_message"),
    *("errorMessage", "error_description", "title", "exception", "reason", "raw"),
)
"""The fields of a message, the best one first."""
_CODES = (
    *("code", "type", "status", "error_type", "error_code", "errorCode", "reason", "__type"),
    *("quotaId", "finish_reason", "finishReason", "blockReason", "object", "error"),
)
_INNER = ("innererror", "innerError", "violations", "metadata", "details", "error", "errors")
_WRAPPED = re.compile(r"(?:(?:litellm\.)?\w+(?:Error|Exception)\b(?:: | - |\s+)){1,5}")
_CLASSES = re.compile(
    r"(?:ContextWindowExceeded|ContentPolicyViolation|BudgetExceeded)Error"
    r"|\b\w+Per(?:Day|Hour|Minute|Second)\w*"
)
"""Names in a message: exceptions of LiteLLM, and quotas of Google behind it."""
_APPENDED = re.compile(r"\s*\.? ?Received Model Group=.*", re.DOTALL)
_STATUSES = {
    "invalid_argument": 400,
    "failed_precondition": 400,
    "invalid_request_error": 400,
    "bad_request": 400,
    "unauthenticated": 401,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_denied": 403,
    "permission_error": 403,
    "not_found": 404,
    "not_found_error": 404,
    "request_too_large": 413,
    "resource_exhausted": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "too_many_requests": 429,
    "internal": 500,
    "internal_error": 500,
    "internal_server_error": 500,
    "internalservererror": 500,
    "server_error": 500,
    "api_error": 500,
    "unavailable": 503,
    "service_unavailable": 503,
    "deadline_exceeded": 504,
    "timeout_error": 504,
    "overloaded_error": 529,
    "overloaded": 529,
}
"""The name of an error -> the HTTP status that it stands for."""


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """A provider's error: its message in one line, and its codes in small letters.

    The outer codes come first.
    """

    message: str = ""
    codes: tuple[str, ...] = ()
    parameter: str = ""  # the parameter that it names as the cause
    is_page: bool = False  # an HTML page of a server or proxy, which is not shown
    headers: Mapping[str, str] = field(default_factory=dict)  # those of a provider behind a gateway

    @property
    def words(self) -> str:
        """Message and codes, in small letters."""
        return " ".join((self.message.casefold(), *self.codes))

    @property
    def status(self) -> int:
        """The HTTP status that the body states by number or name; 0 if it does not."""
        numbers = [int(each) for each in self.codes if re.fullmatch(r"[45]\d\d", each)]
        names = [_STATUSES[each] for each in self.codes if each in _STATUSES]
        return next(iter((*numbers, *names)), 0)


def read_error(body: bytes) -> ErrorBody:
    """Return the words of a body, whatever it is."""
    text = body.decode("utf-8-sig", "replace").strip()
    if re.match(r"(data|event):", text):  # an event of a stream
        text = next((line for line in text.splitlines() if line.startswith("data:")), "")
        text = text.removeprefix("data:").strip()
    found = _json_in(text)
    if found is None:
        if is_page(body):
            return ErrorBody(is_page=True)
        return ErrorBody(message=_unwrapped(text), codes=_classes_in(text))
    codes = (each.casefold() for each in _fields(found, _CODES))
    parameters = [each for each in _fields(found, ("param",)) if each]
    return ErrorBody(
        message=_joined(_messages(found)),
        codes=(
            *(each for each in codes if re.fullmatch(r"[\w.:/-]{1,100}", each)),
            *_classes_in(text),
        ),
        parameter=next(iter(parameters), ""),
        headers=_headers(found),
    )


def is_page(body: bytes) -> bool:
    """Return whether a body is a page in HTML or XML."""
    return re.search(rb"<(!doctype|html|head|body|\?xml)\b", body[:1000], re.IGNORECASE) is not None


def _classes_in(text: str) -> tuple[str, ...]:
    return tuple(each.casefold() for each in _CLASSES.findall(text[:MOST_CHARS]))


def one_line(text: str) -> str:
    """Return the printable characters of a text, in one line."""
    shown = "".join(each if each.isprintable() else " " for each in text)
    return " ".join(shown.split())


def _json_in(text: str) -> Any:
    """Return the object or list of a text; None if it is no JSON."""
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


# --- messages ---------------------------------------------------------------------------------


def _messages(found: Any, depth: int = 0) -> list[str]:
    """Return the messages of a body, each with the field that it is about."""
    if isinstance(found, str):
        return [_unwrapped(found)] if found.strip() else []
    if depth > 5:
        return []
    if isinstance(found, list):
        return [text for each in found[:5] for text in _messages(each, depth + 1)]
    if not isinstance(found, dict):
        return []
    if isinstance(found.get("msg"), str) and isinstance(found.get("loc"), list | tuple):
        place = ".".join(str(each) for each in found["loc"] if isinstance(each, str | int))
        return [f"{place}: {found['msg']}"]
    for name in _MESSAGES:
        if texts := _messages(found.get(name), depth + 1):
            return texts + _behind(found, depth)
    return []


def _behind(found: Mapping[str, Any], depth: int) -> list[str]:
    """Return the messages of the provider behind a gateway (OpenRouter)."""
    metadata = found.get("metadata")
    return _messages(metadata.get("raw"), depth + 1) if isinstance(metadata, dict) else []


def _unwrapped(text: str) -> str:
    """Return a message without what a gateway (LiteLLM) puts around it."""
    text = _APPENDED.sub("", text[:MOST_CHARS])
    inner = _WRAPPED.sub("", text, count=1) if _WRAPPED.match(text) else text
    start = inner.removeprefix("b'").strip().rstrip("'")
    if (found := _json_in(start)) is not None and (texts := _messages(found, 4)):
        return _joined(texts)
    return one_line(inner) or one_line(text)


def _joined(messages: list[str]) -> str:
    """Return messages as one, without those that are a part of another one."""
    different = [
        each
        for each in dict.fromkeys(messages)
        if not any(each != other and each in other for other in messages)
    ]
    return one_line("; ".join(different))[:MOST_CHARS]


# --- other fields -----------------------------------------------------------------------------


def _fields(found: Any, names: tuple[str, ...], depth: int = 0) -> list[str]:
    """Return the texts and numbers in these fields, the outer ones first."""
    if depth > 6:
        return []
    if isinstance(found, str):
        inner = _json_in(found.strip()) if depth and len(found) <= MOST_CHARS else None
        return [] if inner is None else _fields(inner, names, depth + 1)
    if isinstance(found, list):
        return [text for each in found[:10] for text in _fields(each, names, depth + 1)]
    if not isinstance(found, dict):
        return []
    own = [
        str(found[name])
        for name in names
        if isinstance(found.get(name), str | int) and not isinstance(found[name], bool)
    ]
    inner_names = (*_INNER, "message", "detail", "raw")
    nested = (_fields(found.get(name), names, depth + 1) for name in inner_names)
    return own + [text for each in nested for text in each]


def _headers(found: Any) -> dict[str, str]:
    """Return the headers that OpenRouter repeats in the body of an error."""
    for name in ("error", "metadata", "headers"):
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return {}
    return {str(name).lower(): str(each) for name, each in found.items()}
