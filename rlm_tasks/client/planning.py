"""What a request would take, told before anything is paid: nodes, calls, tokens, money and time,
under today's limits.

Looks at a sample of the items, at what earlier calls have taken, and at what buckets and workers
say now; asks no provider, stores nothing.  Decides how amounts become time and how a budget is told
to suffice.  Refuses to know what an operation asks models: that is its forecast."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from resilience.degradation import Degradation
from rlm_tasks.client.platform_status import Pressure
from rlm_tasks.jobs.items import ItemSample, source_of
from rlm_tasks.jobs.splitting import WORTH_PLANNING_MS, Fork, Shape, leaves
from rlm_tasks.jobs.splitting import plan as split
from rlm_tasks.llm.draft import models_for
from rlm_tasks.llm.endpoint_pool import EndpointPool
from rlm_tasks.llm.forecast import Z90, Outlook
from rlm_tasks.llm.gate import BYTES_PER_TOKEN
from rlm_tasks.operations import registry
from rlm_tasks.operations.ports import RoundForecast
from scheduler.slots import SlotBoard

if TYPE_CHECKING:
    from rlm_tasks.client.session import Session
    from rlm_tasks.llm.learned import Known
    from rlm_tasks.operations.registry import Operation
    from rlm_tasks.requests import JobRequest
    from rlm_tasks.settings.llm import EndpointSettings, Tier


# --- what is told -----------------------------------------------------------------------------


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
    """What one round takes: 0 is that of the job's own items."""

    number: int
    operation: str
    items: int  # of the round, at p50
    calls: Estimate
    tokens: Estimate  # of prompts and answers together
    money: Estimate


@dataclass(frozen=True, slots=True)
class Sufficiency:
    """Whether a request's budget pays for all of its rounds."""

    suffices: bool  # at p50
    suffices_p90: bool
    items_share: Estimate  # of the items it pays for, 0 to 1
    limited_by: str  # the unit that pays for the fewest; '' when it suffices at p90


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request would take if it were submitted now."""

    operation: str
    items: int
    nodes: int  # about
    calls: Estimate  # to models, repeated ones not counted
    tokens: Estimate
    money: Estimate  # by the prices of RLM_LLM__MODELS, in their currency
    time_s: (
        Estimate | None
    )  # from the first node's start, when it has all workers to itself; None: not known
    limited_by: str  # what makes most of the time: tokens, requests, bytes, in flight, latency, slots, no worker, no endpoint
    rounds: tuple[PlannedRound, ...]
    models: dict[str, str]  # tier that is asked for -> model that answers for it today
    level: str  # the pressure that holds today
    slots: int  # of live workers that serve its queue
    budget: Sufficiency | None  # None: the request has none
    based_on: int  # earlier calls, or items, that the estimates rest on
    notes: tuple[str, ...] = ()  # what a reader of the figures should know

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        told = [f"{self.operation} over {_number(self.items)} items", self._calls()]
        told += (
            [f"Tokens: {_told(self.tokens)}", f"Money: {_told(self.money)}"]
            if self.calls.p90
            else []
        )
        told += [
            self._time(),
            f"Nodes: about {_number(self.nodes)}, slots: {self.slots}",
            self._budget(),
            *self.notes,
        ]
        return "\n".join(filter(None, told))

    def _calls(self) -> str:
        if not self.calls.p90:
            return "No calls to models"
        asked = ", ".join(f"{model} ({tier} tier)" for tier, model in self.models.items())
        pressed = "" if self.level == "normal" else f", pressure is {self.level}"
        return f"Calls: {_told(self.calls)}, in {len(self.rounds)} round{'s' * (len(self.rounds) > 1)}, to {asked}{pressed}"

    def _time(self) -> str:
        if self.time_s is None:
            return f"Time: not known{f', there is {self.limited_by}' if self.limited_by else ''}"
        likely, bad = _lasting(self.time_s.p50), _lasting(self.time_s.p90)
        return f"Time: {likely if likely == bad else f'{likely}, at p90 {bad}'}, limited by {self.limited_by}"

    def _budget(self) -> str:
        if (its := self.budget) is None:
            return ""
        if its.suffices_p90:
            return "Budget: suffices, also at p90"
        short = "suffices, but not at p90" if its.suffices else "does not suffice"
        return f"Budget: {short}; its {its.limited_by} pay for {its.items_share.p50:.0%} of the items, at p90 {its.items_share.p90:.0%}"


def _told(amount: Estimate) -> str:
    likely, bad = _number(amount.p50), _number(amount.p90)
    return likely if likely == bad else f"{likely}, at p90 {bad}"


def _number(amount: float) -> str:
    if amount % 1 and amount < 1000:
        return f"{amount:.2f}" if amount >= 1 else f"{amount:.2g}"
    return f"{amount:,.0f}"


def _lasting(seconds: float) -> str:
    """Return a time in its two largest units."""
    for size, unit, smaller, name in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // smaller:.0f} {name}"
    return f"{seconds:.1f} s"


# --- how long it takes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flow:
    """What a limit lets pass: `room` at once, now, and from then on so much a second; never more
    than `most` at once.
    """

    per_s: float
    room: float
    most: float

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.per_s + other.per_s, self.room + other.room, self.most + other.most)


@dataclass(frozen=True, slots=True)
class Stage:
    """What one round takes of limits, and how long it lasts without them."""

    seconds: float
    bound: str  # what makes these seconds
    work_s: float  # of all slots together
    model: str = ""  # whose limits they are
    amounts: Mapping[str, float] = field(default_factory=dict)
    flows: Mapping[str, Flow] = field(default_factory=dict)  # of these amounts


def duration(stages: Sequence[Stage]) -> tuple[float, str]:
    """Return the seconds of stages, one after the other, and what makes most of them.

    Amounts are taken for a fluid: a limit lets its room pass at once, and fills it again while
    something else is slower."""
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
    """Return the seconds of calls of which so many are in flight at once, and what bounds them."""
    return max(1.0, calls / at_once) * seconds, "in flight" if calls > at_once else "latency"


def nodes_of(shape: Shape, items: int, slots: int, work_ms: float | None) -> int:
    """Return about how many nodes a job of so many items has, which take so long together; None:
    that is not known.

    An eager shape is planned from sizes alone; any other is cut when it runs, and not at all when
    it is short."""

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


# --- whether it can be paid -------------------------------------------------------------------


def paid_for(
    limit: float, needs: Sequence[float], kept: float, *, goes_on: bool
) -> tuple[float, bool]:
    """Return the share of the first round that a budget pays for, and whether it pays for all.

    As in `spending`: each round but the last leaves the share `kept` of what there is to those
    behind it; the first one of a job that goes in rounds (`goes_on`) does in any case."""
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

    likely, bad = ({unit: paid(unit, at) for unit in limits} for at in ("p50", "p90"))
    worst = min(limits, key=lambda unit: (likely[unit], bad[unit]))
    suffices, suffices_p90 = (all(enough for _, enough in each.values()) for each in (likely, bad))
    shares = Estimate(*(min(share for share, _ in each.values()) for each in (likely, bad)))
    return Sufficiency(suffices, suffices_p90, shares, "" if suffices_p90 else worst)


# --- what holds today -------------------------------------------------------------------------


class Today:
    """What models are asked today, what is known of them, and what they and the workers let
    pass.
    """

    def __init__(self, session: Session, queue: str) -> None:
        self.settings, self.level = session.settings.llm, Pressure(session).level()
        board = SlotBoard(session.store, session.keys)
        [[_, slots]] = session.store.call(board.take(queue, 0))
        self.slots = int(slots)
        self.models: dict[Tier, str] = {}
        self._provider = EndpointPool(session.guards)
        self._flows: dict[str, dict[str, Flow]] = {}

    @property
    def obstacle(self) -> str:
        """What keeps jobs from getting on at all; '' when nothing does."""
        if not self.slots:
            return "no worker"
        return "" if all(map(self.places, self.models.values())) else "no endpoint"

    def model(self, tier: Tier) -> str:
        """Return the model that is asked for a tier: under pressure a smaller one, another where no
        endpoint of it is well.
        """
        if tier not in self.models:
            models = models_for(tier, self.settings, Degradation(self.level))
            self.models[tier] = next((each for each in models if self.places(each)), models[0])
        return self.models[tier]

    def known(self, tier: Tier) -> Known:
        """Return what earlier calls say of a tier's model."""
        return self._provider.learned.of(self.model(tier))

    def places(self, model: str) -> list[EndpointSettings]:
        """Return the endpoints that have a model and are well."""
        ill = self._provider.health.ill()
        return [
            each
            for each in self.settings.endpoints_or_default
            if each.name not in ill and (not each.models or model in each.models)
        ]

    def flows(self, model: str) -> dict[str, Flow]:
        """Return what the limits of a model let pass, over all keys.  Raises StoreUnavailable."""
        if model not in self._flows:
            found: dict[str, Flow] = {}
            for place in {each.key_env: each for each in self.places(model)}.values():
                for name, at in self._provider.bucket(place, model).status().items():
                    rate = at["limit"] / at["per_s"]
                    flow = Flow(
                        rate,
                        min(at["level"], at["limit"] - at["used"]) - at["hold_s"] * rate,
                        at["capacity"],
                    )
                    found[name] = found[name] + flow if name in found else flow
            self._flows[model] = found
        return self._flows[model]

    def at_once(self, model: str) -> int:
        """Return how many calls to a model one slot keeps in flight."""
        return min(self.settings.pool, self.settings.per_host * max(1, len(self.places(model))))

    def money(self, its: RoundForecast) -> float:
        """Return what a round costs."""
        model = self.settings.model(self.model(its.tier))
        return (
            its.prompt_tokens * model.input_price + its.answer_tokens * model.output_price
        ) / 1e6

    def stage(self, its: RoundForecast, outlook: Outlook, slots: int) -> Stage:
        """Return a round on so many slots.  Raises StoreUnavailable."""
        model, tokens, seconds = (
            self.model(its.tier),
            its.prompt_tokens + its.answer_tokens,
            outlook.seconds(its.tier, its.calls),
        )
        at_once, amounts = (
            self.at_once(model),
            {"requests": its.calls, "tokens": tokens, "bytes": tokens * BYTES_PER_TOKEN},
        )
        waves = in_waves(its.calls, seconds, at_once * max(1, slots))
        return Stage(*waves, its.calls * seconds / at_once, model, amounts, self.flows(model))


# --- putting it together ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobEstimate:
    """How a job would go."""

    rounds: list[PlannedRound]
    stages: (
        tuple[list[Stage], list[Stage]] | None
    )  # at p50, at p90; None: nothing is known of its time
    based_on: int
    note: str = ""


def plan(session: Session, asked: JobRequest, settled: JobRequest, queue: str) -> Plan:
    """Return what a request would take: as it was asked, as its operation has settled it, and where
    it would wait.

    Raises InvalidRequest for items that cannot be looked at, StoreUnavailable.
    """
    operation, sample = registry.get(asked.operation), source_of(asked.items).sample(Random(0))
    session.store.check()
    today, shape = Today(session, queue), settled.shape(session.settings.node.target_ms)
    calls = operation.forecast is not None and sample.total > 0
    course = (
        _of_calls(operation, settled, sample, today)
        if calls
        else _of_items(
            session=session, operation=operation, sample=sample, today=today, shape=shape
        )
    )
    time_s, limited_by = _time(course, today.obstacle)
    limits = settled.options.budget.limits if settled.options.budget else {}
    kept, goes_on = session.settings.llm.merge_share, operation.then is not None
    estimated = (
        "" if sample.exact else "The number of items is an estimate, from blocks of the file"
    )
    return Plan(
        operation=operation.name,
        items=sample.total,
        nodes=_nodes(course, shape, today.slots, time_s),
        **{
            name: sum((getattr(each, name) for each in course.rounds), NOTHING)
            for name in ("calls", "tokens", "money")
        },
        time_s=time_s,
        limited_by=limited_by,
        rounds=tuple(course.rounds),
        models={str(tier): model for tier, model in today.models.items()},
        level=today.level.label,
        slots=today.slots,
        budget=sufficiency(limits, course.rounds, kept, goes_on=goes_on) if limits else None,
        based_on=course.based_on,
        notes=tuple(filter(None, (course.note, estimated))),
    )


def _of_calls(
    operation: Operation, request: JobRequest, sample: ItemSample, today: Today
) -> JobEstimate:
    """Return how a job goes whose operation says what it asks models."""
    assert operation.forecast is not None  # it is what it is planned by
    rounds = operation.forecast(request, sample)
    outlooks = Outlook(today.known), Outlook(today.known, Z90)
    likely, bad = map(rounds, outlooks)
    planned = [_planned(number, *pair, today) for number, pair in enumerate(_paired(likely, bad))]
    first_slots = 1 if request.kind == "sequential" else today.slots
    stages = [
        [
            today.stage(each, outlook, today.slots if number else first_slots)
            for number, each in enumerate(every)
        ]
        for every, outlook in zip((likely, bad), outlooks, strict=True)
    ]
    unknown = [model for tier, model in today.models.items() if not today.known(tier).calls]
    note = f"No call to {' or '.join(unknown)} has told yet how long answers are: half of max_tokens are assumed, at p90 all"
    based_on = min(round(today.known(tier).calls) for tier in today.models)
    return JobEstimate(planned, (stages[0], stages[1]), based_on, note if unknown else "")


def _paired(
    likely: list[RoundForecast], bad: list[RoundForecast]
) -> list[tuple[RoundForecast, RoundForecast]]:
    """Put rounds side by side, the last beside the last: at p90 there may be some more between."""
    more = [
        replace(each, calls=0, prompt_tokens=0.0, answer_tokens=0.0)
        for each in bad[len(likely) - 1 : -1]
    ]
    return list(zip([*likely[:-1], *more, likely[-1]], bad, strict=True))


def _planned(number: int, likely: RoundForecast, bad: RoundForecast, today: Today) -> PlannedRound:
    both = likely, bad
    return PlannedRound(
        number=number,
        operation=bad.operation,
        items=likely.calls,
        calls=Estimate(likely.calls, bad.calls),
        tokens=Estimate(*(round(each.prompt_tokens + each.answer_tokens) for each in both)),
        money=Estimate(*map(today.money, both)),
    )


def _of_items(
    session: Session, operation: Operation, sample: ItemSample, today: Today, shape: Shape
) -> JobEstimate:
    """Return how a job goes whose operation calls no models, by what its items have taken so far.

    Their times are taken to spread as those of an exponential distribution do, by their mean: only
    that is counted."""
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
        return JobEstimate(
            rounds, None, 0, f"No item of {operation.name} has told yet how long it takes"
        )
    each_s, slots = (
        usage.avg_duration_ms / 1000,
        1 if shape.mode == "sequential" else max(1, today.slots),
    )
    spread_s = each_s * math.sqrt(n + n**2 / max(1, usage.total_executions))
    work_s = [n * each_s + z * spread_s for z in (0.0, Z90)]
    stages = [[Stage(max(each / slots, min(each, each_s)), "slots", each)] for each in work_s]
    return JobEstimate(rounds, (stages[0], stages[1]), usage.total_executions)


def _time(course: JobEstimate, obstacle: str) -> tuple[Estimate | None, str]:
    if obstacle or course.stages is None:
        return None, obstacle
    (likely_s, limited_by), (bad_s, _) = map(duration, course.stages)
    return Estimate(likely_s, bad_s), limited_by


def _nodes(course: JobEstimate, shape: Shape, slots: int, time_s: Estimate | None) -> int:
    """Count the nodes of all rounds; the later ones have the shape that `rounds` gives them."""
    later = Shape("flat", min_chunk=shape.min_chunk, target_ms=shape.target_ms)
    rounds = [each for each in course.rounds if each.items or not each.number]
    works_ms = [each.work_s * 1000 for each in course.stages[0]] if course.stages else [None]
    nodes = sum(
        nodes_of(later if each.number else shape, each.items, slots, work_ms)
        for each, work_ms in zip(rounds, works_ms, strict=True)
    )
    waiting = 0 if shape.eager or time_s is None else int(time_s.p50 * 1000 / shape.target_ms)
    return max(nodes, waiting)  # a node that waits for a limit ends at its target, too
