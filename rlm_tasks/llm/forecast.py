"""The calls and tokens that the rounds of a job will need, forecast from a sample of its items.

`operations` makes a forecast for each operation with `by_item`, `merging` or `narrowing`.  Plans
call it with an `Outlook` on the tokens and seconds of calls.  Prompts come from the operation's own
drafts, so a forecast cannot differ from the real prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from rlm_tasks.llm.learned import CallKind, CallStatistics
from rlm_tasks.llm.params import Ask, MapReduce, parsed
from rlm_tasks.operations.ports import RoundForecast

if TYPE_CHECKING:
    from rlm_tasks.jobs.items import ItemSample
    from rlm_tasks.llm.draft import Draft
    from rlm_tasks.operations.ports import Forecast
    from rlm_tasks.requests import JobRequest
    from rlm_tasks.settings.llm import Tier

Z90 = 1.2816
"""Standard deviations above the mean: nine of ten values of a normal distribution are below."""
RELEVANT = 5
"""Assumed relevant passages per call, at p50; at p90 four times as many."""
DEFAULTS = CallStatistics()
REPAIR_TOKENS = 40
"""Estimated tokens of the request to repair an answer, beside that answer."""
FIRST_REPAIRS_SD = 0.5
"""Standard deviation of the repairs of a call with a form, before the first one."""


# --- sums and their deviations ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prompts:
    """The estimated tokens of a round's prompts, from a sample, and the limit of its answers."""

    tier: Tier
    kind: CallKind
    max_tokens: int  # most tokens of an answer
    mean: float  # estimated tokens of a prompt, without corrections from earlier calls
    error: float = 0.0  # standard error of the mean
    has_form: bool = False  # an answer of the wrong form is repaired by another call
    samples: int = 1  # calls for each item


@dataclass(frozen=True, slots=True)
class Outlook:
    """Expected tokens and seconds of calls: their means, or `z` standard deviations above them."""

    known: Callable[[Tier, CallKind], CallStatistics]
    z: float = 0.0

    def round(self, prompts: Prompts, items: int) -> RoundForecast:
        """Return the forecast of a round with this number of items."""
        past = self.known(prompts.tier, prompts.kind)
        first = items * prompts.samples
        repairs = round(first * self._repairs(prompts, past, first))
        answer = self.answer_tokens(prompts, first)

        def tokens(estimated: float) -> float:
            prompt = past.prompt.tokens(estimated)
            errors = past.prompt.slope * prompts.error, prompt * past.prompt_spread
            return prompt + self.z * math.hypot(*errors)

        return RoundForecast(
            operation=prompts.kind.operation,
            tier=prompts.tier,
            kind=prompts.kind,
            items=items,
            calls=first + repairs,
            prompt_tokens=first * tokens(prompts.mean)
            + repairs * tokens(prompts.mean + answer + REPAIR_TOKENS),
            answer_tokens=(first + repairs) * answer,
        )

    def answer_tokens(self, prompts: Prompts, calls: int) -> float:
        """Return the mean tokens of this number of answers.

        Before the first call, the worst case is all of max_tokens.
        """
        past = self.known(prompts.tier, prompts.kind)
        if self.z and not past.calls:
            return prompts.max_tokens
        expected, most = past.answer_share(prompts.max_tokens)
        share = self._mean(
            mean=expected,
            sd=past.share_sd,
            first_sd=DEFAULTS.share_sd,
            known=past.own or past.calls,
            calls=calls,
            common=expected * past.answer_spread,
        )
        return prompts.max_tokens * min(1.0, max(share, most) if self.z else share)

    def _repairs(self, prompts: Prompts, past: CallStatistics, calls: int) -> float:
        """Return the repairs for each call."""
        if not prompts.has_form:
            return 0.0
        sd = math.sqrt(past.repairs * max(0.0, 1 - past.repairs))
        return min(
            2.0,
            self._mean(
                mean=past.repairs,
                sd=sd,
                first_sd=FIRST_REPAIRS_SD,
                known=past.formed,
                calls=calls,
            ),
        )

    def seconds(self, tier: Tier, kind: CallKind, calls: int) -> float:
        """Return the mean seconds of this number of calls."""
        past = self.known(tier, kind)
        return self._mean(
            mean=past.seconds,
            sd=past.seconds_sd,
            first_sd=DEFAULTS.seconds_sd,
            known=past.calls,
            calls=calls,
        )

    @property
    def relevant(self) -> int:
        """The relevant passages that a model finds in one call."""
        return 4 * RELEVANT if self.z else RELEVANT

    def _mean(
        self,
        *,
        mean: float,
        sd: float,
        first_sd: float,
        known: float,
        calls: int,
        common: float = 0.0,
    ) -> float:
        """Return the mean of the next `calls` values, from `known` earlier ones.

        Both the values and the measured mean vary.  The default deviation counts as one value,
        because the deviation of a few values means little.  `common` is the deviation that all
        values share.
        """
        spread = math.sqrt((known * sd**2 + first_sd**2) / (known + 1))
        error = spread * math.sqrt(1 / max(1, calls) + 1 / max(1.0, known))
        return mean + self.z * math.hypot(error, common)


Rounds = Callable[[Outlook], list[RoundForecast]]
Compose = Callable[[Any, dict[str, Any], str], "Draft"]


def mean_and_error(sizes: Sequence[float], of: int) -> tuple[float, float]:
    """Return the mean of a sample from a population of size `of`, and its standard error.

    The error is 0 if the sample has all values.
    """
    count = len(sizes)
    unseen = max(0.0, 1 - count / max(1, of))
    return fmean(sizes), pstdev(sizes) * math.sqrt(unseen / max(1, count - 1))


def _prompts(kind: CallKind, drafts: Iterable[Draft], of: int) -> Prompts:
    sample = list(drafts)
    mean, error = mean_and_error([each.estimated for each in sample], of)
    return _like(sample[0], kind, mean, error)


def _like(draft: Draft, kind: CallKind, mean: float, error: float = 0.0) -> Prompts:
    """Return the prompts of a round whose drafts are like this one."""
    return Prompts(
        tier=draft.tier,
        kind=kind,
        max_tokens=draft.max_tokens,
        mean=mean,
        error=error,
        has_form=draft.form is not None,
        samples=draft.samples,
    )


# --- a call for each item ---------------------------------------------------------------------


def by_item(compose: Compose) -> Forecast:
    """Return the forecast of an operation that makes one call for each item."""

    def forecast(request: JobRequest, sample: ItemSample) -> Rounds:
        prompts = _first(compose, request, sample)
        return lambda outlook: [outlook.round(prompts, sample.total)]

    return forecast


def _first(compose: Compose, request: JobRequest, sample: ItemSample) -> Prompts:
    return _prompts(
        CallKind.of(request.operation, request.params),
        (compose(item, request.params, request.complexity) for _, item in sample.items),
        sample.total,
    )


# --- a call for each item, then merges --------------------------------------------------------


def merging(compose: Compose, merge: Compose) -> Forecast:
    """Return the forecast of one call for each item, and of merges until one answer is left."""

    def forecast(request: JobRequest, sample: ItemSample) -> Rounds:
        first, fan_in = _first(compose, request, sample), parsed(MapReduce, request.params).fan_in
        kind = CallKind.of("llm.merge", request.params)

        def rounds(outlook: Outlook) -> list[RoundForecast]:
            forecasts = [outlook.round(first, sample.total)]
            prompts, parts = first, sample.total
            while parts > 1:
                part = "x" * round(4 * outlook.answer_tokens(prompts, parts))
                whole, rest = (
                    merge([part] * of, request.params, request.complexity)
                    for of in (fan_in, (parts - 1) % fan_in + 1)
                )
                parts = -(-parts // fan_in)
                mean = (whole.estimated * (parts - 1) + rest.estimated) / parts
                prompts = _like(whole, kind, mean)
                forecasts.append(outlook.round(prompts, parts))
            return forecasts

        return rounds

    return forecast


# --- a question over all items, narrowed until the rest fits into a context -------------------


Passage = list[Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """The estimated size of all items as passages of a question."""

    groups: int  # groups of passages; one call reads one group
    passages: float  # passages of all items
    per_group: float  # passages that fit into one group
    tokens: float  # tokens of a prompt for each passage
    error: float  # standard error of `tokens`


def narrowing(
    reading: Compose,
    answering: Compose,
    *,
    passage: Callable[[int, Any], Passage],
    packed: Callable[[Iterable[Passage], int], Iterable[list[Passage]]],
    size: Callable[[Passage], int],
) -> Forecast:
    """Return the forecast of an operation that narrows its items down to an answer.

    It reads all items in groups, then the relevant passages again, until it answers from the rest.

    - `passage` makes a passage from the number and the item.
    - `packed` groups passages for a room in tokens.
    - `size` returns the tokens of a passage.
    """

    def forecast(request: JobRequest, sample: ItemSample) -> Rounds:
        params = parsed(Ask, request.params)
        groups = list(packed((passage(*each) for each in sample.items), params.group_tokens))
        empty = reading({"passages": []}, request.params, request.complexity)
        whole = reading(
            {"passages": [one for group in groups for one in group]},
            request.params,
            request.complexity,
        )
        all_read = _reading(
            groups=groups,
            room=params.group_tokens,
            size=size,
            overhead=empty.estimated,
            whole=whole.estimated,
            times=sample.total / len(sample.items),
        )
        last = answering({"passages": []}, request.params, request.complexity)

        def prompts(draft: Draft, operation: str, passages: float) -> Prompts:
            """Return the prompts of one round, with this number of passages in each call."""
            return _like(
                draft,
                CallKind.of(operation, request.params),
                draft.estimated + passages * all_read.tokens,
                passages * all_read.error,
            )

        def rounds(outlook: Outlook) -> list[RoundForecast]:
            left, calls, forecasts = all_read.passages, all_read.groups, []
            for _ in range(params.max_rounds):
                forecasts.append(outlook.round(prompts(empty, "llm.ask", left / calls), calls))
                left = min(left, calls * outlook.relevant)
                if left <= all_read.per_group:
                    break
                calls = math.ceil(left / all_read.per_group)
            few = min(left, all_read.per_group)
            return [*forecasts, outlook.round(prompts(last, "llm.answer", few), 1)]

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
    """Return the size of all items, from a sample's groups; `times`: items per sampled item."""
    sizes = [size(each) for group in groups for each in group]
    full = len(groups) - 1 + min(1.0, sum(map(size, groups[-1])) / room)  # the last may be partial
    passages = len(sizes) * times
    _, error = mean_and_error(sizes, round(passages))
    return Reading(
        groups=math.ceil(full * times),
        passages=passages,
        per_group=len(sizes) / full,
        tokens=(whole - overhead) / len(sizes),
        error=error,
    )
