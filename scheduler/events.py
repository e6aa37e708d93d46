"""What has happened on the platform, as a bounded stream that all workers and clients share.

Decides how an event is told: as a line of the log, and as an entry of the stream, which listeners
follow.  An event is a hint, the ledger is the truth: while Redis is away events are logged, and not
kept.  Refuses to know what anybody makes of an event."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from random import Random
from typing import Any

from redis.exceptions import RedisError

from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.retry import RetryPolicy
from resilience.store import Call, Script, Store

logger = logging.getLogger(__name__)
log = logging.getLogger("rlm.events")
"""Every event is one line here; its parts are in the record's ``event``."""

BLOCK_MS = 500
"""A listener asks for the next event this often, and notices that it was closed."""
PAUSE_S = 0.1
"""... and waits this long after silence, since a store of short timeouts does not wait for it."""
_SPARE_MS = 500
"""A server ends a wait by its own slow tick; only this much later the connection may count as
lost.
"""
BACK_OFF = RetryPolicy(initial_delay_s=0.5, max_delay_s=5.0)
_LONGEST = 500
"""Characters of a message: some quote what a service said, and that may be a page."""
_BATCH = 100

_EMIT = Script.load("scheduler", "event")
NEWEST = Script.load("scheduler", "event_newest")


class EventSeverity(IntEnum):
    """How much it matters to whoever operates the platform (source document 1); numbers are those
    of `logging`.
    """

    INFO = logging.INFO
    WARNING = logging.WARNING
    ERROR = logging.ERROR
    CRITICAL = logging.CRITICAL

    @property
    def label(self) -> str:
        """The name as it is shown and stored: ``warning``."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened: ``Event("breaker.opened", "breaker llm is open",
    EventSeverity.WARNING, {"breaker": "llm"})``.
    """

    name: str  # what, in the past tense
    message: str  # one sentence, kept on one line
    severity: EventSeverity = EventSeverity.INFO
    data: Mapping[str, Any] = field(
        default_factory=dict
    )  # plain JSON that anybody may see: no secrets
    at: float = 0.0  # seconds of the server's clock; 0 before it is in the stream
    id: str = ""  # its place in the stream

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", one_line(self.message))

    def fields(self) -> dict[str, Any]:
        """Return it as a dict of plain JSON."""
        about = {"name": self.name, "severity": self.severity.label, "message": self.message}
        return {"id": self.id, "at": self.at, **about, "data": dict(self.data)}


def one_line(text: str) -> str:
    """Return a text without line breaks and control characters, which would forge log lines, and
    not too long.
    """
    return " ".join(
        "".join(each if each.isprintable() else " " for each in text[:_LONGEST]).split()
    )


class Events:
    """The events of one platform."""

    def __init__(self, store: Store, history: int = 1000) -> None:
        self._store, self._history, self._key = store, history, Keys(store.namespace).events
        self._away = False

    def emit(self, *events: Event) -> None:
        """Log events and add them to the stream, in one round trip; raises nothing while Redis is
        away.
        """
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
        """Add events to the stream that were logged elsewhere, in one round trip; raises nothing
        while Redis is away.
        """
        if not events:
            return
        told = [json.dumps(each.fields(), default=str) for each in events]
        try:
            self._store.call(Call(_EMIT, (self._key,), (self._history, *told)), on_outage="answer")
            self._away = False
        except StoreUnavailable as error:
            if not self._away:
                logger.info("events are logged, and not kept: %s", error)
            self._away = True

    def recent(self, limit: int = 50, name: str | None = None) -> list[Event]:
        """Return the newest events, newest first; only those of a name, or of a pattern as
        `Listener.on` takes it.

        Raises StoreUnavailable.
        """
        [entries] = self._store.call(
            Call(NEWEST, (self._key,), (self._history if name else limit,)), on_outage="answer"
        )
        found = (_event(*entry) for entry in paired(entries))
        return [each for each in found if name is None or _matches(name, each.name)][:limit]

    def read(self, after_id: str, block_ms: int = 0) -> list[Event]:
        """Return what came after an event, oldest first and at most a hundred; wait up to
        `block_ms` for the first.

        It waits less, or not at all, for a store whose timeout is not half a second longer: silence
        is no outage. Raises StoreUnavailable."""
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
    """Yield the entries of a stream as a script answers them, each with its fields by name."""
    for id, flat in entries:
        yield id, dict(zip(flat[::2], flat[1::2], strict=True))


def _event(id: bytes, entry: Mapping[bytes, bytes]) -> Event:
    told = json.loads(entry[b"event"])
    return Event(
        name=told["name"],
        message=told["message"],
        severity=EventSeverity[told["severity"].upper()],
        data=told["data"],
        at=float(entry[b"at"]),
        id=id.decode(),
    )


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1]))


class Listener:
    """A thread that hands events to callbacks, from now on and in their order.

    It survives a lost Redis: what is still in the stream afterwards is handed on, nothing twice.
    """

    def __init__(
        self, events: Events, *, back_off: RetryPolicy = BACK_OFF, random: Random | None = None
    ) -> None:
        self._events, self._back_off, self._random = events, back_off, random or Random()
        self._callbacks: list[tuple[str, Callable[[Event], object]]] = []
        self._after, self._closed = "", threading.Event()
        self._thread = threading.Thread(target=self._run, name="rlm-events", daemon=True)

    def on(self, name: str, callback: Callable[[Event], object]) -> Listener:
        """Call a function with each event of a name, or of all names of a kind: ``breaker.*``.

        It runs in the listener's thread; what it raises is logged.  Raises InvalidValue.
        """
        if not name or "*" in name.removesuffix(".*"):
            raise InvalidValue(
                "name", name, "must be the name of an event, or end in .* as breaker.* does"
            )
        self._callbacks.append((name, callback))
        return self

    def start(self) -> Listener:
        """Begin to listen: what is emitted after this returns is heard."""
        try:
            self._find_now()
        except StoreUnavailable as error:
            logger.info("events are heard as soon as Redis answers: %s", error)
        self._thread.start()
        return self

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread, after the callback that runs; returns when it has ended, or after
        `timeout_s`.
        """
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        for event in self._heard():
            for pattern, callback in tuple(self._callbacks):
                if _matches(pattern, event.name):
                    _call(callback, event)

    def _heard(self) -> Iterator[Event]:
        failures = 0
        while not self._closed.is_set():
            try:
                if not self._after:
                    self._find_now()
                found = self._events.read(self._after, BLOCK_MS)
                failures = 0
            except StoreUnavailable as error:
                failures += 1
                if failures == 1:
                    logger.warning("no events are heard until Redis answers: %s", error)
                self._closed.wait(self._back_off.delay_s(failures, self._random))
                continue
            if not found:
                self._closed.wait(PAUSE_S)
            for event in found:
                if self._closed.is_set():
                    return
                self._after = event.id
                yield event

    def _find_now(self) -> None:
        newest = self._events.recent(1)
        self._after = newest[0].id if newest else "0-0"


def _call(callback: Callable[[Event], object], event: Event) -> None:
    try:
        callback(event)
    except Exception:
        logger.exception("%s failed on %s", getattr(callback, "__qualname__", callback), event.name)
