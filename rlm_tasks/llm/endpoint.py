"""One provider's endpoint: any that answers as OpenAI's does, through the `openai` client.

Decides how a question is sent, what its answer cost, what the provider said of its limits, and what
its errors mean here. Refuses to know limits, budgets and who tries again: one layer retries, and it
is not this one.

An error of the client holds the key and the prompt.  None leaves here, not as a cause or a context
either, and no message of ours has a word of them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from resilience.errors import CallTimeout, Category, RateLimited, RlmError
from resilience.faults import retry_after_s

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncAPIResponse, AsyncOpenAI
    from pydantic import SecretStr

    from rlm_tasks.settings.llm import EndpointSettings

UNSAID_S = 1.0
"""A provider that answers 429 and does not say until when is left alone for this long."""
_TOO_EARLY = {408, 409, 425}  # of all that is below 500, these may go well the next time
_QUOTED = 16  # so many characters in a row are no accident: they were taken from the question


class Question(msgspec.Struct, frozen=True):
    """What is asked: `messages` have a role and a content each, `schema` is the JSON schema that
    the answer is to meet.
    """

    model: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    temperature: float | None = None
    schema: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """A provider's limit in its window, what is left of it, and in how many seconds it is whole
    again; None: not said.
    """

    limit: float | None = None
    remaining: float | None = None
    reset_s: float | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """What a provider said of its limits, in the headers of one answer."""

    requests: Allowance
    tokens: Allowance


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and what it cost; `finish` is "stop", or "length" where `max_tokens` cut
    it.
    """

    model: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: str
    told: Told
    latency_s: float


class UnusableAnswer(RlmError):
    """What came is no answer: not JSON, empty, or cut off.  It may have to be paid for.  Has the
    `endpoint` and `why`.
    """

    code = "UNUSABLE_ANSWER"
    category = Category.TRANSIENT
    retryable = True
    trips = True

    def __init__(self, endpoint: str, why: str) -> None:
        self.endpoint, self.why = endpoint, why
        super().__init__(f"endpoint {endpoint}: its answer cannot be used ({why})")


class ProviderRefused(RlmError):
    """An answer that will be the same the next time: a person has to act.  Has the `endpoint`,
    `why`, and HTTP's `status`.

    `category` is AUTH, QUOTA or VALIDATION; `code` is CONTEXT_LENGTH_EXCEEDED where a prompt is too
    long."""

    def __init__(
        self, endpoint: str, category: Category, code: str, why: str, status: int = 0
    ) -> None:
        self.endpoint, self.category, self.code, self.why = endpoint, category, code, why
        self.status = status  # 0: nothing was asked
        super().__init__(f"endpoint {endpoint}: {why}")


class ProviderDown(ConnectionError):
    """An endpoint that cannot be reached, or fails.  Has the `endpoint`, `why`, and in `headers`
    for how long to leave it.
    """

    def __init__(self, endpoint: str, why: str, wait_s: float | None = None) -> None:
        self.endpoint, self.why = endpoint, why
        self.headers = (
            {} if wait_s is None else {"retry-after": f"{wait_s:.3f}"}
        )  # where `classify` looks for it
        super().__init__(f"endpoint {endpoint}: {why}")


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text has: one for every four bytes of UTF-8, rounded up."""
    return -(-len(text.encode(errors="replace")) // 4)


def estimated_prompt(messages: Iterable[Mapping[str, str]]) -> int:
    """Return about how many tokens messages have."""
    return sum(estimated_tokens(message["content"]) for message in messages)


class Endpoint:
    """One place to ask, with connections of its own, which live as long as the event loop that
    asks.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        key: SecretStr,
        *,
        timeout_s: float,
        per_host: int,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._key, self._timeout_s, self._per_host, self._idle_s, self._clock = (
            key,
            timeout_s,
            per_host,
            idle_s,
            clock,
        )
        self._room = asyncio.Semaphore(
            per_host
        )  # who waits for a connection does not wait for the provider: no time-out
        self._client: AsyncOpenAI | None = None

    def open(self) -> None:
        """Make what calls need, which takes a while; what is wrong with the key is told by the
        first call.
        """
        with suppress(ProviderRefused):
            self._opened()

    async def ask(self, question: Question) -> Answer:
        """Ask once, when one of `per_host` connections is free.

        Raises RateLimited, CallTimeout, ProviderDown, UnusableAnswer, ProviderRefused.
        """
        answering = False
        try:
            async with (
                self._room,
                asyncio.timeout(None if self.settings.stream else self._timeout_s),
            ):
                began = self._clock()
                calls = self._opened().chat.completions.with_streaming_response
                async with calls.create(**self._request(question)) as response:
                    answering = True
                    said = await (_streamed if self.settings.stream else _whole)(response)
                    return self._answer(question, said, told(response.headers), began)
        except Exception as error:  # whatever it is, it may hold the key and the prompt
            meaning = self._meaning(error, self._timeout_s, question, answering=answering)
        raise meaning

    async def check(self, timeout_s: float) -> float:
        """Return how many seconds the endpoint took to list its models.  Raises what `ask`
        raises.
        """
        from httpx2 import Response

        began = self._clock()
        try:
            async with asyncio.timeout(timeout_s):
                await self._opened().get("/models", cast_to=Response)
                return self._clock() - began
        except Exception as error:
            meaning = self._meaning(error, timeout_s)
        raise meaning

    async def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _opened(self) -> AsyncOpenAI:
        if self._client is None:
            key = self._key.get_secret_value().strip()
            if not (key and key.isascii() and key.isprintable()):
                why = f"{self.settings.key_env} holds no key; set it, to any word where none is asked for"
                raise ProviderRefused(self.settings.name, Category.AUTH, "UNAUTHORISED", why)
            from httpx2 import Limits
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient

            most = self._per_host + 1  # a check never waits for calls
            limits = Limits(
                max_connections=most, max_keepalive_connections=most, keepalive_expiry=self._idle_s
            )
            self._client = AsyncOpenAI(
                api_key=key,
                base_url=self.settings.base_url or None,
                max_retries=0,
                timeout=self._timeout_s,
                http_client=DefaultAsyncHttpxClient(limits=limits, timeout=self._timeout_s),
            )
        return self._client

    def _request(self, question: Question) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.settings.models.get(question.model, question.model),
            "messages": list(question.messages),
            self.settings.max_tokens_as: question.max_tokens,
        }
        if question.temperature is not None:
            request["temperature"] = question.temperature
        if question.schema is not None:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": question.schema},
            }
        if self.settings.stream:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        return request

    def _answer(self, question: Question, said: _Said, told: Told, began: float) -> Answer:
        if not said.text:
            raise UnusableAnswer(self.settings.name, f"it is empty, and ended by {said.finish!r}")
        usage = said.usage or _Usage()
        return Answer(
            model=question.model,
            text=said.text,
            prompt_tokens=estimated_prompt(question.messages)
            if usage.prompt_tokens is None
            else usage.prompt_tokens,
            completion_tokens=estimated_tokens(said.text)
            if usage.completion_tokens is None
            else usage.completion_tokens,
            finish=said.finish,
            told=told,
            latency_s=self._clock() - began,
        )

    # --- what goes wrong -----------------------------------------------------------------------

    def _meaning(
        self,
        error: Exception,
        limit_s: float,
        question: Question | None = None,
        *,
        answering: bool = False,
    ) -> Exception:
        """Return what an error means here."""
        import httpx2
        import openai

        name = self.settings.name
        if isinstance(error, (ProviderRefused, UnusableAnswer)):
            return error
        if isinstance(error, (TimeoutError, openai.APITimeoutError, httpx2.TimeoutException)):
            return CallTimeout(f"endpoint {name}", limit_s)
        if answering:  # of these, only a decoder's words are of the form alone
            return UnusableAnswer(
                name, str(error) if isinstance(error, msgspec.DecodeError) else type(error).__name__
            )
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error, question)
        if isinstance(error, (openai.APIConnectionError, httpx2.HTTPError, OSError)):
            return ProviderDown(
                name, f"cannot be reached ({type(error.__cause__ or error).__name__})"
            )
        return ProviderRefused(
            name,
            Category.VALIDATION,
            "INVALID_REQUEST",
            f"cannot be asked this ({type(error).__name__})",
        )

    def _refusal(self, error: APIStatusError, question: Question | None) -> Exception:
        """Return what a status below 200 or above 299 means."""
        name, status = self.settings.name, error.status_code
        if status == 402 or "insufficient_quota" in (error.code, error.type):
            why = f"its account is used up ({status}); no waiting helps, see its plan and billing"
            return ProviderRefused(
                endpoint=name,
                category=Category.QUOTA,
                code="INSUFFICIENT_QUOTA",
                why=why,
                status=status,
            )
        if status == 429:
            return RateLimited(f"endpoint {name}", _wait_s(error), "the provider answered 429")
        if status in (401, 403):
            why = f"it does not accept its key ({status}); see {self.settings.key_env}"
            return ProviderRefused(
                endpoint=name, category=Category.AUTH, code="UNAUTHORISED", why=why, status=status
            )
        if status in _TOO_EARLY or status >= 500:
            return ProviderDown(name, f"answers {status}", retry_after_s(error))
        code = (
            "CONTEXT_LENGTH_EXCEEDED"
            if error.code == "context_length_exceeded"
            else "INVALID_REQUEST"
        )
        where = (
            f"; does {self.settings.base_url or 'OPENAI_BASE_URL'} end as it should, such as in /v1?"
            if status == 404
            else ""
        )
        why = f"refuses the question ({status}): {self._reason(error, question)}{where}"
        return ProviderRefused(
            endpoint=name, category=Category.VALIDATION, code=code, why=why, status=status
        )

    def _reason(self, error: APIStatusError, question: Question | None) -> str:
        """Return what the provider said, up to 200 characters, unless it quotes what no message may
        hold.
        """
        said = error.body.get("message") if isinstance(error.body, dict) else None
        if not isinstance(said, str):
            return "it does not say why"
        said = " ".join(said.split())[:200]
        private = [
            self._key.get_secret_value(),
            *(each["content"] for each in (question.messages if question else ())),
        ]
        pieces = {said[at : at + _QUOTED] for at in range(max(1, len(said) - _QUOTED + 1))}
        for text in (" ".join(each.split()) for each in private if each):
            if "\\" in said or text in said or any(piece in text for piece in pieces):
                return "what it says quotes the question"
        return said


# --- reading what was said --------------------------------------------------------------------


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Said(NamedTuple):
    text: str
    finish: str
    usage: _Usage | None


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Whole(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: _Usage | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Part(msgspec.Struct):
    delta: _Delta
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Part] = []
    usage: _Usage | None = None


async def _whole(response: AsyncAPIResponse[Any]) -> _Said:
    """Read an answer.  Raises what the connection and the decoder raise."""
    answer = msgspec.json.decode(await response.read(), type=_Whole)
    choice = answer.choices[0]
    return _Said(choice.message.content, choice.finish_reason or "stop", answer.usage)


async def _streamed(response: AsyncAPIResponse[Any]) -> _Said:
    """Read an answer that comes in parts.  Raises what the connection and the decoder raise."""
    parts: list[str] = []
    finish, usage = None, None
    async for event in await response.parse():
        chunk = msgspec.convert(event, _Chunk, from_attributes=True)
        usage = chunk.usage or usage
        for part in chunk.choices:
            finish = part.finish_reason or finish
            if part.delta.content is not None:
                parts.append(part.delta.content)
    if finish is None or not parts:
        raise msgspec.ValidationError("it ended before it was finished")
    # Halves of one character may come apart; a half without its other is none.
    text = "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _Said(text, finish, usage)


def told(headers: Mapping[str, str]) -> Told:
    """Return what headers ``x-ratelimit-{limit,remaining,reset}-{requests,tokens}`` say; lengths of
    time are as `seconds`.
    """

    def of(what: str) -> Allowance:
        limit, remaining, reset = (
            headers.get(f"x-ratelimit-{each}-{what}", "")
            for each in ("limit", "remaining", "reset")
        )
        return Allowance(_number(limit), _number(remaining), seconds(reset))

    return Told(of("requests"), of("tokens"))


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float | None:
    """Return a length of time as providers write it, `3`, `12ms`, `1h2m3.5s`, in seconds; None
    where it is none.
    """
    length = r"(\d{1,9}(?:\.\d{1,9})?)(ms|[smhd])"
    if re.fullmatch(f"(?:{length})+", text.strip()):
        return sum(float(count) * _UNITS[unit] for count, unit in re.findall(length, text))
    return _number(text)


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\s*\d{1,12}(\.\d{1,9})?\s*", text) else None


def _wait_s(error: APIStatusError) -> float:
    """Return for how many seconds a provider that answered 429 wants to be left alone."""
    said = told(error.response.headers)
    spent = [each.reset_s or 0.0 for each in (said.requests, said.tokens) if each.remaining == 0]
    return retry_after_s(error) or max(spent, default=0.0) or UNSAID_S
