"""Operations that are made to make room: each writes down what it ran, and for how long, outside of
everything that may die.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlm_tasks import Context, operation
from tests.faults.ops import note


def _listed(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def _ran(index: int, began: float, ctx: Context) -> None:
    note(ctx.params["journal"], f"{index} {time.perf_counter() - began}")


@operation("p_each", merge=_listed)
def p_each(index: int, ctx: Context) -> list[int]:
    """Take a while, and no processor."""
    began = time.perf_counter()
    time.sleep(ctx.params["s"])
    _ran(index, began, ctx)
    return [index]


@operation("p_batch", merge=_listed, batch=True)
def p_batch(items: list[int], ctx: Context) -> list[int]:
    """Take a while for each of several."""
    for index in items:
        p_each(index, ctx)
    return list(items)


@operation("p_async", merge=_listed, concurrency=4)
async def p_async(index: int, ctx: Context) -> list[int]:
    """Take a while among others."""
    began = time.perf_counter()
    await asyncio.sleep(ctx.params["s"])
    _ran(index, began, ctx)
    return [index]


def _slowly(index: int) -> None:
    """Take a while to find nothing wrong."""
    time.sleep(0.02)
    assert index >= 0


@operation("p_checked", merge=_listed, validate=_slowly)
def p_checked(index: int, ctx: Context) -> list[int]:
    """Take a while, after every item was looked at."""
    p_each(index, ctx)
    return [index]


@operation("p_until_told", merge=_listed)
def p_until_told(index: int, ctx: Context) -> list[int]:
    """Take a while, until a file says that it is enough."""
    if not Path(ctx.params["enough"]).exists():
        time.sleep(ctx.params["s"])
    note(f"{ctx.params['journal']}.{ctx.job_id}", index)
    return [index]
