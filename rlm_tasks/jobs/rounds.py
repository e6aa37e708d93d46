"""The argument and the answer of an operation's `then`: the round that ended, and the next one.

Users write `then`; `engine.rounds` calls it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlm_tasks.errors import InvalidRequest

ROUND_FAILED = "ROUND_FAILED"
"""The code of the error of a job whose round ended without an answer."""


@dataclass(frozen=True, slots=True)
class Round:
    """The round that has ended, as `Operation.then` receives it."""

    number: int  # 0: the round of the job's own items
    params: dict[str, Any]  # the params of the job's request
    total: int  # items of the round
    done: int  # items that succeeded
    stopped: str  # why the round ended before its items did: '', early, budget
    short: bool  # it, or a round before it, lacks items that failed or were not run


@dataclass(frozen=True, slots=True)
class NextRound:
    """The items of the next round, with the operation that runs them and its `params`.

    With `last`, no round follows, so this one may spend all that is left of the budget.  With
    `strict`, none of its items may fail, even if the request tolerates errors: the answer would be
    wrong without one.  Raises InvalidRequest for an operation or params of a wrong type.
    """

    operation: str  # its name, or the operation itself
    items: Iterable[Any]
    params: dict[str, Any]
    last: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        name = getattr(self.operation, "name", self.operation)
        if not isinstance(name, str):
            raise InvalidRequest("operation of NextRound", name, "must be an operation or its name")
        object.__setattr__(self, "operation", name)
        if not isinstance(self.params, dict) or not all(
            isinstance(key, str) for key in self.params
        ):
            advice = "must be a dict; its keys are texts"
            raise InvalidRequest("params of NextRound", self.params, advice)
