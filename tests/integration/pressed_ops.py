"""Operations of the tests of pressure and preemption."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rlm_tasks import Context, operation


@operation("nap", merge=sum)
def nap(seconds: float) -> int:
    """Sleep; use no processor time."""
    time.sleep(seconds)
    return 1


@operation("stamp")
def stamp(_: Any) -> float:
    """Return the time at which the item began, in seconds since the epoch."""
    return time.time()


@operation("where_and_when")
def where_and_when(seconds: float, ctx: Context) -> tuple[int, float, float]:
    """Return the process that ran the item, and the times of its begin and end."""
    began = time.time()
    time.sleep(seconds)
    return os.getpid(), began, time.time()


@operation("limited")
def limited(seconds: float, ctx: Context) -> int:
    """Sleep, and return how many of 100 entities the level allows."""
    time.sleep(seconds)
    return ctx.limit(100)


@operation("under_level")
def under_level(_: Any, ctx: Context) -> str:
    """Return the level that the item runs under."""
    return ctx.degradation.level.label


def burn(seconds: float) -> tuple[float, float]:
    """Compute for some seconds; return the wall-clock time and the processor time."""
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        pass
    return time.perf_counter() - began, time.process_time() - used


@operation("compute")
def compute(seconds: float, ctx: Context) -> tuple[float, float, int]:
    """Compute; return wall-clock time, processor time, and how many of 100 entities are allowed."""
    return *burn(seconds), ctx.limit(100)


def _at_a_glance(_: float) -> str:
    return "simple"


@operation("thorough", simplified=_at_a_glance)
def thorough(seconds: float) -> str:
    """Compute; under pressure the simplified function runs instead."""
    burn(seconds)
    return "full"


@operation("hold")
def hold(megabytes: int, ctx: Context) -> int:
    """Keep a slot and some written memory until the file `until` exists, at most 20 s."""
    held, until = b"\1" * (megabytes << 20), time.monotonic() + 20
    while not Path(ctx.params["until"]).exists() and time.monotonic() < until:
        time.sleep(0.05)
    return len(held)


@operation("dawdle")
def dawdle(seconds: float) -> None:
    """Sleep; only one test uses this operation, so no other has changed its learned times."""
    time.sleep(seconds)


@operation("every_third_fails")
def every_third_fails(number: int) -> int:
    """Fail at multiples of three."""
    if number % 3 == 0:
        raise ValueError(f"{number} is a third")
    return number


@operation("one_at_a_time", allocation={"max_workers": 1, "min_workers": 1})
def one_at_a_time(seconds: float, ctx: Context) -> tuple[float, float]:
    """Return the times at which the item began and ended.

    A negative item writes its process id to a file, and hangs, unless the file exists."""
    if seconds < 0 and not (hangs := Path(ctx.params["hangs"])).exists():
        hangs.write_text(str(os.getpid()), encoding="ascii")
        time.sleep(30)
    began = time.time()
    time.sleep(abs(seconds))
    return began, time.time()


@operation("huge", allocation={"min_memory_mb": 10**9, "max_memory_mb": 10**9})
def huge(_: Any) -> None:
    """Require more memory than any machine has."""
