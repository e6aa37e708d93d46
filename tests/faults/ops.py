"""Operations of the fault tests; they keep a journal of items in a file, which no fault affects."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate
from resilience.retry import RetryPolicy
from rlm_tasks import Context, operation


def _concatenated(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def note(path: str, line: Any) -> None:
    """Append a line to a journal in one write, so that a kill cannot cut it."""
    journal = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, f"{line}\n".encode())
    os.close(journal)


@operation("journalled", merge=_concatenated)
def journalled(index: int, ctx: Context) -> list[int]:
    """Sleep for `ms`, write the index to the journal, and return it."""
    time.sleep(ctx.params["ms"] / 1000)
    note(f"{ctx.params['journal']}.{ctx.job_id}", index)
    return [index]


def _sized(index: int, ctx: Context) -> list[Any]:
    time.sleep(ctx.params.get("ms", 2) / 1000)
    return [[index, "x" * ctx.params["bytes"]]]


@operation("sized", merge=_concatenated)
def sized(index: int, ctx: Context) -> list[Any]:
    """Sleep for `ms`, and return the index with a text of some bytes."""
    return _sized(index, ctx)


@operation(
    "sized_and_guarded",
    merge=_concatenated,
    rate_limit=Rate(10_000, per_s=1),
    breaker=BreakerConfig(failure_threshold=3),
    bulkhead=50,
    retry=RetryPolicy(max_attempts=2),
)
def sized_and_guarded(index: int, ctx: Context) -> list[Any]:
    """Do the same behind every kind of guard."""
    return _sized(index, ctx)


@operation("holds_the_interpreter", merge=_concatenated)
def holds_the_interpreter(index: int, ctx: Context) -> list[int]:
    """Hold the interpreter lock for some seconds in C code, so that no other thread runs."""
    note(f"{ctx.params['journal']}.{ctx.job_id}", index)
    ctypes.PyDLL(None).sleep(int(ctx.params["seconds"]))
    return [index]


@operation("eats_memory", merge=_concatenated)
def eats_memory(index: int, ctx: Context) -> list[int]:
    """At one item, request more memory than the process may have."""
    if index == ctx.params["at"]:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
        bytearray(2**31)
    return [index]


@operation("poison", merge=_concatenated)
def poison(index: int, ctx: Context) -> list[int]:
    """Kill the process, or the whole worker, at some items, until the file `cured` exists."""
    if index in ctx.params["poison"] and not Path(ctx.params.get("cured", "nowhere")).exists():
        if ctx.params.get("worker"):
            kill_worker()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(ctx.params.get("ms", 0) / 1000)
    return [index]


@operation("poison_batch", batch=True, merge=_concatenated)
def poison_batch(items: list[int], ctx: Context) -> list[int]:
    """Kill the process if the batch has a poisonous item; take long if it has a slow one.

    An item of `deaf` takes long and ignores signals."""
    if set(items) & set(ctx.params.get("poison", ())):
        os.kill(os.getpid(), signal.SIGKILL)
    if set(items) & set(ctx.params.get("deaf", ())):
        sum(range(10**15))  # one call of C: Python handles no signal before it ends
    if set(items) & set(ctx.params.get("slow", ())):
        time.sleep(60)
    return list(items)


@operation("poison_async", concurrency=20, merge=_concatenated)
async def poison_async(index: int, ctx: Context) -> list[int]:
    """Kill the process at some items, while other items are in flight."""
    await asyncio.sleep(0.002)
    if index in ctx.params["poison"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return [index]


def _deadly_merge(parts: Iterable[list[int]]) -> list[int]:
    whole = _concatenated(parts)
    if len(whole) > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole


@operation("deadly_merge", merge=_deadly_merge)
def deadly_merge(index: int) -> list[int]:
    """Return the item.  The merge of more than five items kills its process."""
    return [index]


@operation("versioned", version=int(os.environ.get("TEST_VERSION", "1")))
def versioned(_: int) -> int:
    """Return the version of this operation."""
    return int(os.environ["TEST_VERSION"])


@operation("pid_after", merge=_concatenated)
def pid_after(seconds: float, ctx: Context) -> list[tuple[int, int]]:
    """Sleep, then return the item's index and the id of the process that ran it."""
    time.sleep(seconds)
    return [(ctx.index, os.getpid())]


def kill_worker() -> None:
    """Kill the main process of this pool process, and all of its pool processes, at once."""
    import psutil

    main = psutil.Process(os.getppid())
    others = [each for each in main.children() if each.pid != os.getpid()]
    for each in (main, *others):
        os.kill(each.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
