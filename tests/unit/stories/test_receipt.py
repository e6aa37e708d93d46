"""The receipt of a job: each item that pressure has shaped is in it once, at its level.

This holds whatever happens to the node of the item.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.bucket import Rate
from resilience.degradation import CONSTRAINTS, IN_FORCE, Level, ResourceConstraints, Strategy
from resilience.retry import RetryPolicy
from rlm_tasks import (
    Adaptive,
    Binary,
    Conditions,
    Context,
    JobRequest,
    NWay,
    Options,
    operation,
    results,
)
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.results import Receipt, Shaped, Status
from tests.unit.resilience.test_degradation import (
    EMBEDDINGS,
    EXPENSIVE,
    LIMITS,
    OPTIONAL,
    QUESTIONS,
    SAME_BY_RESOURCE_CONSTRAINTS,
    SIMPLIFIED,
)
from tests.unit.stories.test_waiting import WaitingPlatform

Table = dict[tuple[str, str], int]
"""A receipt as a table: strategy and level -> items."""

QUICK = RetryPolicy(max_attempts=3, initial_delay_s=0.002, max_delay_s=0.004)


class PressedPlatform(WaitingPlatform):
    """A platform under pressure, whose operations may lose their own node.

    It notes the questions of the last run of each item.
    """

    def __init__(self, seed: int = 0, level: Level = Level.NORMAL) -> None:
        super().__init__(seed)
        self.runtime.page.level = level
        self.levels: list[Level] = []  # the levels of the next nodes; the last one stays
        self.noted: dict[
            int, tuple[Level, set[Strategy]]
        ] = {}  # item -> the level and the questions of its last run
        self.failed_once: set[int] = set()
        self.losses = 2  # still to come; after three losses an item is not run again
        self.wrong_levels: list[tuple[int, Level]] = []
        self.limits: list[int] = []  # the limit of each item, of 1000
        _platform.append(self)

    def step(self) -> None:
        """Begin a node at its own level."""
        if self.levels:
            self.runtime.page.level = self.levels.pop(0)
        self.began = self.runtime.page.level
        super().step()

    def lose(self) -> None:
        """Release the running node, as if its process had died or its lease was over.

        Its holder continues without knowing it.
        """
        if not self.losses:
            return
        self.losses -= 1
        [held] = self.runtime.page.held()
        died_of = self.random.choice(["", "SIGKILL"])
        assert self.ledger.release(
            held.job, held.node, held.token, self.random.choice([-1, -2, held.item]), died_of
        )
        self.runtime.delivery.resend(held.job, [held.node])

    def note(self, items: list[dict[str, Any]], level: Level) -> None:
        """Note the questions of items that ran together."""
        asked = {QUESTIONS[question][0] for item in items for question in item["asks"]}
        self.noted.update({item["i"]: (level, asked) for item in items})
        if level not in (self.began, Level.EMERGENCY):
            self.wrong_levels.append((items[0]["i"], level))

    def expected(self) -> Table:
        """Return the receipt that follows from the notes."""
        receipt_of: Counter[tuple[str, str]] = Counter()
        for level, asked in self.noted.values():
            receipt_of.update(
                (strategy.value, level.label)
                for strategy in asked & set(CONSTRAINTS[level].strategies)
            )
        return dict(receipt_of)

    def job(self, name: str, items: list[dict[str, Any]], **fields: Any) -> JobSpec:
        """Open a job that tolerates errors."""
        return self.submit(
            JobRequest(
                operation=name, items=items, options=Options(continue_on_error=True), **fields
            )
        )


_platform: list[PressedPlatform] = []


def receipt_of(facts: dict[str, str]) -> Table:
    """Return the receipt of a job as a table."""
    return {(each.strategy, each.level): each.items for each in results.receipt_of([facts])}


def item(i: int, *asks: str, ms: float = 0, fails: str = "", then: str = "") -> dict[str, Any]:
    """Return an item that asks questions and takes `ms`.

    `fails` is empty, `once` or `always`; `then` loses its node or sets the level.
    """
    return {"i": i, "ms": ms, "asks": asks, "fails": fails, "then": then}


# --- operations with questions ----------------------------------------------------------------


def _ask(one: dict[str, Any], ctx: Context) -> None:
    """Ask by the context and by ResourceConstraints in turn."""
    platform = _platform[-1]
    platform.clock.now += one["ms"] / 1000
    for at, question in enumerate(one["asks"]):
        answer = (
            QUESTIONS[question][1](ctx)
            if (one["i"] + at) % 2
            else SAME_BY_RESOURCE_CONSTRAINTS[question](None)
        )
        if question == "limit":
            platform.limits.append(answer)


def _end(one: dict[str, Any]) -> list[int]:
    platform = _platform[-1]
    if one["then"] == "lose":
        platform.lose()
    elif one["then"]:
        platform.runtime.page.level = Level[one["then"].upper()]
    if one["fails"] == "always":
        raise ValueError(f"item {one['i']}")
    if one["fails"] == "once" and one["i"] not in platform.failed_once:
        platform.failed_once.add(one["i"])
        raise ConnectionError(f"item {one['i']}")
    return [one["i"]]


def _one(one: dict[str, Any], ctx: Context) -> list[int]:
    _platform[-1].note([one], ctx.degradation.level)
    _ask(one, ctx)
    return _end(one)


def _several(items: list[dict[str, Any]], ctx: Context) -> list[int]:
    for one in items:
        _ask(one, ctx)
    level = ctx.degradation.level
    if len(items) == 1:  # a batch of one item is not isolated
        _platform[-1].note(items, level)
    found = [index for one in items for index in _end(one)]
    _platform[-1].note(items, level)
    return found


async def _among_others(one: dict[str, Any], ctx: Context) -> list[int]:
    _platform[-1].note([one], ctx.degradation.level)
    _ask(one, ctx)
    await asyncio.sleep(0)
    return _end(one)


def _concatenated(parts: Iterable[list[Any]]) -> list[Any]:
    return [one for part in parts for one in part]


for _suffix, _retry in (("", None), ("_again", QUICK)):
    operation(f"unit_asks{_suffix}", merge=_concatenated, retry=_retry)(_one)
    operation(f"unit_asks_batch{_suffix}", merge=_concatenated, batch=True, retry=_retry)(_several)
    operation(f"unit_asks_async{_suffix}", merge=_concatenated, concurrency=3, retry=_retry)(
        _among_others
    )
PLAIN = ["unit_asks", "unit_asks_batch", "unit_asks_async"]
OPERATIONS = [*PLAIN, *(f"{name}_again" for name in PLAIN)]


# --- at random --------------------------------------------------------------------------------

_SHAPES = st.sampled_from(
    [
        {"type": "sequential"},
        {"type": "parallel", "chunk_size": 1},
        {"type": "parallel", "chunk_size": 7},
        {"type": "recursive"},
        {"strategy": Binary(min_chunk_size=3, max_depth=3)},
        {"strategy": NWay(split_factor=5, min_chunk_size=2)},
        {"strategy": Adaptive(min_chunk_size=2, max_chunk_size=9)},
    ]
)


@st.composite
def _items(draw: st.DrawFn, then: tuple[str, ...]) -> list[dict[str, Any]]:
    n, ms = draw(st.integers(0, 60)), draw(st.sampled_from([0, 1, 15, 120]))
    asks = draw(
        st.lists(st.lists(st.sampled_from(sorted(QUESTIONS)), max_size=6), min_size=1, max_size=4)
    )
    special = draw(
        st.dictionaries(
            st.integers(0, 59),
            st.sampled_from([("always", ""), ("once", ""), *(("", t) for t in then)]),
        )
    )
    made = [item(i, *asks[i * 7 % len(asks)], ms=ms) for i in range(n)]
    for i, (fails, after) in special.items():
        if i < n:
            made[i] |= {"fails": fails, "then": after}
    return made


_AT_RANDOM = settings(
    max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@_AT_RANDOM
@given(
    items=_items(("lose",)),
    shape=_SHAPES,
    name=st.sampled_from(OPERATIONS),
    seed=st.integers(0, 10_000),
)
def test_at_normal_a_receipt_is_always_empty(items: Any, shape: Any, name: str, seed: int) -> None:
    platform = PressedPlatform(seed)

    facts = platform.run_all(platform.job(name, items, **shape))

    assert facts["state"] == Status.SUCCEEDED, facts
    assert receipt_of(facts) == {}
    assert set(platform.limits) <= {1000}


@_AT_RANDOM
@given(
    items=_items(("lose", "lose", "emergency")),
    shape=_SHAPES,
    name=st.sampled_from(OPERATIONS),
    seed=st.integers(0, 10_000),
    levels=st.lists(st.sampled_from(Level), min_size=1, max_size=20),
)
def test_each_item_counts_once_by_the_questions_of_its_last_run(
    items: Any, shape: Any, name: str, seed: int, levels: list[Level]
) -> None:
    platform = PressedPlatform(seed)
    platform.levels = levels

    facts = platform.run_all(platform.job(name, items, **shape))

    assert facts["state"] == Status.SUCCEEDED, facts
    assert int(facts["done"]) + int(facts["failed"]) == len(items) == len(platform.noted)
    assert receipt_of(facts) == platform.expected()
    assert platform.wrong_levels == [], (
        "items with a level that is neither that of their node nor an emergency"
    )


# --- single cases -----------------------------------------------------------------------------

EVERYTHING = tuple(QUESTIONS)
AT_LEVEL: dict[Level, set[str]] = {
    Level.NORMAL: set(),
    Level.ELEVATED: {LIMITS},
    Level.HIGH: {LIMITS, OPTIONAL, EXPENSIVE},
    Level.CRITICAL: {LIMITS, OPTIONAL, EXPENSIVE, SIMPLIFIED, EMBEDDINGS},
    Level.EMERGENCY: {LIMITS, OPTIONAL, EXPENSIVE, SIMPLIFIED, EMBEDDINGS},
}
FACTORS = {
    Level.NORMAL: 1000,
    Level.ELEVATED: 800,
    Level.HIGH: 800,
    Level.CRITICAL: 500,
    Level.EMERGENCY: 300,
}


def run(
    name: str,
    items: list[dict[str, Any]],
    level: Level,
    prepare: Callable[[PressedPlatform], None] = lambda _: None,
    **fields: Any,
) -> tuple[Table, PressedPlatform]:
    """Run a job, by default in one node; return its receipt."""
    platform = PressedPlatform(1, level)
    prepare(platform)
    facts = platform.run_all(platform.job(name, items, **({"type": "sequential"} | fields)))
    assert facts["state"] == Status.SUCCEEDED, facts
    return receipt_of(facts), platform


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", Level)
def test_each_item_is_in_the_receipt_for_each_strategy_it_asked_for(
    level: Level, name: str
) -> None:
    receipt, platform = run(name, [item(i, *EVERYTHING, *EVERYTHING) for i in range(23)], level)

    assert receipt == {(strategy, level.label): 23 for strategy in AT_LEVEL[level]}, (
        "an item that asks twice counts once"
    )
    assert set(platform.limits) == {FACTORS[level]}


@pytest.mark.parametrize("name", ["unit_asks", "unit_asks_async"])
def test_only_items_that_asked_are_in_the_receipt(name: str) -> None:
    receipt, _ = run(name, [item(i, *["limit"] * (i % 4)) for i in range(20)], Level.CRITICAL)

    assert receipt == {(LIMITS, "critical"): 15}


def test_a_batch_counts_all_its_items() -> None:
    receipt, platform = run(
        "unit_asks_batch", [item(i, *["limit"] * (i == 4)) for i in range(5)], Level.HIGH
    )

    assert platform.noted[1] == (Level.HIGH, {LIMITS}), (
        "the first batch is one item, the second has the others"
    )
    assert receipt == {(LIMITS, "high"): 4}


@pytest.mark.parametrize("name", OPERATIONS)
def test_failed_items_are_in_the_receipt(name: str) -> None:
    receipt, _ = run(
        name, [item(i, "limit", fails="always" if i % 3 else "") for i in range(20)], Level.HIGH
    )

    assert receipt == {(LIMITS, "high"): 20}


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name.endswith("again")])
def test_a_retried_item_is_in_the_receipt_once(name: str) -> None:
    receipt, platform = run(
        name, [item(i, "limit", fails="once" if i % 5 == 2 else "") for i in range(20)], Level.HIGH
    )

    assert len(platform.limits) > 20
    assert receipt == {(LIMITS, "high"): 20}


@pytest.mark.parametrize("name", ["unit_asks_batch", "unit_asks_batch_again"])
@pytest.mark.parametrize("fails", ["always", "once"])
def test_a_failed_batch_that_is_run_item_by_item_counts_each_item(name: str, fails: str) -> None:
    items = [item(0), item(1), item(2, "limit"), item(3, "limit", fails=fails), item(4)]

    receipt, platform = run(name, items, Level.HIGH)

    assert len(platform.limits) > 2, "they asked in the batch, and each again"
    assert receipt == {(LIMITS, "high"): 2}


@operation("unit_asks_little", merge=_concatenated, simplified=lambda _: ["simple"])
def unit_asks_little(_: int) -> list[str]:
    """Use a simpler way under pressure."""
    return ["full"]


async def _simple(_: int) -> list[str]:
    return ["simple"]


@operation("unit_asks_little_async", merge=_concatenated, concurrency=2, simplified=_simple)
async def unit_asks_little_async(_: int) -> list[str]:
    """Use a simpler way under pressure, among other items."""
    return ["full"]


@operation(
    "unit_asks_little_batch",
    merge=_concatenated,
    batch=True,
    simplified=lambda items: ["simple"] * len(items),
)
def unit_asks_little_batch(items: list[int]) -> list[str]:
    """Use a simpler way for several items."""
    return ["full"] * len(items)


@pytest.mark.parametrize(
    "name", ["unit_asks_little", "unit_asks_little_async", "unit_asks_little_batch"]
)
@pytest.mark.parametrize(
    ("level", "output", "receipt"),
    [
        (Level.NORMAL, "full", {}),
        (Level.HIGH, "full", {}),
        (Level.CRITICAL, "simple", {(SIMPLIFIED, "critical"): 9}),
        (Level.EMERGENCY, "simple", {(SIMPLIFIED, "emergency"): 9}),
    ],
)
def test_a_simplified_implementation_is_in_the_receipt(
    name: str, level: Level, output: str, receipt: Table
) -> None:
    platform = PressedPlatform(1, level)
    spec = platform.submit(JobRequest(operation=name, items=range(9)))

    assert receipt_of(platform.run_all(spec)) == receipt
    assert platform.output(spec) == [output] * 9


@operation(
    "unit_asks_valid",
    merge=_concatenated,
    validate=lambda one: one is None or 1 / (one["fails"] != "always"),
)
def unit_asks_valid(one: dict[str, Any], ctx: Context) -> list[int]:
    """Ask for an item that is neither empty nor invalid."""
    return _one(one, ctx)


def test_an_item_that_was_not_run_is_not_in_the_receipt() -> None:
    platform = PressedPlatform(1, Level.HIGH)
    items = [None, item(1, "limit"), item(2, "limit", fails="always"), None, item(4, "limit")]
    conditions = Conditions(skip_if_empty=True, validate_before_process=True)

    facts = platform.run_all(platform.job("unit_asks_valid", items, conditions=conditions))  # type: ignore[arg-type]  # empty items

    assert (facts["done"], facts["failed"], facts["skipped"]) == ("2", "1", "2")
    assert receipt_of(facts) == {(LIMITS, "high"): 2}


# --- when the level changes -------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "batch" not in name])
@pytest.mark.parametrize("began", [Level.NORMAL, Level.HIGH])
def test_an_emergency_holds_from_the_next_slice_on(name: str, began: Level) -> None:
    items = [
        item(i, "limit", ms=60, then="emergency" if i == 5 else "") for i in range(14)
    ]  # each item takes a slice

    receipt, platform = run(name, items, began)

    assert (
        len([r for r in platform.ledger.all_records(_spec_of(platform)) if r.id != "merge"]) == 1
    ), "all in one node"
    assert receipt == {(LIMITS, "emergency"): 8} | ({(LIMITS, "high"): 6} if began else {})


def _spec_of(platform: PressedPlatform) -> str:
    [job] = platform.store.client.zrange(platform.keys.jobs, 0, -1)
    return job.decode()


def test_within_a_slice_the_level_stays() -> None:
    items = [item(i, "limit", ms=1, then="emergency" if i == 0 else "") for i in range(30)]

    receipt, _ = run("unit_asks", items, Level.HIGH)

    assert receipt == {(LIMITS, "high"): 10, (LIMITS, "emergency"): 20}, "the first slice has 10 ms"


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("then", ["normal", "critical"])
def test_any_other_change_waits_for_the_next_node(name: str, then: str) -> None:
    items = [item(i, "limit", ms=60, then=then if i == 5 else "") for i in range(14)]

    receipt, _ = run(name, items, Level.HIGH)

    assert receipt == {(LIMITS, "high"): 14}


@pytest.mark.parametrize("name", PLAIN)
def test_each_node_has_the_level_at_which_it_begins(name: str) -> None:
    def prepare(platform: PressedPlatform) -> None:
        platform.levels = [
            Level.NORMAL,
            Level.HIGH,
            Level.EMERGENCY,
            Level.NORMAL,
            Level.HIGH,
        ]  # the root and four parts

    items = [item(i, "limit", "simplified") for i in range(40)]
    receipt, platform = run(name, items, Level.NORMAL, prepare, type="parallel", chunk_size=10)

    assert platform.wrong_levels == []
    assert (
        receipt
        == platform.expected()
        == {
            (LIMITS, "high"): 20,
            (LIMITS, "emergency"): 10,
            (SIMPLIFIED, "emergency"): 10,
        }
    )


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("again", [Level.HIGH, Level.CRITICAL, Level.NORMAL])
def test_a_node_that_is_lost_and_repeated_counts_once_by_its_last_holder(
    name: str, again: Level
) -> None:
    def prepare(platform: PressedPlatform) -> None:
        platform.levels, platform.losses = [Level.HIGH, again], 1

    items = [item(i, "limit", then="lose" if i == 7 else "") for i in range(12)]
    receipt, platform = run(name, items, Level.NORMAL, prepare)

    assert len(platform.limits) > 12
    assert sum(receipt.values()) == (12 if again else 0)
    assert receipt == ({(LIMITS, again.label): 12} if again else {})


# --- the degradation in force -----------------------------------------------------------------


def test_outside_of_an_item_nothing_is_in_force() -> None:
    items = [item(i, "limit", ms=60, then="emergency" if i == 1 else "") for i in range(4)]
    IN_FORCE.set(None)

    for name in OPERATIONS:
        run(name, items, Level.HIGH)
        assert IN_FORCE.get() is None, name


_costs: list[int] = []


def _cost(_: Any) -> dict[str, float]:
    _costs.append(ResourceConstraints.get_entity_limit())
    return {"requests": 1}


@operation("unit_costs", merge=_concatenated, rate_limit=Rate(1e6, per_s=1), cost=_cost)
def unit_costs(one: int) -> list[int]:
    """Ask no question itself."""
    return [one]


@operation(
    "unit_costs_async",
    merge=_concatenated,
    concurrency=2,
    rate_limit=Rate(1e6, per_s=1),
    cost=_cost,
)
async def unit_costs_async(one: int) -> list[int]:
    """Ask no question itself, among other items."""
    return [one]


@pytest.mark.parametrize("name", ["unit_costs", "unit_costs_async"])
def test_questions_of_a_cost_function_count_for_the_item(name: str) -> None:
    for level in (Level.EMERGENCY, Level.HIGH):
        _costs.clear()
        platform = PressedPlatform(1, level)
        facts = platform.run_all(platform.submit(JobRequest(operation=name, items=range(5))))

        assert _costs == [FACTORS[level]] * 5
        assert receipt_of(facts) == {(LIMITS, level.label): 5}


def test_a_receipt_is_sorted_and_readable() -> None:
    facts = {
        "state": "running",
        "shaped:use_simplified_methods:critical": "2",
        "shaped:reduce_entity_limits:high": "20",
    }

    receipt = results.receipt_of([facts])

    assert receipt == Receipt(
        [
            Shaped("reduce_entity_limits", "high", 20),
            Shaped("use_simplified_methods", "critical", 2),
        ]
    )
    assert (
        str(receipt)
        == "reduce_entity_limits at high: 20 items; use_simplified_methods at critical: 2 items"
    )
    assert str(results.receipt_of([{"state": "running"}])) == "nothing was left out"
