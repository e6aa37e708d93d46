"""Platform events: the list of all kinds, and the bounded stream that all processes share.

The monitor, nodes and endpoint checks emit events.  Each is one line of the log and one entry of
the stream, which `Listener` follows.  The ledger does not depend on events: while Redis is away
they are logged but not stored.  Begin with `KINDS`, then `Events.emit`.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from random import Random
from types import MappingProxyType
from typing import Any

from pydantic.alias_generators import to_snake
from redis.exceptions import RedisError

from resilience.degradation import Level
from resilience.errors import InvalidValue, StoreUnavailable, refuse_unless_count
from resilience.keys import Keys
from resilience.retry import RetryPolicy
from resilience.store import Call, Script, Store
from resilience.validation import readable

logger = logging.getLogger(__name__)
log = logging.getLogger("rlm.events")
"""The logger of events: one line each, with its fields in the record's ``event``."""

BLOCK_MS = 500
"""Longest wait of a listener for the next event; then it checks whether it was closed."""
PAUSE_S = 0.1
"""Pause of a listener after a read without events: with short timeouts a read does not wait."""
_SPARE_MS = 500
"""Time by which the socket timeout must exceed a wait: the server ends waits by a slow tick."""
BACK_OFF = RetryPolicy(initial_delay_s=0.5, max_delay_s=5.0)
_LONGEST = 500
"""Most characters of a message: some messages quote a service's answer, which may be a page."""
_BATCH = 100

_EMIT = Script.load("scheduler", "event")
NEWEST = Script.load("scheduler", "event_newest")


class EventSeverity(IntEnum):
    """How much an event matters to operators; the numbers are those of `logging`."""

    INFO = logging.INFO
    WARNING = logging.WARNING
    ERROR = logging.ERROR
    CRITICAL = logging.CRITICAL

    @property
    def label(self) -> str:
        """The severity as it is shown and stored: ``warning``."""
        return self.name.lower()


_NAMED_ELSEWHERE = {"execution_time_ms": "duration_ms", "task_id": "job"}
"""Fields of an event's data by the names that other orchestrators use."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that has happened on the platform.

    Code of the platform makes events of a kind: ``BREAKER_OPENED.event("breaker llm has opened",
    {"breaker": "llm"})``.
    """

    name: str  # name of its kind, a key of `KINDS`
    message: str  # one sentence, kept on one line
    severity: EventSeverity = EventSeverity.INFO
    data: Mapping[str, Any] = field(default_factory=dict)  # plain JSON, without secrets
    at: float = 0.0  # seconds of the server's clock; 0 before it is in the stream
    id: str = ""  # its id in the stream; '' before it is in the stream

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", one_line(self.message))

    def __getattr__(self, name: str) -> Any:
        """Return a field of the data as an attribute, also under the names of orchestrators.

        These are in snake_case or camelCase: ``event.executionTimeMs``, ``event.taskId``.
        """
        if name.startswith("_"):
            raise AttributeError(name)
        field = to_snake(name)
        field = _NAMED_ELSEWHERE.get(field, field)
        if field not in self.data:
            raise AttributeError(
                f"{self.name} has no field {name!r}; it has {', '.join(self.data)}"
            )
        return self.data[field]

    def fields(self) -> dict[str, Any]:
        """Return the event as a dict of plain JSON."""
        about = {"name": self.name, "severity": self.severity.label, "message": self.message}
        return {"id": self.id, "at": self.at, **about, "data": dict(self.data)}


def one_line(text: str) -> str:
    """Return a text on one line, at most 500 characters long.

    Line breaks and control characters become spaces: they could forge lines of the log.
    """
    printable = "".join(each if each.isprintable() else " " for each in text[:_LONGEST])
    return " ".join(printable.split())


# --- the list ---------------------------------------------------------------------------------


LEVEL_SEVERITIES = {
    Level.NORMAL: EventSeverity.INFO,
    Level.ELEVATED: EventSeverity.INFO,
    Level.HIGH: EventSeverity.WARNING,
    Level.CRITICAL: EventSeverity.ERROR,
    Level.EMERGENCY: EventSeverity.CRITICAL,
}
"""Severity of a change to a pressure level."""


@dataclass(frozen=True, slots=True)
class EventKind:
    """One kind of event: its name, its severity, its meaning, and the fields of its data."""

    name: str
    severity: EventSeverity | str  # a text if it varies: the rule that sets it
    meaning: str  # one sentence: when the event is emitted
    fields: Mapping[str, str]  # field of the data -> its content
    in_stream: bool = True  # false: the event only raises alerts

    def event(
        self,
        message: str,
        data: Mapping[str, Any] | None = None,
        severity: EventSeverity | None = None,
    ) -> Event:
        """Return an event of this kind; `severity` is for kinds whose severity varies.

        Raises InvalidValue for data that the kind does not list, and for a missing severity.
        """
        if unknown := (data or {}).keys() - self.fields.keys():
            advice = f"{self.name} has the fields {', '.join(self.fields)}; list others in its kind"
            raise InvalidValue("data", sorted(unknown), advice)
        if severity is None:
            if not isinstance(self.severity, EventSeverity):
                advice = f"must be given for {self.name}: it is {self.severity}"
                raise InvalidValue("severity", severity, advice)
            severity = self.severity
        return Event(self.name, message, severity, data or {})


_HOST_LOAD = {
    "host": "name of the worker; missing for the cluster",
    "cpu_percent": "CPU in use, in percent",
    "memory_percent": "memory in use, in percent of its limit",
    "memory_mb": "memory in use, in MB",
}

PRESSURE_CHANGED = EventKind(
    "pressure.changed",
    "info for normal and elevated, warning for high, error for critical, critical for emergency",
    "The cluster level changed.",
    {
        "level": "the level after the change",
        "before": "the level before the change; missing in alerts",
        "why": "the reason for the level; missing in alerts",
        **{name: f"{content}; only in alerts" for name, content in _HOST_LOAD.items()},
        "worker_count": "number of slots; only in alerts",
        "active_executors": "number of busy slots; only in alerts",
    },
)
DEGRADATION_STARTED = EventKind(
    "degradation.started",
    EventSeverity.INFO,
    "The cluster level rose, so operations leave out work.",
    {
        "strategies": "list of the strategies in force",
        "host": "name of the worker; only in alerts, and missing for the cluster",
    },
)
DEGRADATION_ENDED = EventKind(
    "degradation.ended",
    EventSeverity.INFO,
    "The cluster level is normal again, so no work is left out.",
    {"strategies": "an empty list"},
)
BREAKER_OPENED = EventKind(
    "breaker.opened",
    EventSeverity.WARNING,
    "The monitor found that a breaker is no longer closed.",
    {
        "breaker": "name of the breaker",
        "open": "list of all breakers that are not closed",
        "host": "name of the worker; only in alerts, and missing for the cluster",
    },
)
BREAKER_CLOSED = EventKind(
    "breaker.closed",
    EventSeverity.INFO,
    "The monitor found that a breaker is closed again.",
    {"breaker": "name of the breaker", "open": "list of all breakers that are not closed"},
)
BREAKERS_OPEN = EventKind(
    "breakers.open",
    EventSeverity.ERROR,
    "Three or more breakers are open at once.",
    {"open": "list of all breakers that are not closed"},
    in_stream=False,
)
MEMORY_HIGH = EventKind(
    "memory.high",
    EventSeverity.WARNING,
    "A pool process or a host uses much memory; only events about a process are in the stream.",
    {
        **_HOST_LOAD,
        "memory_mb": "memory of the process or the host, in MB",
        "operation": "operation of the process's last node; missing for a host",
    },
)
CPU_HIGH = EventKind(
    "cpu.high",
    EventSeverity.WARNING,
    "A host or the cluster uses much CPU.",
    _HOST_LOAD,
    in_stream=False,
)
EXECUTION_SLOW = EventKind(
    "execution.slow",
    EventSeverity.WARNING,
    "An item, or a whole job, took longer than `RLM_ALERTS__SLOW_EXECUTION_MS`.",
    {
        "operation": "name of the operation",
        "job": "id of the job",
        "index": "index of the item; missing for a whole job",
        "duration_ms": "time of the item or the job, in milliseconds",
    },
)
_COMPARED = {
    "operation": "name of the operation",
    "change_percent": "change of the mean time of an item, in percent; null without a past",
    "recent_ms": "mean time of an item in the latest snapshots, in milliseconds",
    "past_ms": "mean time of an item before, in milliseconds",
}
PERFORMANCE_DEGRADED = EventKind(
    "performance.degraded",
    EventSeverity.WARNING,
    "The items of an operation take longer than before.",
    _COMPARED,
)
PERFORMANCE_RECOVERED = EventKind(
    "performance.recovered",
    EventSeverity.INFO,
    "The items of an operation no longer take longer, or its past has expired.",
    _COMPARED,
)
ERRORS_HIGH = EventKind(
    "errors.high",
    EventSeverity.WARNING,
    "More items of an operation failed than `RLM_SNAPSHOTS__ERROR_RATE` allows.",
    {
        "operation": "name of the operation",
        "failed": "number of items that failed since the snapshot before",
        "items": "number of items since the snapshot before",
        "percent": "failed items, in percent of these",
    },
)
FAULTS_ESCALATED = EventKind(
    "faults.escalated",
    EventSeverity.WARNING,
    "A fault of a service recurs so often that its severity was raised.",
    {
        "service": "name of the service, by default that of the operation",
        "code": "code of the fault",
        "severity": "severity of the fault now",
    },
)
ENDPOINT_ILL = EventKind(
    "endpoint.ill",
    EventSeverity.WARNING,
    "An endpoint of models failed its checks, and gets no calls.",
    {"endpoint": "name of the endpoint", "why": "the reason for the last failure"},
)
ENDPOINT_WELL = EventKind(
    "endpoint.well",
    EventSeverity.WARNING,
    "An endpoint of models passed a check again, and gets calls.",
    {"endpoint": "name of the endpoint"},
)
SCALING_ADVISED = EventKind(
    "scaling.advised",
    EventSeverity.INFO,
    "The advised number of workers changed.",
    {"desired_workers": "the advised number of workers", "why": "the reason for the change"},
)
ALERT_RAISED = EventKind(
    "alert.raised",
    "the severity of the alert",
    "An alert was raised and sent to the channels.",
    {
        "id": "id of the alert",
        "at": "time of the alert, in seconds of the server's clock",
        "kind": "name of the event that raised the alert",
        "subject": "the host, breaker, endpoint or operation, or `cluster`",
        "severity": "severity of the alert",
        "message": "text of the alert",
        "held_back": "number of alerts like it that were held back since the last one",
        "data": "data of the event that raised the alert",
    },
)

KINDS: Mapping[str, EventKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            PRESSURE_CHANGED,
            DEGRADATION_STARTED,
            DEGRADATION_ENDED,
            BREAKER_OPENED,
            BREAKER_CLOSED,
            BREAKERS_OPEN,
            MEMORY_HIGH,
            CPU_HIGH,
            EXECUTION_SLOW,
            PERFORMANCE_DEGRADED,
            PERFORMANCE_RECOVERED,
            ERRORS_HIGH,
            FAULTS_ESCALATED,
            ENDPOINT_ILL,
            ENDPOINT_WELL,
            SCALING_ADVISED,
            ALERT_RAISED,
        )
    }
)
"""All kinds of platform events, by name.  `docs/reference/events.md` is generated from it."""


# --- the stream -------------------------------------------------------------------------------


class Events:
    """The events of one platform."""

    def __init__(self, store: Store, history: int = 1000) -> None:
        self._store, self._history, self._key = store, history, Keys(store.namespace).events
        self._away = False

    def emit(self, *events: Event) -> None:
        """Log events and add them to the stream, in one round trip.

        While Redis is away events are logged but not stored, and nothing is raised.  Raises
        InvalidValue for a name that `KINDS` does not have.
        """
        _check(events)
        for each in events:
            log.log(
                each.severity,
                "%s %s: %s",
                each.severity.label,
                each.name,
                each.message,
                extra={"event": each.fields()},
            )
        self.keep(*events)

    def keep(self, *events: Event) -> None:
        """Add events to the stream that were logged elsewhere, in one round trip.

        While Redis is away they are not stored, and nothing is raised.  Raises InvalidValue for a
        name that `KINDS` does not have.
        """
        if not events:
            return
        _check(events)
        entries = [json.dumps(each.fields(), default=str) for each in events]
        try:
            call = Call(_EMIT, (self._key,), (self._history, *entries))
            self._store.call(call, on_outage="answer")
            self._away = False
        except StoreUnavailable as error:
            if not self._away:
                logger.info("Events are logged but not stored: %s", error)
            self._away = True

    def recent(self, limit: int = 50, name: str | None = None) -> list[Event]:
        """Return the newest events, newest first.

        With `name` only events of this name, or of a pattern such as ``breaker.*``.  Raises
        StoreUnavailable.
        """
        refuse_unless_count("limit", limit, least=0)
        [entries] = self._store.call(
            Call(NEWEST, (self._key,), (self._history if name else limit,)), on_outage="answer"
        )
        newest = (_event(*entry) for entry in paired(entries))
        return [each for each in newest if name is None or _matches(name, each.name)][:limit]

    def read(self, after_id: str, block_ms: int = 0) -> list[Event]:
        """Return the events after an id, oldest first and at most 100; wait up to `block_ms` for
        the first.

        The wait ends half a second before the socket timeout of the store, so it may be shorter, or
        0.  A stream without events is no outage.  Raises StoreUnavailable.
        """
        client = self._store.client
        timeout_s = client.connection_pool.connection_kwargs.get("socket_timeout")
        if timeout_s:
            block_ms = min(block_ms, int(timeout_s * 1000) - _SPARE_MS)
        try:
            answer: Any = client.xread(
                {self._key: after_id}, count=_BATCH, block=block_ms if block_ms > 0 else None
            )
        except (RedisError, OSError) as error:
            raise self._store.unavailable(error) from None
        return [_event(*entry) for _, entries in answer or () for entry in entries]


def paired(
    entries: Sequence[tuple[bytes, Sequence[bytes]]],
) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    """Yield id and fields of each entry of a stream, as scripts answer with them."""
    for id, flat in entries:
        yield id, dict(zip(flat[::2], flat[1::2], strict=True))


def _check(events: Sequence[Event]) -> None:
    for each in events:
        if each.name not in KINDS:
            advice = f"must be one of {', '.join(KINDS)}; scheduler.events lists the kinds"
            raise InvalidValue("name", each.name, advice)


UNREADABLE = "unreadable"
"""The name of an event that this release cannot read; it keeps its place in the stream."""


def _event(id: bytes, entry: Mapping[bytes, bytes]) -> Event:
    found = readable("an event of the platform", [(id, entry)], lambda each: _read_event(*each))
    return found[0] if found else _unreadable(id)


def _unreadable(id: bytes) -> Event:
    return Event(
        name=UNREADABLE,
        message="this event cannot be read: another release wrote it, or it is damaged",
        severity=EventSeverity.INFO,
        at=int(id.partition(b"-")[0]) / 1000,
        id=id.decode(),
    )


def _read_event(id: bytes, entry: Mapping[bytes, bytes]) -> Event:
    fields = json.loads(entry[b"event"])
    return Event(
        name=fields["name"],
        message=fields["message"],
        severity=EventSeverity[fields["severity"].upper()],
        data=fields["data"],
        at=float(entry[b"at"]),
        id=id.decode(),
    )


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1]))


class Listener:
    """A thread that calls functions with new events, in their order.

    After an outage of Redis it continues with the events that the stream still has; no event is
    delivered twice.
    """

    def __init__(
        self, events: Events, *, back_off: RetryPolicy = BACK_OFF, random: Random | None = None
    ) -> None:
        self._events, self._back_off, self._random = events, back_off, random or Random()
        self._callbacks: list[tuple[str, Callable[[Event], object]]] = []
        self._after, self._closed = "", threading.Event()
        self._thread = threading.Thread(target=self._run, name="rlm-events", daemon=True)

    def on(self, name: str, callback: Callable[[Event], object]) -> Listener:
        """Call a function with each event of a name, or of a pattern such as ``breaker.*``.

        The function runs in the listener's thread; an exception that it raises is logged.  Raises
        InvalidValue for a pattern that matches no event.
        """
        if not isinstance(name, str) or not name or "*" in name.removesuffix(".*"):
            raise InvalidValue(
                "name", name, "must be the name of an event, or end in .* as breaker.* does"
            )
        self._callbacks.append((name, callback))
        return self

    def start(self) -> Listener:
        """Start the thread: events that are emitted after the return are delivered.

        While Redis is away it starts, too; it then delivers events from the first answer on.
        """
        try:
            self._skip_to_newest()
        except StoreUnavailable as error:
            logger.info("Events are received as soon as Redis answers: %s", error)
        self._thread.start()
        return self

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread after the callback that runs now; return when it has ended, or after
        `timeout_s` seconds.
        """
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        for event in self._received():
            for pattern, callback in tuple(self._callbacks):
                if _matches(pattern, event.name):
                    _call(callback, event)

    def _received(self) -> Iterator[Event]:
        failures = 0
        while not self._closed.is_set():
            try:
                if not self._after:
                    self._skip_to_newest()
                batch = self._events.read(self._after, BLOCK_MS)
                failures = 0
            except StoreUnavailable as error:
                failures += 1
                if failures == 1:
                    logger.warning("No events are received until Redis answers: %s", error)
                self._closed.wait(self._back_off.delay_s(failures, self._random))
                continue
            if not batch:
                self._closed.wait(PAUSE_S)
            for event in batch:
                if self._closed.is_set():
                    return
                self._after = event.id
                yield event

    def _skip_to_newest(self) -> None:
        newest = self._events.recent(1)
        self._after = newest[0].id if newest else "0-0"


def _call(callback: Callable[[Event], object], event: Event) -> None:
    try:
        callback(event)
    except Exception:
        logger.exception("%s failed on %s", getattr(callback, "__qualname__", callback), event.name)
