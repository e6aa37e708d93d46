"""Operations with bad code: it hangs in each place where the platform calls it, or raises anything.

The process id of each process that hangs is in the folder of the job's params.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate
from rlm_tasks import NextRound, operation
from rlm_tasks.operations.registry import Operation
from tests.hostile import raise_hostile

FOLDER = Path(os.environ.get("BAD_OPS_FOLDER", "."))
HANGS = "hang-at"
"""An item that begins with this hangs, or is the cause that its job hangs."""


def hang(place: str) -> NoReturn:
    """Note this process, and never return, whatever interrupts it."""
    (FOLDER / f"{place}.{os.getpid()}").touch()
    while True:
        try:
            time.sleep(600)
        except BaseException:  # noqa: S112  # this is how it is stubborn
            continue


def _within(function: str) -> bool:
    return any(frame.name == function for frame in traceback.extract_stack())


def _item(item: Any) -> Any:
    if str(item).startswith(HANGS):
        hang("item")
    return item


def _validate(_item: Any) -> None:
    hang("validate")


async def _never(_item: Any) -> None:
    (FOLDER / f"await.{os.getpid()}").touch()
    await asyncio.Event().wait()


async def _blocks(_item: Any) -> None:
    hang("blocked")


def _cost(_item: Any) -> dict[str, float]:
    hang("cost")


def _fails(_item: Any) -> None:
    raise ConnectionError


def _fallback(_item: Any) -> None:
    hang("fallback")


def _hangs_when(function: str, place: str) -> Any:
    """Return a merge that hangs when it is called from a function of the platform."""

    def merge(parts: Iterable[Any]) -> int:
        count = sum(1 for _ in parts)
        if _within(function):
            hang(place)
        return count

    return merge


def _finalize(_count: Any) -> None:
    hang("finalize")


def _then(_outputs: Any, _round: Any) -> None:
    hang("then")


def _then_items(_outputs: Any, _round: Any) -> NextRound:
    def items() -> Iterator[Any]:
        yield 1
        hang("items")

    return NextRound("hang_item", items(), {})


def _number(item: Any) -> int:
    if isinstance(item, int) and item >= 86:
        time.sleep(0.4)  # all other parts have ended before this one
    return 1


OPERATIONS: dict[str, Operation] = {
    "item": operation("hang_item")(_item),
    "validate": operation("hang_validate", validate=_validate)(_item),
    "await": operation("hang_await", concurrency=5)(_never),
    "blocked": operation("hang_blocked", concurrency=5)(_blocks),
    "cost": operation("hang_cost", rate_limit=Rate(1000, 60.0), cost=_cost)(_item),
    "fallback": operation(
        "hang_fallback", breaker=BreakerConfig(failure_threshold=1), fallback=_fallback
    )(_fails),
    "fold": operation("hang_fold", merge=_hangs_when("fold", "fold"))(_number),
    "chord": operation("hang_chord", merge=_hangs_when("compact_split", "chord"))(_number),
    "merge": operation("hang_merge", merge=_hangs_when("merge_root", "merge"))(_number),
    "finalize": operation("hang_finalize", finalize=_finalize)(_number),
    "then": operation("hang_then", then=_then)(_number),
    "items": operation("hang_items", then=_then_items)(_number),
    "reading": operation("hang_reading")(_item),
}


def _bytes(size: int) -> bytes:
    return os.urandom(size)


def _joined(parts: Iterable[bytes]) -> bytes:
    return b"".join(parts)


operation("big_output")(_bytes)
operation("big_merge", merge=_joined)(_bytes)
operation("big_answer", merge=max, finalize=lambda part: part * 0 + os.urandom(3_000_000))(_bytes)


class Panic(BaseException):
    """An exception as extensions written in Rust raise it."""


RAISED = {each.__name__: each for each in (Panic, KeyboardInterrupt, SystemExit, GeneratorExit)}
RAISED["CancelledError"] = asyncio.CancelledError


def _raises(item: Any) -> Any:
    if isinstance(item, str):
        raise RAISED[item]("\udce9")
    if item < 0:
        raise_hostile(-item)
    return item


async def _raises_in_flight(item: Any) -> Any:
    return _raises(item)


async def _raises_in_a_task(item: Any) -> Any:
    return await asyncio.ensure_future(_raises_in_flight(item))


def _raises_in_a_batch(items: list[Any]) -> list[Any]:
    return [_raises(item) for item in items]


operation("raise_item")(_raises)
operation("raise_guarded", bulkhead=9, retry=2)(_raises)
operation("raise_batch", batch=True)(_raises_in_a_batch)
operation("raise_async", concurrency=5)(_raises_in_flight)
operation("raise_task", concurrency=5)(_raises_in_a_task)


if "RLM_READY_FILE" in os.environ:  # a worker: for it, the disk of some files is gone
    _open = io.open

    def _open_or_hang(file: Any, *args: Any, **options: Any) -> Any:
        if str(file).endswith("on-a-dead-disk.txt"):
            hang("reading")
        return _open(file, *args, **options)

    io.open = _open_or_hang  # type: ignore[assignment]
