"""A fake provider, for rehearsals without money: a real HTTP server that speaks OpenAI's wire
format.

    python -m rlm_tasks.testing.fake_provider --port 8089 --window 60 --requests 3500 --tokens 90000

Decides by its own clock what its limits let in, goes wrong by a schedule, and counts what it was
asked and what it answered.  Equal questions have equal answers.  Refuses to know who asks: any key
will do.

POST /v1/chat/completions and GET /v1/models are as OpenAI's.  GET /report tells what was counted,
POST /reset starts anew, POST /schedule takes a list of `Rule`."""

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
from typing import Annotated, Any, Literal

import msgspec

from rlm_tasks.llm.endpoint import estimated_prompt
from rlm_tasks.llm.endpoint import estimated_tokens as tokens  # so that here, estimates are exact

MOST_BYTES = 64 * 2**20
"""No request is longer."""

# --- what it answers ---------------------------------------------------------------------------


class Model:
    """What is answered: by `behaviour`, "echo" the last message, or "reader" what a simple reader
    of it would say.

    A reader finds in its text

    - a line ``QUESTION: ...`` and lines ``[<number>] <passage>``: it answers as JSON which passages
      share at least half of the question's words of four letters or more, the best five (`found`),
      and the best one's best sentence (`answer`);
    - a line ``MERGE:`` and lines ``- <text>`` below it: it answers with the texts, each once,
      sorted, joined by "; ";
    - ``SUM:``: it answers with the sum of the integers behind it;
    - nothing of that: it answers with the first twelve words.

    It puts more than one property into an object only when it is asked again.
    """

    def __init__(self, behaviour: str = "reader") -> None:
        self._behaviour = behaviour

    def answer(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None = None
    ) -> str:
        """Return the answer to messages; with a `schema` of one property it is an object that has
        it.
        """
        if self._behaviour == "echo":
            text = f"echo: {messages[-1]['content']}"
        else:
            text = _read(
                next(
                    (each["content"] for each in reversed(messages) if each.get("role") == "user"),
                    "",
                )
            )
        again = any(each.get("role") == "assistant" for each in messages)
        return text if schema is None else _shaped(text, schema, again=again)


def _read(text: str) -> str:
    question = re.search(r"^QUESTION:(.*)$", text, re.MULTILINE)
    passages = re.findall(r"^\[(\d+)\] (.*)$", text, re.MULTILINE)
    if question and passages:
        return _found(_words(question[1]), {int(number): passage for number, passage in passages})
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


def _found(wanted: set[str], passages: Mapping[int, str]) -> str:
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
        as_asked = {"string": str, "integer": int, "number": float}[about["type"]]
        return msgspec.json.encode({name: as_asked(text)}).decode()
    return text


def cut(text: str, most: int) -> str:
    """Return the first `most` tokens of a text."""
    return text.encode()[: 4 * most].decode(errors="ignore")


# --- what it lets in --------------------------------------------------------------------------


class Window:
    """A true sliding window: in any `window_s` seconds, so many requests and so many tokens; 0 is
    without a limit.
    """

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
        self._entries: deque[list[float]] = deque()  # [when it came, tokens] of all that counts
        self._used = 0.0

    def take(self, tokens: float) -> list[float] | None:
        """Let a request in that comes now, and return its entry, [when it came, tokens]; None: it
        is too much.
        """
        now = self._clock()
        while self._entries and self._entries[0][0] <= now - self._window_s:
            self._used -= self._entries.popleft()[1]
        if not self._fits(len(self._entries) + 1, self._used + tokens):
            return None
        self._entries.append(entry := [now, tokens])
        self._used += tokens
        return entry

    def settle(self, entry: list[float], tokens: float) -> None:
        """Put an entry right, now that it is known how many tokens it has."""
        if self._entries and entry[0] >= self._entries[0][0]:
            self._used += tokens - entry[1]
        entry[1] = tokens

    def wait_s(self, tokens: float) -> float:
        """Return after how many seconds a request would be let in that is too much now."""
        count, used, wait_s = len(self._entries) + 1, self._used + tokens, self._window_s
        for came, cost in self._entries:
            if self._fits(count, used):
                break
            count, used, wait_s = count - 1, used - cost, came + self._window_s - self._clock()
        return max(0.001, wait_s)

    def headers(self) -> dict[str, str]:
        """Return what OpenAI says of its limits with every answer."""
        whole_s = (
            max(0.0, self._entries[-1][0] + self._window_s - self._clock())
            if self._entries
            else 0.0
        )
        told = {}
        for what, limit, used in (
            ("requests", self._requests, len(self._entries)),
            ("tokens", self._tokens, self._used),
        ):
            if limit < math.inf:
                told[f"x-ratelimit-limit-{what}"] = f"{limit:.0f}"
                told[f"x-ratelimit-remaining-{what}"] = f"{max(0, limit - used):.0f}"
                told[f"x-ratelimit-reset-{what}"] = f"{whole_s:.3f}s"
        return told

    def _fits(self, count: int, tokens: float) -> bool:
        return count <= self._requests and tokens <= self._tokens


# --- what goes wrong --------------------------------------------------------------------------

_ERRORS = {
    "400": (400, "context_length_exceeded", "This model's maximum context length is exceeded."),
    "401": (401, "invalid_api_key", "Incorrect API key provided: {key}."),
    "404": (404, "model_not_found", "The model does not exist."),
    "422": (
        422,
        "invalid_request",
        "Value error in: {question!a}",
    ),  # some servers do send back what they were sent
    "429": (429, "rate_limit_exceeded", "Rate limit reached."),
    "quota": (429, "insufficient_quota", "You exceeded your current quota."),
    "500": (500, "server_error", "The server had an error."),
    "503": (503, "overloaded", "The engine is overloaded."),
}


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to every n-th request, of those between two numbers; the first request is 1.

    Kinds: a status or "quota", which are errors and may have `headers`; "timeout" never answers;
    "garbage" is no JSON, "empty" has no choices; "cut" ends in the middle; each part of a "slow"
    answer is `seconds` late."""

    kind: Literal[
        "400",
        "401",
        "404",
        "422",
        "429",
        "500",
        "503",
        "quota",
        "timeout",
        "garbage",
        "cut",
        "empty",
        "slow",
    ]
    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    first: int = msgspec.field(name="from", default=1)
    to: int | None = None
    headers: dict[str, str] = {}
    seconds: float = 1.0

    def meets(self, number: int) -> bool:
        """Say whether it is for this request."""
        return (
            number >= self.first
            and (self.to is None or number <= self.to)
            and number % self.every == 0
        )


# --- what it counts ---------------------------------------------------------------------------


class Spent(msgspec.Struct):
    """What one model answered."""

    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Counts(msgspec.Struct):
    """What was seen since the last reset; `taken` has [when it came by the monotonic clock, tokens]
    of what was let in.
    """

    requests: int = 0
    refused: int = 0
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    by_model: dict[str, Spent] = {}
    most_in_flight: int = 0
    connections_opened: int = 0
    taken: list[list[float]] = []
    prompts: Counter[bytes] = msgspec.field(
        default_factory=Counter
    )  # a digest of the question -> how often answered

    def report(self, in_flight: int, connections: int) -> dict[str, Any]:
        """Return all of it as plain data, with what is open just now."""
        return {
            **{
                name: getattr(self, name)
                for name in ("requests", "refused", "faults", "by_model", "taken")
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


# --- what it understands ----------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    """How to stream."""

    include_usage: bool = False


class Schema(msgspec.Struct):
    """A JSON schema under a name."""

    schema: dict[str, Any] = {}


class Format(msgspec.Struct):
    """The form an answer is to have."""

    json_schema: Schema | None = None


class Asked(msgspec.Struct):
    """A question, of what OpenAI's has the part that is understood here."""

    model: str
    messages: Annotated[list[dict[str, str]], msgspec.Meta(min_length=1)]
    max_tokens: int = 256
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)
    response_format: Format = msgspec.field(default_factory=Format)

    def __post_init__(self) -> None:
        if not all({"role", "content"} <= set(message) for message in self.messages):
            raise ValueError("messages: each has a role and a content")

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is to meet."""
        return self.response_format.json_schema.schema if self.response_format.json_schema else None

    @property
    def digest(self) -> bytes:
        """Equal for equal questions to equal models."""
        return hashlib.sha256(msgspec.json.encode((self.model, self.messages))).digest()


class Request(msgspec.Struct):
    """One HTTP request; names of headers are lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str:
        """The key it carries, or nothing."""
        scheme, _, key = self.headers.get("authorization", "").partition(" ")
        return key if scheme.lower() == "bearer" else ""


class HungUp(ConnectionError):
    """This connection has ended."""


class Connection:
    """HTTP/1.1 over one connection: one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.counted = False

    async def request(self) -> Request:
        """Return the next request.  Raises ConnectionError, EOFError and ValueError where none
        comes.
        """
        head, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head.split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        length = int(headers.get("content-length", "0"))
        if length > MOST_BYTES:
            raise ValueError("too long")
        return Request(method, path, headers, await self._reader.readexactly(length))

    async def send(
        self, status: int, content: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with JSON."""
        await self.send_parts(status, [msgspec.json.encode(content)], headers)

    async def send_parts(
        self,
        status: int,
        parts: Sequence[bytes],
        headers: Mapping[str, str] | None = None,
        *,
        chunked: bool = False,
        pause_s: float = 0.0,
        cut: bool = False,
    ) -> None:
        """Answer part by part, as events where it is `chunked`, else as JSON; `cut` hangs up in the
        middle.
        """
        length = (
            {"Transfer-Encoding": "chunked"}
            if chunked
            else {"Content-Length": str(sum(map(len, parts)))}
        )
        about = {
            "Content-Type": "text/event-stream" if chunked else "application/json",
            **length,
            **(headers or {}),
        }
        lines = [
            f"HTTP/1.1 {status} {http.client.responses[status]}",
            *(f"{name}: {value}" for name, value in about.items()),
        ]
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        if chunked:
            parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
            parts[-1] += b"0\r\n\r\n"
        for part in parts[: len(parts) // 2] if cut else parts:
            if pause_s:
                await self.pause(pause_s)
            self._writer.write(part)
            await self._writer.drain()
        if cut:
            raise HungUp

    async def pause(self, seconds: float | None = None) -> None:
        """Say nothing for a while, or for ever.  Raises HungUp when the other side hangs up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._reader.read(1)
            raise HungUp

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


class FakeProvider:
    """The server: limits, schedule, counts, and a model behind them; an answer takes about
    `latency_s`.
    """

    def __init__(
        self,
        new_window: Callable[[], Window],
        model: Model,
        schedule: Sequence[Rule],
        latency_s: float,
    ) -> None:
        self._new_window, self._model, self._schedule, self._latency_s = (
            new_window,
            model,
            schedule,
            latency_s,
        )
        self._window, self._counts, self._random = new_window(), Counts(), Random(1)
        self._in_flight = self._connections = 0
        self._routes = {
            ("POST", "/v1/chat/completions"): self._complete,
            ("GET", "/v1/models"): self._models,
            ("GET", "/report"): self._report,
            ("POST", "/reset"): self._reset,
            ("POST", "/schedule"): self._reschedule,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes over one connection."""
        connection = Connection(reader, writer)
        # Cancelled: the server ends, and asyncio would tell of each connection.
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
            return await connection.send(404, _error("not_found", "There is no such place."))
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
        await connection.send(
            200,
            {"object": "list", "data": [{"id": "fake", "object": "model", "owned_by": "nobody"}]},
        )

    async def _report(self, request: Request, connection: Connection) -> None:
        await connection.send(200, self._counts.report(self._in_flight, self._connections))

    async def _reset(self, request: Request, connection: Connection) -> None:
        self._window, self._counts = self._new_window(), Counts()
        await connection.send(200, {})

    async def _reschedule(self, request: Request, connection: Connection) -> None:
        self._schedule = msgspec.json.decode(request.body, type=list[Rule])
        await connection.send(200, {})

    async def _complete(self, request: Request, connection: Connection) -> None:
        asked = msgspec.json.decode(request.body, type=Asked)
        prompt = estimated_prompt(asked.messages)
        counts = self._counts
        counts.requests += 1
        counts.prompts[asked.digest] += 0
        rule = next((each for each in self._schedule if each.meets(counts.requests)), None)
        entry = self._window.take(prompt + asked.max_tokens)
        if entry is None:
            counts.refused += 1
            return await connection.send(
                429,
                _error("rate_limit_exceeded", "Rate limit reached."),
                self._too_much(asked, prompt),
            )
        counts.taken.append(entry)
        self._in_flight += 1
        counts.most_in_flight = max(counts.most_in_flight, self._in_flight)
        try:
            await asyncio.sleep(self._latency_s * self._random.uniform(0.8, 1.2))
            if rule is not None:
                counts.faults[rule.kind] += 1
            if rule is None or rule.kind == "slow":
                await self._give(
                    asked=asked,
                    prompt=prompt,
                    entry=entry,
                    connection=connection,
                    pause_s=rule.seconds if rule else 0.0,
                )
            else:
                await self._fail(asked, request.key, rule, connection)
        finally:
            self._in_flight -= 1
        return None

    def _too_much(self, asked: Asked, prompt: int) -> dict[str, str]:
        wait_s = self._window.wait_s(prompt + asked.max_tokens)
        wait = {
            "Retry-After": f"{math.ceil(wait_s)}",
            "retry-after-ms": f"{math.ceil(wait_s * 1000)}",
        }
        return {**wait, **self._window.headers()}

    async def _give(
        self, asked: Asked, prompt: int, entry: list[float], connection: Connection, pause_s: float
    ) -> None:
        whole = self._model.answer(asked.messages, asked.schema)
        text = cut(whole, asked.max_tokens)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": tokens(text),
            "total_tokens": prompt + tokens(text),
        }
        self._window.settle(entry, usage["total_tokens"])
        spent = self._counts.by_model.setdefault(asked.model, Spent())
        spent.answered += 1
        spent.prompt_tokens += prompt
        spent.completion_tokens += usage["completion_tokens"]
        self._counts.prompts[asked.digest] += 1
        parts = _parts(asked, text, "stop" if text == whole else "length", usage)
        await connection.send_parts(
            200, parts, self._window.headers(), chunked=asked.stream, pause_s=pause_s
        )

    async def _fail(self, asked: Asked, key: str, rule: Rule, connection: Connection) -> None:
        if rule.kind in _ERRORS:
            status, code, why = _ERRORS[rule.kind]
            error = _error(code, why.format(key=key, question=asked.messages[-1]["content"]))
            return await connection.send(status, error, {**self._window.headers(), **rule.headers})
        if rule.kind == "timeout":
            return await connection.pause()
        if rule.kind == "garbage":
            parts = [b"data: <html>\n\n"] if asked.stream else [b"<html>"]
        elif rule.kind == "empty":
            parts = (
                [_event(asked, [], None), b"data: [DONE]\n\n"]
                if asked.stream
                else [_json(asked, [], None)]
            )
        else:
            parts = _parts(asked, "half of an answer", "stop", None)
        return await connection.send_parts(200, parts, chunked=asked.stream, cut=rule.kind == "cut")


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def _parts(asked: Asked, text: str, finish: str, usage: dict[str, int] | None) -> list[bytes]:
    """Return an answer's body in several parts, events where it is streamed."""
    if not asked.stream:
        body = _json(
            asked,
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
        _event(asked, [{"index": 0, "delta": delta, "finish_reason": end}], None)
        for delta, end in deltas
    ]
    if asked.stream_options.include_usage:
        events.append(_event(asked, [], usage))
    return [*events, b"data: [DONE]\n\n"]


def _event(asked: Asked, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
    return b"data: %b\n\n" % _json(asked, choices, usage)


def _json(asked: Asked, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> bytes:
    kind = "chat.completion.chunk" if asked.stream else "chat.completion"
    known = {} if usage is None else {"usage": usage}
    return msgspec.json.encode(
        {
            "id": "fake",
            "object": kind,
            "created": 0,
            "model": asked.model,
            "choices": choices,
            **known,
        }
    )


# --- running it -------------------------------------------------------------------------------


class Running:
    """A fake provider in a process of its own: `base_url` is what an endpoint's settings take."""

    def __init__(self, port: int) -> None:
        self.port, self.base_url = port, f"http://127.0.0.1:{port}/v1"

    def report(self) -> dict[str, Any]:
        """Return what it has seen, see `Counts.report`."""
        return self._ask("GET", "/report")

    def reset(self) -> None:
        """Forget what was seen, and what counts against the limits."""
        self._ask("POST", "/reset")

    def schedule(self, *rules: Mapping[str, Any]) -> None:
        """Replace what goes wrong, see `Rule`."""
        self._ask("POST", "/schedule", rules)

    def _ask(self, method: str, path: str, content: Any = None) -> dict[str, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port)) as line:
            line.request(method, path, msgspec.json.encode(content))
            response = line.getresponse()
            found: dict[str, Any] = msgspec.json.decode(response.read())
        if response.status != 200:
            raise ValueError(found["error"]["message"])
        return found


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
    # A session of its own: Ctrl-C reaches us first, and it stops when we have done what we do then.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            ready = process.stdout.readline() if process.stdout else b""
            if not ready:
                raise NotStarted("the fake provider did not start; it has said why on stderr")
            yield Running(int(ready.split()[-1]))
        finally:
            end(process)


async def _run(options: argparse.Namespace) -> None:
    provider = FakeProvider(
        lambda: Window(options.window, options.requests, options.tokens),
        Model(options.model_behaviour),
        options.schedule,
        options.latency,
    )
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)
    if options.stdin:

        def wait_for_its_end() -> None:
            while os.read(sys.stdin.fileno(), 4096):
                pass
            loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=wait_for_its_end, daemon=True).start()
    server = await asyncio.start_server(provider.serve, "127.0.0.1", options.port, backlog=1024)
    print("at", server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()
    server.close()


def _main() -> None:
    options = argparse.ArgumentParser(description="A fake provider with OpenAI's wire format.")
    options.add_argument(
        "--port", type=int, default=0, help="port of the loopback interface; 0: a free one"
    )
    options.add_argument("--window", type=float, default=60.0, help="seconds that its limits count")
    options.add_argument(
        "--requests", type=float, default=0.0, help="requests in any window; 0: no limit"
    )
    options.add_argument(
        "--tokens", type=float, default=0.0, help="tokens in any window; 0: no limit"
    )
    options.add_argument(
        "--latency", type=float, default=0.0, help="seconds an answer takes, about"
    )
    rules = msgspec.json.Decoder(list[Rule])
    options.add_argument(
        "--schedule",
        type=rules.decode,
        default=[],
        help='what goes wrong: [{"kind": "500", "every": 9}]',
    )
    options.add_argument(
        "--model-behaviour", choices=["reader", "echo"], default="reader", help="what it answers"
    )
    options.add_argument("--stdin", action="store_true", help="end when stdin does")
    asyncio.run(_run(options.parse_args()))


if __name__ == "__main__":
    _main()
