"""A fake provider for tests without cost: a real HTTP server with OpenAI's wire format.

    python -m rlm_tasks.testing.fake_provider --port 8089 --window 60 --requests 3500 --tokens 90000

Tests, examples and the benchmarks start it with `running`.  It applies its limits by its own clock,
fails by a schedule, and counts requests and answers.  Equal questions get equal answers.  Any key
is accepted.

POST /v1/chat/completions and GET /v1/models work as OpenAI's do.  GET /report returns the counts,
POST /reset sets them to 0, POST /schedule takes a list of `Rule`.  POST /models-status takes the
status of GET /v1/models.  `odd_answers` has answers as real providers give them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from random import Random
from typing import Annotated, Any

import msgspec

from rlm_tasks.testing.http_connection import Connection, Request
from rlm_tasks.testing.odd_answers import ASKS_FOR, ODD_ANSWERS
from rlm_tasks.testing.odd_responses import Asked, Response
from rlm_tasks.testing.tokenizer import TOKENIZERS, Tokenizer

# --- the model ---------------------------------------------------------------------------------


class Model:
    """The answers, by `behaviour`.

    - "echo" repeats the last message.
    - "reader" answers from its text.
    - "writer" is a reader, but it answers ``in <number> words`` where the text asks for that.  The
      number varies as lengths of real answers do.  Nine of ten forms are right the first time.

    A reader looks for the first of these in the text:

    - A line ``QUESTION: ...`` and lines ``[<number>] <passage>``.  Passages match that share at
      least half of the question's words of four letters or more.  The answer is JSON with the best
      five of them (`found`) and the best sentence of the best one (`answer`).
    - A line ``MERGE:`` and lines ``- <text>`` below it.  The answer has each text once, sorted and
      joined by "; ".
    - ``SUM:``.  The answer is the sum of the integers behind it.
    - Else the answer is the first twelve words.

    For a schema of several properties, only its answer to a repeated question is an object.
    """

    def __init__(self, behaviour: str = "reader") -> None:
        self._behaviour = behaviour

    def answer(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None = None
    ) -> str:
        """Return the answer to messages; with a `schema` of one property, an object that has it."""
        again = any(each.get("role") == "assistant" for each in messages)
        if self._behaviour == "echo":
            text = f"echo: {messages[-1]['content']}"
        else:
            prompts = [each["content"] for each in messages if each.get("role") == "user"] or [""]
            text = _read(prompts[-1])
            if self._behaviour == "writer":
                random = Random(prompts[0])
                text = _written(prompts[0], text, random)
                again = again or random.random() < 0.9
        return text if schema is None else _shaped(text, schema, again=again)


def _read(text: str) -> str:
    question = re.search(r"^QUESTION:(.*)$", text, re.MULTILINE)
    passages = re.findall(r"^\[(\d+)\] (.*)$", text, re.MULTILINE)
    if question and passages:
        return _search_answer(
            _words(question[1]), {int(number): passage for number, passage in passages}
        )
    if merge := re.search(r"^MERGE:.*$", text, re.MULTILINE):
        return "; ".join(
            sorted(
                {
                    each.strip()
                    for each in re.findall(r"^- (.*)$", text[merge.end() :], re.MULTILINE)
                }
            )
        )
    if "SUM:" in text:
        return str(sum(int(each) for each in re.findall(r"-?\d+", text.partition("SUM:")[2])))
    return " ".join(text.split()[:12])


def _written(prompt: str, text: str, random: Random) -> str:
    """Return words of a prompt, about as many as it asks for; else the text."""
    asked = re.search(r"\bin (?:about )?(\d+) words?\b", prompt)
    if asked is None:
        return text
    count, words = round(int(asked[1]) * random.lognormvariate(-0.08, 0.4)), prompt.split()
    return " ".join(random.choices(words, k=max(1, count)))


def _search_answer(wanted: set[str], passages: Mapping[int, str]) -> str:
    shared = {number: len(wanted & _words(passage)) for number, passage in passages.items()}
    found = sorted(
        (n for n in shared if wanted and 2 * shared[n] >= len(wanted)),
        key=lambda n: (-shared[n], n),
    )[:5]
    sentences = re.split(r"(?<=[.!?])\s+", passages[found[0]].strip()) if found else [""]
    best = max(sentences, key=lambda each: len(wanted & _words(each)))  # the first of equals
    return msgspec.json.encode({"answer": best, "found": found}).decode()


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text.lower()))


def _shaped(text: str, schema: Mapping[str, Any], *, again: bool) -> str:
    with suppress(msgspec.DecodeError):
        if isinstance(msgspec.json.decode(text), dict):
            return text
    properties = schema.get("properties", {})
    if again:
        fillers = {"string": text, "integer": 0, "number": 0.0, "boolean": False, "array": []}
        return msgspec.json.encode(
            {name: fillers.get(about.get("type")) for name, about in properties.items()}
        ).decode()
    with suppress(ValueError, KeyError):
        [(name, about)] = properties.items()
        convert = {"string": str, "integer": int, "number": float}[about["type"]]
        return msgspec.json.encode({name: convert(text)}).decode()
    return text


# --- its limits -------------------------------------------------------------------------------


class Window:
    """A true sliding window of `window_s` seconds, with limits on requests and tokens; 0: none."""

    def __init__(
        self,
        window_s: float,
        requests: float,
        tokens: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window_s, self._requests, self._tokens = (
            window_s,
            requests or math.inf,
            tokens or math.inf,
        )
        self._clock = clock
        self._entries: deque[list[float]] = deque()  # [time, tokens] of requests in the window
        self._used = 0.0

    def take(self, tokens: float) -> list[float] | None:
        """Accept a request that comes now and return its entry, [time, tokens]; None: refused."""
        now = self._clock()
        while self._entries and self._entries[0][0] <= now - self._window_s:
            self._used -= self._entries.popleft()[1]
        if not self._fits(len(self._entries) + 1, self._used + tokens):
            return None
        self._entries.append(entry := [now, tokens])
        self._used += tokens
        return entry

    def settle(self, entry: list[float], tokens: float) -> None:
        """Set the tokens of an entry to the number that was used."""
        if self._entries and entry[0] >= self._entries[0][0]:
            self._used += tokens - entry[1]
        entry[1] = tokens

    def wait_s(self, tokens: float) -> float:
        """Return the seconds until a refused request would be accepted."""
        count, used, wait_s = len(self._entries) + 1, self._used + tokens, self._window_s
        for at, cost in self._entries:
            if self._fits(count, used):
                break
            count, used, wait_s = count - 1, used - cost, at + self._window_s - self._clock()
        return max(0.001, wait_s)

    def headers(self) -> dict[str, str]:
        """Return the headers with its limits, as OpenAI sends them with each answer."""
        whole_s = (
            max(0.0, self._entries[-1][0] + self._window_s - self._clock())
            if self._entries
            else 0.0
        )
        headers = {}
        for unit, limit, used in (
            ("requests", self._requests, len(self._entries)),
            ("tokens", self._tokens, self._used),
        ):
            if limit < math.inf:
                headers[f"x-ratelimit-limit-{unit}"] = f"{limit:.0f}"
                headers[f"x-ratelimit-remaining-{unit}"] = f"{max(0, limit - used):.0f}"
                headers[f"x-ratelimit-reset-{unit}"] = f"{whole_s:.3f}s"
        return headers

    def _fits(self, count: int, tokens: float) -> bool:
        return count <= self._requests and tokens <= self._tokens


# --- its failures -----------------------------------------------------------------------------

_ERRORS = {
    "400": (400, "context_length_exceeded", "This model's maximum context length is exceeded."),
    "401": (401, "invalid_api_key", "Incorrect API key provided: {key}."),
    "404": (404, "model_not_found", "The model does not exist."),
    # Some servers quote the request in their errors.
    "422": (422, "invalid_request", "Value error in: {question!a}"),
    "429": (429, "rate_limit_exceeded", "Rate limit reached."),
    "quota": (429, "insufficient_quota", "You exceeded your current quota."),
    "500": (500, "server_error", "The server had an error."),
    "503": (503, "overloaded", "The engine is overloaded."),
}


KINDS = {*_ERRORS, "timeout", "garbage", "cut", "empty", "slow"}
"""The kinds of failures, besides odd answers."""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A failure for every n-th request between two numbers; the first request is 1.

    Kinds:

    - a status, or "quota": an error, which may have `headers`
    - "timeout": no answer
    - "garbage": an answer that is no JSON
    - "empty": an answer without choices
    - "cut": an answer that ends in the middle
    - "slow": each part of the answer is `seconds` late
    - the name of an odd answer, see `odd_answers.ODD_ANSWERS`
    """

    kind: str
    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    first: int = msgspec.field(name="from", default=1)
    to: int | None = None
    headers: dict[str, str] = {}
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS and self.kind not in ODD_ANSWERS:
            raise ValueError(f"kind: there is no failure {self.kind!r}; --list prints them")

    def meets(self, number: int) -> bool:
        """Return whether the rule applies to the request with this number."""
        return (
            number >= self.first
            and (self.to is None or number <= self.to)
            and number % self.every == 0
        )


# --- its counts -------------------------------------------------------------------------------


class Spent(msgspec.Struct):
    """The answers of one model, or of one kind, and what they cost."""

    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # tokens of prompts that came from the cache
    stated_money: float = 0.0  # prices that answers stated; their tokens are counted, too

    def add(self, prompt: int, completion: int, cached: int = 0, money: float = 0.0) -> None:
        """Add one answer."""
        self.answered += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.cached_tokens += cached
        self.stated_money += money


class Counts(msgspec.Struct):
    """The counts since the last reset.

    `taken` has the [time by the monotonic clock, tokens] of each accepted request.
    """

    requests: int = 0
    refused: int = 0
    checks: int = 0  # requests for its models
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    by_model: dict[str, Spent] = {}
    by_kind: dict[str, Spent] = {}
    """Of odd answers, by their name; `answered` counts their calls."""
    most_in_flight: int = 0
    connections_opened: int = 0
    taken: list[list[float]] = []
    prompts: Counter[bytes] = msgspec.field(default_factory=Counter)
    """The number of answers by the digest of their question."""

    def report(self, in_flight: int, connections: int) -> dict[str, Any]:
        """Return all counts as plain data, with the requests and connections that are open now."""
        return {
            **{
                name: getattr(self, name)
                for name in (
                    "requests",
                    "refused",
                    "checks",
                    "faults",
                    "by_model",
                    "by_kind",
                    "taken",
                )
            },
            **{
                each: sum(getattr(spent, each) for spent in self.by_model.values())
                for each in Spent.__struct_fields__
            },
            "in_flight": in_flight,
            "most_in_flight": self.most_in_flight,
            "connections": connections,
            "connections_opened": self.connections_opened,
            "prompts": {
                "distinct": len(self.prompts),
                "most_answered": max(self.prompts.values(), default=0),
            },
        }


# --- its wire format --------------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    """Options of a streamed answer."""

    include_usage: bool = False


class Schema(msgspec.Struct):
    """A JSON schema under a name."""

    schema: dict[str, Any] = {}


class Format(msgspec.Struct):
    """The required form of an answer."""

    json_schema: Schema | None = None


class ChatRequest(msgspec.Struct):
    """A request for a chat completion: the fields of OpenAI's that this server supports."""

    model: str
    messages: Annotated[list[dict[str, str]], msgspec.Meta(min_length=1)]
    max_tokens: int = 256
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)
    response_format: Format = msgspec.field(default_factory=Format)

    def __post_init__(self) -> None:
        if not all({"role", "content"} <= set(message) for message in self.messages):
            raise ValueError("messages: each has a role and a content")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        if (asks := self.asks_for) is not None and asks[1] not in ODD_ANSWERS:
            raise ValueError(f"messages: there is no odd answer {asks[1]!r}; --list prints them")

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, if there is one."""
        return self.response_format.json_schema.schema if self.response_format.json_schema else None

    @property
    def asks_for(self) -> re.Match[str] | None:
        """The last message's wish for an odd answer, see `ASKS_FOR`."""
        return ASKS_FOR.search(self.messages[-1]["content"])

    @property
    def digest(self) -> bytes:
        """A hash of model and messages."""
        return hashlib.sha256(msgspec.json.encode((self.model, self.messages))).digest()


class FakeProvider:
    """The server: limits, schedule, counts and a model.

    An answer takes about `latency_s` seconds.  It makes as many answers at once as it has `slots`;
    further questions wait.  It refuses a question above its `context`, in tokens of prompt and
    answer; 0: no limit.  `always` is the odd answer to all other questions.
    """

    def __init__(
        self,
        new_window: Callable[[], Window],
        model: Model,
        schedule: Sequence[Rule],
        latency_s: float,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 1_000_000,
        context: float = 0,
        models_status: int = 200,
        always: str | None = None,
    ) -> None:
        self._new_window, self._model, self._schedule, self._latency_s = (
            new_window,
            model,
            schedule,
            latency_s,
        )
        self._tokenizer = tokenizer or TOKENIZERS["bytes"]()
        self._window, self._counts, self._random = new_window(), Counts(), Random(1)
        self._given: Counter[bytes] = Counter()  # odd answers by the digest of their question
        self._context, self._always = context, always
        self._models_status = models_status
        self._in_flight = self._connections = 0
        self._slots = asyncio.Semaphore(slots)
        self._routes = {
            ("POST", "/v1/chat/completions"): self._complete,
            ("GET", "/v1/models"): self._models,
            ("GET", "/report"): self._report,
            ("POST", "/reset"): self._reset,
            ("POST", "/schedule"): self._reschedule,
            ("POST", "/models-status"): self._set_models_status,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        connection = Connection(reader, writer)
        # Without CancelledError asyncio would log each connection when the server ends.
        with suppress(
            ConnectionError, EOFError, asyncio.LimitOverrunError, ValueError, asyncio.CancelledError
        ):
            while True:
                await self._answer(await connection.request(), connection)
        self._connections -= connection.counted
        connection.close()

    async def _answer(self, request: Request, connection: Connection) -> None:
        route = self._routes.get((request.method, request.path))
        if route is None:
            return await connection.send(404, _error("not_found", "There is no such path."))
        if request.path.startswith("/v1/"):
            if not connection.counted:
                connection.counted = True
                self._connections += 1
                self._counts.connections_opened += 1
            if not request.key:
                return await connection.send(
                    401, _error("invalid_api_key", "You didn't provide an API key.")
                )
        try:
            return await route(request, connection)
        except msgspec.DecodeError as error:
            return await connection.send(400, _error("invalid_request", str(error)))

    async def _models(self, request: Request, connection: Connection) -> None:
        self._counts.checks += 1
        await connection.send(
            self._models_status,
            {"object": "list", "data": [{"id": "fake", "object": "model", "owned_by": "nobody"}]},
        )

    async def _report(self, request: Request, connection: Connection) -> None:
        await connection.send(200, self._counts.report(self._in_flight, self._connections))

    async def _reset(self, request: Request, connection: Connection) -> None:
        self._window, self._counts = self._new_window(), Counts()
        self._given.clear()
        await connection.send(200, {})

    async def _reschedule(self, request: Request, connection: Connection) -> None:
        self._schedule = msgspec.json.decode(request.body, type=list[Rule])
        await connection.send(200, {})

    async def _set_models_status(self, request: Request, connection: Connection) -> None:
        self._models_status = msgspec.json.decode(request.body, type=int)
        await connection.send(200, {"checks": self._counts.checks})

    async def _complete(self, request: Request, connection: Connection) -> None:
        chat = msgspec.json.decode(request.body, type=ChatRequest)
        prompt = self._tokenizer.prompt(chat.messages, chat.schema)
        counts = self._counts
        counts.requests += 1
        counts.prompts[chat.digest] += 0
        rule = next((each for each in self._schedule if each.meets(counts.requests)), None)
        entry = self._window.take(prompt + chat.max_tokens)
        if entry is None:
            counts.refused += 1
            return await connection.send(
                429,
                _error("rate_limit_exceeded", "Rate limit reached."),
                self._refusal_headers(chat, prompt),
            )
        counts.taken.append(entry)
        self._in_flight += 1
        counts.most_in_flight = max(counts.most_in_flight, self._in_flight)
        try:
            async with self._slots:
                await asyncio.sleep(self._latency_s * self._random.uniform(0.8, 1.2))
            if rule is not None:
                counts.faults[rule.kind] += 1
            if (odd := self._odd_for(chat, prompt, rule)) is not None:
                response = self._odd_response(chat, odd, prompt, request)
                self._window.settle(entry, response.prompt + response.completion)
                await connection.send_odd(response)
            elif rule is None or rule.kind == "slow":
                await self._answer_chat(
                    chat=chat,
                    prompt=prompt,
                    entry=entry,
                    connection=connection,
                    pause_s=rule.seconds if rule else 0.0,
                )
            else:
                await self._fail_chat(chat, request.key, rule, connection)
        finally:
            self._in_flight -= 1
        return None

    def _odd_for(self, chat: ChatRequest, prompt: int, rule: Rule | None) -> str | None:
        """Return the name of the odd answer to a request, if it gets one.

        The schedule comes first, then the wish of the prompt, then the modes of the server."""
        if rule is not None:
            return rule.kind if rule.kind in ODD_ANSWERS else None
        if (asks := chat.asks_for) is not None:
            self._given[chat.digest] += 1
            if self._given[chat.digest] <= int(asks[2] or sys.maxsize):
                return asks[1]
        if self._context and prompt + chat.max_tokens > self._context:
            return "context-openai"
        return self._always

    def _odd_response(
        self, chat: ChatRequest, name: str, prompt: int, request: Request
    ) -> Response:
        """Return an odd answer, and count what it bills."""
        text = self._tokenizer.cut(self._model.answer(chat.messages, chat.schema), chat.max_tokens)
        response = ODD_ANSWERS[name].make(
            Asked(
                text=text,
                question=chat.messages[-1]["content"],
                prompt=prompt,
                completion=self._tokenizer.count(text),
                max_tokens=chat.max_tokens,
                stream=chat.stream,
                states_usage=not chat.stream or chat.stream_options.include_usage,
                parameters=frozenset(msgspec.json.decode(request.body)),
                now=time.time(),
            )
        )
        bill = (response.prompt, response.completion, response.cached, response.stated_money or 0.0)
        self._counts.by_kind.setdefault(name, Spent()).add(*bill)
        if response.prompt or response.completion:
            self._counts.by_model.setdefault(chat.model, Spent()).add(*bill)
        return response

    def _refusal_headers(self, chat: ChatRequest, prompt: int) -> dict[str, str]:
        wait_s = self._window.wait_s(prompt + chat.max_tokens)
        wait = {
            "Retry-After": f"{math.ceil(wait_s)}",
            "retry-after-ms": f"{math.ceil(wait_s * 1000)}",
        }
        return {**wait, **self._window.headers()}

    async def _answer_chat(
        self,
        chat: ChatRequest,
        prompt: int,
        entry: list[float],
        connection: Connection,
        pause_s: float,
    ) -> None:
        whole = self._model.answer(chat.messages, chat.schema)
        text = self._tokenizer.cut(whole, chat.max_tokens)
        completion = self._tokenizer.count(text)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        self._window.settle(entry, usage["total_tokens"])
        self._counts.by_model.setdefault(chat.model, Spent()).add(prompt, completion)
        self._counts.prompts[chat.digest] += 1
        parts = _chat_parts(chat, text, "stop" if text == whole else "length", usage)
        await connection.send_parts(
            200, parts, self._window.headers(), chunked=chat.stream, pause_s=pause_s
        )

    async def _fail_chat(
        self, chat: ChatRequest, key: str, rule: Rule, connection: Connection
    ) -> None:
        if rule.kind in _ERRORS:
            status, code, why = _ERRORS[rule.kind]
            error = _error(code, why.format(key=key, question=chat.messages[-1]["content"]))
            return await connection.send(status, error, {**self._window.headers(), **rule.headers})
        if rule.kind == "timeout":
            return await connection.pause()
        if rule.kind == "garbage":
            parts = [b"data: <html>\n\n"] if chat.stream else [b"<html>"]
        elif rule.kind == "empty":
            parts = (
                [_chat_event(chat, [], None), b"data: [DONE]\n\n"]
                if chat.stream
                else [_chat_json(chat, [], None)]
            )
        else:
            parts = _chat_parts(chat, "half of an answer", "stop", None)
        return await connection.send_parts(200, parts, chunked=chat.stream, cut=rule.kind == "cut")


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def _chat_parts(
    chat: ChatRequest, text: str, finish: str, usage: dict[str, int] | None
) -> list[bytes]:
    """Return the body of an answer in several parts; as events if it is streamed."""
    if not chat.stream:
        body = _chat_json(
            chat,
            [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": finish,
                }
            ],
            usage,
        )
        return [body[: len(body) // 2], body[len(body) // 2 :]]
    quarter = max(1, -(-len(text) // 4))
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": text[at : at + quarter]}, None) for at in range(0, len(text), quarter)]
    deltas += [({}, finish)]
    events = [
        _chat_event(chat, [{"index": 0, "delta": delta, "finish_reason": end}], None)
        for delta, end in deltas
    ]
    if chat.stream_options.include_usage:
        events.append(_chat_event(chat, [], usage))
    return [*events, b"data: [DONE]\n\n"]


def _chat_event(
    chat: ChatRequest, choices: list[dict[str, Any]], usage: dict[str, int] | None
) -> bytes:
    return b"data: %b\n\n" % _chat_json(chat, choices, usage)


def _chat_json(
    chat: ChatRequest, choices: list[dict[str, Any]], usage: dict[str, int] | None
) -> bytes:
    kind = "chat.completion.chunk" if chat.stream else "chat.completion"
    known = {} if usage is None else {"usage": usage}
    return msgspec.json.encode(
        {
            "id": "fake",
            "object": kind,
            "created": 0,
            "model": chat.model,
            "choices": choices,
            **known,
        }
    )


# --- its process ------------------------------------------------------------------------------


class Running:
    """A fake provider in its own process; `base_url` is for the settings of an endpoint."""

    def __init__(self, port: int) -> None:
        self.port, self.base_url = port, f"http://127.0.0.1:{port}/v1"

    def report(self) -> dict[str, Any]:
        """Return its counts, see `Counts.report`."""
        return self._request("GET", "/report")

    def reset(self) -> None:
        """Set its counts and the use of its limits to 0."""
        self._request("POST", "/reset")

    def schedule(self, *rules: Mapping[str, Any]) -> None:
        """Replace its schedule of failures, see `Rule`."""
        self._request("POST", "/schedule", rules)

    def answer_models(self, status: int) -> int:
        """Set the status of answers to GET /v1/models; return the number of requests so far."""
        checks: int = self._request("POST", "/models-status", status)["checks"]
        return checks

    def _request(self, method: str, path: str, content: Any = None) -> dict[str, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request(method, path, msgspec.json.encode(content))
            response = connection.getresponse()
            answer: dict[str, Any] = msgspec.json.decode(response.read())
        if response.status != 200:
            raise ValueError(answer["error"]["message"])
        return answer


@contextmanager
def running(
    schedule: Sequence[Mapping[str, Any]] = (), **options: float | str
) -> Iterator[Running]:
    """Run a fake provider for the length of a block; `options` are those of the command line.

    Raises rlm_tasks.testing.embedded.NotStarted.
    """
    from rlm_tasks.testing.embedded import NotStarted, end

    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--stdin",
        f"--schedule={msgspec.json.encode(schedule).decode()}",
        *words,
    ]
    # With its own session it gets no Ctrl-C; this process cleans up and then stops it.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            ready = process.stdout.readline() if process.stdout else b""
            if not ready:
                raise NotStarted("the fake provider did not start; the reason is on stderr")
            yield Running(int(ready.split()[-1]))
        finally:
            end(process)


async def _run(options: argparse.Namespace) -> None:
    provider = FakeProvider(
        lambda: Window(options.window, options.requests, options.tokens),
        Model(options.model_behaviour),
        options.schedule,
        options.latency,
        TOKENIZERS[options.tokenizer](),
        slots=options.slots,
        context=options.context,
        models_status=options.models_status,
        always=options.always,
    )
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)
    if options.stdin:

        def wait_for_end() -> None:
            while os.read(sys.stdin.fileno(), 4096):
                pass
            loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=wait_for_end, daemon=True).start()
    server = await asyncio.start_server(provider.serve, "127.0.0.1", options.port, backlog=1024)
    print("at", server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()
    server.close()


def _main() -> None:
    options = argparse.ArgumentParser(description="A fake provider with OpenAI's wire format.")
    options.add_argument(
        "--port", type=int, default=0, help="port on the loopback interface; 0: a free one"
    )
    options.add_argument(
        "--window", type=float, default=60.0, help="seconds of the window of its limits"
    )
    options.add_argument(
        "--requests", type=float, default=0.0, help="requests in any window; 0: no limit"
    )
    options.add_argument(
        "--tokens", type=float, default=0.0, help="tokens in any window; 0: no limit"
    )
    options.add_argument("--latency", type=float, default=0.0, help="mean seconds of an answer")
    options.add_argument(
        "--slots", type=int, default=1_000_000, help="answers made at once; other questions wait"
    )
    options.add_argument(
        "--context", type=float, default=0.0, help="tokens of its context; 0: no limit"
    )
    options.add_argument(
        "--models-status", type=int, default=200, help="status of answers to GET /v1/models"
    )
    options.add_argument(
        "--always",
        choices=list(ODD_ANSWERS),
        metavar="NAME",
        help="an odd answer for each question, such as usage-missing",
    )
    rules = msgspec.json.Decoder(list[Rule])
    options.add_argument(
        "--schedule",
        type=rules.decode,
        default=[],
        help='failures, as JSON: [{"kind": "500", "every": 9}]',
    )
    options.add_argument(
        "--model-behaviour",
        choices=["reader", "writer", "echo"],
        default="reader",
        help="kind of answers",
    )
    options.add_argument(
        "--tokenizer",
        choices=list(TOKENIZERS),
        default="bytes",
        help="bytes: four bytes are a token, as the platform estimates; pieces: about as real "
        "models count",
    )
    options.add_argument(
        "--list", action="store_true", help="print the names of odd answers, and end"
    )
    options.add_argument("--stdin", action="store_true", help="end when stdin is closed")
    chosen = options.parse_args()
    if chosen.list:
        for name, odd in ODD_ANSWERS.items():
            print(f"{odd.group:<11}{name:<25}{odd.about}")
        return
    asyncio.run(_run(chosen))


if __name__ == "__main__":
    _main()
