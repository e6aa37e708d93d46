"""Estimate the nodes, calls, tokens, money and time of a request before it costs anything.

`Client.plan` calls `plan`.  It samples the items, and reads the figures of earlier calls and the
state of buckets and workers; it calls no provider and stores nothing.  The operation's forecast
counts its calls to models; this module turns amounts into time, and compares them with the budget.
Begin with `plan`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from resilience.degradation import Degradation
from rlm_tasks import words
from rlm_tasks.client.platform_status import Pressure
from rlm_tasks.jobs.file_roots import FilesRoot
from rlm_tasks.jobs.items import ItemSample, source_of
from rlm_tasks.jobs.splitting import WORTH_PLANNING_MS, Fork, Shape, leaves
from rlm_tasks.jobs.splitting import plan as split
from rlm_tasks.llm.draft import models_for
from rlm_tasks.llm.endpoint_pool import BYTES_PER_TOKEN, EndpointPool
from rlm_tasks.llm.forecast import Z90, Outlook
from rlm_tasks.operations import registry
from rlm_tasks.operations.ports import RoundForecast
from rlm_tasks.words import count, figure
from scheduler.slots import SlotBoard

if TYPE_CHECKING:
    from rlm_tasks.client.session import Session
    from rlm_tasks.llm.learned import CallKind, CallStatistics
    from rlm_tasks.operations.registry import Operation
    from rlm_tasks.requests import JobRequest
    from rlm_tasks.settings.llm import EndpointSettings, Tier


# --- the plan ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """An amount: half of such jobs take less than `p50`, nine of ten less than `p90`."""

    p50: float
    p90: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.p50 + other.p50, self.p90 + other.p90)


NOTHING = Estimate(0, 0)


@dataclass(frozen=True, slots=True)
class PlannedRound:
    """The estimate of one round; round 0 has the job's own items."""

    number: int
    operation: str
    items: int  # at p50
    calls: Estimate
    tokens: Estimate  # prompts and answers together
    money: Estimate


@dataclass(frozen=True, slots=True)
class Sufficiency:
    """Whether a request's budget pays for all of its rounds."""

    suffices: bool  # at p50
    suffices_p90: bool
    items_share: Estimate  # share of the items that it pays for, 0 to 1
    limited_by: str  # the unit that pays for the fewest items; '' when it suffices at p90


@dataclass(frozen=True, slots=True)
class Plan:
    """The estimate of a request that is submitted now."""

    operation: str
    items: int
    nodes: int  # approximate
    calls: Estimate  # to models; repeated calls are not counted
    tokens: Estimate
    money: Estimate  # by the prices of RLM_LLM__MODELS, in their currency
    time_s: Estimate | None
    """From the first node's start, if no other job uses the workers; None: not known."""
    limited_by: str
    """The cause of most of the time.

    One of tokens, requests, bytes, in flight, latency, slots, no worker, no endpoint.
    """
    rounds: tuple[PlannedRound, ...]
    models: dict[str, str]  # tier of the request -> model that answers for it today
    level: str  # the pressure level today
    slots: int  # of live workers that serve its queue
    budget: Sufficiency | None  # None: the request has none
    based_on: int  # number of earlier calls to the model, or items, behind the estimates
    notes: tuple[str, ...] = ()  # remarks on the figures for the reader
    alike: int = 0  # the part of the earlier calls that had the same operation and params

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.operation} over {count(self.items, 'item')}", self._calls()]
        if self.calls.p90:
            lines += [f"Tokens: {_amount(self.tokens)}", f"Money: {_amount(self.money)}"]
        lines += [
            self._time(),
            f"Nodes: about {figure(self.nodes)}, slots: {self.slots}",
            self._budget(),
            self._basis(),
            *self.notes,
        ]
        return "\n".join(filter(None, lines))

    def _calls(self) -> str:
        if not self.calls.p90:
            return "No calls to models"
        rounds = count(len(self.rounds), "round")
        models = ", ".join(f"{model} ({tier} tier)" for tier, model in self.models.items())
        pressure = "" if self.level == "normal" else f", pressure is {self.level}"
        return f"Calls: {_amount(self.calls)}, in {rounds}, to {models}{pressure}"

    def _time(self) -> str:
        if self.time_s is None:
            return f"Time: not known{f', there is {self.limited_by}' if self.limited_by else ''}"
        time = _both(words.duration(self.time_s.p50), words.duration(self.time_s.p90))
        return f"Time: {time}, limited by {self.limited_by}"

    def _basis(self) -> str:
        """Say which earlier calls the estimate rests on."""
        if not (self.calls.p90 and self.based_on):
            return ""
        calls = f"Based on {count(self.based_on, 'earlier call')} to the model"
        if not self.alike:
            return f"{calls}, none with these params: lengths of answers may differ much"
        return f"{calls}, {figure(min(self.alike, self.based_on))} of them with these params"

    def _budget(self) -> str:
        if (budget := self.budget) is None:
            return ""
        if budget.suffices_p90:
            return "Budget: suffices, also at p90"
        verdict = "suffices, but not at p90" if budget.suffices else "does not suffice"
        share = budget.items_share
        shares = f"{share.p50:.0%}, at p90 {share.p90:.0%}"
        return (
            f"Budget: {verdict}; its {budget.limited_by} pay for this share of the items: {shares}"
        )


def _amount(amount: Estimate) -> str:
    return _both(figure(amount.p50), figure(amount.p90))


def _both(p50: str, p90: str) -> str:
    return p50 if p50 == p90 else f"{p50}, at p90 {p90}"


ROUND_S = 0.1
"""Seconds in which a round begins and ends, beside its calls: measured on two cores."""

# --- how long it takes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flow:
    """The amounts that a limit lets pass over time."""

    per_s: float  # refilled each second
    room: float  # may pass at once, now; below 0 while the limit is on hold
    most: float  # may ever pass at once

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.per_s + other.per_s, self.room + other.room, self.most + other.most)


@dataclass(frozen=True, slots=True)
class Stage:
    """The amounts that one round takes of limits, and its time without limits."""

    seconds: float
    bound: str  # the cause of these seconds
    work_s: float  # all slots together
    model: str = ""  # the model that has the limits
    amounts: Mapping[str, float] = field(default_factory=dict)
    flows: Mapping[str, Flow] = field(default_factory=dict)  # limits of these amounts


def duration(stages: Sequence[Stage]) -> tuple[float, str]:
    """Return the seconds of stages, one after the other, and the cause of most of them.

    Amounts count as a fluid: a limit lets its room pass at once, and refills it while something
    else is slower.
    """
    room: dict[tuple[str, str], float] = {}
    by: dict[str, float] = {}
    for stage in stages:
        left = {
            name: room.get((stage.model, name), flow.room) for name, flow in stage.flows.items()
        }
        waits = {
            name: max(0.0, stage.amounts[name] - left[name]) / flow.per_s
            for name, flow in stage.flows.items()
        }
        waits[stage.bound] = stage.seconds
        slowest = max(waits, key=lambda name: waits[name])
        by[slowest] = by.get(slowest, 0.0) + waits[slowest]
        for name, flow in stage.flows.items():
            room[stage.model, name] = min(
                flow.most, left[name] + waits[slowest] * flow.per_s - stage.amounts[name]
            )
    return sum(by.values()), max(by, key=lambda name: by[name], default="")


def in_waves(calls: float, seconds: float, at_once: int) -> tuple[float, str]:
    """Return the seconds of calls, with `at_once` of them in flight, and their bound."""
    return max(1.0, calls / at_once) * seconds, "in flight" if calls > at_once else "latency"


def nodes_of(shape: Shape, items: int, slots: int, work_ms: float | None) -> int:
    """Return the approximate number of nodes of a job.

    `work_ms` is the time of all items together, None if it is not known.  An eager shape is planned
    from sizes alone.  Any other shape is cut while it runs, and a short job is not cut at all.
    """

    @functools.cache
    def planned(size: int, depth: int) -> int:
        part = split(shape, 0, size, depth, max(1, slots))
        if not isinstance(part, Fork):
            return 1
        return 1 + sum(
            planned(leaf.hi - leaf.lo, leaf.depth) if shape.eager else 1 for leaf in leaves(part)
        )

    if shape.eager or work_ms is None:
        return planned(items, 0)
    return (
        1
        if work_ms < WORTH_PLANNING_MS
        else max(planned(items, 0), math.ceil(work_ms / shape.target_ms))
    )


# --- the budget -------------------------------------------------------------------------------


def paid_for(
    limit: float, needs: Sequence[float], kept: float, *, goes_on: bool
) -> tuple[float, bool]:
    """Return the share of the first round that a budget pays for, and whether it pays for all.

    As in `ledger.budgets`, each round but the last keeps the share `kept` of the rest for the
    rounds behind it.  With `goes_on` the job has rounds, and the first round keeps it in any case.
    """
    left, enough, share = limit, True, 1.0
    for number, need in enumerate(needs):
        last = number == len(needs) - 1 and (number > 0 or not goes_on)
        may = left if last else left * (1 - kept)
        enough = enough and need <= may
        share = min(1.0, may / need) if number == 0 and need else share
        left -= min(need, may)
    return share, enough


def sufficiency(
    limits: Mapping[str, float], rounds: Sequence[PlannedRound], kept: float, *, goes_on: bool
) -> Sufficiency:
    """Return whether limits by unit (calls, tokens, money) pay for rounds."""

    def paid(unit: str, at: str) -> tuple[float, bool]:
        return paid_for(
            limits[unit],
            [getattr(getattr(each, unit), at) for each in rounds],
            kept,
            goes_on=goes_on,
        )

    p50, p90 = ({unit: paid(unit, at) for unit in limits} for at in ("p50", "p90"))
    worst = min(limits, key=lambda unit: (p50[unit], p90[unit]))
    suffices, suffices_p90 = (all(enough for _, enough in each.values()) for each in (p50, p90))
    shares = Estimate(*(min(share for share, _ in each.values()) for each in (p50, p90)))
    return Sufficiency(suffices, suffices_p90, shares, "" if suffices_p90 else worst)


# --- the platform today -----------------------------------------------------------------------


class Today:
    """The models that the platform would call now, with their past figures, limits and slots."""

    def __init__(self, session: Session, queue: str) -> None:
        self.settings, self.level = session.settings.llm, Pressure(session).level()
        board = SlotBoard(session.store, session.keys)
        [[_, slots]] = session.store.call(board.take(queue, 0))
        self.slots = int(slots)
        self.models: dict[Tier, str] = {}
        self._pool = EndpointPool(session.guards)
        self._flows: dict[str, dict[str, Flow]] = {}

    @property
    def obstacle(self) -> str:
        """The lack that stops all jobs, `no worker` or `no endpoint`; '' without one."""
        if not self.slots:
            return "no worker"
        return "" if all(map(self.endpoints, self.models.values())) else "no endpoint"

    def model(self, tier: Tier) -> str:
        """Return the model that answers for a tier now.

        Under pressure it is a smaller one; if no endpoint of a model is healthy, it is another one.
        """
        if tier not in self.models:
            models = models_for(tier, self.settings, Degradation(self.level))
            self.models[tier] = next((each for each in models if self.endpoints(each)), models[0])
        return self.models[tier]

    def known(self, tier: Tier, kind: CallKind) -> CallStatistics:
        """Return the figures of earlier calls of a kind to a tier's model."""
        return self._pool.learned.of(self.model(tier), kind, whole=True)

    def endpoints(self, model: str) -> list[EndpointSettings]:
        """Return the healthy endpoints that have a model."""
        unhealthy = self._pool.health.unhealthy()
        return [
            each
            for each in self.settings.endpoints_or_default
            if each.name not in unhealthy and (not each.models or model in each.models)
        ]

    def flows(self, model: str) -> dict[str, Flow]:
        """Return the flows of a model's limits, over all API keys.  Raises StoreUnavailable."""
        if model not in self._flows:
            found: dict[str, Flow] = {}
            for endpoint in {each.key_env: each for each in self.endpoints(model)}.values():
                for name, status in self._pool.bucket(endpoint, model).status().items():
                    per_s = status["limit"] / status["per_s"]
                    free = min(status["level"], status["limit"] - status["used"])
                    flow = Flow(per_s, free - status["hold_s"] * per_s, status["capacity"])
                    found[name] = found[name] + flow if name in found else flow
            self._flows[model] = found
        return self._flows[model]

    def at_once(self, model: str) -> int:
        """Return the number of calls to a model that one slot keeps in flight."""
        endpoints = max(1, len(self.endpoints(model)))
        return min(self.settings.pool, self.settings.per_host * endpoints)

    def money(self, forecast: RoundForecast) -> float:
        """Return the price of a round."""
        model = self.settings.model(self.model(forecast.tier))
        prompts = forecast.prompt_tokens * model.input_price
        billed = self.known(forecast.tier, forecast.kind).price_ratio
        return billed * (prompts + forecast.answer_tokens * model.output_price) / 1e6

    def stage(self, forecast: RoundForecast, outlook: Outlook, slots: int) -> Stage:
        """Return the stage of a round on a number of slots.  Raises StoreUnavailable."""
        model, calls = self.model(forecast.tier), forecast.calls
        tokens = forecast.prompt_tokens + forecast.answer_tokens
        seconds, at_once = outlook.seconds(forecast.tier, forecast.kind, calls), self.at_once(model)
        slot_s = self.known(forecast.tier, forecast.kind).slot_s
        amounts = {"requests": calls, "tokens": tokens, "bytes": tokens * BYTES_PER_TOKEN}
        # A node has at least the items that a slot keeps in flight.
        slots = max(1, min(slots, forecast.items // at_once))
        waves = in_waves(calls, seconds, at_once * slots)
        took_s, bound = max(waves, (calls * slot_s / slots, "slots"))
        work_s = calls * max(slot_s, seconds / at_once)
        return Stage(took_s + ROUND_S, bound, work_s, model, amounts, self.flows(model))


# --- putting it together ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobEstimate:
    """The rounds and stages of a job."""

    rounds: list[PlannedRound]
    stages: tuple[list[Stage], list[Stage]] | None  # at p50, at p90; None: time is not known
    based_on: int
    note: str = ""
    alike: int = 0


def plan(session: Session, given: JobRequest, checked: JobRequest, queue: str) -> Plan:
    """Return the plan of a request that would wait in `queue`.

    `given` is the request as the user wrote it, `checked` the same with its operation's changes.
    Raises InvalidRequest for items that cannot be sampled, and StoreUnavailable.
    """
    operation, root = registry.get(given.operation), FilesRoot(session.settings.files_root)
    sample = source_of(given.items).sample(Random(0), root)
    session.store.check()
    today, shape = Today(session, queue), checked.shape(session.settings.node.target_ms)
    if operation.forecast is not None and sample.total > 0:
        estimate = _of_calls(operation, checked, sample, today)
    else:
        estimate = _of_items(
            session=session, operation=operation, sample=sample, today=today, shape=shape
        )
    time_s, limited_by = _time(estimate, today.obstacle)
    limits = checked.options.budget.limits if checked.options.budget else {}
    kept, goes_on = session.settings.llm.merge_share, operation.then is not None
    inexact = "" if sample.exact else "The number of items is an estimate, from blocks of the file"
    return Plan(
        operation=operation.name,
        items=sample.total,
        nodes=_nodes(estimate, shape, today.slots, time_s),
        **{
            name: sum((getattr(each, name) for each in estimate.rounds), NOTHING)
            for name in ("calls", "tokens", "money")
        },
        time_s=time_s,
        limited_by=limited_by,
        rounds=tuple(estimate.rounds),
        models={str(tier): model for tier, model in today.models.items()},
        level=today.level.label,
        slots=today.slots,
        budget=sufficiency(limits, estimate.rounds, kept, goes_on=goes_on) if limits else None,
        based_on=estimate.based_on,
        alike=estimate.alike,
        notes=tuple(filter(None, (estimate.note, inexact))),
    )


def _of_calls(
    operation: Operation, request: JobRequest, sample: ItemSample, today: Today
) -> JobEstimate:
    """Return the estimate of a job whose operation has a forecast of its calls to models."""
    assert operation.forecast is not None  # see `plan`
    rounds = operation.forecast(request, sample)
    outlooks = Outlook(today.known), Outlook(today.known, Z90)
    p50, p90 = map(rounds, outlooks)
    planned = [_planned(number, *pair, today) for number, pair in enumerate(_paired(p50, p90))]
    first_slots = 1 if request.kind == "sequential" else today.slots
    stages = [
        [
            today.stage(each, outlook, today.slots if number else first_slots)
            for number, each in enumerate(every)
        ]
        for every, outlook in zip((p50, p90), outlooks, strict=True)
    ]
    known = [(each, today.known(each.tier, each.kind)) for each in p50]
    unknown = sorted({today.model(each.tier) for each, past in known if not past.calls})
    note = (
        f"No call to {' or '.join(unknown)} is known yet: each answer is assumed to have half of "
        "max_tokens, at p90 all of them"
    )
    based_on = min(round(past.calls) for _, past in known)
    alike = min(round(past.own) for _, past in known)
    return JobEstimate(
        planned, (stages[0], stages[1]), based_on, note if unknown else "", alike=alike
    )


def _paired(
    p50: list[RoundForecast], p90: list[RoundForecast]
) -> list[tuple[RoundForecast, RoundForecast]]:
    """Pair the rounds of p50 and p90, the last with the last; p90 may have more between."""
    more = [
        replace(each, items=0, calls=0, prompt_tokens=0.0, answer_tokens=0.0)
        for each in p90[len(p50) - 1 : -1]
    ]
    return list(zip([*p50[:-1], *more, p50[-1]], p90, strict=True))


def _planned(number: int, p50: RoundForecast, p90: RoundForecast, today: Today) -> PlannedRound:
    both = p50, p90
    return PlannedRound(
        number=number,
        operation=p90.operation,
        items=p50.items,
        calls=Estimate(p50.calls, p90.calls),
        tokens=Estimate(*(round(each.prompt_tokens + each.answer_tokens) for each in both)),
        money=Estimate(*map(today.money, both)),
    )


def _of_items(
    session: Session, operation: Operation, sample: ItemSample, today: Today, shape: Shape
) -> JobEstimate:
    """Return the estimate of a job without calls to models, from the times of earlier items.

    Only the mean of these times is recorded, so they are assumed to be exponentially distributed.
    """
    usage, n = session.usage.of(operation.name), sample.total
    rounds = [
        PlannedRound(
            number=0,
            operation=operation.name,
            items=n,
            calls=NOTHING,
            tokens=NOTHING,
            money=NOTHING,
        )
    ]
    if n and not usage.total_executions:
        note = f"The time of an item of {operation.name} is not known yet: none has run"
        return JobEstimate(rounds, None, 0, note)
    each_s = usage.avg_duration_ms / 1000
    slots = 1 if shape.mode == "sequential" else max(1, today.slots)
    spread_s = each_s * math.sqrt(n + n**2 / max(1, usage.total_executions))
    work_s = [n * each_s + z * spread_s for z in (0.0, Z90)]
    stages = [[Stage(max(each / slots, min(each, each_s)), "slots", each)] for each in work_s]
    return JobEstimate(rounds, (stages[0], stages[1]), usage.total_executions)


def _time(estimate: JobEstimate, obstacle: str) -> tuple[Estimate | None, str]:
    if obstacle or estimate.stages is None:
        return None, obstacle
    (p50_s, limited_by), (p90_s, _) = map(duration, estimate.stages)
    return Estimate(p50_s, p90_s), limited_by


def _nodes(estimate: JobEstimate, shape: Shape, slots: int, time_s: Estimate | None) -> int:
    """Count the nodes of all rounds; the later ones have the shape that `engine.rounds` sets."""
    later = Shape("flat", min_chunk=shape.min_chunk, target_ms=shape.target_ms)
    rounds = [each for each in estimate.rounds if each.items or not each.number]
    works_ms = [each.work_s * 1000 for each in estimate.stages[0]] if estimate.stages else [None]
    nodes = sum(
        nodes_of(later if each.number else shape, each.items, slots, work_ms)
        for each, work_ms in zip(rounds, works_ms, strict=True)
    )
    # A node that waits for a limit ends at its target time, too.
    waiting = 0 if shape.eager or time_s is None else int(time_s.p50 * 1000 / shape.target_ms)
    return max(nodes, waiting)
