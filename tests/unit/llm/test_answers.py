"""Reading responses: any bytes give an answer or one kind of error, whatever a provider sends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from rlm_tasks.llm.wire.answers import (
    UNSAID,
    BodyWithoutAnswer,
    Received,
    read_stream,
    read_whole,
    usage_in,
)

WHOLE: dict[str, Any] = {
    "id": "1",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "so it is", "refusal": None},
            "finish_reason": "stop",
        }
    ],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
        "cost": 0.25,
    },
}
EVENTS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    {"choices": [{"delta": {"content": "so it "}, "finish_reason": None}]},
    {"choices": [{"delta": {"content": "is"}, "finish_reason": "stop"}]},
    {"choices": [], "usage": WHOLE["usage"]},
]
ODD: list[Any] = [None, True, -1, 1e300, float("nan"), "", "x", [], [[]], {}, {"a": 1}, "\ud83d"]


def streamed(body: bytes, cuts: Random | None = None) -> Received:
    async def chunks() -> AsyncIterator[bytes]:
        at = 0
        while at < len(body):
            size = cuts.randint(1, 9) if cuts else len(body)
            yield body[at : at + size]
            at += size

    return asyncio.run(read_stream(chunks()))


def changed(value: Any, random: Random) -> Any:
    """Return JSON data with some values replaced by odd ones."""
    if random.random() < 0.04:
        return random.choice(ODD)
    if isinstance(value, dict):
        return {name: changed(each, random) for name, each in value.items()}
    if isinstance(value, list):
        return [changed(each, random) for each in value]
    return value


def as_events(events: list[Any], end: str = "\n") -> bytes:
    return "".join(f"data: {json.dumps(each)}{end}{end}" for each in events).encode()


@pytest.mark.parametrize("seed", range(20))
def test_odd_values_anywhere_give_an_answer_or_one_kind_of_error(seed: int) -> None:
    random, ends = Random(seed), {"answer": 0, "error": 0}
    for _ in range(150):
        body = json.dumps(changed(WHOLE, random)).encode()
        events = as_events([changed(each, random) for each in EVENTS])
        cut = random.randrange(len(events))
        for read in (
            lambda body=body: read_whole(body),
            lambda body=body: streamed(body),
            lambda body=events: streamed(body, random),
            lambda body=events: read_whole(body),
            lambda body=events[:cut]: streamed(body, random),
        ):
            try:
                received = read()
            except BodyWithoutAnswer:
                ends["error"] += 1
            else:
                ends["answer"] += 1
                assert bool(received.text.strip()) == (not received.fault)
                received.text.encode()
                usage = received.usage
                assert (usage.prompt_tokens or 0) >= usage.cached_tokens >= 0
                assert (usage.completion_tokens or 0) >= 0
                assert usage.money is None or usage.money >= 0
    assert min(ends.values()) > 20


USAGE_OF_ANTHROPIC = {
    "input_tokens": 10,
    "output_tokens": 4,
    "cache_read_input_tokens": 900,
    "cache_creation_input_tokens": 50,
}


def test_input_tokens_of_anthropic_are_without_those_of_its_cache() -> None:
    usage = usage_in(USAGE_OF_ANTHROPIC)

    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (960, 900, 4)
    usage = usage_in({**USAGE_OF_ANTHROPIC, "prompt_tokens": 960})  # a gateway has added them
    assert (usage.prompt_tokens, usage.cached_tokens) == (960, 900)


@pytest.mark.parametrize("rest", [b"data: bye\n\n", b"data: {}\n\n", b": alive\n\n", None])
def test_after_the_end_of_a_stream_nothing_takes_its_answer_away(rest: bytes | None) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield as_events(EVENTS) + b"data: [DONE]\n\n"
        if rest is None:
            raise ConnectionError
        yield rest

    received = asyncio.run(read_stream(chunks()))

    assert (received.text, received.usage.completion_tokens) == ("so it is", 4)


def test_a_connection_lost_after_the_finish_costs_the_usage_alone() -> None:
    async def chunks(events: list[Any]) -> AsyncIterator[bytes]:
        yield as_events(events)
        raise ConnectionError

    received = asyncio.run(read_stream(chunks(EVENTS[:3])))
    assert (received.text, received.usage) == ("so it is", UNSAID)
    with pytest.raises(ConnectionError):
        asyncio.run(read_stream(chunks(EVENTS[:2])))


@pytest.mark.parametrize("finish", ["error", "abort", "insufficient_system_resource"])
def test_half_of_an_answer_from_a_model_that_failed_is_not_taken(finish: str) -> None:
    [choice] = WHOLE["choices"]
    body = json.dumps({**WHOLE, "choices": [{**choice, "finish_reason": finish}]}).encode()

    for read in (read_whole, streamed):
        with pytest.raises(BodyWithoutAnswer, match="broke off") as caught:
            read(body)
        assert caught.value.usage == usage_in(WHOLE["usage"])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_lines_of_a_stream_may_end_in_any_way_and_come_in_any_pieces(end: str) -> None:
    body = b": a comment" + end.encode() * 2 + as_events(EVENTS, end) + b"data: [DONE]"

    for seed in range(20):
        received = streamed(body, Random(seed))
        assert (received.text, received.finish) == ("so it is", "stop")
        assert received.usage.completion_tokens == 4


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 100_000,
        b"1" * 5000,
        b"\xff\xfe\x00",
        b"<html>",
        b'{"choices":[{"message":{"content":"half',
        b'{"choices":[{"finish_reason":"error","message":{}}],"error":{"code":502}}',
        b"data: \n\n",
        as_events(EVENTS[:2]),
        b"data: [DONE]\n\n",
        b"event: error\ndata: {}\n\n",
    ],
)
def test_a_body_without_an_answer_is_told_by_one_error(body: bytes) -> None:
    for read in (read_whole, streamed):
        with pytest.raises(BodyWithoutAnswer):
            read(body)
