"""The built-in operations: samples, and sums and statistics that are exact under any split.

`registry.import_operations` imports this module in each client and worker.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from heapq import merge as merge_sorted
from typing import Any

from rlm_tasks.operations.code_metrics import measure_file, merge_reports
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.registry import operation

_WORD = re.compile(r"\w+")


def _number(item: Any) -> None:
    if isinstance(item, bool) or not isinstance(item, int | float):
        raise TypeError(f"not a number: {item!r}")


def _not_empty(item: Any) -> None:
    if item is None or item in ("", [], {}):
        raise ValueError("empty item")


# --- sum, exact: integers as they are, floats as ratios of integers ---------------------------


def _exact(value: float) -> list[int]:
    """Return a finite float as numerator and denominator; the denominator is a power of two."""
    return list(value.as_integer_ratio())


def _add(first: list[int], second: list[int]) -> list[int]:
    top, bottom = first[0] * second[1] + second[0] * first[1], first[1] * second[1]
    common = math.gcd(bottom, first[1] * second[1], top)
    return [top // common, bottom // common]


def _total(values: Iterable[float]) -> list[Any]:
    """Return [whole numbers only, numerator, denominator, sum of infinities and NaN]."""
    whole, ratio, odd = 0, [0, 1], 0.0
    only_whole = True
    for value in values:
        if isinstance(value, int):
            whole += value
        elif math.isfinite(value):
            only_whole, ratio = False, _add(ratio, _exact(value))
        else:
            only_whole, odd = False, odd + value
    top, bottom = _add(ratio, [whole, 1])
    return [only_whole, top, bottom, odd]


def _merge_totals(totals: Iterable[list[Any]]) -> list[Any]:
    only_whole, ratio, odd = True, [0, 1], 0.0
    for whole, top, bottom, other in totals:
        only_whole, ratio, odd = only_whole and whole, _add(ratio, [top, bottom]), odd + other
    return [only_whole, *ratio, odd]


def _as_number(total: list[Any]) -> float:
    only_whole, top, bottom, odd = total
    if only_whole:
        return int(top)
    return odd if odd else float(Fraction(top, bottom))


@operation("sum", batch=True, merge=_merge_totals, finalize=_as_number, validate=_number)
def sum_items(items: Sequence[float]) -> list[Any]:
    """Add numbers; the answer does not depend on how the job was split."""
    if isinstance(items, range):
        return [True, sum(items), 1, 0.0]
    for item in items:
        _number(item)
    return _total(items)


# --- aggregate --------------------------------------------------------------------------------


def _summaries(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {"count": 0, "sum": [0, 1], "squares": [0, 1], "min": None, "max": None}
    for part in parts:
        whole["count"] += part["count"]
        whole["sum"] = _add(whole["sum"], part["sum"])
        whole["squares"] = _add(whole["squares"], part["squares"])
        for name, better in (("min", min), ("max", max)):
            known = [each for each in (whole[name], part[name]) if each is not None]
            whole[name] = better(known) if known else None
    return whole


def _statistics(part: dict[str, Any]) -> dict[str, Any]:
    count = part["count"]
    if not count:
        return {"count": 0, "mean": None, "min": None, "max": None, "variance": None}
    total, squares = Fraction(*part["sum"]), Fraction(*part["squares"])
    variance = (squares - total * total / count) / count
    return {
        "count": count,
        "mean": float(total / count),
        "min": part["min"],
        "max": part["max"],
        "variance": float(variance),
    }


@operation("aggregate", batch=True, merge=_summaries, finalize=_statistics, validate=_number)
def aggregate(items: Sequence[float]) -> dict[str, Any]:
    """Return count, mean, min, max and population variance of finite numbers.

    The answer is exact under any split.
    """
    total, squares = Fraction(0), Fraction(0)
    for item in items:
        _number(item)
        exact = Fraction(item)
        total, squares = total + exact, squares + exact * exact
    return {
        "count": len(items),
        "sum": [total.numerator, total.denominator],
        "squares": [squares.numerator, squares.denominator],
        "min": min(items),
        "max": max(items),
    }


# --- text and order ---------------------------------------------------------------------------


def _add_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    whole: Counter[str] = Counter()
    for each in counts:
        whole.update(each)
    return dict(sorted(whole.items(), key=lambda pair: (-pair[1], pair[0])))


@operation("word_count", merge=_add_counts)
def word_count(line: str) -> dict[str, int]:
    """Count the words of a text, in lower case."""
    return Counter(_WORD.findall(line.lower()))


def _merge_runs(runs: Iterable[list[Any]]) -> list[Any]:
    return list(merge_sorted(*runs))


@operation("sort", batch=True, merge=_merge_runs)
def sort(items: Sequence[Any]) -> list[Any]:
    """Sort items: each node sorts its part, and parts are merged as in a merge sort."""
    return sorted(items)


# --- samples ----------------------------------------------------------------------------------


def _burn(item: Any, rounds: int) -> int:
    """Compute for a while, deterministically from the item."""
    value = hash_of(item)
    for _ in range(rounds):
        value = (value * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
    return value


def hash_of(item: Any) -> int:
    """Return a number that is the same in every process, unlike `hash`."""
    text = repr(item).encode()
    value = 14695981039346656037
    for byte in text[:256]:
        value = ((value ^ byte) * 1099511628211) & 0xFFFFFFFFFFFFFFFF
    return value


@operation("process", validate=_not_empty)
def process(item: Any, ctx: Context) -> dict[str, Any]:
    """A CPU-bound sample: ``params["rounds"]`` sets its cost (default 100)."""
    return {"item": item, "digest": _burn(item, int(ctx.params.get("rounds", 100)))}


@operation("complex_process", validate=_not_empty)
def complex_process(item: Any, ctx: Context) -> dict[str, Any]:
    """A CPU-bound sample whose cost differs a hundredfold from item to item."""
    rounds = int(ctx.params.get("rounds", 100))
    return {"item": item, "digest": _burn(item, rounds * (1 + hash_of(item) % 100))}


@operation("conditional_process", validate=_not_empty)
def conditional_process(item: Any, ctx: Context) -> dict[str, Any]:
    """Process numbers and texts; other items pass through unchanged."""
    if not isinstance(item, int | float | str):
        return {"item": item, "processed": False}
    return {
        "item": item,
        "processed": True,
        "digest": _burn(item, int(ctx.params.get("rounds", 100))),
    }


def _merge_extremes(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """An example of a merge: it receives partials in item order and returns one partial."""
    parts = list(parts)
    return {
        "count": sum(part["count"] for part in parts),
        "first": parts[0]["first"],
        "last": parts[-1]["last"],
        "largest": max(part["largest"] for part in parts),
    }


@operation("custom_merge", merge=_merge_extremes)
def custom_merge(item: Any) -> dict[str, Any]:
    """An example with its own merge: count, first, last and largest item."""
    return {"count": 1, "first": item, "last": item, "largest": item}


operation("code_metrics", merge=merge_reports)(measure_file)
