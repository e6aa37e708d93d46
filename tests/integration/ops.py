"""Operations that the tests' workers import through RLM_OPERATIONS."""

from __future__ import annotations

import asyncio
import functools
import itertools
import operator
import os
import signal
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from rlm_tasks import Context, NextRound, operation


def _concatenated(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def spin(milliseconds: float) -> None:
    """Use the processor for a time."""
    until = time.perf_counter() + milliseconds / 1000
    while time.perf_counter() < until:
        pass


@operation("echo")
def echo(item: Any) -> Any:
    """Return the item."""
    return item


@operation("collect", merge=_concatenated)
def collect(item: Any) -> list[Any]:
    """Return the item in a list; the merge keeps item order."""
    return [item]


@operation("spin_then_collect", merge=_concatenated)
def spin_then_collect(item: dict[str, Any]) -> list[int]:
    """Use the processor for the item's milliseconds; fail if the item has `fails`."""
    spin(item["ms"])
    if item.get("fails"):
        raise ValueError(f"item {item['i']}")
    return [item["i"]]


@operation("spin_each")
def spin_each(item: dict[str, Any]) -> int:
    """Do the same as `spin_then_collect`, with one output per item."""
    return spin_then_collect(item)[0]


@operation("nap")
def nap(milliseconds: float) -> float:
    """Sleep; use no processor time."""
    time.sleep(milliseconds / 1000)
    return milliseconds


@operation("fail_odd", merge=sum)
def fail_odd(number: int) -> int:
    """Fail at odd numbers."""
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


def _odd_round(_outputs: Any, _round: Any) -> NextRound:
    """Return a round whose item 2 is odd."""
    return NextRound("fail_odd", [2, 4, 3], {})


@operation("fail_odd_round", then=_odd_round)
def fail_odd_round(item: Any) -> Any:
    """Return the item; the next round fails."""
    return item


@operation("slow_round", then=lambda *_: NextRound("nap", [50.0] * 500, {}))
def slow_round(item: Any) -> Any:
    """Return the item; the next round takes 25 seconds of a slot."""
    return item


@operation("parse_day")
def parse_day(text: str) -> str:
    """Return a day as its parser prints it."""
    return date.fromisoformat(text).isoformat()


@operation("return_even")
def return_even(number: int) -> int:
    """Return even numbers, and fail at odd ones; the outputs are not merged."""
    return fail_odd.function(number)  # type: ignore[no-any-return]  # an int


@operation("not_storable")
def not_storable(number: int) -> Any:
    """Return a value that cannot be stored for every tenth number."""
    return {"at": object()} if number % 10 == 3 else number


@operation("not_storable_merged", merge=lambda parts: {"sum": sum(parts), "of": object()})
def not_storable_merged(number: int) -> Any:
    """Return the number; the merge returns a value that cannot be stored."""
    return number


@operation("bad_merge", merge=lambda parts: 1 / 0)
def bad_merge(number: int) -> int:
    """Return the number; the merge raises an error."""
    return number


@operation("die_once")
def die_once(item: dict[str, Any]) -> int:
    """Kill the process the first time the marked item runs."""
    marker = Path(item["marker"]) if item.get("marker") else None
    if marker is not None and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return int(item["i"])


@operation("die_always")
def die_always(item: dict[str, Any]) -> int:
    """Kill the process every time the marked item runs."""
    if item.get("poison"):
        os.kill(os.getpid(), signal.SIGKILL)
    spin(item.get("ms", 0))
    return int(item["i"])


def _positive(number: int) -> None:
    if number <= 0:
        raise ValueError(f"{number} is not positive")


@operation("checked", merge=_concatenated, validate=_positive)
def checked(number: int) -> list[int]:
    """Return the number; validation refuses other than positive numbers before the job runs."""
    return [number]


@operation("pause", concurrency=50, merge=_concatenated)
async def pause(number: int, ctx: Context) -> list[int]:
    """Wait as for an answer from outside, with fifty items in flight."""
    await asyncio.sleep(ctx.params.get("ms", 10) / 1000)
    return [number]


@operation("where")
def where(_: Any, ctx: Context) -> list[Any]:
    """Return the job id, index and parameters of the context, and the process id."""
    return [ctx.job_id, ctx.index, ctx.params, os.getpid()]


def _taken_out(row: dict[str, Any]) -> int:
    """Take a value out of its row, as careless code does, and fail as the row says."""
    value: int = row.pop("v")
    if row.pop("bad", False):
        raise ValueError(f"row {value} is bad")
    if (marker := row.pop("once", "")) and not Path(marker).exists():
        Path(marker).touch()
        raise ConnectionError("comes back")
    return value


@operation("take_out", merge=_concatenated)
def take_out(row: dict[str, Any]) -> list[int]:
    """Change the item in place; its process dies once if the row has a marker `dies`."""
    if (marker := row.get("dies", "")) and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [_taken_out(row)]


@operation("take_out_batch", batch=True, merge=_concatenated)
def take_out_batch(rows: list[dict[str, Any]]) -> list[int]:
    """Change the items in place."""
    return [_taken_out(row) for row in rows]


@operation("take_out_retried", merge=_concatenated, retry=3)
def take_out_retried(row: dict[str, Any]) -> list[int]:
    """Change the item in place; it is tried again."""
    return [_taken_out(row)]


@operation("take_out_async", merge=_concatenated, retry=3, concurrency=4)
async def take_out_async(row: dict[str, Any]) -> list[int]:
    """Change the item in place; it is tried again beside others."""
    return [_taken_out(row)]


@operation("count_characters", batch=True, merge=sum)
def count_characters(lines: list[str]) -> int:
    """Return the number of characters of some lines."""
    return sum(map(len, lines))


@operation("typed_echo")
def typed_echo(item: Any, ctx: Context) -> dict[str, Any]:
    """Return an item, the params, and the types that this process saw."""
    return {
        "item": item,
        "params": ctx.params,
        "types": (type(item).__name__, type(ctx.params["value"]).__name__),
    }


@operation("typed_max", merge=max)
def typed_max(item: Any) -> Any:
    """Return the item; the merge compares partials."""
    return item


@operation("typed_sum", merge=lambda parts: functools.reduce(operator.add, parts))
def typed_sum(item: Any) -> Any:
    """Return the item; the merge adds partials."""
    return item


@operation("typed_sorted", merge=lambda parts: sorted(itertools.chain.from_iterable(parts)))
def typed_sorted(item: Any) -> Any:
    """Return the item in a list; the merge sorts partials."""
    return [item]
