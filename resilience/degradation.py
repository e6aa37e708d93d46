"""Pressure levels, and what code leaves out at each: cheaper answers instead of none.

Decides which strategies are in force at a level, and remembers which of them really shaped an
answer.  Factors and levels are those of source document 1.  Refuses to know where a level comes
from and what is computed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

THRESHOLDS = (65.0, 75.0, 85.0, 95.0)
"""Percent of memory or CPU at which each level above NORMAL begins (source document 1)."""


class Level(IntEnum):
    """How hard a host, or the whole cluster, is pressed."""

    NORMAL = 0
    ELEVATED = 1
    HIGH = 2
    CRITICAL = 3
    EMERGENCY = 4

    @property
    def label(self) -> str:
        """The name as it is shown and stored: ``high``."""
        return self.name.lower()


def level_of(percent: float, thresholds: tuple[float, ...] = THRESHOLDS) -> Level:
    """Return the level of a percentage, without memory of earlier ones."""
    return Level(bisect_right(thresholds, percent))


class Strategy(StrEnum):
    """A way to do less, by its name in source document 1."""

    ENTITY_LIMITS = "reduce_entity_limits"
    OPTIONAL = "skip_optional_analysis"
    EXPENSIVE = "disable_expensive_computations"
    SIMPLIFIED = "use_simplified_methods"
    EMBEDDINGS = "reduce_embedding_dimensions"
    # Of calls to models, and no part of source document 1:
    SMALLER_MODEL = "use_smaller_model"  # by pressure
    OTHER_MODEL = "use_other_model"  # no endpoint of the one asked for was well
    NO_MODEL = "merge_without_model"  # the budget was spent: parts were put one after the other
    CUT_ANSWER = "cut_answer"  # it was as long as it might be, and went on


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a level asks of code."""

    entity_limit_factor: float = 1.0
    skip_optional_analysis: bool = False
    skip_expensive_computation: bool = False
    use_simplified_methods: bool = False
    embedding_dimensions_factor: float = 1.0

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies in force."""
        in_force = {
            Strategy.ENTITY_LIMITS: self.entity_limit_factor < 1,
            Strategy.OPTIONAL: self.skip_optional_analysis,
            Strategy.EXPENSIVE: self.skip_expensive_computation,
            Strategy.SIMPLIFIED: self.use_simplified_methods,
            Strategy.EMBEDDINGS: self.embedding_dimensions_factor < 1,
        }
        return tuple(strategy for strategy, asked in in_force.items() if asked)

    @property
    def fingerprint(self) -> str:
        """What a cache key must contain, so that a degraded answer is never taken for a full one;
        '' when nothing is.
        """
        if not self.strategies:
            return ""
        names = ",".join(self.strategies)
        return f"{names}:{self.entity_limit_factor:g}:{self.embedding_dimensions_factor:g}"


CONSTRAINTS: dict[Level, Constraints] = {
    Level.NORMAL: Constraints(),
    Level.ELEVATED: Constraints(0.8),
    Level.HIGH: Constraints(0.8, skip_optional_analysis=True, skip_expensive_computation=True),
    Level.CRITICAL: Constraints(
        0.5, True, True, use_simplified_methods=True, embedding_dimensions_factor=0.5
    ),
    Level.EMERGENCY: Constraints(
        0.3, True, True, use_simplified_methods=True, embedding_dimensions_factor=0.5
    ),
}


class Degradation:
    """What one item is asked to leave out; it remembers in `shaped` what was really asked of it."""

    __slots__ = ("constraints", "level", "shaped")

    def __init__(self, level: Level = Level.NORMAL) -> None:
        self.level = level
        self.constraints = CONSTRAINTS[level]
        self.shaped: set[Strategy] = set()

    def limit(self, most: int) -> int:
        """Return how many of `most` entities to look at; at least one of any."""
        return self._reduced(most, self.constraints.entity_limit_factor, Strategy.ENTITY_LIMITS)

    def embedding_dimensions(self, full: int) -> int:
        """Return how many dimensions an embedding of `full` dimensions is to have."""
        return self._reduced(
            full, self.constraints.embedding_dimensions_factor, Strategy.EMBEDDINGS
        )

    @property
    def skip_optional(self) -> bool:
        """Whether to leave out what the answer can do without."""
        return self._asked(Strategy.OPTIONAL, self.constraints.skip_optional_analysis)

    @property
    def skip_expensive(self) -> bool:
        """Whether to leave out what costs much."""
        return self._asked(Strategy.EXPENSIVE, self.constraints.skip_expensive_computation)

    @property
    def simplified(self) -> bool:
        """Whether to use the simple method."""
        return self._asked(Strategy.SIMPLIFIED, self.constraints.use_simplified_methods)

    def size(self, full: int) -> int:
        """Return which of the sizes 0 to `full` to use: one less from high pressure on, the
        smallest from critical.
        """
        its = self.constraints
        size = (
            0
            if its.use_simplified_methods
            else max(0, full - 1)
            if its.skip_expensive_computation
            else full
        )
        if size < full:
            self.shaped.add(Strategy.SMALLER_MODEL)
        return size

    def _reduced(self, full: int, factor: float, strategy: Strategy) -> int:
        if factor >= 1 or full <= 1:
            return full
        self.shaped.add(strategy)
        return max(1, math.floor(full * factor))

    def _asked(self, strategy: Strategy, asked: bool) -> bool:
        if asked:
            self.shaped.add(strategy)
        return asked


IN_FORCE: ContextVar[Degradation | None] = ContextVar("degradation", default=None)
"""What the item that runs here is asked to leave out."""


class ResourceConstraints:
    """The same questions in the words of source document 1, for code that is handed a context.

    `context` is an operation's ``ctx``, or a dict: its ``pressure_level`` (a name, a number or a
    `Level`) is taken when it has one, and what holds for the running item otherwise."""

    @staticmethod
    def get_constraints(context: Any = None) -> dict[str, Any]:
        """Return everything that is asked for, as a dict.  Reading it leaves no trace in the
        receipt: act on the others.
        """
        found = _of(context)
        asked = found.constraints
        return {
            "pressure_level": found.level.label,
            "entity_limit_factor": asked.entity_limit_factor,
            "skip_optional_analysis": asked.skip_optional_analysis,
            "skip_expensive_computation": asked.skip_expensive_computation,
            "use_simplified_methods": asked.use_simplified_methods,
            "embedding_dimensions_factor": asked.embedding_dimensions_factor,
        }

    @staticmethod
    def get_entity_limit(context: Any = None, default: int = 1000) -> int:
        """Return how many of `default` entities to look at."""
        return _of(context).limit(default)

    @staticmethod
    def should_skip_optional_analysis(context: Any = None) -> bool:
        """Whether to leave out what the answer can do without."""
        return _of(context).skip_optional

    @staticmethod
    def should_skip_expensive_computation(context: Any = None) -> bool:
        """Whether to leave out what costs much."""
        return _of(context).skip_expensive

    @staticmethod
    def should_use_simplified_methods(context: Any = None) -> bool:
        """Whether to use the simple method."""
        return _of(context).simplified

    @staticmethod
    def get_embedding_dimensions(context: Any = None, default: int = 768) -> int:
        """Return how many dimensions an embedding of `default` dimensions is to have."""
        return _of(context).embedding_dimensions(default)


def _of(context: Any) -> Degradation:
    if isinstance(found := getattr(context, "degradation", None), Degradation):
        return found
    if isinstance(context, Mapping) and "pressure_level" in context:
        return Degradation(as_level(context["pressure_level"]))
    return IN_FORCE.get() or Degradation()


def as_level(value: Level | str | int) -> Level:
    """Return a level by its name, number or itself.  Raises ValueError, naming all."""
    try:
        return Level[value.upper()] if isinstance(value, str) else Level(value)
    except (KeyError, ValueError):
        raise ValueError(
            f"{value!r} is no pressure level; there are {', '.join(each.label for each in Level)}"
        ) from None
