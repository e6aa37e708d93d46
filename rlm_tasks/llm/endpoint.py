"""One provider's endpoint with the interface of OpenAI, called through the `openai` client.

`endpoint_pool` has one per address; `gate` calls `ask`.  This module sends a question, reads the
answer with usage and rate-limit headers, and turns the client's errors into ours.  It never
retries; the guards do.

An error of the client contains the key and the prompt.  No such error leaves this module, not even
as a cause or context, and no message of ours contains a part of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import structs

from resilience.errors import CallTimeout, Category, RateLimited
from rlm_tasks.llm.wire.answers import (
    Answer,
    BodyWithoutAnswer,
    Question,
    cost_in,
    estimated_prompt,
    read_stream,
    read_whole,
)
from rlm_tasks.llm.wire.errors import (
    ErrorResponse,
    ProviderDown,
    ProviderRefused,
    UnusableAnswer,
    error_of,
    refused_parameter,
)
from rlm_tasks.llm.wire.rate_limit_headers import RateLimitHeaders, rate_limits

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncAPIResponse, AsyncOpenAI
    from pydantic import SecretStr

    from rlm_tasks.settings.llm import EndpointSettings

AVOIDABLE = {
    "max_tokens": "max_completion_tokens",
    "max_completion_tokens": "max_tokens",
    "stream_options": "",
}
"""The parameters that a request can do without -> the one to send instead; '' for none."""


class Endpoint:
    """One address to call, with its own connections.

    They live as long as the event loop of the calls.
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
        time_of_day: Callable[[], float] = time.time,
        learn: Callable[[str, RateLimitHeaders], None] | None = None,
    ) -> None:
        self.settings = settings
        self._key, self._timeout_s, self._per_host, self._idle_s, self._clock = (
            key,
            timeout_s,
            per_host,
            idle_s,
            clock,
        )
        self._time_of_day, self._learn = time_of_day, learn
        # The time limit must not count the wait for a free connection.
        self._connections = asyncio.Semaphore(per_host)
        self._client: AsyncOpenAI | None = None
        self._refused_parameters: dict[str, frozenset[str]] = {}  # by model, as the provider said

    def open(self) -> None:
        """Make the client, which takes a while; the first call raises for an invalid key."""
        with suppress(ProviderRefused):
            self._opened()

    async def ask(self, question: Question) -> Answer:
        """Send a question, as soon as one of `per_host` connections is free.

        A provider that refuses a parameter by its name is asked again without it, and from then on.
        Raises RateLimited, CallTimeout, ProviderDown, UnusableAnswer, ProviderRefused.
        """
        while True:
            answering = False
            try:
                async with (
                    self._connections,
                    asyncio.timeout(None if self.settings.stream else self._timeout_s),
                ):
                    began = self._clock()
                    calls = self._opened().chat.completions.with_streaming_response
                    async with calls.create(**self._request(question)) as response:
                        answering = True
                        return await self._read(question, response, began)
            except Exception as error:  # any error may contain the key and the prompt
                if self._has_learned(error, question):
                    continue
                meaning = self._meaning(error, self._timeout_s, question, answering=answering)
            raise meaning

    async def _read(
        self, question: Question, response: AsyncAPIResponse[Any], began: float
    ) -> Answer:
        """Read the response to a question.

        Raises BodyWithoutAnswer, and the errors of the connection.
        """
        if self.settings.stream:
            received = await read_stream(response.iter_bytes())
        else:
            received = read_whole(await response.read())
        text, usage = received.text, received.usage.split(estimated_prompt(question.messages))
        if text and not usage.completion_tokens:
            usage = structs.replace(usage, completion_tokens=None)  # no text costs nothing
        if (money := cost_in(response.headers)) is not None:
            usage = structs.replace(usage, money=money)
        return Answer(
            model=question.model,
            text=text,
            finish=received.finish or "stop",
            limits=rate_limits(response.headers, self._time_of_day()),
            latency_s=self._clock() - began,
            usage=usage,
            fault=received.fault,
        )

    async def check(self, timeout_s: float) -> float:
        """Return the seconds that the endpoint took to answer for its `health_path`.

        Raises as `ask` does.
        """
        from httpx2 import Response

        began = self._clock()
        try:
            async with asyncio.timeout(timeout_s):
                await self._opened().get(self.settings.health_path, cast_to=Response)
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
                why = (
                    f"{self.settings.key_env} holds no key; set it, to any text if the endpoint "
                    "needs no key"
                )
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
                # A redirect would send the key and the question to another address.
                http_client=DefaultAsyncHttpxClient(
                    limits=limits, timeout=self._timeout_s, follow_redirects=False
                ),
            )
        return self._client

    def _request(self, question: Question) -> dict[str, Any]:
        refused = self._refused_parameters.get(question.model, frozenset())
        max_tokens_as: str = self.settings.max_tokens_as
        if max_tokens_as in refused:
            max_tokens_as = AVOIDABLE[max_tokens_as]
        request: dict[str, Any] = {
            "model": self.settings.models.get(question.model, question.model),
            "messages": list(question.messages),
            max_tokens_as: question.max_tokens,
        }
        if question.temperature is not None:
            request["temperature"] = question.temperature
        if question.schema is not None:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": question.schema},
            }
        if self.settings.stream:
            request["stream"] = True
            if "stream_options" not in refused:
                request["stream_options"] = {"include_usage": True}
        return request

    def _has_learned(self, error: Exception, question: Question) -> bool:
        """Whether the next request differs, because the provider refused one of its parameters."""
        import openai

        if not isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
            return False
        name = refused_parameter(self._response_of(error))
        refused = self._refused_parameters.get(question.model, frozenset())
        if name not in AVOIDABLE or name not in self._request(question):
            return False
        if AVOIDABLE[name] in refused:
            return False  # it takes neither of two names
        self._refused_parameters[question.model] = refused | {name}
        return True

    # --- errors --------------------------------------------------------------------------------

    def _meaning(
        self,
        error: Exception,
        limit_s: float,
        question: Question | None = None,
        *,
        answering: bool = False,
    ) -> Exception:
        """Return our error for an error of the client."""
        import httpx2
        import openai

        name, cause = self.settings.name, error.__cause__ or error
        if isinstance(error, ProviderRefused):
            return error
        if isinstance(error, BodyWithoutAnswer):
            return self._without_answer(error, question)
        if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout):
            return ProviderDown(name, f"cannot be reached ({type(cause).__name__})")
        if isinstance(error, (TimeoutError, openai.APITimeoutError, httpx2.TimeoutException)):
            return CallTimeout(f"endpoint {name}", limit_s)
        if answering:  # the text of the error may quote the answer
            return UnusableAnswer(name, f"the connection was lost in it: {type(cause).__name__}")
        if isinstance(error, openai.APIStatusError):
            response = self._response_of(error)
            if question is not None and self._learn is not None:  # a 429 names the limits
                self._learn(question.model, rate_limits(response.headers, response.now))
            return self._error_of(response, question)
        if isinstance(error, (openai.APIConnectionError, httpx2.HTTPError, OSError)):
            why = f"the connection was lost before an answer ({type(cause).__name__})"
            return ProviderDown(name, why, sent=True)
        return ProviderRefused(
            name,
            Category.VALIDATION,
            "INVALID_REQUEST",
            f"the request cannot be sent ({type(error).__name__})",
        )

    def _without_answer(self, found: BodyWithoutAnswer, question: Question | None) -> Exception:
        """Return our error for a response that is no answer, or holds an error in its place."""
        if found.error is None:
            return UnusableAnswer(self.settings.name, found.why, found.usage)
        response = ErrorResponse(200, {}, msgspec.json.encode(found.error))
        error = self._error_of(response, question)
        if found.usage is None:  # nothing of an answer was made
            return error
        if isinstance(error, RateLimited):  # the answer costs money, unlike a 429
            error = UnusableAnswer(self.settings.name, error.why)
        if isinstance(error, ProviderDown | ProviderRefused | UnusableAnswer):
            error.usage = found.usage
        return error

    def _error_of(self, response: ErrorResponse, question: Question | None) -> Exception:
        """Return our error for a provider's; no message quotes the key or the question."""
        key = self._key.get_secret_value()
        if question is None:
            return error_of(response, self.settings, [key])
        texts = [each["content"] for each in question.messages]
        tokens = estimated_prompt(question.messages) + question.max_tokens
        return error_of(response, self.settings, [key, *texts], tokens=tokens)

    def _response_of(self, error: APIStatusError) -> ErrorResponse:
        response = error.response
        return ErrorResponse(
            error.status_code, response.headers, response.content, self._time_of_day()
        )
