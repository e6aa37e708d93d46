"""The operations that call models: `llm.map`, `llm.map_reduce` and `llm.ask`, with their rounds.

Importing it registers them; `registry.import_operations` does so if the `openai` client is
installed (the extra ``llm``).  Each operation composes drafts from items, and its `then` makes the
next round from the answers.  Limits, budgets and endpoints are the gate's.  Begin with `_register`.
"""

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
from rlm_tasks.llm.forecast import by_item, merging, narrowing
from rlm_tasks.llm.params import Ask, Map, MapReduce, Params, Prompted, parsed
from rlm_tasks.llm.wire.answers import estimated_tokens
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
"""More than any pool: RLM_LLM__POOL limits the calls in flight, not this."""


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
    """Register an operation that gets one answer for each item.

    `conclude` makes the item's output from item and answer.  `forecast` has the calls of all
    rounds; by default there is one round.
    """

    async def answer(item: Any, context: Context) -> Any:
        if context.entry is None:
            raise InvalidRequest(
                "operation", name, "calls a model, so it runs only in a job; submit it"
            )
        from rlm_tasks.llm.gate import BudgetSpent

        try:
            return conclude(item, await context.entry.reply(context))
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
    first: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
    return (*first, {"role": "user", "content": prompt})


def _draft(
    params: Params, complexity: str, prompt: str, form: type[BaseModel] | None = None
) -> Draft:
    return Draft(
        messages=_messages(params.system, prompt),
        max_tokens=params.max_tokens,
        tier=tier_for(params.tier, complexity),
        temperature=params.temperature,
        form=form,
        samples=params.samples if isinstance(params, Map) else 1,
        fails_filtered=params.filtered_answers == "fail",
    )


def _plain(answer: Any) -> Any:
    if isinstance(answer, list):
        return [_plain(each) for each in answer]
    return answer.model_dump(mode="json") if isinstance(answer, BaseModel) else answer


def _checked(model: type[P], request: JobRequest, settings: Any) -> tuple[JobRequest, P]:
    """Return a request with checked params as plain data, and the params.

    Raises InvalidRequest.
    """
    params = parsed(model, request.params)
    tier = tier_for(params.tier, request.complexity)
    params.fits(settings.llm, tier)
    if request.options.budget is not None:
        params.pays(request.options.budget.limits, settings.llm.of_tier(tier), settings.llm)
    update: dict[str, Any] = {"params": params.model_dump(mode="json", exclude_defaults=True)}
    if request.kind == "recursive" and request.strategy is None:
        # A smaller node would leave connections of its process idle.
        update["strategy"] = Adaptive(
            min_chunk_size=min(
                settings.llm.pool, settings.llm.per_host * len(settings.llm.endpoints_or_default)
            )
        )
    return request.model_copy(update=update), params


# --- llm.map ----------------------------------------------------------------------------------


def _prompted(model: type[Prompted]) -> Compose:
    """Return the function that composes the draft of an item from the prompt of params."""

    def compose(item: Any, params: dict[str, Any], complexity: str) -> Draft:
        checked = parsed(model, params)
        return _draft(checked, complexity, checked.filled(item), checked.form)

    return compose


_map, _map_first = _prompted(Map), _prompted(MapReduce)
_register(
    "llm.map",
    _map,
    lambda item, answer: _plain(answer),
    prepare=lambda request, settings: _checked(Map, request, settings)[0],
)


# --- llm.map_reduce ---------------------------------------------------------------------------


def _merge(parts: list[Any], params: dict[str, Any], complexity: str) -> Draft:
    checked = parsed(MapReduce, params)
    listed = "\n".join(f"- {_text(part)}" for part in parts)
    return _draft(checked, complexity, f"{checked.merge_prompt}\nMERGE:\n{listed}", checked.form)


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    try:
        return json.dumps(part, ensure_ascii=False, default=str)
    except TypeError:  # its keys are not strings
        return str(part)


def _merge_next(outputs: Iterable[Any], round: Round) -> Any:
    """Return the last answer, or the next round, which merges a few answers in each call."""
    params = parsed(MapReduce, round.params)
    few = list(itertools.islice(rest := iter(outputs), 2))
    if len(few) < 2:
        return few[0] if few else None
    groups = _in_groups(itertools.chain(few, rest), params.fan_in, params.group_tokens)
    is_last = round.done <= params.fan_in
    return NextRound("llm.merge", groups, round.params, last=is_last, strict=True)


def _in_groups(parts: Iterator[Any], most: int, room: int) -> Iterator[list[Any]]:
    """Yield groups of parts, one for each merge; a group has at least two parts."""
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
    """Return a request whose merges fit into a context.

    Raises InvalidRequest when not even two answers fit.
    """
    request, params = _checked(MapReduce, request, settings)
    room = _room(params, request.complexity, settings.llm, params.merge_prompt)
    if 2 * params.max_tokens > room:
        raise InvalidRequest(
            "max_tokens",
            params.max_tokens,
            f"two answers of this length do not fit into one merge, which has room for {room} "
            "tokens; set a smaller value",
        )
    group_tokens = min(params.group_tokens or room, room)
    params = params.model_copy(update={"group_tokens": group_tokens})
    return request.model_copy(
        update={"params": params.model_dump(mode="json", exclude_defaults=True)}
    )


def _joined(parts: list[Any], context: Context) -> Any:
    """Return the parts one after the other: the fallback of a merge when the budget is spent."""
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
_register("llm.merge", _merge, lambda parts, answer: _plain(answer), fallback=_joined)


# --- llm.ask ----------------------------------------------------------------------------------


class Found(BaseModel):
    """The relevant passages in one call, and a note on their content."""

    found: list[int]  # numbers of the passages that help to answer
    answer: str = ""  # a note on what they say


class Reply(BaseModel):
    """A model's answer to the question, and the passages that support it."""

    answer: str
    found: list[int] = []


OVERHEAD_TOKENS = 300
"""Tokens for the instructions around a question and its passages."""
Passage = list[Any]  # number, text


def _about(task: str, form: type[BaseModel]) -> Compose:
    """Return the function that composes a task with the question and numbered passages."""

    def compose(item: dict[str, Any], params: dict[str, Any], complexity: str) -> Draft:
        checked = parsed(Ask, params)
        return _draft(checked, complexity, f"{task}\n{_listed(checked.question, item)}", form)

    return compose


_reading = _about(
    "Below are numbered passages. Which of them help to answer the question? Give their numbers as "
    "`found`, the most helpful first, and in `answer` what they say about it, in short. Give an "
    "empty list when none does.",
    Found,
)
_answering = _about(
    "Answer the question from the numbered passages alone. Give the numbers of those that your "
    "answer rests on as `found`. Say so when they do not answer it.",
    Reply,
)


def _listed(question: str, item: dict[str, Any]) -> str:
    passages = "\n".join(
        f"[{number}] {' '.join(text.split())}" for number, text in item["passages"]
    )
    return f"QUESTION: {' '.join(question.split())}\n{passages}"


def _read(item: dict[str, Any], answer: Found) -> dict[str, Any]:
    """Return the relevant passages, best first, with the note; unknown numbers are dropped."""
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
    """Return the notes of earlier calls: the fallback of the answer when the budget is spent."""
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
    """Return the answer, or the next round.

    Relevant passages that fit into one call are answered from; others are read again, up to
    `max_rounds` times.
    """
    params, results = parsed(Ask, round.params), list(outputs)
    if results and "answer" in results[0]:
        return results[0]
    read = (
        _count_items(each["read"] for each in results)
        if round.number == 0
        else max((each["read"] for each in results), default=0)
    )
    about = {
        "read": read,
        "found": sum(len(each["kept"]) for each in results),
        "rounds": round.number + 1,
        "complete": not round.short,
    }
    if not about["found"]:
        return {**about, "answer": "", "citations": []}
    kept = [passage for each in results for passage in each["kept"]]
    if sum(map(_size, kept)) > params.group_tokens:
        if round.number + 1 < params.max_rounds:
            groups = (
                {"passages": group, "read": read}
                for group in _packed(sorted(kept), params.group_tokens)
            )
            return NextRound("llm.ask", groups, round.params)
        kept, about["complete"] = _best(results, params.group_tokens), False
    last = {"passages": sorted(kept), "notes": [each["note"] for each in results], "about": about}
    return NextRound("llm.answer", [last], round.params, last=True, strict=True)


def _count_items(ranges: Iterable[tuple[int, int]]) -> int:
    """Return the number of items in ranges in order; a long item may be in several of them."""
    read = end = 0
    for lo, hi in ranges:
        read, end = read + max(0, hi - max(lo, end)), hi
    return read


def _size(passage: Sequence[Any]) -> int:
    return estimated_tokens(passage[1]) + 3  # its number, in brackets


def _best(results: list[dict[str, Any]], room: int) -> list[Passage]:
    """Return the best passages of all groups in turns, as far as they fit."""
    turns = (
        each
        for each in itertools.chain(*itertools.zip_longest(*(each["kept"] for each in results)))
        if each is not None
    )
    kept: list[Passage] = []
    for passage in turns:
        if _size(passage) <= room:
            kept.append(passage)
            room -= _size(passage)
    return kept


def _packed(passages: Iterable[Passage], room: int) -> Iterator[list[Passage]]:
    """Yield groups of passages in order, one for each call; a passage that is too long is cut."""
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
    """Return a request whose items are groups of passages, so that a call reads many items."""
    request, params = _checked(Ask, request, settings)
    room = _room(params, request.complexity, settings.llm, params.question)
    params = params.model_copy(update={"group_tokens": min(params.group_tokens, room)})
    passages = ([number, _text(item)] for number, item in enumerate(_texts(request.items)))
    groups = ({"passages": group} for group in _packed(passages, params.group_tokens))
    return request.model_copy(
        update={"items": groups, "params": params.model_dump(mode="json", exclude_defaults=True)}
    )


def _room(params: Params, complexity: str, settings: LlmSettings, prompt: str) -> int:
    """Return the tokens that a call has for items, beside prompt and answer.

    Raises InvalidRequest for less than 100.
    """
    model = settings.model(settings.of_tier(tier_for(params.tier, complexity)))
    texts = estimated_tokens(prompt) + estimated_tokens(params.system)
    reserved = params.max_tokens + OVERHEAD_TOKENS + texts
    most = min(model.context_tokens, int((model.tokens or settings.tokens) * 0.8)) - reserved
    if most < 100:
        raise InvalidRequest(
            "max_tokens",
            params.max_tokens,
            "and the prompt leave no room for items; set a smaller value or a larger tier",
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
