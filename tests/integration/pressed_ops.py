"""Operations that tests of pressure and preemption run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rlm_tasks import Context, operation


@operation("nap", merge=sum)
def nap(seconds: float) -> int:
    """Take a while, and no processor."""
    time.sleep(seconds)
    return 1


@operation("stamp")
def stamp(_: Any) -> float:
    """Say when the item began."""
    return time.time()


@operation("where_and_when")
def where_and_when(seconds: float, ctx: Context) -> tuple[int, float, float]:
    """Say which process ran the item, and from when to when."""
    began = time.time()
    time.sleep(seconds)
    return os.getpid(), began, time.time()


@operation("limited")
def limited(seconds: float, ctx: Context) -> int:
    """Take a while, and say how many of 100 entities one may look at."""
    time.sleep(seconds)
    return ctx.limit(100)


@operation("under_level")
def under_level(_: Any, ctx: Context) -> str:
    """Say under which level the item runs."""
    return ctx.degradation.level.label


def burn(seconds: float) -> tuple[float, float]:
    """Compute for some time; return it, and how much of it a processor was had."""
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        pass
    return time.perf_counter() - began, time.process_time() - used


@operation("compute")
def compute(seconds: float, ctx: Context) -> tuple[float, float, int]:
    """Compute; say how long, how much of it with a processor, and how many of 100 entities were
    looked at.
    """
    return *burn(seconds), ctx.limit(100)


def _at_a_glance(_: float) -> str:
    return "simple"


@operation("thorough", simplified=_at_a_glance)
def thorough(seconds: float) -> str:
    """Compute, unless it is to be simple."""
    burn(seconds)
    return "full"


@operation("hold")
def hold(megabytes: int, ctx: Context) -> int:
    """Hold a slot, and memory of which every page is written, until a file is there, and 20 s at
    most.
    """
    held, until = b"\1" * (megabytes << 20), time.monotonic() + 20
    while not Path(ctx.params["until"]).exists() and time.monotonic() < until:
        time.sleep(0.05)
    return len(held)


@operation("dawdle")
def dawdle(seconds: float) -> None:
    """Take a while: no other test lets this one be slow."""
    time.sleep(seconds)


@operation("every_third_fails")
def every_third_fails(number: int) -> int:
    """Refuse each third number."""
    if number % 3 == 0:
        raise ValueError(f"{number} is a third")
    return number


@operation("one_at_a_time", allocation={"max_workers": 1, "min_workers": 1})
def one_at_a_time(seconds: float, ctx: Context) -> tuple[float, float]:
    """Say from when to when the item ran; the first attempt at a negative one writes down its
    process, and hangs.
    """
    if seconds < 0 and ctx.attempt == 1:
        Path(ctx.params["hangs"]).write_text(str(os.getpid()), encoding="ascii")
        time.sleep(30)
    began = time.time()
    time.sleep(abs(seconds))
    return began, time.time()


@operation("huge", allocation={"min_memory_mb": 10**9, "max_memory_mb": 10**9})
def huge(_: Any) -> None:
    """Need more memory than there is."""
