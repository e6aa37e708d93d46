"""How the odd answers of the fake provider are made: errors, bodies, streams and lost connections.

`odd_answers` has the table of them.  A `Make` returns a `Response` to what was asked, with the
tokens that the provider bills for it.
"""

from __future__ import annotations

import email.utils
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

SOON_S = 1.0
"""The wait that a 429 asks for."""
NOTHING_SAID = object()
"""The usage of an answer that does not state one."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and the good answer that the fake provider would give."""

    text: str
    question: str
    prompt: int  # tokens of the question
    completion: int  # tokens of the good answer
    max_tokens: int
    stream: bool
    states_usage: bool  # a stream states it on request
    parameters: frozenset[str]  # the names of the fields of the request
    now: float  # seconds since 1970


@dataclass(frozen=True, slots=True)
class Response:
    """A response, and what it costs.

    `wire` is the way in which it is sent, see `Connection.send_odd` of the fake provider.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    wire: str = ""
    prompt: int = 0  # tokens that are billed
    completion: int = 0
    cached: int = 0  # tokens of the prompt that are billed at the price of the cache
    stated_money: float | None = None  # the price that the response states, in place of tokens


Make = Callable[[Asked], Response]


# --- errors -----------------------------------------------------------------------------------


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def failure(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Make:
    """Return an error that bills nothing; in a text, {question} stands for the prompt."""

    def make(asked: Asked) -> Response:
        text = body if isinstance(body, str) else json.dumps(body)
        kind = "text/html" if text.startswith("<") else "application/json"
        said = text.replace("{question}", json.dumps(asked.question)[1:-1])
        at = {name: _at(value, asked.now) for name, value in (headers or {}).items()}
        return Response(status, said.encode(), {"Content-Type": kind, **at})

    return make


def openai(status: int, message: str, code: str = "", **more: Any) -> Make:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return failure(status, {"error": {**error, **more}})


def refuses(parameter: str, message: str) -> Make:
    """Return a refusal of a parameter; a request without it gets a good answer."""
    refused = openai(400, message, "unsupported_parameter", param=parameter)
    return lambda asked: (refused if parameter in asked.parameters else answer())(asked)


def _at(value: str, now: float) -> str:
    """Return a header with the time after `SOON_S` in place of the name of a form."""
    then = now + SOON_S
    whole = datetime.fromtimestamp(then, UTC)
    forms = {
        "{date}": email.utils.format_datetime(whole.replace(microsecond=0), usegmt=True),
        "{now}": email.utils.format_datetime(
            datetime.fromtimestamp(now, UTC).replace(microsecond=0), usegmt=True
        ),
        "{unix}": f"{then:.3f}",
        "{unix-ms}": f"{then * 1000:.0f}",
        "{iso}": whole.isoformat(),
    }
    return forms.get(value, value)


def wait(headers: Mapping[str, str], body: Any = "Slow down.") -> Make:
    """Return a 429 that asks to wait SOON_S."""
    return failure(429, body, headers)


# --- answers ----------------------------------------------------------------------------------


def usage_of(asked: Asked, completion: int | None = None) -> dict[str, Any]:
    made = asked.completion if completion is None else completion
    return {
        "prompt_tokens": asked.prompt,
        "completion_tokens": made,
        "total_tokens": asked.prompt + made,
    }


def answer(
    message: Callable[[str], Mapping[str, Any]] = lambda text: {"content": text},
    *,
    finish: str | None = "stop",
    usage: Callable[[Asked], Any] = usage_of,
    completion: Callable[[Asked], int] = lambda asked: asked.completion,
    cached: Callable[[Asked], int] = lambda _: 0,
    money: float | None = None,
    headers: Mapping[str, str] | None = None,
    wire: str = "",
    edit: Callable[[bytes], bytes] = lambda body: body,
    events: Callable[[list[Any]], list[Any]] = lambda events: events,
) -> Make:
    """Return an answer with the status 200, whole or streamed.

    - `message` returns the fields of the message for the good text.
    - `usage` returns what the body states; `completion` and `cached` what is billed.
    - `edit` changes the body, `events` the events of a stream.
    """

    def make(asked: Asked) -> Response:
        stated = usage(asked) if asked.states_usage else NOTHING_SAID
        said = message(asked.text)
        if asked.stream:
            body = _streamed(events(_events(said, finish, stated)))
        else:
            choice = {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": finish}
            whole = {"id": "1", "object": "chat.completion", "choices": [choice], "usage": stated}
            body = as_json({name: each for name, each in whole.items() if each is not NOTHING_SAID})
        kind = "text/event-stream" if asked.stream else "application/json"
        return Response(
            status=200,
            body=edit(body),
            headers={"Content-Type": kind, **(headers or {})},
            wire=wire,
            prompt=asked.prompt,
            completion=completion(asked),
            cached=cached(asked),
            stated_money=money,
        )

    return make


def _events(said: Mapping[str, Any], finish: str | None, usage: Any) -> list[Any]:
    """Return the events of a streamed answer: texts come in two halves."""
    content = said.get("content")
    parts: list[Mapping[str, Any]] = [said]
    if isinstance(content, str) and len(content) > 1:
        half = len(content) // 2
        parts = [{**said, "content": content[:half]}, {"content": content[half:]}]
    deltas: list[Mapping[str, Any]] = [{"role": "assistant", "content": ""}, *parts]
    events: list[Any] = [event(each) for each in deltas] + [event({}, finish)]
    return events + ([] if usage is NOTHING_SAID else [{"choices": [], "usage": usage}])


def event(delta: Any, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion.chunk", "choices": [choice]}


def with_message(events: list[Any]) -> list[Any]:
    """Return the events of a stream with the text so far in each, beside the delta."""
    text, found = "", []
    for each in events:
        for choice in each["choices"]:
            text += choice["delta"].get("content") or ""
        choices = [{**choice, "message": {"content": text}} for choice in each["choices"]]
        found.append({**each, "choices": choices})
    return found


def ends_with(error: Mapping[str, Any]) -> Callable[[list[Any]], list[Any]]:
    """Return an edit that puts an error in place of the second half of a stream."""
    return lambda events: [*events[:2], {"error": error}]


def _streamed(events: list[Any]) -> bytes:
    return b"".join(b"data: %b\n\n" % as_json(each) for each in events) + b"data: [DONE]\n\n"


def raw(body: bytes, *, status: int = 200, billed: bool = True, wire: str = "") -> Make:
    """Return a body as it is; it was billed like a good answer, unless said otherwise."""

    def make(asked: Asked) -> Response:
        tokens = (asked.prompt, asked.completion) if billed else (0, 0)
        return Response(status, body, {"Content-Type": "application/json"}, wire, *tokens)

    return make


def lost(wire: str, *, prompt: bool = False, whole: bool = False) -> Make:
    """Return an answer that is lost on its way; its prompt or all of it may be billed."""

    def make(asked: Asked) -> Response:
        return replace(
            answer(wire=wire)(asked),
            prompt=asked.prompt if prompt or whole else 0,
            completion=asked.completion if whole else 0,
        )

    return make


def gateway_error(status: int, body: str) -> Make:
    """Return the error of a gateway in front of a model that has read the prompt."""

    def make(asked: Asked) -> Response:
        return replace(failure(status, body)(asked), prompt=asked.prompt)

    return make


def no_text(usage: Callable[[Asked], Any] = usage_of, **message: Any) -> Make:
    finish = message.pop("finish", "stop")
    return answer(lambda _: {"content": None, **message}, finish=finish, usage=usage)


def reasoned(**message: Any) -> Make:
    """Return an answer whose reasoning took all of max_tokens."""

    def usage(asked: Asked) -> dict[str, Any]:
        details = {"reasoning_tokens": asked.max_tokens}
        return {**usage_of(asked, asked.max_tokens), "completion_tokens_details": details}

    return answer(
        lambda _: {"content": "", **message},
        finish="length",
        usage=usage,
        completion=lambda asked: asked.max_tokens,
    )


def first(event: Any) -> Callable[[list[Any]], list[Any]]:
    """Return an edit that puts an event before all others."""
    return lambda events: [event, *events]
