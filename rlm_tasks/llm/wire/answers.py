"""A question to a model, and the answer with its cost, as providers send it.

`llm.endpoint` reads whole and streamed responses with it; the gate settles an `Answer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from rlm_tasks.llm.wire.rate_limit_headers import RateLimitHeaders

if TYPE_CHECKING:
    from openai import AsyncAPIResponse


class Question(msgspec.Struct, frozen=True):
    """A question to one model.

    `messages` have a role and a content each; `schema` is the JSON schema of the answer.
    """

    model: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    temperature: float | None = None
    schema: dict[str, Any] | None = None


class Answer(msgspec.Struct, frozen=True):
    """The answer of a model, with its cost.

    `finish` is "stop", or "length" if `max_tokens` cut the text.
    """

    model: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: str
    limits: RateLimitHeaders = msgspec.field(name="told")  # the name under which it is cached
    latency_s: float


def estimated_tokens(text: str) -> int:
    """Return the estimated tokens of a text: one for each four bytes of UTF-8, rounded up."""
    return -(-len(text.encode(errors="replace")) // 4)


def estimated_prompt(messages: Iterable[Mapping[str, str]]) -> int:
    """Return the estimated tokens of messages."""
    return sum(estimated_tokens(message["content"]) for message in messages)


# --- reading answers --------------------------------------------------------------------------


class TokenUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class WireReply(NamedTuple):
    text: str
    finish: str
    usage: TokenUsage | None


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Whole(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: TokenUsage | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Part(msgspec.Struct):
    delta: _Delta
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Part] = []
    usage: TokenUsage | None = None


async def read_whole(response: AsyncAPIResponse[Any]) -> WireReply:
    """Read an answer.  Raises the errors of the connection and of the decoder."""
    answer = msgspec.json.decode(await response.read(), type=_Whole)
    choice = answer.choices[0]
    return WireReply(choice.message.content, choice.finish_reason or "stop", answer.usage)


async def read_stream(response: AsyncAPIResponse[Any]) -> WireReply:
    """Read a streamed answer.  Raises the errors of the connection and of the decoder."""
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
    # The two halves of one character may come in two parts; a single half is replaced.
    text = "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return WireReply(text, finish, usage)
