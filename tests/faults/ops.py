"""Operations of the fault tests: they keep a journal of what ran, outside of everything that may
die.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlm_tasks import Context, operation


def _concatenated(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def note(path: str, line: Any) -> None:
    """Append a line to a journal, whole or not at all."""
    journal = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, f"{line}\n".encode())
    os.close(journal)


@operation("journalled", merge=_concatenated)
def journalled(index: int, ctx: Context) -> list[int]:
    """Take `ms` of time, write the index down, answer with it."""
    time.sleep(ctx.params["ms"] / 1000)
    note(f"{ctx.params['journal']}.{ctx.job_id}", index)
    return [index]


@operation("holds_the_interpreter", merge=_concatenated)
def holds_the_interpreter(index: int, ctx: Context) -> list[int]:
    """Spend seconds in C code that never lets another thread run."""
    note(f"{ctx.params['journal']}.{ctx.job_id}", index)
    ctypes.PyDLL(None).sleep(int(ctx.params["seconds"]))
    return [index]


@operation("eats_memory", merge=_concatenated)
def eats_memory(index: int, ctx: Context) -> list[int]:
    """Ask for more memory than the process may have, at one item."""
    if index == ctx.params["at"]:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
        bytearray(2**31)
    return [index]


@operation("poison", merge=_concatenated)
def poison(index: int, ctx: Context) -> list[int]:
    """End the process, or the whole worker, at some items; a file says when they have become
    harmless.
    """
    if index in ctx.params["poison"] and not Path(ctx.params.get("cured", "nowhere")).exists():
        if ctx.params.get("worker"):
            kill_worker()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(ctx.params.get("ms", 0) / 1000)
    return [index]


@operation("poison_batch", batch=True, merge=_concatenated)
def poison_batch(items: list[int], ctx: Context) -> list[int]:
    """End the process when a batch has a poisonous item, or hold it up when it has a slow one."""
    if set(items) & set(ctx.params.get("poison", ())):
        os.kill(os.getpid(), signal.SIGKILL)
    if set(items) & set(ctx.params.get("deaf", ())):
        sum(range(10**15))  # one call of C: no signal is heard before it ends
    if set(items) & set(ctx.params.get("slow", ())):
        time.sleep(60)
    return list(items)


@operation("poison_async", concurrency=20, merge=_concatenated)
async def poison_async(index: int, ctx: Context) -> list[int]:
    """End the process after a while, with others in flight."""
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
    """Have a merge that ends its process once it sees more than five items."""
    return [index]


@operation("versioned", version=int(os.environ.get("TEST_VERSION", "1")))
def versioned(_: int) -> int:
    """Answer with the version of this operation."""
    return int(os.environ["TEST_VERSION"])


@operation("pid_after", merge=_concatenated)
def pid_after(seconds: float, ctx: Context) -> list[tuple[int, int]]:
    """Wait, then tell which process ran which item."""
    time.sleep(seconds)
    return [(ctx.index, os.getpid())]


def kill_worker() -> None:
    """End the main process of this pool process, and all of its pool processes, at once."""
    import psutil

    main = psutil.Process(os.getppid())
    others = [each for each in main.children() if each.pid != os.getpid()]
    for each in (main, *others):
        os.kill(each.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
