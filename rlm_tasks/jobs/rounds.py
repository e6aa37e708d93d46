"""What an operation's `then` receives and returns: the round that ended, and the next one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Round:
    """What `Operation.then` is told of the round that has ended: 0 is the job's own items."""

    number: int
    params: dict[str, Any]  # of the job's request
    total: int  # items of the round
    done: int  # of them
    stopped: str  # why the round ended before its items did: '', early, budget
    short: bool  # it, or a round before it, has left items out: failed ones, or those that were not run


@dataclass(frozen=True, slots=True)
class NextRound:
    """The items to go on with, and by which operation; `params` go to it.

    `last` says that no round is to follow: it may spend all that is left.  `strict` that none of
    its items may fail, whatever the request says of errors: an answer without it would be wrong.
    """

    operation: str
    items: Iterable[Any]
    params: dict[str, Any]
    last: bool = False
    strict: bool = False
