"""How many calls each round of a job will make, and of how many tokens, from a sample of its items.

Decides which rounds the answers of a job go through, and how far such sums lie from their means.
Prompts are composed by the operation's own drafts, a second way to compose them would soon be a
wrong one.  Refuses to know prices, limits and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from rlm_tasks.llm.endpoint import estimated_prompt
from rlm_tasks.llm.learned import Known
from rlm_tasks.llm.params import Ask, MapReduce, parsed
from rlm_tasks.operations.ports import RoundForecast

if TYPE_CHECKING:
    from rlm_tasks.jobs.items import ItemSample
    from rlm_tasks.llm.draft import Draft
    from rlm_tasks.operations.ports import Forecast
    from rlm_tasks.requests import JobRequest
    from rlm_tasks.settings.llm import Tier

Z90 = 1.2816
"""Nine of ten values of a normal distribution lie below its mean and this many standard
deviations.
"""
FOUND = 5
"""So many passages of those that a model reads at once are taken to help with a question; at p90
four times as many.
"""
FIRST = Known()


# --- sums, and how far they lie from their means ----------------------------------------------


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a sample of a round's drafts says: the tokens of a prompt, before what was learned, and
    what an answer may have.
    """

    tier: Tier
    max_tokens: int
    mean: float
    error: float = 0.0  # standard error of the mean


@dataclass(frozen=True, slots=True)
class Outlook:
    """How calls turn out, all in all: as they do on average, or `z` standard deviations worse."""

    known: Callable[[Tier], Known]
    z: float = 0.0

    def round(self, operation: str, prompts: Prompts, calls: int) -> RoundForecast:
        """Return what so many calls with such prompts take."""
        prompt = self.known(prompts.tier).prompt_ratio * (prompts.mean + self.z * prompts.error)
        return RoundForecast(
            operation=operation,
            tier=prompts.tier,
            calls=calls,
            prompt_tokens=calls * prompt,
            answer_tokens=calls * self.answer_tokens(prompts, calls),
        )

    def answer_tokens(self, prompts: Prompts, calls: int) -> float:
        """Return the mean tokens of so many answers; before anything is known, at worst all that
        they may have.
        """
        its = self.known(prompts.tier)
        if self.z and not its.calls:
            return prompts.max_tokens
        return prompts.max_tokens * min(
            1.0,
            self._mean(
                mean=its.share, sd=its.share_sd, first_sd=FIRST.share_sd, its=its, calls=calls
            ),
        )

    def seconds(self, tier: Tier, calls: int) -> float:
        """Return the mean seconds of so many calls."""
        its = self.known(tier)
        return self._mean(
            mean=its.seconds, sd=its.seconds_sd, first_sd=FIRST.seconds_sd, its=its, calls=calls
        )

    @property
    def found(self) -> int:
        """Passages that a model finds among those that it reads at once."""
        return 4 * FOUND if self.z else FOUND

    def _mean(self, mean: float, sd: float, first_sd: float, its: Known, calls: int) -> float:
        """Return the mean of so many values to come.

        They vary, and so does the mean that was learned.  What is assumed before anything is known
        counts as one value, for the spread of a few values says little."""
        spread = math.sqrt((its.calls * sd**2 + first_sd**2) / (its.calls + 1))
        return mean + self.z * spread * math.sqrt(1 / max(1, calls) + 1 / max(1.0, its.calls))


Rounds = Callable[[Outlook], list[RoundForecast]]
Compose = Callable[[Any, dict[str, Any], str], "Draft"]


def mean_and_error(sizes: Sequence[float], of: int) -> tuple[float, float]:
    """Return the mean of a sample, and its standard error as that of so many: none when all were
    looked at.
    """
    looked = len(sizes)
    unseen = max(0.0, 1 - looked / max(1, of))
    return fmean(sizes), pstdev(sizes) * math.sqrt(unseen / max(1, looked - 1))


def _prompts(drafts: Iterable[Draft], of: int) -> Prompts:
    looked = list(drafts)
    return Prompts(
        looked[0].tier, looked[0].max_tokens, *mean_and_error([_size(each) for each in looked], of)
    )


def _size(draft: Draft) -> int:
    return estimated_prompt(draft.messages)


# --- a call for each item ---------------------------------------------------------------------


def by_item(compose: Compose) -> Forecast:
    """Forecast an operation that asks once for each item."""

    def forecast(request: JobRequest, sample: ItemSample) -> Rounds:
        prompts = _first(compose, request, sample)
        return lambda outlook: [outlook.round(request.operation, prompts, sample.total)]

    return forecast


def _first(compose: Compose, request: JobRequest, sample: ItemSample) -> Prompts:
    return _prompts(
        (compose(item, request.params, request.complexity) for _, item in sample.items),
        sample.total,
    )


# --- then merges, until one answer is left ----------------------------------------------------


def merging(compose: Compose, merge: Compose) -> Forecast:
    """Forecast an operation that asks for each item, and has answers merged a few at a time."""

    def forecast(request: JobRequest, sample: ItemSample) -> Rounds:
        first, fan_in = _first(compose, request, sample), parsed(MapReduce, request.params).fan_in

        def rounds(outlook: Outlook) -> list[RoundForecast]:
            found, prompts, parts = (
                [outlook.round(request.operation, first, sample.total)],
                first,
                sample.total,
            )
            while parts > 1:
                part = "x" * round(4 * outlook.answer_tokens(prompts, parts))
                sizes = [
                    _size(merge([part] * of, request.params, request.complexity))
                    for of in (fan_in, (parts - 1) % fan_in + 1)
                ]
                parts = -(-parts // fan_in)
                prompts = Prompts(
                    first.tier, first.max_tokens, (sizes[0] * (parts - 1) + sizes[1]) / parts
                )
                found.append(outlook.round("llm.merge", prompts, parts))
            return found

        return rounds

    return forecast


# --- or are narrowed, until they fit into a context -------------------------------------------


Passage = list[Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading the items of a question comes to."""

    groups: int  # of passages that are read at once
    passages: float  # of all items
    room_for: float  # passages, in one group
    tokens: float  # of a prompt, for each passage
    error: float  # standard error of that
    overhead: int  # tokens of a prompt without passages


def narrowing(
    reading: Compose,
    answering: Compose,
    *,
    passage: Callable[[int, Any], Passage],
    packed: Callable[[Iterable[Passage], int], Iterable[list[Passage]]],
    size: Callable[[Passage], int],
) -> Forecast:
    """Forecast an operation that reads all items in groups, and what was found again, until it
    answers from the rest.

    `passage` makes one of an item, `packed` puts passages together for a room in tokens, of which
    each takes its `size`."""

    def forecast(request: JobRequest, sample: ItemSample) -> Rounds:
        its = parsed(Ask, request.params)
        groups = list(packed((passage(*each) for each in sample.items), its.group_tokens))
        empty = reading({"passages": []}, request.params, request.complexity)
        whole = reading(
            {"passages": [one for group in groups for one in group]},
            request.params,
            request.complexity,
        )
        all_read = _reading(
            groups=groups,
            room=its.group_tokens,
            size=size,
            overhead=_size(empty),
            whole=_size(whole),
            times=sample.total / len(sample.items),
        )
        last = answering({"passages": []}, request.params, request.complexity)

        def prompts(passages: float, overhead: float) -> Prompts:
            """Return the prompts of one round in which each call has so many passages."""
            return Prompts(
                empty.tier,
                empty.max_tokens,
                overhead + passages * all_read.tokens,
                passages * all_read.error,
            )

        def rounds(outlook: Outlook) -> list[RoundForecast]:
            left, calls, found = all_read.passages, all_read.groups, []
            for _ in range(its.max_rounds):
                found.append(
                    outlook.round("llm.ask", prompts(left / calls, all_read.overhead), calls)
                )
                left = min(left, calls * outlook.found)
                if left <= all_read.room_for:
                    break
                calls = math.ceil(left / all_read.room_for)
            few = min(left, all_read.room_for)
            return [*found, outlook.round("llm.answer", prompts(few, _size(last)), 1)]

        return rounds

    return forecast


def _reading(
    groups: list[list[Passage]],
    room: int,
    size: Callable[[Passage], int],
    overhead: int,
    whole: int,
    times: float,
) -> Reading:
    """Return what reading comes to, of a sample's groups; there are `times` as many items as in the
    sample.
    """
    sizes = [size(each) for group in groups for each in group]
    full = (
        len(groups) - 1 + min(1.0, sum(map(size, groups[-1])) / room)
    )  # the last one would have taken more
    passages = len(sizes) * times
    _, error = mean_and_error(sizes, round(passages))
    return Reading(
        groups=math.ceil(full * times),
        passages=passages,
        room_for=len(sizes) / full,
        tokens=(whole - overhead) / len(sizes),
        error=error,
        overhead=overhead,
    )
