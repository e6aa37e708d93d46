"""Metrics as they are declared: counters, histograms and peaks, with the values of their labels.

The engine, `llm` and users' modules declare and count; `telemetry.exposition` exposes the sums.
Each slot of the pool has its own files (`slot_files`), and the process that follows a recycled or
killed one continues them.  So counters never fall, and there are never more files than slots.
Outside of a worker with a metrics port nothing is counted.  Begin with `Counter`.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from resilience.errors import InvalidValue
from rlm_tasks.metrics.slot_files import SlotFiles, count

OTHER = "other"
"""The value of a label in place of one that was not declared, or that is one too many.

Without it, the number of series would grow with the texts that users send."""
MOST_VALUES = 100
"""Values that a label without declared ones may have in one worker."""
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
MILLISECONDS = tuple(1000 * each for each in SECONDS)
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_F = TypeVar("_F", bound=Callable[..., Any])


# --- kinds of metrics -------------------------------------------------------------------------


Labels = Mapping[str, Collection[str] | None]
DECLARED: dict[str, Metric] = {}


class Metric:
    """A declared metric.

    `labels` has the values of each label; None allows all values, of which the first `most_values`
    of a worker are kept apart.  Further ones count as ``other``, so the sum stays right.
    """

    type = ""

    def __init__(
        self,
        name: str,
        about: str,
        labels: Labels | None = None,
        *,
        most_values: int = MOST_VALUES,
    ) -> None:
        """Declare it in each process that imports the module.  Raises InvalidValue."""
        self.name, self.about, self.labels = name, about, dict(labels or {})
        self.most_values = most_values
        if not most_values > 0:
            raise InvalidValue("most_values", most_values, "must be above 0")
        for each in (name, *self.labels):
            if not _NAME.fullmatch(each):
                raise InvalidValue(
                    "name",
                    each,
                    "must be letters, digits and underscores, and not begin with a digit",
                )
        known = DECLARED.setdefault(name, self)
        if known is not self and (type(known), known.labels) != (type(self), self.labels):
            raise InvalidValue(
                "name",
                name,
                "is declared already with other labels or another kind; use another name",
            )

    @property
    def family(self) -> str:
        """The name in its TYPE line."""
        return self.name

    def _values(self, given: Mapping[str, str]) -> tuple[str, ...]:
        if given.keys() != self.labels.keys():
            raise InvalidValue(
                "labels",
                sorted(given),
                f"{self.name} has the labels {', '.join(self.labels) or 'none'}; give each of them",
            )
        return tuple(
            given[label] if allowed is None or given[label] in allowed else OTHER
            for label, allowed in self.labels.items()
        )

    def _bounded(
        self,
        files: SlotFiles,
        values: tuple[str, ...],
        series: Callable[[tuple[str, ...]], Sequence[str]],
    ) -> Sequence[str]:
        """Return the keys of a series; a value that is one too many for its label is replaced.

        `series` returns the keys for values.
        """
        named = dict(zip(self.labels, values, strict=True))
        given = {
            label: value
            for label, value in named.items()
            if self.labels[label] is None and value != OTHER
        }

        def kept(excess: Collection[str]) -> Sequence[str]:
            return series(tuple(OTHER if label in excess else named[label] for label in named))

        if not given:
            return series(values)
        excess = files.excess(
            self.family, given, self.most_values, lambda excess: (self.type, kept(excess))
        )
        if excess:
            DROPPED.inc(metric=self.name)
        return kept(excess)

    def _key(self, sample: str, values: tuple[str, ...], **more: str) -> str:
        from prometheus_client.mmap_dict import mmap_key

        return mmap_key(
            self.family, sample, [*self.labels, *more], [*values, *more.values()], self.about
        )


class Counter(Metric):
    """A number that only grows.

    Its name ends in ``_total``.  Each of its `labels` is declared with its values.  Raises
    InvalidValue for an invalid name or label.
    """

    type = "counter"

    def __init__(
        self,
        name: str,
        about: str,
        labels: Labels | None = None,
        *,
        most_values: int = MOST_VALUES,
    ) -> None:
        if not name.endswith("_total"):
            raise InvalidValue("name", name, "a counter's name must end in _total")
        super().__init__(name, about, labels, most_values=most_values)
        self._keys = functools.cache(lambda values: [self._key(self.name, values)])

    @property
    def family(self) -> str:
        """The name without ``_total``; only its sample has that ending."""
        return self.name.removesuffix("_total")

    def inc(self, amount: float = 1.0, **labels: str) -> None:
        """Add an amount to it.

        Raises InvalidValue for other labels than the declared ones, and for an amount below 0 or
        not finite.
        """
        if not 0 <= amount <= sys.float_info.max:
            raise InvalidValue("amount", amount, f"{self.name} is a counter; add 0 or more")
        values = self._values(labels)

        def add(files: SlotFiles) -> None:
            [key] = self._bounded(files, values, self._keys)
            files.add("counter", (key, amount))

        count(add)


class Histogram(Metric):
    """The distribution of values over `buckets`, which are given by their upper bounds.

    `labels` are declared as for a Counter.  Raises InvalidValue for an invalid name or label.
    """

    type = "histogram"

    def __init__(
        self,
        name: str,
        about: str,
        labels: Labels | None = None,
        buckets: Collection[float] = SECONDS,
        *,
        most_values: int = MOST_VALUES,
    ) -> None:
        super().__init__(name, about, labels, most_values=most_values)
        self._bounds = (*sorted(buckets), float("inf"))
        self._keys = functools.cache(self._keys_of)

    def observe(self, value: float, times: int = 1, **labels: str) -> None:
        """Count a value the given number of times.

        Raises InvalidValue for other labels than the declared ones.
        """
        values = self._values(labels)

        def add(files: SlotFiles) -> None:
            total, *buckets = keys = self._bounded(files, values, self._keys)
            bucket = buckets[bisect_left(self._bounds, value)]
            files.add("histogram", (total, value * times), (bucket, times), among=keys)

        count(add)

    def _keys_of(self, values: tuple[str, ...]) -> list[str]:
        from prometheus_client.utils import floatToGoString

        buckets = [
            self._key(f"{self.name}_bucket", values, le=floatToGoString(each))
            for each in self._bounds
        ]
        return [self._key(f"{self.name}_sum", values), *buckets]


class Peak(Metric):
    """The greatest value of all pool processes so far."""

    type = "gauge"

    def reach(self, value: float) -> None:
        """Keep a value if it is the greatest so far."""
        count(lambda files: files.reach(self._own_key, value))

    @functools.cached_property
    def _own_key(self) -> str:
        return self._key(self.name, ())


DROPPED = Counter(
    "rlm_metric_series_dropped_total",
    "Counts under the label value `other`, because the label had its most values already.",
    {"metric": None},
    most_values=10_000,  # metrics are declared by code
)


# --- decorators for users' functions ----------------------------------------------------------


def counted(name: str, about: str) -> Callable[[_F], _F]:
    """Decorate a function or coroutine function: count calls, by outcome ``ok`` or ``error``."""
    calls = Counter(name, about, {"outcome": ("ok", "error")})
    return _watched(lambda _, ok: calls.inc(outcome="ok" if ok else "error"))


def timed(name: str, about: str, buckets: Collection[float] = SECONDS) -> Callable[[_F], _F]:
    """Decorate a function or coroutine function: observe the seconds that its calls take."""
    durations = Histogram(name, about, buckets=buckets)
    return _watched(lambda seconds, _: durations.observe(seconds))


def _watched(record: Callable[[float, bool], None]) -> Callable[[_F], _F]:
    """Return a decorator: `record` receives the seconds of each call, and whether it returned."""

    def decorate(function: _F) -> _F:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaiting(*args: Any, **kwargs: Any) -> Any:
                with _Watch(record):
                    return await function(*args, **kwargs)

            return awaiting  # type: ignore[return-value]  # it has the function's own signature

        @functools.wraps(function)
        def calling(*args: Any, **kwargs: Any) -> Any:
            with _Watch(record):
                return function(*args, **kwargs)

        return calling  # type: ignore[return-value]  # as above

    return decorate


class _Watch:
    def __init__(self, record: Callable[[float, bool], None]) -> None:
        self._record = record

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        self._record(time.perf_counter() - self._began, raised is None)
