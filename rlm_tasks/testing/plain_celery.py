"""The same work in plain Celery, with `chunks` and `chord` as a user would write it by hand.

The platform does not use it.  The demo's ``--compare`` and the benchmarks run it as
``celery -A rlm_tasks.testing.plain_celery worker``, with Celery's own defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from celery import Celery, chord, signals

from rlm_tasks.operations.code_metrics import measure_file, merge_reports

_url = os.environ.get("RLM_REDIS_URL", "redis://localhost:6379/0")
app = Celery("handwritten", broker=_url, backend=_url, set_as_current=False)
app.conf.update(task_default_queue="handwritten", broker_connection_retry_on_startup=True)


@signals.worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # Celery ships no types
def _say_ready(**_: Any) -> None:
    if path := os.environ.get("RLM_READY_FILE"):
        Path(path).touch()


@app.task  # type: ignore[untyped-decorator]  # Celery ships no types
def noop(item: Any) -> None:
    """Do nothing."""


@app.task  # type: ignore[untyped-decorator]  # Celery ships no types
def count(results: list[Any]) -> int:
    """End a chord of no-ops."""
    return len(results)


@app.task  # type: ignore[untyped-decorator]  # Celery ships no types
def compute_chunk(chunk: list[int]) -> int:
    """Compute a chunk of items."""
    return sum(compute(rounds) for rounds in chunk)


@app.task  # type: ignore[untyped-decorator]  # Celery ships no types
def total(counts: list[int]) -> int:
    """End a chord over chunks."""
    return sum(counts)


@app.task  # type: ignore[untyped-decorator]  # Celery ships no types
def measure(paths: list[str]) -> dict[str, Any]:
    """Measure a chunk of files; a file that cannot be parsed is left out."""
    return merge_reports(_measured(paths))


@app.task  # type: ignore[untyped-decorator]  # Celery ships no types
def merge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the chunks' reports."""
    return merge_reports(reports)


def _measured(paths: Iterable[str]) -> Iterable[dict[str, Any]]:
    for path in paths:
        try:
            yield measure_file(path)
        except (SyntaxError, UnicodeError, OSError):
            continue


def measure_by_chord(paths: list[str], chunk: int) -> dict[str, Any]:
    """Measure files by a chord over fixed chunks and wait for the report."""
    parts = [paths[at : at + chunk] for at in range(0, len(paths), chunk)]
    report: dict[str, Any] = chord([measure.s(part) for part in parts], merge.s())().get(
        timeout=600
    )
    return report


def measure_serially(paths: list[str]) -> dict[str, Any]:
    """Measure files one after the other in this process."""
    return merge_reports(_measured(paths))


def compute_by_chord(items: list[int], chunk: int) -> int:
    """Compute items by a chord over fixed chunks and wait for the count."""
    parts = [items[at : at + chunk] for at in range(0, len(items), chunk)]
    counted: int = chord([compute_chunk.s(part) for part in parts], total.s())().get(timeout=600)
    return counted


def compute(rounds: int) -> int:
    """Hold the CPU for a fixed amount of work, and count one item."""
    value = rounds
    for _ in range(rounds):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return 1
