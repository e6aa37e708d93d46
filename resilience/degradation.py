"""Pressure levels, and the work that code leaves out at each: cheaper answers instead of none.

Operations ask it through ``ctx``, other code through `ResourceConstraints`; the scheduler computes
the level.  Begin with `Degradation`, which also records the strategies that shaped an answer.
Levels, factors and names are those of other orchestrators, so that their users find them again.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

from resilience.errors import InvalidValue

THRESHOLDS = (65.0, 75.0, 85.0, 95.0)
"""Percent of memory or CPU at which each level above NORMAL begins."""


class Level(IntEnum):
    """How loaded a host, or the whole cluster, is."""

    NORMAL = 0
    ELEVATED = 1
    HIGH = 2
    CRITICAL = 3
    EMERGENCY = 4

    @property
    def label(self) -> str:
        """The name as it is shown and stored, such as ``high``."""
        return self.name.lower()


ResourcePressureLevel = Level
"""The name that other orchestrators use."""


def level_of(percent: float, thresholds: tuple[float, ...] = THRESHOLDS) -> Level:
    """Return the level of a percentage; earlier levels do not count."""
    return Level(bisect_right(thresholds, percent))


class Strategy(StrEnum):
    """A way to do less.  The first five names are those of other orchestrators."""

    ENTITY_LIMITS = "reduce_entity_limits"
    OPTIONAL = "skip_optional_analysis"
    EXPENSIVE = "disable_expensive_computations"
    SIMPLIFIED = "use_simplified_methods"
    EMBEDDINGS = "reduce_embedding_dimensions"
    # The others are ways of calls to models:
    SMALLER_MODEL = "use_smaller_model"  # because of pressure
    OTHER_MODEL = "use_other_model"  # no endpoint of the requested model was healthy
    NO_MODEL = "merge_without_model"  # the budget was spent: the parts were only joined in order
    CUT_ANSWER = "cut_answer"  # the answer reached its largest length before its end
    FILTERED_ANSWER = "filtered_answer"  # a filter of the provider cut the answer before its end
    REPAIRED_ANSWER = "repaired_answer"  # it had the wrong form at first, and was sent back


@dataclass(frozen=True, slots=True)
class Constraints:
    """The work that a level asks code to leave out."""

    entity_limit_factor: float = 1.0
    skip_optional_analysis: bool = False
    skip_expensive_computation: bool = False
    use_simplified_methods: bool = False
    embedding_dimensions_factor: float = 1.0

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The strategies in force."""
        requested = {
            Strategy.ENTITY_LIMITS: self.entity_limit_factor < 1,
            Strategy.OPTIONAL: self.skip_optional_analysis,
            Strategy.EXPENSIVE: self.skip_expensive_computation,
            Strategy.SIMPLIFIED: self.use_simplified_methods,
            Strategy.EMBEDDINGS: self.embedding_dimensions_factor < 1,
        }
        return tuple(strategy for strategy, is_requested in requested.items() if is_requested)

    @property
    def fingerprint(self) -> str:
        """A text for cache keys, so that a degraded answer is never taken for a full one.

        It is '' while no strategy is in force.
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
    """The work that one item leaves out.

    `shaped` records the strategies that its code asked about and that were in force.
    """

    __slots__ = ("constraints", "level", "shaped")

    def __init__(self, level: Level = Level.NORMAL) -> None:
        self.level = level
        self.constraints = CONSTRAINTS[level]
        self.shaped: set[Strategy] = set()

    def limit(self, most: int) -> int:
        """Return the number of entities to process, of `most`; at least 1, unless `most` is 0."""
        return self._reduced(most, self.constraints.entity_limit_factor, Strategy.ENTITY_LIMITS)

    def embedding_dimensions(self, full: int) -> int:
        """Return the number of dimensions for an embedding of `full` dimensions."""
        return self._reduced(
            full, self.constraints.embedding_dimensions_factor, Strategy.EMBEDDINGS
        )

    @property
    def skip_optional(self) -> bool:
        """Whether to leave out analysis that the answer does not need."""
        return self._asked(Strategy.OPTIONAL, self.constraints.skip_optional_analysis)

    @property
    def skip_expensive(self) -> bool:
        """Whether to leave out expensive computation."""
        return self._asked(Strategy.EXPENSIVE, self.constraints.skip_expensive_computation)

    @property
    def simplified(self) -> bool:
        """Whether to use the simple method."""
        return self._asked(Strategy.SIMPLIFIED, self.constraints.use_simplified_methods)

    def size(self, full: int) -> int:
        """Return the size to use, of the sizes 0 to `full`.

        From high pressure on it is one less than `full`, from critical pressure on 0.
        """
        constraints = self.constraints
        size = (
            0
            if constraints.use_simplified_methods
            else max(0, full - 1)
            if constraints.skip_expensive_computation
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

    def _asked(self, strategy: Strategy, in_force: bool) -> bool:
        if in_force:
            self.shaped.add(strategy)
        return in_force


IN_FORCE: ContextVar[Degradation | None] = ContextVar("degradation", default=None)
"""The degradation of the item that runs in this context."""


class ResourceConstraints:
    """The same questions under the names of other orchestrators, for code that gets a context.

    `context` is an operation's ``ctx`` or a dict.  A dict's ``pressure_level`` is a name, a number
    or a `Level`.  Without one, the level of the running item counts.
    """

    @staticmethod
    def get_constraints(context: Any = None) -> dict[str, Any]:
        """Return all constraints and the level, as a dict.

        The receipt records each constraint that is read from it and that is in force.
        """
        return _ConstraintsRead(_of(context))

    @staticmethod
    def get_entity_limit(context: Any = None, default: int = 1000) -> int:
        """Return the number of entities to process, of `default`."""
        return _of(context).limit(default)

    @staticmethod
    def should_skip_optional_analysis(context: Any = None) -> bool:
        """Whether to leave out analysis that the answer does not need."""
        return _of(context).skip_optional

    @staticmethod
    def should_skip_expensive_computation(context: Any = None) -> bool:
        """Whether to leave out expensive computation."""
        return _of(context).skip_expensive

    @staticmethod
    def should_use_simplified_methods(context: Any = None) -> bool:
        """Whether to use the simple method."""
        return _of(context).simplified

    @staticmethod
    def get_embedding_dimensions(context: Any = None, default: int = 768) -> int:
        """Return the number of dimensions for an embedding of `default` dimensions."""
        return _of(context).embedding_dimensions(default)


_STRATEGIES = {
    "entity_limit_factor": Strategy.ENTITY_LIMITS,
    "skip_optional_analysis": Strategy.OPTIONAL,
    "skip_expensive_computation": Strategy.EXPENSIVE,
    "use_simplified_methods": Strategy.SIMPLIFIED,
    "embedding_dimensions_factor": Strategy.EMBEDDINGS,
}


class _ConstraintsRead(dict[str, Any]):
    """The constraints of an item as a dict that records which of them its code reads."""

    def __init__(self, degradation: Degradation) -> None:
        self.degradation = degradation  # so it can be handed on as a context
        constraints = {name: getattr(degradation.constraints, name) for name in _STRATEGIES}
        super().__init__({"pressure_level": degradation.level.label, **constraints})

    def __getitem__(self, name: str) -> Any:
        self._record(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # makes `**` and `dict` read each value by its name

    def get(self, name: str, default: Any = None) -> Any:
        """Return a constraint, and record it."""
        self._record(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        """Return a constraint and remove it from this dict, and record it."""
        self._record(name)
        return super().pop(name, *default)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return a constraint, and record it."""
        self._record(name)
        return super().setdefault(name, default)

    def items(self) -> Any:
        """Return all constraints, and record each."""
        self._record(*self)
        return super().items()

    def values(self) -> Any:
        """Return all constraints, and record each."""
        self._record(*self)
        return super().values()

    def copy(self) -> dict[str, Any]:
        """Return all constraints as another dict, and record each."""
        return dict(self)

    def _record(self, *names: str) -> None:
        in_force = self.degradation.constraints.strategies
        read = {_STRATEGIES.get(name) for name in names}
        self.degradation.shaped.update(each for each in in_force if each in read)


def _of(context: Any) -> Degradation:
    if isinstance(degradation := getattr(context, "degradation", None), Degradation):
        return degradation
    if isinstance(context, Mapping) and "pressure_level" in context:
        return Degradation(as_level(context["pressure_level"]))
    return IN_FORCE.get() or Degradation()


def as_level(value: Level | str | int) -> Level:
    """Return a level for its name, its number or itself.  Raises InvalidValue, which names all."""
    try:
        return Level[value.upper()] if isinstance(value, str) else Level(value)
    except (KeyError, ValueError):
        known = ", ".join(each.label for each in Level)
        raise InvalidValue("level", value, f"is no pressure level; there are {known}") from None
