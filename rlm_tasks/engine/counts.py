"""The metrics that nodes count, for the /metrics page of a worker.

`node` calls `count_node` once for each finished node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilience.store import on_alone
from rlm_tasks.jobs.splitting import Reason
from rlm_tasks.metrics.declared import MILLISECONDS, Counter, Histogram, Peak
from rlm_tasks.metrics.slot_files import is_counting

if TYPE_CHECKING:
    from rlm_tasks.ledger.records import Report

MOST_OPERATIONS = 1000
"""Operations that the metrics of a worker keep apart; code declares them, not users' texts."""
ITEMS = Counter(
    "rlm_items_total",
    "Items that ended: done, failed, or skipped as empty.",
    {"operation": None, "outcome": ("done", "failed", "skipped")},
    most_values=MOST_OPERATIONS,
)
NODES = Counter(
    "rlm_nodes_total",
    "Nodes that ended: done with their whole range, or the reason of their cut.",
    {"operation": None, "reason": ("done", *(each.name.lower() for each in Reason))},
    most_values=MOST_OPERATIONS,
)
NODE_DURATION = Histogram(
    "rlm_node_duration_seconds",
    "Time from a node's claim to its finish.",
    {"operation": None},
    most_values=MOST_OPERATIONS,
)
EXECUTION_TIME = Histogram(
    "rlm_execution_time_ms",
    "Mean time of an item in its node, counted once for each item.",
    {"operation": None},
    MILLISECONDS,
    most_values=MOST_OPERATIONS,
)
BUSY = Counter(
    "rlm_item_busy_seconds_total",
    "Time spent in items.",
    {"operation": None},
    most_values=MOST_OPERATIONS,
)
RETRIED = Counter(
    "rlm_retries_total",
    "Items that recovered at a later try, or were given up although a retry might have helped.",
    {"operation": None, "outcome": ("recovered", "given_up")},
    most_values=MOST_OPERATIONS,
)
CACHED = Counter(
    "rlm_cache_reads_total",
    "Reads of stored items, by whether their block was still in memory.",
    {"outcome": ("hit", "miss")},
)
GUARD_ALONE = Counter(
    "rlm_guard_alone_total",
    "Decisions that guards made without Redis, by kind of guard.",
    {"guard": ("breaker", "bucket", "bulkhead", "retry_budget", "single_flight")},
)
PEAK_MEMORY = Peak("rlm_peak_memory_mb", "Largest memory that one pool process has held.")

on_alone(lambda kind: GUARD_ALONE.inc(guard=kind))


def count_node(
    operation: str,
    report: Report,
    hi: int,
    *,
    took_s: float,
    recovered: int = 0,
    given_up: int = 0,
    validating: bool = False,
    cache: tuple[int, int] = (0, 0),
) -> None:
    """Count one finished node: its items, its end and its time; `hi` was the end of its range.

    `cache` is the number of reads of stored items from memory and from Redis.
    """
    if not is_counting():
        return
    reason = Reason(report.why).name.lower() if report.mid < hi and report.why else "done"
    NODES.inc(operation=operation, reason=reason)
    NODE_DURATION.observe(took_s, operation=operation)
    PEAK_MEMORY.reach(report.peak_kb / 1024)
    outcomes = {"failed": report.failed_count}
    if not validating:
        outcomes |= {"done": report.done, "skipped": len(report.skipped)}
        busy_s, ran = report.busy_us / 1e6, report.done + report.failed_count
        BUSY.inc(busy_s, operation=operation)
        if ran:
            EXECUTION_TIME.observe(1000 * busy_s / ran, times=ran, operation=operation)
    for outcome, number in outcomes.items():
        if number:
            ITEMS.inc(number, operation=operation, outcome=outcome)
    for outcome, number in (("recovered", recovered), ("given_up", given_up)):
        if number:
            RETRIED.inc(number, operation=operation, outcome=outcome)
    for outcome, number in zip(("hit", "miss"), cache, strict=True):
        if number:
            CACHED.inc(number, outcome=outcome)
