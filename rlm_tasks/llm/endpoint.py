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

from resilience.errors import CallTimeout, Category, RateLimited
from resilience.faults import retry_after_s
from rlm_tasks.llm.wire.answers import (
    Answer,
    Question,
    TokenUsage,
    WireReply,
    estimated_prompt,
    estimated_tokens,
    read_stream,
    read_whole,
)
from rlm_tasks.llm.wire.errors import ProviderDown, ProviderRefused, UnusableAnswer
from rlm_tasks.llm.wire.rate_limit_headers import RateLimitHeaders, rate_limits, wait_s

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from pydantic import SecretStr

    from rlm_tasks.settings.llm import EndpointSettings

_TEMPORARY = {408, 409, 425}  # statuses below 500 that may succeed at the next try
_QUOTED = 16  # a common text of this many characters is a quotation of the question


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
    ) -> None:
        self.settings = settings
        self._key, self._timeout_s, self._per_host, self._idle_s, self._clock = (
            key,
            timeout_s,
            per_host,
            idle_s,
            clock,
        )
        # The time limit must not count the wait for a free connection.
        self._connections = asyncio.Semaphore(per_host)
        self._client: AsyncOpenAI | None = None

    def open(self) -> None:
        """Make the client, which takes a while; the first call raises for an invalid key."""
        with suppress(ProviderRefused):
            self._opened()

    async def ask(self, question: Question) -> Answer:
        """Send a question once, as soon as one of `per_host` connections is free.

        Raises RateLimited, CallTimeout, ProviderDown, UnusableAnswer, ProviderRefused.
        """
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
                    read = read_stream if self.settings.stream else read_whole
                    reply = await read(response)
                    return self._answer(question, reply, rate_limits(response.headers), began)
        except Exception as error:  # any error may contain the key and the prompt
            meaning = self._meaning(error, self._timeout_s, question, answering=answering)
        raise meaning

    async def check(self, timeout_s: float) -> float:
        """Return the seconds that the endpoint took to list its models.  Raises as `ask` does."""
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

    def _answer(
        self, question: Question, reply: WireReply, limits: RateLimitHeaders, began: float
    ) -> Answer:
        if not reply.text:
            raise UnusableAnswer(self.settings.name, f"it is empty, and ended by {reply.finish!r}")
        usage = reply.usage or TokenUsage()
        return Answer(
            model=question.model,
            text=reply.text,
            prompt_tokens=estimated_prompt(question.messages)
            if usage.prompt_tokens is None
            else usage.prompt_tokens,
            completion_tokens=estimated_tokens(reply.text)
            if usage.completion_tokens is None
            else usage.completion_tokens,
            finish=reply.finish,
            limits=limits,
            latency_s=self._clock() - began,
        )

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

        name = self.settings.name
        if isinstance(error, (ProviderRefused, UnusableAnswer)):
            return error
        if isinstance(error, (TimeoutError, openai.APITimeoutError, httpx2.TimeoutException)):
            return CallTimeout(f"endpoint {name}", limit_s)
        if answering:  # only the text of a decoder's error cannot quote the answer
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
            f"the request cannot be sent ({type(error).__name__})",
        )

    def _refusal(self, error: APIStatusError, question: Question | None) -> Exception:
        """Return our error for a status below 200 or above 299."""
        name, status = self.settings.name, error.status_code
        if status == 402 or "insufficient_quota" in (error.code, error.type):
            why = f"its quota is used up ({status}); waiting does not help, see plan and billing"
            return ProviderRefused(
                endpoint=name,
                category=Category.QUOTA,
                code="INSUFFICIENT_QUOTA",
                why=why,
                status=status,
            )
        if status == 429:
            return RateLimited(f"endpoint {name}", wait_s(error), "the provider answered 429")
        if status in (401, 403):
            why = f"it does not accept its key ({status}); see {self.settings.key_env}"
            return ProviderRefused(
                endpoint=name, category=Category.AUTH, code="UNAUTHORISED", why=why, status=status
            )
        if status in _TEMPORARY or status >= 500:
            return ProviderDown(name, f"answers {status}", retry_after_s(error))
        code = (
            "CONTEXT_LENGTH_EXCEEDED"
            if error.code == "context_length_exceeded"
            else "INVALID_REQUEST"
        )
        url = self.settings.base_url or "OPENAI_BASE_URL"
        where = f"; does {url} have its right end, such as /v1?" if status == 404 else ""
        why = f"refuses the question ({status}): {self._reason(error, question)}{where}"
        return ProviderRefused(
            endpoint=name, category=Category.VALIDATION, code=code, why=why, status=status
        )

    def _reason(self, error: APIStatusError, question: Question | None) -> str:
        """Return the provider's message, up to 200 characters, unless it quotes key or prompt."""
        message = error.body.get("message") if isinstance(error.body, dict) else None
        if not isinstance(message, str):
            return "without a reason"
        message = " ".join(message.split())[:200]
        private = [
            self._key.get_secret_value(),
            *(each["content"] for each in (question.messages if question else ())),
        ]
        pieces = {message[at : at + _QUOTED] for at in range(max(1, len(message) - _QUOTED + 1))}
        for text in (" ".join(each.split()) for each in private if each):
            if "\\" in message or text in message or any(piece in text for piece in pieces):
                return "its reason is hidden, because it quotes the question"
        return message
