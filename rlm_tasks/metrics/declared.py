"""What a worker counts, so that the numbers of all its pool processes are one.

Each slot of the pool has files of its own, and the process that comes after a recycled or killed one goes on writing in
them: counters never fall, and there are never more files than slots.  Decides what is counted, by which labels, and what a
gauge means; refuses to know who reads it (`health`).  Outside of a worker with a metrics port nothing is counted.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import threading
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from billiard.process import current_process

from resilience.errors import InvalidValue
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs.splitting import Reason

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric as Family
    from prometheus_client.mmap_dict import MmapedDict

    from rlm_tasks.ledger.ledger import Report

logger = logging.getLogger(__name__)

OTHER = "other"
"""What stands for a label's values that were not declared: a label must not grow with what users send."""
SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
MILLISECONDS = tuple(1000 * each for each in SECONDS)
ERRORS_OF_S = 300.0
"""The error rate is that of the items of the last five minutes."""
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_F = TypeVar("_F", bound=Callable[..., Any])


# --- where processes count ---------------------------------------------------------------------------


class SlotFiles:
    """The files of one worker, in prometheus_client's format: for each kind of metric one by each slot of the pool.

    prometheus_client's own values find their folder by an environment variable, which every program that an operation
    starts would inherit; and count by process, so that each recycled one would leave a file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._pid = folder, os.getpid()
        self._open: dict[str, MmapedDict] = {}
        self._begun: set[str] = set()
        self._lock = threading.Lock()  # for pools of threads; the main process of others never holds it

    def add(self, kind: str, *amounts: tuple[str, float], among: Sequence[str] = ()) -> None:
        """Add to the series of these keys; those they are `among` begin with them, at 0."""
        with self._lock:
            file = self._file(kind)
            if among and among[0] not in self._begun:
                self._begun.add(among[0])
                for key in among:
                    file.read_value(key)
            for key, amount in amounts:
                file.write_value(key, file.read_value(key)[0] + amount, 0.0)

    def reach(self, key: str, value: float) -> None:
        """Keep the value if it is the greatest so far."""
        with self._lock:
            file = self._file("gauge_max")
            if value > file.read_value(key)[0]:
                file.write_value(key, value, 0.0)

    def close(self) -> None:
        """Give the files back; what was counted stays in them."""
        for file in self._open.values():
            file.close()
        self._open, self._begun = {}, set()

    def _file(self, kind: str) -> MmapedDict:
        if self._pid != os.getpid():
            self.close()  # what was inherited by a fork is another slot's
            self._pid = os.getpid()
        if kind not in self._open:
            self._open[kind] = self._opened(self._folder / f"{kind}_{_slot()}.db")
        return self._open[kind]

    def _opened(self, path: Path) -> MmapedDict:
        from prometheus_client.mmap_dict import MmapedDict

        if path.exists():
            return MmapedDict(str(path))
        made = path.with_suffix(".new")  # a reader must not meet an empty file
        file = MmapedDict(str(made))
        made.replace(path)
        return file


def _slot() -> str:
    index = getattr(current_process(), "index", None)
    return "main" if index is None else str(index)


_files: SlotFiles | None = None


def begin(folder: Path) -> None:
    """Have this process, and those it forks, count into a folder."""
    global _files  # noqa: PLW0603  # a process counts in one place, whoever counts
    end()
    _files = SlotFiles(folder)


def end() -> None:
    """Count nothing any more in this process."""
    global _files  # noqa: PLW0603
    if _files is not None:
        _files.close()
    _files = None


def _count(write: Callable[[SlotFiles], None]) -> None:
    if _files is not None:
        try:
            write(_files)
        except OSError as error:
            logger.warning("This process counts no more, its metrics cannot be written: %s", error)
            end()


# --- what is declared --------------------------------------------------------------------------------


Labels = Mapping[str, Collection[str] | None]
DECLARED: dict[str, Metric] = {}


class Metric:
    """A declared metric.  `labels` has the values that each label may take; None for one whose values are few by nature."""

    type = ""

    def __init__(self, name: str, about: str, labels: Labels | None = None) -> None:
        """Declare it, once for all processes that import the module.  Raises InvalidValue."""
        self.name, self.about, self.labels = name, about, dict(labels or {})
        for each in (name, *self.labels):
            if not _NAME.fullmatch(each):
                raise InvalidValue("name", each, "must be letters, digits and underscores, and begin with no digit")
        known = DECLARED.setdefault(name, self)
        if known is not self and (type(known), known.labels) != (type(self), self.labels):
            raise InvalidValue("name", name, "is declared already, with other labels or as another kind of metric")

    @property
    def family(self) -> str:
        """The name that stands in its TYPE line."""
        return self.name

    def _values(self, given: Mapping[str, str]) -> tuple[str, ...]:
        if given.keys() != self.labels.keys():
            raise InvalidValue("labels", sorted(given), f"{self.name} has the labels {', '.join(self.labels) or 'none'}")
        return tuple(
            given[label] if allowed is None or given[label] in allowed else OTHER for label, allowed in self.labels.items()
        )

    def _key(self, sample: str, values: tuple[str, ...], **more: str) -> str:
        from prometheus_client.mmap_dict import mmap_key

        return mmap_key(self.family, sample, [*self.labels, *more], [*values, *more.values()], self.about)


class Counter(Metric):
    """A number that only grows.  Its name ends in ``_total``; each of its `labels` is declared with the values it may take.

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
        """Add to it.  Raises InvalidValue for other labels than the declared ones, and for less than 0."""
        if amount < 0:
            raise InvalidValue("amount", amount, f"{self.name} is a counter: it only grows")
        values = self._values(labels)
        _count(lambda files: files.add("counter", (self._keys(values), amount)))


class Histogram(Metric):
    """How values are spread over `buckets`, given by their upper bounds; `labels` as for a Counter.

    Raises InvalidValue for a name or a label that cannot be.
    """

    type = "histogram"

    def __init__(self, name: str, about: str, labels: Labels | None = None, buckets: Collection[float] = SECONDS) -> None:
        super().__init__(name, about, labels)
        self._bounds = (*sorted(buckets), float("inf"))
        self._keys = functools.cache(self._keys_of)

    def observe(self, value: float, times: int = 1, **labels: str) -> None:
        """Count a value, as often as it came.  Raises InvalidValue for other labels than the declared ones."""
        total, *buckets = keys = self._keys(self._values(labels))
        found = buckets[bisect_left(self._bounds, value)]
        _count(lambda files: files.add("histogram", (total, value * times), (found, times), among=keys))

    def _keys_of(self, values: tuple[str, ...]) -> list[str]:
        from prometheus_client.utils import floatToGoString

        buckets = [self._key(f"{self.name}_bucket", values, le=floatToGoString(each)) for each in self._bounds]
        return [self._key(f"{self.name}_sum", values), *buckets]


class Peak(Metric):
    """The greatest value that any pool process has had."""

    type = "gauge"

    def reach(self, value: float) -> None:
        """Keep a value if it is the greatest so far."""
        _count(lambda files: files.reach(self._own_key, value))

    @functools.cached_property
    def _own_key(self) -> str:
        return self._key(self.name, ())


# --- what nodes count --------------------------------------------------------------------------------


ITEMS = Counter(
    "rlm_items_total",
    "Items that ended: done, failed, or skipped as empty.",
    {"operation": None, "outcome": ("done", "failed", "skipped")},
)
NODES = Counter(
    "rlm_nodes_total",
    "Nodes that ended: done with their whole range, or why they handed over the rest.",
    {"operation": None, "reason": ("done", *(each.name.lower() for each in Reason))},
)
NODE_DURATION = Histogram("rlm_node_duration_seconds", "From a node's claim to its finish.", {"operation": None})
EXECUTION_TIME = Histogram(
    "rlm_execution_time_ms", "Mean time of an item in each node, counted once for each item.", {"operation": None}, MILLISECONDS
)
BUSY = Counter("rlm_item_busy_seconds_total", "Time spent in items.", {"operation": None})
RETRIED = Counter(
    "rlm_retries_total",
    "Items that were worth another try, by how they ended: recovered, or given up.",
    {"operation": None, "outcome": ("recovered", "given_up")},
)
CACHED = Counter(
    "rlm_cache_reads_total", "Reads of stored items, by whether their block was still in memory.", {"outcome": ("hit", "miss")}
)
PEAK_MEMORY = Peak("rlm_peak_memory_mb", "The most memory that one pool process has held.")
LLM_CALLS = Counter(
    "rlm_llm_calls_total",
    "Calls to models, by how they ended.",
    {"model": None, "endpoint": None, "outcome": ("ok", "rate_limited", "timeout", "failed", "refused", "unusable")},
)
LLM_SECONDS = Histogram("rlm_llm_call_seconds", "From a call to a model to its answer.", {"model": None})
LLM_TOKENS = Counter(
    "rlm_llm_tokens_total", "Tokens that calls to models were paid for.", {"model": None, "kind": ("prompt", "completion")}
)
LLM_MONEY = Counter("rlm_llm_money_total", "What calls to models have cost, by the prices of the settings.", {"model": None})
LLM_SHARED = Counter(
    "rlm_llm_shared_total", "Answers that were not paid again, by where they were.", {"source": ("memo", "cache", "flight")}
)
LLM_REFUSED = Counter("rlm_llm_budget_refusals_total", "Calls to models that were not made, because a job's budget is spent.")


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
    """Count one finished node: the items it reports, and how it ended; `hi` is where its range ended.

    `cache` is how often the items it read were in memory, and how often not.
    """
    if _files is None:
        return
    reason = Reason(report.why).name.lower() if report.mid < hi and report.why else "done"
    NODES.inc(operation=operation, reason=reason)
    NODE_DURATION.observe(took_s, operation=operation)
    PEAK_MEMORY.reach(report.peak_kb / 1024)
    outcomes = {"failed": len(report.failed)}
    if not validating:
        outcomes |= {"done": report.done, "skipped": len(report.skipped)}
        busy_s, ran = report.busy_us / 1e6, report.done + len(report.failed)
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


# --- what a request counts ----------------------------------------------------------------------------


Told = Mapping[str, float | str]


def emission(told: Told) -> list[tuple[Counter, float, dict[str, str]]]:
    """Return the counters that a request's numbers are for, with what is added to each, and its labels.

    ``business.records`` is the counter ``business_records_total``; a text is the label of its name.  Raises InvalidRequest
    for a counter that no module has declared, and for labels that it does not have.
    """
    labels = {name.replace(".", "_"): value for name, value in told.items() if isinstance(value, str)}
    found = []
    for name, amount in told.items():
        if isinstance(amount, str):
            continue
        total = f"{name.replace('.', '_')}_total"
        counter = DECLARED.get(total)
        if not isinstance(counter, Counter) or total.startswith("rlm_"):
            raise InvalidRequest("emit_metrics", name, f"declare it beside your operations: Counter({total!r}, ...)")
        if amount < 0 or labels.keys() != counter.labels.keys():
            raise InvalidRequest(
                "emit_metrics", dict(told), f"{name} only grows, by labels {', '.join(counter.labels) or 'none'}"
            )
        found.append((counter, amount, labels))
    return found


def emit(told: Told) -> None:
    """Count what the request of a job says, now that it has succeeded."""
    try:
        for counter, amount, labels in emission(told):
            counter.inc(amount, **labels)
    except InvalidRequest as error:
        logger.warning("Not counted, its declaration is another here than where it was submitted: %s", error)


# --- functions of a user's own -----------------------------------------------------------------------


def counted(name: str, about: str) -> Callable[[_F], _F]:
    """Decorate a function, or a coroutine function: count its calls, by outcome ``ok`` or ``error``."""
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


# --- what is told of the worker ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """How a worker stands, as its main process knows."""

    total: int  # slots
    busy: int
    draining: bool
    level: int  # of pressure, 0 to 4: what it acts on
    memory_mb: float  # of its processes
    memory_level: int | None = None  # of its host's memory alone; None: it could not be measured
    breakers: Mapping[str, str] = field(default_factory=dict)  # service -> closed, half-open or open

    @property
    def free(self) -> int:
        """Slots that wait for work."""
        return 0 if self.draining else max(0, self.total - self.busy)


GAUGES = {
    "rlm_slots": "Slots of this worker, by state: busy or free. A worker that drains has none that is free.",
    "rlm_concurrency_level": "Slots that are busy.",
    "rlm_object_pool_utilization": "Busy share of the pool's processes, 0 to 1.",
    "rlm_memory_usage_mb": "Memory that the worker's processes hold; what they share counts in each.",
    "rlm_memory_pressure_level": "Level that the memory of this host alone comes to: 0 normal to 4 emergency.",
    "rlm_pressure_level": "Level that this worker acts on: 0 normal to 4 emergency.",
    "rlm_error_rate": "Failed share of the items that ended in the last five minutes, 0 to 1.",
    "rlm_recovery_success_rate": "Share of the items worth another try that ended well, 0 to 1, since the worker started.",
    "rlm_cache_hit_rate": "Share of the reads of stored items whose block was in memory, 0 to 1, since the worker started.",
    "rlm_circuit_breaker_state": "State of each service's breaker: 0 closed, 1 half-open, 2 open. None while Redis is away.",
    "rlm_draining": "Whether the worker drains: 1, else 0.",
}
"""Read from the main process when somebody asks, not counted."""
BREAKER_STATES = {"closed": 0.0, "half-open": 1.0, "open": 2.0}


def registry(folder: Path, standing: Callable[[], Standing], clock: Callable[[], float] = time.monotonic) -> CollectorRegistry:
    """Return what one worker exposes.

    Where its owner runs prometheus_client in its multiprocess mode (``PROMETHEUS_MULTIPROC_DIR``), what that folder has, too.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    found = CollectorRegistry()
    found.register(_Exposed(folder, standing, clock))
    try:
        MultiProcessCollector(found)
    except ValueError:
        logger.debug("PROMETHEUS_MULTIPROC_DIR is not set: what is exposed is what is declared here")
    return found


class _Exposed:
    """Everything declared: what was counted in the folder, and how the worker stands."""

    def __init__(self, folder: Path, standing: Callable[[], Standing], clock: Callable[[], float]) -> None:
        self._folder, self._standing = folder, standing
        self._errors = _ErrorRate(clock)

    def collect(self) -> Iterator[Family]:
        """Yield each metric, also one that nothing was counted of."""
        from prometheus_client.metrics_core import Metric as Family
        from prometheus_client.multiprocess import MultiProcessCollector

        counted = MultiProcessCollector(None, path=str(self._folder)).collect()
        found = {each.name: each for each in counted}
        for metric in DECLARED.values():
            found.setdefault(metric.family, Family(metric.family, metric.about, metric.type))
        yield from sorted(found.values(), key=lambda each: each.name)
        for name, samples in self._gauges(found).items():
            family = Family(name, GAUGES[name], "gauge")
            for labels, value in samples:
                family.add_sample(name, labels, value)
            yield family

    def _gauges(self, found: Mapping[str, Family]) -> dict[str, list[tuple[dict[str, str], float]]]:
        at, retried = self._standing(), _by_outcome(found.get(RETRIED.family))
        cached = _by_outcome(found.get(CACHED.family))
        rate = self._errors.of(_by_outcome(found.get(ITEMS.family)))
        return {
            "rlm_slots": [({"state": "busy"}, at.busy), ({"state": "free"}, at.free)],
            "rlm_concurrency_level": [({}, at.busy)],
            "rlm_object_pool_utilization": [({}, min(1.0, at.busy / at.total) if at.total else 0.0)],
            "rlm_memory_usage_mb": [({}, at.memory_mb)],
            "rlm_memory_pressure_level": [({}, at.memory_level)] if at.memory_level is not None else [],
            "rlm_pressure_level": [({}, at.level)],
            "rlm_error_rate": [({}, rate)],
            "rlm_recovery_success_rate": [({}, retried["recovered"] / retried.total())] if retried.total() else [],
            "rlm_cache_hit_rate": [({}, cached["hit"] / cached.total())] if cached.total() else [],
            "rlm_circuit_breaker_state": [({"service": name}, BREAKER_STATES[state]) for name, state in at.breakers.items()],
            "rlm_draining": [({}, float(at.draining))],
        }


def _by_outcome(family: Family | None) -> Tally[str]:
    found: Tally[str] = Tally()
    for sample in family.samples if family is not None else ():
        found[sample.labels["outcome"]] += int(sample.value)
    return found


class _ErrorRate:
    """The failed share of the items between now and the look that is five minutes old, or the oldest there was."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._looks: deque[tuple[float, int, int]] = deque([(clock(), 0, 0)])  # when, failed, ended

    def of(self, items: Tally[str]) -> float:
        now, failed = self._clock(), items["failed"]
        ended = failed + items["done"]
        with self._lock:
            self._looks.append((now, failed, ended))
            while self._looks[1][0] <= now - ERRORS_OF_S:
                self._looks.popleft()
            _, failed_before, ended_before = self._looks[0]
        return (failed - failed_before) / (ended - ended_before) if ended > ended_before else 0.0
