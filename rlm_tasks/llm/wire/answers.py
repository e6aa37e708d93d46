"""A question to a model, and the answer with its usage, read from any provider's response.

`llm.endpoint` reads whole bodies with `read_whole` and streams with `read_stream`; the gate settles
an `Answer`.  Providers differ in small things, and none of them must cost a paid answer.  So the
reading takes content in parts, usage as text, missing fields, a whole body in place of a stream.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec

from rlm_tasks.llm.wire.error_bodies import is_page
from rlm_tasks.llm.wire.rate_limit_headers import RateLimitHeaders

REST_S = 1.0
"""Seconds for which the rest of a stream is read after its end, so that the connection stays."""
MOST_COUNTED = 1e9
"""A provider's count of tokens above this is a mistake, and counts as absent."""
FINISHES = {
    "max_tokens": "length",
    "model_length": "length",
    "safety": "content_filter",
    "prohibited_content": "content_filter",
    "blocklist": "content_filter",
    "recitation": "content_filter",
    "spii": "content_filter",
    "content_filtered": "content_filter",
    "function_call": "tool_calls",
    "tool_use": "tool_calls",
    "malformed_function_call": "tool_calls",
    "unexpected_tool_call": "tool_calls",
    "image_safety": "content_filter",
    "abort": "error",  # vLLM
    "insufficient_system_resource": "error",  # DeepSeek
}
"""The reasons of other providers for the end of an answer -> those of OpenAI.

"error" is OpenRouter's for a model that failed on the way, so the text is not whole."""


_DECIMAL = r"\d{1,12}(\.\d{1,30})?([eE]-?\d{1,2})?"


class Question(msgspec.Struct, frozen=True):
    """A question to one model.

    `messages` have a role and a content each; `schema` is the JSON schema of the answer.
    """

    model: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    temperature: float | None = None
    schema: dict[str, Any] | None = None


class TokenUsage(msgspec.Struct, frozen=True):
    """The tokens and the money that a provider bills for one call.  None: it did not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None  # the tokens of reasoning are in it
    cached_tokens: int = 0  # tokens of the prompt that the provider had in its cache
    money: float | None = None  # the price that a gateway states
    total_only: bool = False  # `completion_tokens` is the total, because no part of it is known

    @property
    def is_complete(self) -> bool:
        """Whether the provider stated the tokens of prompt and completion."""
        return self.prompt_tokens is not None and self.completion_tokens is not None

    def split(self, estimated: int) -> TokenUsage:
        """Return the usage with an estimated prompt, if the provider sent only the total."""
        if not self.total_only or self.completion_tokens is None:
            return self
        prompt = min(estimated, self.completion_tokens)
        return TokenUsage(prompt, self.completion_tokens - prompt, 0, self.money)


UNSAID = TokenUsage()


class Answer(msgspec.Struct, frozen=True):
    """The answer of a model, with what it costs.

    `finish` is "stop", "length" if `max_tokens` cut the text, or "content_filter" if a filter did.
    `fault` is '' for an answer with a text.  Otherwise it is the code of `NoAnswerText`: the
    provider has answered, but there is no text.
    """

    model: str
    text: str
    finish: str
    limits: RateLimitHeaders = msgspec.field(name="told")  # the name under which it is cached
    latency_s: float
    usage: TokenUsage = UNSAID
    fault: str = ""


class BodyWithoutAnswer(Exception):
    """A response that is no answer: not JSON, without choices, or an error in place of them.

    Has `why`, without a part of the body, the object with an `error` in it, and the `usage`.
    `usage` is None for an error before any part of an answer.
    """

    def __init__(self, why: str, *, error: Any = None, usage: TokenUsage | None = None) -> None:
        self.why, self.error, self.usage = why, error, usage
        super().__init__(why)


def estimated_tokens(text: str) -> int:
    """Return the estimated tokens of a text: one for each four bytes of UTF-8, rounded up."""
    return -(-len(text.encode(errors="replace")) // 4)


def estimated_prompt(messages: Iterable[Mapping[str, str]]) -> int:
    """Return the estimated tokens of messages."""
    return sum(estimated_tokens(message["content"]) for message in messages)


# --- the parts of a response ------------------------------------------------------------------


@dataclass(slots=True)
class Received:
    """The parts of one answer, gathered from a whole body or from the events of a stream."""

    texts: list[str] = field(default_factory=list)
    finish: str = ""
    refuses: bool = False  # it has a text of refusal
    calls_tool: bool = False
    has_choice: bool = False
    in_deltas: bool = False
    usage: TokenUsage = UNSAID

    @property
    def text(self) -> str:
        """The text of the answer; half of a character, which cannot be stored, is replaced."""
        # The two halves of one character may come in two parts.
        joined = "".join(self.texts)
        return joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    @property
    def fault(self) -> str:
        """The code that tells why there is no text; '' for an answer with a text."""
        if not self.text.strip():
            if self.refuses or self.finish == "refusal":
                return "REFUSED"
            if self.finish == "content_filter":
                return "CONTENT_FILTERED"
            return "TOOL_CALL" if self.calls_tool or self.finish == "tool_calls" else "ANSWER_EMPTY"
        return ""

    def add_event(self, data: bytes) -> None:
        """Add the data of one event of a stream, which may be empty.

        Raises BodyWithoutAnswer.
        """
        if data.strip() not in (b"", b"null"):
            self.add(parsed(data))

    def add(self, body: Any) -> None:
        """Add a whole body, or the data of an event.

        Raises BodyWithoutAnswer for anything but an object, and for an error.
        """
        if not isinstance(body, dict):
            raise BodyWithoutAnswer("it is no JSON object", usage=self.usage)
        choices = [each for each in _listed(body.get("choices")) if isinstance(each, dict)]
        groq = body.get("x_groq")
        for holder in (*choices, groq, body):
            if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
                self.usage = usage_in(holder["usage"])
        if not choices and body.get("error"):
            self._fail(body)
        for choice in choices[:1]:
            self._add_choice(choice)
            if choice.get("error"):
                self._fail({"error": choice["error"]})
            if self.finish == "error":
                self._fail(body)

    def _fail(self, holder: Mapping[str, Any]) -> NoReturn:
        """Raise BodyWithoutAnswer for the error in an object, or for an answer that broke off."""
        if not holder.get("error"):
            raise BodyWithoutAnswer("the model broke off", usage=self.usage)
        is_begun = self.has_choice or self.usage != UNSAID
        usage = self.usage if is_begun else None
        raise BodyWithoutAnswer("it holds an error", error=holder, usage=usage)

    def _add_choice(self, choice: Mapping[str, Any]) -> None:
        self.has_choice = True
        finish = choice.get("finish_reason")
        if isinstance(finish, str) and finish:
            finish = finish.lower()[:40]
            self.finish = FINISHES.get(finish, finish)
        whole, delta = choice.get("message"), choice.get("delta")
        self.in_deltas |= isinstance(delta, dict)
        message = whole or delta
        if self.in_deltas and isinstance(whole, dict) and whole.get("content"):
            self.texts.clear()  # it has the text so far (Perplexity), or all of it (MiniMax)
        elif delta:
            message = delta
        if not isinstance(message, dict):
            message = {"content": choice.get("text")}
        self.texts += _texts(message.get("content"))
        self.refuses |= bool(message.get("refusal")) or any(
            isinstance(part, dict) and part.get("type") == "refusal"
            for part in _listed(message.get("content"))
        )
        self.calls_tool |= bool(message.get("tool_calls") or message.get("function_call"))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(content: Any) -> list[str]:
    """Return the texts of a message's content, which may be a text or a list of parts."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return [text for part in content for text in _texts(part)]
    if isinstance(content, dict):
        # A part of another type is the model's reasoning, an image, a refusal.
        is_text = content.get("type", "text") in ("text", "output_text")
        return _texts(content.get("text")) if is_text else []
    return []


# --- usage ------------------------------------------------------------------------------------


def usage_in(usage: Mapping[str, Any]) -> TokenUsage:
    """Return the usage of a body, in the forms of many providers.

    - Numbers may be texts or floats.  A negative one, and no token of a prompt, count as absent.
    - Tokens of reasoning may be missing in `completion_tokens`: the total has them.
    - `prompt_tokens` may be missing: the total minus the completion.
    - Anthropic's `input_tokens` are without those of the cache.
    """
    prompt = _first(usage, "prompt_tokens", "input_tokens") or None
    completion = _first(usage, "completion_tokens", "output_tokens")
    total = _first(usage, "total_tokens") or None
    details = _inner(usage, "completion_tokens_details", "output_tokens_details")
    reasoning = _first(details, "reasoning_tokens") or _first(usage, "reasoning_tokens") or 0
    cached = (
        _first(_inner(usage, "prompt_tokens_details", "input_tokens_details"), "cached_tokens")
        or _first(usage, "prompt_cache_hit_tokens", "cache_read_input_tokens", "cached_tokens")
        or 0
    )
    if not _first(usage, "prompt_tokens"):
        names = ("cache_read_input_tokens", "cache_creation_input_tokens")
        prompt = (prompt or 0) + sum(_first(usage, name) or 0 for name in names) or None
    if total is not None and prompt is not None:
        completion = max(completion or 0, total - prompt)
    elif completion is not None and completion < reasoning:
        completion += reasoning
    if prompt is None and total is not None and completion is not None:
        prompt = max(0, total - completion) or None
    money = _number(usage.get("cost"))
    if prompt is None and completion is None:
        return TokenUsage(None, total, 0, money, total_only=total is not None)
    return TokenUsage(prompt, completion, min(cached, prompt or 0), money)


def _inner(usage: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    return next((usage[name] for name in names if isinstance(usage.get(name), dict)), {})


def _first(usage: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these that is a number of tokens; None without one."""
    counts = (_number(usage.get(name)) for name in names)
    return next((round(each) for each in counts if each is not None), None)


def _number(value: Any) -> float | None:
    """Return a number from 0 to MOST_COUNTED; None for anything else."""
    if isinstance(value, str) and re.fullmatch(
        r"\s*\d{1,12}(\.\d{1,30})?([eE]-?\d{1,2})?\s*", value
    ):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= MOST_COUNTED else None


def cost_in(headers: Mapping[str, str]) -> float | None:
    """Return the price of a call that a gateway (LiteLLM) states in a header; None without one."""
    return _number(headers.get("x-litellm-response-cost"))


# --- bodies and streams -----------------------------------------------------------------------


def parsed(body: bytes) -> Any:
    """Return a body as JSON data; a byte-order mark and NaN are allowed.

    Raises BodyWithoutAnswer.
    """
    try:
        # Some servers send line feeds and tabs in texts as they are.
        return json.loads(body.decode("utf-8-sig", "replace"), strict=False)
    except (ValueError, RecursionError):  # also an integer of thousands of digits
        why = "it is empty" if not body.strip() else "it is not JSON"
        if is_page(body):
            why = "it is a page, not JSON; does base_url have its right end, such as /v1?"
    raise BodyWithoutAnswer(why)


def read_whole(body: bytes) -> Received:
    """Return the answer in a whole body; a server may send events in place of one object.

    Raises BodyWithoutAnswer.
    """
    received, start = Received(), body.lstrip()
    if start.startswith((b"data:", b"event:", b": ")):
        for line in body.splitlines():
            name, _, value = line.partition(b":")
            if name == b"data":
                if value.strip() == b"[DONE]":
                    break
                received.add_event(value)
        return _finished(received)
    received.add(parsed(body))
    if not received.has_choice:
        raise BodyWithoutAnswer("it has no choice", usage=received.usage)
    return received


async def read_stream(chunks: AsyncIterable[bytes]) -> Received:
    """Return the answer in a stream of events; a server may send a whole body in place of one.

    After the end of the answer it does not matter what comes, or whether the connection is lost.
    Raises BodyWithoutAnswer, and the errors of the connection.
    """
    received, other = Received(), []
    lines = _lines(chunks)
    try:
        async for line in lines:
            name, colon, value = line.partition(b":")
            if name == b"data" and colon:
                if value.strip() == b"[DONE]":
                    break
                received.add_event(value)
            elif not received.has_choice:
                other.append(line)
    except BodyWithoutAnswer:
        raise
    except Exception:
        if not received.finish:
            raise
    await _read_rest(lines)
    if not received.has_choice and b"".join(other).lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return read_whole(b"\n".join(other))
    return _finished(received)


def _finished(received: Received) -> Received:
    """Return the answer of a stream.  Raises BodyWithoutAnswer if the stream has no end."""
    if not received.finish:
        raise BodyWithoutAnswer("it ended before it was finished", usage=received.usage)
    return received


async def _read_rest(lines: AsyncIterator[bytes]) -> None:
    """Read what comes after the end of an answer, for a short time."""
    with suppress(Exception):
        async with asyncio.timeout(REST_S):
            async for _ in lines:
                pass


async def _lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of a stream: they end in CR LF, LF or CR."""
    rest = b""
    async for chunk in chunks:
        # A CR at the end may be the first half of CR LF.
        *lines, rest = re.split(rb"\r\n|\n|\r(?=[\s\S])", rest + chunk)
        for line in lines:
            yield line
    for line in rest.splitlines():
        yield line
