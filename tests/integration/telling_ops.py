"""Operations whose exceptions tell what the operation was given: the item, or a param."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NoReturn

from resilience.bucket import Rate
from resilience.errors import RateLimited
from rlm_tasks import Context, NextRound, operation
from rlm_tasks.jobs.rounds import Round


class Told(Exception):
    """Says what it was given; its name may be seen, its message may not."""


def _tell(what: Any) -> NoReturn:
    raise Told(f"customer {what} is unknown, {what}")


@operation("tell_item")
def tell_item(item: Any) -> Any:
    """Raise what the item is."""
    _tell(item)


@operation("tell_guarded", service="shop", breaker={"failure_threshold": 100}, retry=1)
def tell_guarded(item: Any) -> Any:
    """Raise what the item is, behind a breaker and a retry."""
    raise ConnectionError(f"customer {item} does not answer")


@operation("tell_output")
def tell_output(item: Any) -> Any:
    """Return an output that cannot be stored."""
    return {item: {item: _Unstorable(item)}}


class _Unstorable:
    def __init__(self, item: Any) -> None:
        self._item = item

    def __repr__(self) -> str:
        return f"<{self._item}>"


@operation("tell_validation", validate=_tell)
def tell_validation(item: Any) -> Any:
    """Fail in validation."""
    return item


def _tell_merged(outputs: Iterable[Any]) -> Any:
    _tell(list(outputs))


@operation("tell_merge", merge=_tell_merged)
def tell_merge(item: Any) -> Any:
    """Leave the failing to the merge."""
    return item


def _next(name: str, _outputs: Any, ended: Round) -> NextRound:
    return NextRound(name, [ended.params["told"]], {})


@operation("tell_round", then=functools.partial(_next, "tell_item"))
def tell_round(item: Any, ctx: Context) -> Any:
    """Leave the failing to the items of the next round."""
    return item


@operation("tell_merge_of_round", then=functools.partial(_next, "tell_merge"))
def tell_merge_of_round(item: Any, ctx: Context) -> Any:
    """Leave the failing to the merge of the next round."""
    return item


@operation("tell_then", then=lambda _outputs, ended: _tell(ended.params["told"]))
def tell_then(item: Any, ctx: Context) -> Any:
    """Leave the failing to the function that makes the next round."""
    return item


@operation("tell_wait")
def tell_wait(item: Any) -> Any:
    """Ask to come back later."""
    raise RateLimited("the shop", 600, f"customer {item} has used up its calls")


@operation("tell_wait_async", concurrency=4)
async def tell_wait_async(item: Any) -> Any:
    """Ask to come back later, among others."""
    raise RateLimited("the shop", 600, f"customer {item} has used up its calls")


def _cost(item: Any) -> dict[str, float]:
    raise RateLimited("the price list", 600, f"customer {item} has no price yet")


@operation("tell_cost", rate_limit=Rate(100, per_s=1), cost=_cost)
def tell_cost(item: Any) -> Any:
    """Ask to come back later, before the call."""
    return item
