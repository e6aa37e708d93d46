"""The operations that call models: a prompt per item, a tree of merges, a question over more than a
context holds.

Decides what is asked in each, and what the rounds of a job make of the answers.  Refuses to know
limits, budgets and providers, which are the gate's.  Registered where the `openai` client is
installed (the extra ``llm``)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from resilience.degradation import Strategy
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs.items import source_of
from rlm_tasks.jobs.rounds import NextRound, Round
from rlm_tasks.llm.draft import Draft, Message, tier_for
from rlm_tasks.llm.endpoint import estimated_tokens
from rlm_tasks.llm.forecast import by_item, merging, narrowing
from rlm_tasks.llm.params import Ask, Map, MapReduce, Params, parsed
from rlm_tasks.operations import registry
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.ports import Forecast
from rlm_tasks.operations.protection import Protection
from rlm_tasks.operations.registry import Operation
from rlm_tasks.requests import Adaptive, JobRequest
from rlm_tasks.settings.llm import LlmSettings

P = TypeVar("P", bound=Params)
Compose = Callable[[Any, dict[str, Any], str], Draft]
MOST_IN_FLIGHT = 1000
"""The pool of the worker's settings bounds the calls in flight; this never does."""


def _register(
    name: str,
    compose: Compose,
    conclude: Callable[[Any, Any], Any],
    *,
    prepare: Callable[[JobRequest, Any], JobRequest] | None = None,
    then: Callable[[Any, Round], Any] | None = None,
    fallback: Callable[..., Any] | None = None,
    forecast: Forecast | None = None,
) -> None:
    """Register an operation whose items each become one answer; `conclude` makes the item's output
    of item and answer.

    Its `forecast` says what its rounds ask; left out: one round.
    """

    async def answer(item: Any, context: Context) -> Any:
        if context.entry is None:
            raise InvalidRequest(
                "operation", name, "calls a model, and runs in a job only: submit it"
            )
        from rlm_tasks.llm.gate import BudgetSpent

        try:
            return conclude(item, await context.entry.gate.reply(context))
        except BudgetSpent as spent:
            if fallback is None or not spent.final:
                raise
            return fallback(item, context)

    def gate(guards: Any, operation: Operation, spec: Any) -> Any:
        from rlm_tasks.llm.gate import Gate

        return Gate(guards, operation, spec, compose)

    registry.register(
        Operation(
            name,
            answer,
            concurrency=MOST_IN_FLIGHT,
            gate=gate,
            prepare=prepare,
            then=then,
            protection=Protection(name, fallback=fallback),
            forecast=forecast or by_item(compose),
        )
    )


def _messages(system: str, prompt: str) -> tuple[Message, ...]:
    told: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
    return (*told, {"role": "user", "content": prompt})


def _draft(its: Params, complexity: str, prompt: str, form: type[BaseModel] | None = None) -> Draft:
    tier = tier_for(its.tier, complexity)
    return Draft(
        messages=_messages(its.system, prompt),
        max_tokens=its.max_tokens,
        tier=tier,
        temperature=its.temperature,
        form=form,
    )


def _plain(answer: Any) -> Any:
    return answer.model_dump(mode="json") if isinstance(answer, BaseModel) else answer


def _settled(model: type[P], request: JobRequest, settings: Any) -> tuple[JobRequest, P]:
    """Return a request with its params checked, and as plain data."""
    its = parsed(model, request.params)
    tier = tier_for(its.tier, request.complexity)
    its.fits(settings.llm, tier)
    if request.options.budget is not None:
        its.pays(request.options.budget.limits, settings.llm.of_tier(tier), settings.llm)
    found: dict[str, Any] = {"params": its.model_dump(mode="json", exclude_defaults=True)}
    if request.kind == "recursive" and request.strategy is None:
        # A smaller node would leave connections of its process idle.
        found["strategy"] = Adaptive(
            min_chunk_size=min(
                settings.llm.pool, settings.llm.per_host * len(settings.llm.endpoints_or_default)
            )
        )
    return request.model_copy(update=found), its


# --- llm.map ----------------------------------------------------------------------------------


def _prompted(model: type[Map]) -> Compose:
    """Return what asks an item's own prompt, as params of a model have it."""

    def compose(item: Any, params: dict[str, Any], complexity: str) -> Draft:
        its = parsed(model, params)
        return _draft(its, complexity, its.filled(item), its.form)

    return compose


_map, _map_first = _prompted(Map), _prompted(MapReduce)
_register(
    "llm.map",
    _map,
    lambda item, answer: _plain(answer),
    prepare=lambda request, settings: _settled(Map, request, settings)[0],
)


# --- llm.map_reduce ---------------------------------------------------------------------------


def _merge(parts: list[Any], params: dict[str, Any], complexity: str) -> Draft:
    its = parsed(MapReduce, params)
    listed = "\n".join(f"- {_text(part)}" for part in parts)
    return _draft(its, complexity, f"{its.merge_prompt}\nMERGE:\n{listed}", its.form)


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    try:
        return json.dumps(part, ensure_ascii=False, default=str)
    except TypeError:  # its keys are no texts
        return str(part)


def _merge_next(outputs: Iterable[Any], round: Round) -> Any:
    """Merge what there is, a few at a time, until one is left."""
    its = parsed(MapReduce, round.params)
    few = list(itertools.islice(found := iter(outputs), 2))
    if len(few) < 2:
        return few[0] if few else None
    groups = _in_groups(itertools.chain(few, found), its.fan_in, its.group_tokens)
    return NextRound("llm.merge", groups, round.params, last=round.done <= its.fan_in, strict=True)


def _in_groups(parts: Iterator[Any], most: int, room: int) -> Iterator[list[Any]]:
    """Put parts together that one merge reads; at least two, or it would merge nothing."""
    group: list[Any] = []
    left = room
    for part in parts:
        size = estimated_tokens(_text(part)) + 1  # its dash
        if len(group) >= most or (len(group) >= 2 and size > left):
            yield group
            group, left = [], room
        group.append(part)
        left -= size
    if group:
        yield group


def _mergeable(request: JobRequest, settings: Any) -> JobRequest:
    """Return a request whose merges fit into a context.  Raises InvalidRequest when not even two
    answers do.
    """
    request, its = _settled(MapReduce, request, settings)
    room = _room(its, request.complexity, settings.llm, its.merge_prompt)
    if 2 * its.max_tokens > room:
        raise InvalidRequest(
            "max_tokens",
            its.max_tokens,
            f"two answers as long do not fit into one merge, which has room for {room}; ask for less",
        )
    its = its.model_copy(update={"group_tokens": min(its.group_tokens or room, room)})
    return request.model_copy(update={"params": its.model_dump(mode="json", exclude_defaults=True)})


def _side_by_side(parts: list[Any], context: Context) -> Any:
    """Put parts one after the other: what is done with them when no model can be paid."""
    context.degradation.shaped.add(Strategy.NO_MODEL)
    return parts[0] if len(parts) == 1 else "\n\n".join(_text(part) for part in parts)


_register(
    "llm.map_reduce",
    _map_first,
    lambda item, answer: _plain(answer),
    prepare=_mergeable,
    then=_merge_next,
    forecast=merging(_map_first, _merge),
)
_register("llm.merge", _merge, lambda parts, answer: _plain(answer), fallback=_side_by_side)


# --- llm.ask ----------------------------------------------------------------------------------


class Found(BaseModel):
    """What a model found among the passages that it has read."""

    found: list[int]  # numbers of the passages that help to answer
    answer: str = ""  # what they say


class Reply(BaseModel):
    """A model's answer to the question, and the passages that it rests on."""

    answer: str
    found: list[int] = []


OVERHEAD_TOKENS = 300
"""Of the words around a question and its passages."""
Passage = list[Any]  # number, text


def _about(asked: str, form: type[BaseModel]) -> Compose:
    """Return what asks something of the question and numbered passages."""

    def compose(item: dict[str, Any], params: dict[str, Any], complexity: str) -> Draft:
        its = parsed(Ask, params)
        return _draft(its, complexity, f"{asked}\n{_listed(its.question, item)}", form)

    return compose


_reading = _about(
    "Below are numbered passages. Which of them help to answer the question? Give their numbers as `found`, the most helpful "
    "first, and in `answer` what they say about it, in short. Give an empty list when none does.",
    Found,
)
_answering = _about(
    "Answer the question from the numbered passages alone. Give the numbers of those that your answer rests on as `found`. "
    "Say so when they do not answer it.",
    Reply,
)


def _listed(question: str, item: dict[str, Any]) -> str:
    passages = "\n".join(
        f"[{number}] {' '.join(text.split())}" for number, text in item["passages"]
    )
    return f"QUESTION: {' '.join(question.split())}\n{passages}"


def _read(item: dict[str, Any], answer: Found) -> dict[str, Any]:
    """Keep the passages that were found, best first; a number that was not among them is no
    passage.
    """
    texts: dict[int, list[str]] = {}
    for number, text in item["passages"]:
        texts.setdefault(number, []).append(text)
    kept = [
        [number, text] for number in dict.fromkeys(answer.found) for text in texts.get(number, ())
    ]
    return {
        "kept": kept,
        "note": answer.answer,
        "read": item.get("read") or [min(texts), max(texts) + 1],
    }


def _answered(item: dict[str, Any], answer: Reply) -> dict[str, Any]:
    known = {number for number, _ in item["passages"]}
    return {
        **item["about"],
        "answer": answer.answer,
        "citations": _ranges(known & set(answer.found)),
    }


def _notes_alone(item: dict[str, Any], context: Context) -> dict[str, Any]:
    """Answer with what was noted on the way: when no model can be paid any more."""
    context.degradation.shaped.add(Strategy.NO_MODEL)
    known = {number for number, _ in item["passages"]}
    return {
        **item["about"],
        "answer": "\n\n".join(filter(None, item["notes"])),
        "citations": _ranges(known),
        "complete": False,
    }


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Return half-open ranges of item numbers."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges


def _narrow(outputs: Iterable[dict[str, Any]], round: Round) -> Any:
    """Answer from what was found when that fits; else have it read again, until it does or has
    to.
    """
    its, found = parsed(Ask, round.params), list(outputs)
    if found and "answer" in found[0]:
        return found[0]
    read = (
        _read_in(each["read"] for each in found)
        if round.number == 0
        else max((each["read"] for each in found), default=0)
    )
    about = {
        "read": read,
        "found": sum(len(each["kept"]) for each in found),
        "rounds": round.number + 1,
        "complete": not round.short,
    }
    if not about["found"]:
        return {**about, "answer": "", "citations": []}
    kept = [passage for each in found for passage in each["kept"]]
    if sum(map(_size, kept)) > its.group_tokens:
        if round.number + 1 < its.max_rounds:
            groups = (
                {"passages": group, "read": read}
                for group in _packed(sorted(kept), its.group_tokens)
            )
            return NextRound("llm.ask", groups, round.params)
        kept, about["complete"] = _best(found, its.group_tokens), False
    last = {"passages": sorted(kept), "notes": [each["note"] for each in found], "about": about}
    return NextRound("llm.answer", [last], round.params, last=True, strict=True)


def _read_in(ranges: Iterable[tuple[int, int]]) -> int:
    """Return how many items are in ranges that follow each other; a long item may be in several."""
    read = end = 0
    for lo, hi in ranges:
        read, end = read + max(0, hi - max(lo, end)), hi
    return read


def _size(passage: Sequence[Any]) -> int:
    return estimated_tokens(passage[1]) + 3  # its number, in brackets


def _best(found: list[dict[str, Any]], room: int) -> list[Passage]:
    """Return the best passages of all groups, in turns, as many as fit."""
    turns = (
        each
        for each in itertools.chain(*itertools.zip_longest(*(each["kept"] for each in found)))
        if each is not None
    )
    kept: list[Passage] = []
    for passage in turns:
        if _size(passage) <= room:
            kept.append(passage)
            room -= _size(passage)
    return kept


def _packed(passages: Iterable[Passage], room: int) -> Iterator[list[Passage]]:
    """Put passages together, in order, as many as a model reads at once; one that is too long is
    cut.
    """
    group: list[Passage] = []
    left = room
    for passage in (piece for each in passages for piece in _pieces(each, room)):
        if group and _size(passage) > left:
            yield group
            group, left = [], room
        group.append(passage)
        left -= _size(passage)
    if group:
        yield group


def _pieces(passage: Passage, room: int) -> Iterator[Passage]:
    number, text = passage
    data, most, at = text.encode(errors="replace"), (room - 3) * 4, 0
    while len(data) - at > most:
        end = at + most
        while data[end] & 0xC0 == 0x80:  # in the middle of a character
            end -= 1
        yield [number, data[at:end].decode()]
        at = end
    yield [number, data[at:].decode()]


def _grouped(request: JobRequest, settings: Any) -> JobRequest:
    """Return a request whose items are groups of what it was given: a model reads many of them at
    once.
    """
    request, its = _settled(Ask, request, settings)
    room = _room(its, request.complexity, settings.llm, its.question)
    its = its.model_copy(update={"group_tokens": min(its.group_tokens, room)})
    passages = ([number, _text(item)] for number, item in enumerate(_texts(request.items)))
    groups = ({"passages": group} for group in _packed(passages, its.group_tokens))
    return request.model_copy(
        update={"items": groups, "params": its.model_dump(mode="json", exclude_defaults=True)}
    )


def _room(its: Params, complexity: str, settings: LlmSettings, asked: str) -> int:
    """Return how many tokens go into one call beside what is asked.  Raises InvalidRequest."""
    model = settings.model(settings.of_tier(tier_for(its.tier, complexity)))
    besides = (
        its.max_tokens + OVERHEAD_TOKENS + estimated_tokens(asked) + estimated_tokens(its.system)
    )
    most = min(model.context_tokens, int((model.tokens or settings.tokens) * 0.8)) - besides
    if most < 100:
        raise InvalidRequest(
            "max_tokens",
            its.max_tokens,
            "and what is asked leave no room; ask for less, or for a larger tier",
        )
    return most


def _texts(items: Any) -> Iterable[Any]:
    source = source_of(items)
    if not source.of_texts:
        raise InvalidRequest("items", items, "must be an iterable of texts, or Lines(...)")
    return source


_register(
    "llm.ask",
    _reading,
    _read,
    prepare=_grouped,
    then=_narrow,
    forecast=narrowing(
        _reading,
        _answering,
        passage=lambda number, item: [number, _text(item)],
        packed=_packed,
        size=_size,
    ),
)
_register("llm.answer", _answering, _answered, fallback=_notes_alone)
