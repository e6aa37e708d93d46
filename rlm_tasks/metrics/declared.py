"""What a worker counts, so that the numbers of all its pool processes are one.

Each slot of the pool has files of its own, and the process that comes after a recycled or killed
one goes on writing in them: counters never fall, and there are never more files than slots.
Decides what is counted, by which labels, and what a gauge means; refuses to know who reads it
(`health`).  Outside of a worker with a metrics port nothing is counted."""

from __future__ import annotations

import functools
import inspect
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from resilience.errors import InvalidValue
from rlm_tasks.metrics.slot_files import count

OTHER = "other"
"""What stands for a label's values that were not declared: a label must not grow with what users
send.
"""
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
MILLISECONDS = tuple(1000 * each for each in SECONDS)
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_F = TypeVar("_F", bound=Callable[..., Any])


# --- what is declared -------------------------------------------------------------------------


Labels = Mapping[str, Collection[str] | None]
DECLARED: dict[str, Metric] = {}


class Metric:
    """A declared metric.  `labels` has the values that each label may take; None for one whose
    values are few by nature.
    """

    type = ""

    def __init__(self, name: str, about: str, labels: Labels | None = None) -> None:
        """Declare it, once for all processes that import the module.  Raises InvalidValue."""
        self.name, self.about, self.labels = name, about, dict(labels or {})
        for each in (name, *self.labels):
            if not _NAME.fullmatch(each):
                raise InvalidValue(
                    "name", each, "must be letters, digits and underscores, and begin with no digit"
                )
        known = DECLARED.setdefault(name, self)
        if known is not self and (type(known), known.labels) != (type(self), self.labels):
            raise InvalidValue(
                "name", name, "is declared already, with other labels or as another kind of metric"
            )

    @property
    def family(self) -> str:
        """The name that stands in its TYPE line."""
        return self.name

    def _values(self, given: Mapping[str, str]) -> tuple[str, ...]:
        if given.keys() != self.labels.keys():
            raise InvalidValue(
                "labels",
                sorted(given),
                f"{self.name} has the labels {', '.join(self.labels) or 'none'}",
            )
        return tuple(
            given[label] if allowed is None or given[label] in allowed else OTHER
            for label, allowed in self.labels.items()
        )

    def _key(self, sample: str, values: tuple[str, ...], **more: str) -> str:
        from prometheus_client.mmap_dict import mmap_key

        return mmap_key(
            self.family, sample, [*self.labels, *more], [*values, *more.values()], self.about
        )


class Counter(Metric):
    """A number that only grows.  Its name ends in ``_total``; each of its `labels` is declared with
    the values it may take.

    Raises InvalidValue for a name or a label that cannot be.
    """

    type = "counter"

    def __init__(self, name: str, about: str, labels: Labels | None = None) -> None:
        if not name.endswith("_total"):
            raise InvalidValue("name", name, "a counter's name ends in _total")
        super().__init__(name, about, labels)
        self._keys = functools.cache(lambda values: self._key(self.name, values))

    @property
    def family(self) -> str:
        """The name without ``_total``: that ending is its sample's."""
        return self.name.removesuffix("_total")

    def inc(self, amount: float = 1.0, **labels: str) -> None:
        """Add to it.  Raises InvalidValue for other labels than the declared ones, and for less
        than 0.
        """
        if amount < 0:
            raise InvalidValue("amount", amount, f"{self.name} is a counter: it only grows")
        values = self._values(labels)
        count(lambda files: files.add("counter", (self._keys(values), amount)))


class Histogram(Metric):
    """How values are spread over `buckets`, given by their upper bounds; `labels` as for a Counter.

    Raises InvalidValue for a name or a label that cannot be.
    """

    type = "histogram"

    def __init__(
        self,
        name: str,
        about: str,
        labels: Labels | None = None,
        buckets: Collection[float] = SECONDS,
    ) -> None:
        super().__init__(name, about, labels)
        self._bounds = (*sorted(buckets), float("inf"))
        self._keys = functools.cache(self._keys_of)

    def observe(self, value: float, times: int = 1, **labels: str) -> None:
        """Count a value, as often as it came.  Raises InvalidValue for other labels than the
        declared ones.
        """
        total, *buckets = keys = self._keys(self._values(labels))
        found = buckets[bisect_left(self._bounds, value)]
        count(
            lambda files: files.add("histogram", (total, value * times), (found, times), among=keys)
        )

    def _keys_of(self, values: tuple[str, ...]) -> list[str]:
        from prometheus_client.utils import floatToGoString

        buckets = [
            self._key(f"{self.name}_bucket", values, le=floatToGoString(each))
            for each in self._bounds
        ]
        return [self._key(f"{self.name}_sum", values), *buckets]


class Peak(Metric):
    """The greatest value that any pool process has had."""

    type = "gauge"

    def reach(self, value: float) -> None:
        """Keep a value if it is the greatest so far."""
        count(lambda files: files.reach(self._own_key, value))

    @functools.cached_property
    def _own_key(self) -> str:
        return self._key(self.name, ())


# --- what nodes count -------------------------------------------------------------------------


# --- what a request counts --------------------------------------------------------------------


# --- functions of a user's own ----------------------------------------------------------------


def counted(name: str, about: str) -> Callable[[_F], _F]:
    """Decorate a function, or a coroutine function: count its calls, by outcome ``ok`` or
    ``error``.
    """
    calls = Counter(name, about, {"outcome": ("ok", "error")})
    return _watched(lambda _, ok: calls.inc(outcome="ok" if ok else "error"))


def timed(name: str, about: str, buckets: Collection[float] = SECONDS) -> Callable[[_F], _F]:
    """Decorate a function, or a coroutine function: how long its calls take, in seconds."""
    durations = Histogram(name, about, buckets=buckets)
    return _watched(lambda seconds, _: durations.observe(seconds))


def _watched(tell: Callable[[float, bool], None]) -> Callable[[_F], _F]:
    """Tell of each call of a function how long it took, and whether it returned."""

    def decorate(function: _F) -> _F:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaiting(*args: Any, **kwargs: Any) -> Any:
                with _Watch(tell):
                    return await function(*args, **kwargs)

            return awaiting  # type: ignore[return-value]  # it takes and returns what the function does

        @functools.wraps(function)
        def calling(*args: Any, **kwargs: Any) -> Any:
            with _Watch(tell):
                return function(*args, **kwargs)

        return calling  # type: ignore[return-value]  # as above

    return decorate


class _Watch:
    def __init__(self, tell: Callable[[float, bool], None]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        self._tell(time.perf_counter() - self._began, raised is None)


# --- what is told of the worker ---------------------------------------------------------------
