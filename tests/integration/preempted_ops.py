"""Operations that the tests preempt; each writes its items and their time to a journal file."""

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
    """Sleep for `s` seconds; use no processor time."""
    began = time.perf_counter()
    time.sleep(ctx.params["s"])
    _ran(index, began, ctx)
    return [index]


@operation("p_batch", merge=_listed, batch=True)
def p_batch(items: list[int], ctx: Context) -> list[int]:
    """Sleep for `s` seconds for each item of a batch."""
    for index in items:
        p_each(index, ctx)
    return list(items)


@operation("p_async", merge=_listed, concurrency=4)
async def p_async(index: int, ctx: Context) -> list[int]:
    """Sleep for `s` seconds, with four items in flight."""
    began = time.perf_counter()
    await asyncio.sleep(ctx.params["s"])
    _ran(index, began, ctx)
    return [index]


def _slowly(index: int) -> None:
    """Take 20 ms to validate an item."""
    time.sleep(0.02)
    assert index >= 0


@operation("p_checked", merge=_listed, validate=_slowly)
def p_checked(index: int, ctx: Context) -> list[int]:
    """Sleep for `s` seconds; all items are validated first."""
    p_each(index, ctx)
    return [index]


@operation("p_until_enough", merge=_listed)
def p_until_enough(index: int, ctx: Context) -> list[int]:
    """Sleep for `s` seconds, but not once the file `enough` exists."""
    if not Path(ctx.params["enough"]).exists():
        time.sleep(ctx.params["s"])
    note(f"{ctx.params['journal']}.{ctx.job_id}", index)
    return [index]
