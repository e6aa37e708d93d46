"""Who is told what goes wrong, how badly, and how often.

Decides which events raise an alert (RULES), lets no two of a kind and subject follow each other too
soon over all processes, and hands alerts to the channels.  Refuses to know how anything was
measured, and who reads an alert."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import queue
import secrets
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from random import Random
from typing import Any, NamedTuple, TextIO
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from resilience.degradation import THRESHOLDS, Level, as_level
from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.retry import Retry, RetryPolicy
from resilience.store import Argument, Call, Script, Store
from scheduler.events import NEWEST, Event, Events, EventSeverity, one_line, paired
from scheduler.settings import AlertSettings

__all__ = ["Alert", "AlertChannel", "Alerts", "ResourcePressureEvent", "Webhook", "sign", "verify"]

logger = logging.getLogger(__name__)
log = logging.getLogger("rlm.alerts")
"""The channel LOG: every alert is one line here; its parts are in the record's ``alert``."""

SEVERAL = 3
"""So many breakers that are open at once are a problem of their own: source document 1 says
"multiple".
"""
MEMORY_PCT = THRESHOLDS[Level.HIGH - 1]
"""Percent of a host's memory in use that is warned of: where source document 1 begins to leave work
out.
"""
TIMEOUT_S = 5.0
"""A webhook's receiver that is silent for longer has not got the alert."""
ATTEMPTS = RetryPolicy(max_attempts=3, initial_delay_s=1.0, max_delay_s=10.0, deadline_s=60.0)
WAITING = 100
"""Alerts that wait for a webhook; further ones are not sent to it, they are in the history."""
RECENT = 10
REMEMBERED = 1000
"""Kinds and subjects of alerts a process remembers for when Redis is away."""
_MINUTE = 60.0

_RAISE, _COUNTS = Script.load("scheduler", "alert"), Script.load("scheduler", "alert_counts")


class AlertChannel(StrEnum):
    """Where alerts go (source document 1)."""

    LOG = "log"
    WEBHOOK = "webhook"
    SIGNAL = "signal"  # a callback
    STDOUT = "stdout"


class AlertRule(NamedTuple):
    """How an event is alerted."""

    severity: EventSeverity
    interval_s: float  # none as bad of its kind and subject within this
    about: str = (
        ""  # the datum of the event that names its subject; without it the subject is the cluster
    )


RULES: dict[str, AlertRule] = {
    "memory.high": AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "host"),
    "cpu.high": AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "host"),
    "pressure.elevated": AlertRule(EventSeverity.INFO, 10 * _MINUTE, "host"),
    "pressure.high": AlertRule(EventSeverity.WARNING, 7 * _MINUTE, "host"),
    "pressure.critical": AlertRule(EventSeverity.ERROR, 4 * _MINUTE, "host"),
    "pressure.emergency": AlertRule(EventSeverity.CRITICAL, 2 * _MINUTE, "host"),
    "breaker.opened": AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "breaker"),
    "endpoint.ill": AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "endpoint"),
    "breakers.open": AlertRule(EventSeverity.ERROR, 5 * _MINUTE),
    "degradation.started": AlertRule(EventSeverity.INFO, 10 * _MINUTE, "host"),
    "execution.slow": AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "operation"),
    "performance.degraded": AlertRule(EventSeverity.WARNING, 10 * _MINUTE, "operation"),
}
"""Severities and intervals of source document 1, which knows no comparison with the past; it gives
pressure 2 to 10 minutes "based on level".

An event ``pressure.changed`` is looked up by the level in its data.  All levels of a host are one
kind: a worse one than the last is told at once. """


@dataclass(frozen=True, slots=True)
class ResourcePressureEvent:
    """How a host, or the cluster, stands (the record of source document 1)."""

    timestamp: datetime
    pressure_level: Level | str | int
    cpu_percent: float
    memory_mb: float
    memory_percent: float
    worker_count: int
    active_executors: int
    degradation_applied: Sequence[str] = ()
    circuit_breakers_open: Sequence[str] = ()
    message: str = ""
    host: str = ""

    def events(self, cpu_pct: float, memory_pct: float = MEMORY_PCT) -> Iterator[Event]:
        """Return what is to be said of it.  Raises ValueError for an unknown level."""
        level, host = as_level(self.pressure_level).label, {"host": self.host} if self.host else {}
        load = {
            "cpu_percent": self.cpu_percent,
            "memory_percent": self.memory_percent,
            "memory_mb": self.memory_mb,
        }
        work = {"worker_count": self.worker_count, "active_executors": self.active_executors}
        said = (
            self.message
            or f"pressure is {level}: memory {self.memory_percent:.4g} %, CPU {self.cpu_percent:.4g} %"
        )
        yield Event("pressure.changed", said, data={**host, "level": level, **load, **work})
        if self.memory_percent >= memory_pct:
            yield Event(
                "memory.high",
                f"memory is {self.memory_percent:.4g} % in use ({self.memory_mb:.0f} MB)",
                data=host | load,
            )
        if self.cpu_percent >= cpu_pct:
            yield Event("cpu.high", f"CPU is {self.cpu_percent:.4g} % in use", data=host | load)
        for name in self.circuit_breakers_open:
            yield Event("breaker.opened", f"breaker {name} is open", data=host | {"breaker": name})
        if self.degradation_applied:
            strategies = list(self.degradation_applied)
            yield Event(
                "degradation.started",
                f"degraded: {', '.join(strategies)}",
                data=host | {"strategies": strategies},
            )


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert, as every channel is told it."""

    kind: str  # the event's name
    subject: str  # a host, a breaker, an operation, or the cluster
    severity: EventSeverity
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    held_back: int = 0  # so many like it were not told since the last one
    at: float = 0.0  # seconds of the server's clock

    @property
    def pressure_level(self) -> str:
        """The pressure level it tells of; empty when it tells of something else."""
        return str(self.data.get("level", ""))

    def fields(self) -> dict[str, Any]:
        """Return it as a dict of plain JSON."""
        about = {
            "kind": self.kind,
            "subject": self.subject,
            "severity": self.severity.label,
            "message": self.message,
        }
        return {
            "id": self.id,
            "at": self.at,
            **about,
            "held_back": self.held_back,
            "data": dict(self.data),
        }


class _Draft(NamedTuple):
    """An alert that may be held back."""

    alert: Alert
    interval_s: float


@dataclass(slots=True)
class _Last:
    """The last alert of a kind and subject that this process raised."""

    at_s: float
    severity: EventSeverity
    held_back: int = 0


class Alerts:
    """The alerts of one platform: process an event in every process that sees it, and it is told
    once.
    """

    def __init__(
        self,
        store: Store,
        settings: AlertSettings = AlertSettings(),  # noqa: B008  # frozen
        events: Events | None = None,
        callback: Callable[[Alert], object] | None = None,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        stream: TextIO | None = None,
        colour: bool | None = None,
    ) -> None:
        """`callback` runs in the caller's thread, and should be quick; `stream` None is the
        standard output.

        `colour` None colours a terminal; give False where NO_COLOR is set.  `clock` gives seconds
        of the day's time. Raises InvalidValue for a webhook without a usable URL."""
        self._store, self._settings, self._events, self._clock = store, settings, events, clock
        self._keys = Keys(store.namespace)
        self._stream, self._colour = stream, colour
        self._last: dict[str, _Last] = {}
        self._webhook = _webhook(settings, clock, sleep, store.random)
        known: dict[str, Callable[[Alert], object]] = {"log": _write_log, "stdout": self._print}
        if self._webhook:
            known["webhook"] = self._webhook.send_alert
        self._tell = {AlertChannel(name): known[name] for name in settings.channels}
        if callback:
            self._tell[AlertChannel.SIGNAL] = callback

    @property
    def channels(self) -> tuple[AlertChannel, ...]:
        """Where alerts go."""
        return tuple(self._tell)

    @property
    def webhook_url(self) -> str:
        """The webhook's scheme and host, without what may be secret in its URL; empty when there is
        none.
        """
        return self._webhook.shown if self._webhook else ""

    def process_event(self, event: Event | ResourcePressureEvent) -> list[Alert]:
        """Raise the alerts of an event, tell them on all channels, and return them; those held back
        are only counted.

        While Redis is away each process limits its own.  Raises ValueError for an unknown pressure
        level."""
        drafts = [draft for each in self._said(event) if (draft := _draft(each))]
        raised = self._raise(drafts) if drafts else []
        for alert in raised:
            self._hand_out(alert)
        if self._events:
            self._events.keep(
                *(
                    Event("alert.raised", each.message, each.severity, each.fields())
                    for each in raised
                )
            )
        return raised

    def history(self, limit: int = 50) -> list[Alert]:
        """Return the newest alerts, newest first.  Raises StoreUnavailable."""
        [entries] = self._store.call(self._newest(limit), on_outage="answer")
        return _read(entries)

    def get_alert_summary(self) -> dict[str, Any]:
        """Return the `summary`, by its name in source document 1."""
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Return how many alerts there were, in all and of late, and the last ten (source document
        1).

        Those raised while Redis was away are not among them.  Raises StoreUnavailable.
        """
        _, day, totals = self._keys.alerts()
        (hour, last_day, flat), entries = self._store.call(
            Call(_COUNTS, (day, totals), ()), self._newest(RECENT), on_outage="answer"
        )
        counted = {
            name.decode(): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)
        }
        return {
            "total_alerts": sum(counted.values()),
            "last_hour": hour,
            "last_24_hours": last_day,
            "by_severity": {each.label: counted.get(each.label, 0) for each in EventSeverity},
            "recent_alerts": [each.fields() for each in _read(entries)],
        }

    def close(self, timeout_s: float = 5.0) -> bool:
        """Send what waits for the webhook; return whether all of it went out in time."""
        return self._webhook.close(timeout_s) if self._webhook else True

    # --- deciding ------------------------------------------------------------------------------

    def _said(self, event: Event | ResourcePressureEvent) -> Iterator[Event]:
        """Yield what an event says; a breaker's may name all that are ``open``."""
        if isinstance(event, ResourcePressureEvent):
            yield from event.events(self._settings.cpu_pct)
            opened = event.circuit_breakers_open
        else:
            yield event
            opened = event.data.get("open", ()) if event.name == "breaker.opened" else ()
        if len(opened) >= SEVERAL:
            yield Event(
                "breakers.open",
                f"{len(opened)} breakers are open: {', '.join(opened)}",
                data={"open": list(opened)},
            )

    def _raise(self, drafts: Sequence[_Draft]) -> list[Alert]:
        gates = [self._keys.alert(each.alert.kind, each.alert.subject) for each in drafts]
        args: list[Argument] = [self._settings.history]
        for alert, interval_s in drafts:
            told = json.dumps(alert.fields(), default=str)
            args += (
                alert.id,
                alert.severity.label,
                int(alert.severity),
                round(interval_s * 1000),
                told,
            )
        try:
            [answers] = self._store.call(
                Call(_RAISE, (*self._keys.alerts(), *gates), args), on_outage="answer"
            )
        except StoreUnavailable:
            return [found for each in drafts if (found := self._raise_alone(*each))]
        verdicts = zip(drafts, answers, strict=True)
        raised = [
            _told(draft.alert, float(at), held_back)
            for draft, (is_raised, held_back, at) in verdicts
            if is_raised
        ]
        for alert in raised:
            self._remember(alert)
        return raised

    def _raise_alone(self, alert: Alert, interval_s: float) -> Alert | None:
        """Decide as the script does, by what this process has raised itself."""
        last = self._last.get(f"{alert.kind}:{alert.subject}")
        if (
            last
            and self._store.clock() - last.at_s < interval_s
            and alert.severity <= last.severity
        ):
            last.held_back += 1
            return None
        self._remember(alert)
        return _told(alert, self._clock(), last.held_back if last else 0)

    def _remember(self, alert: Alert) -> None:
        gate = f"{alert.kind}:{alert.subject}"
        self._last.pop(gate, None)  # to the end: the first is the oldest
        self._last[gate] = _Last(self._store.clock(), alert.severity)
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]

    def _newest(self, limit: int) -> Call:
        return Call(NEWEST, (self._keys.alerts().history,), (limit,))

    # --- telling -------------------------------------------------------------------------------

    def _hand_out(self, alert: Alert) -> None:
        for channel, tell in self._tell.items():
            try:
                tell(alert)
            except Exception:
                name = getattr(tell, "__qualname__", tell)
                logger.exception(
                    "alert %s was not told on channel %s (%s)", alert.id, channel.value, name
                )

    def _print(self, alert: Alert) -> None:
        stream = self._stream or sys.stdout
        coloured = stream.isatty() if self._colour is None else self._colour
        line = f"{alert.severity.name:<8} {alert.kind} [{alert.subject}] {alert.message}"
        print(
            f"\x1b[{_COLOURS[alert.severity]}m{line}\x1b[0m" if coloured else line,
            file=stream,
            flush=True,
        )


_COLOURS = {
    EventSeverity.INFO: "36",
    EventSeverity.WARNING: "33",
    EventSeverity.ERROR: "31",
    EventSeverity.CRITICAL: "1;37;41",
}
"""Cyan, yellow, red, and white on red."""


def _draft(event: Event) -> _Draft | None:
    named = (
        f"pressure.{event.data.get('level')}" if event.name == "pressure.changed" else event.name
    )
    rule = RULES.get(named)
    if rule is None:
        return None
    subject = one_line(str(event.data.get(rule.about) or "cluster"))
    alert = Alert(
        kind=event.name,
        subject=subject,
        severity=rule.severity,
        message=event.message,
        data=event.data,
        id=secrets.token_hex(8),
    )
    return _Draft(alert, rule.interval_s)


def _told(alert: Alert, at: float, held_back: int) -> Alert:
    more = f" ({held_back} more like this were held back)" if held_back else ""
    return replace(alert, at=at, held_back=held_back, message=alert.message + more)


def _read(entries: Sequence[tuple[bytes, Sequence[bytes]]]) -> list[Alert]:
    found = []
    for _, entry in paired(entries):
        told = json.loads(entry[b"alert"])
        severity = EventSeverity[told["severity"].upper()]
        alert = Alert(
            kind=told["kind"],
            subject=told["subject"],
            severity=severity,
            message=told["message"],
            data=told["data"],
            id=told["id"],
        )
        found.append(_told(alert, float(entry[b"at"]), int(entry[b"held"])))
    return found


def _write_log(alert: Alert) -> None:
    told = (alert.severity.label, alert.kind, alert.subject, alert.message)
    log.log(alert.severity, "%s %s [%s]: %s", *told, extra={"alert": alert.fields()})


# --- webhooks ---------------------------------------------------------------------------------


def sign(body: bytes, timestamp: str, secret: str) -> str:
    """Return what stands in ``X-RLM-Signature``: the HMAC-SHA256 of ``<timestamp>.<body>``."""
    return (
        "sha256="
        + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    )


def verify(body: bytes, timestamp: str, signature: str, secret: str) -> bool:
    """Say, in constant time, whether a webhook came from who knows the secret.

    A receiver gives the raw body and the headers ``X-RLM-Timestamp`` and ``X-RLM-Signature``, and
    should refuse a timestamp (seconds since 1970) that is some minutes old: it may be a replay."""
    return hmac.compare_digest(sign(body, timestamp, secret).encode(), signature.encode())


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any) -> None:
        """Follow none: what is signed for one receiver is not for another."""


class Webhook:
    """POSTs JSON to one receiver from a thread of its own, so that no caller ever waits for it."""

    def __init__(
        self,
        url: str,
        secret: str = "",
        *,
        clock: Callable[[], float] = time.time,
        retry: Retry | None = None,
        timeout_s: float = TIMEOUT_S,
        waiting: int = WAITING,
    ) -> None:
        """`clock` gives seconds of the day's time; `retry` is three attempts unless told
        otherwise.  Raises InvalidValue.
        """
        self.shown, self._url, self._authorization = _parts(url)
        self._secret, self._clock, self._retry, self._timeout_s = (
            secret,
            clock,
            retry or Retry(ATTEMPTS),
            timeout_s,
        )
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._waiting: queue.Queue[tuple[str, bytes] | None] = queue.Queue(waiting)
        self._thread: threading.Thread | None = None
        self._starting, self._failing = threading.Lock(), False

    def send_alert(self, alert: Alert) -> None:
        """Send an alert; its id lets the receiver tell a second delivery from a second alert."""
        self.send(alert.id, alert.fields())

    def send(self, id: str, fields: Mapping[str, Any]) -> None:
        """Have something sent; what does not fit into the queue is not sent, and that is logged."""
        try:
            self._waiting.put_nowait((id, json.dumps(fields, default=str).encode()))
        except queue.Full:
            self._gave_up("its queue is full")
            return
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="rlm-webhook", daemon=True)
                self._thread.start()

    def close(self, timeout_s: float = 5.0) -> bool:
        """Send what waits and end the thread; return whether it was done in time.  A later `send`
        begins again.
        """
        until = time.monotonic() + timeout_s
        if self._thread is None or not self._thread.is_alive():
            return True
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (each := self._waiting.get()) is not None:
            self._deliver(*each)

    def _deliver(self, id: str, body: bytes) -> None:
        try:
            self._retry.call(self._post, id, body)
        except Exception as error:
            self._gave_up(_reason(error))
            return
        if self._failing:
            logger.info("webhook at %s answers again", self.shown)
        self._failing = False

    def _post(self, id: str, body: bytes) -> None:
        timestamp = str(int(self._clock()))
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": id,
            "X-RLM-Timestamp": timestamp,
        } | self._authorization
        if self._secret:
            headers["X-RLM-Signature"] = sign(body, timestamp, self._secret)
        request = urllib.request.Request(self._url, body, headers, method="POST")  # noqa: S310  # http and https: `_parts`
        try:
            self._opener.open(request, timeout=self._timeout_s).close()
        except HTTPError as error:
            error.close()
            raise

    def _gave_up(self, why: str) -> None:
        """Log the first of an outage; never the URL or an error's text, which may hold what is
        secret.
        """
        if not self._failing:
            logger.warning(
                "webhook at %s fails (%s); what it misses is not sent again", self.shown, why
            )
        self._failing = True


def _webhook(
    settings: AlertSettings,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    random: Random,
) -> Webhook | None:
    if "webhook" not in settings.channels:
        return None
    retry = Retry(ATTEMPTS, random=random, sleep=sleep)
    return Webhook(settings.webhook_url, settings.webhook_secret, clock=clock, retry=retry)


def _parts(url: str) -> tuple[str, str, dict[str, str]]:
    """Return a URL as it may be shown, the URL without user and password, and the header that
    carries these.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or " " in url:
        shown = f"{parts.scheme}://{host or ''}" if parts.scheme else ""
        raise InvalidValue(
            "alerts.webhook_url",
            shown,
            "must be a URL that begins with http:// or https:// and names a host",
        )
    place = f"[{host}]" if ":" in host else host
    place += f":{port}" if port else ""
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    secret = (
        {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}
        if parts.username
        else {}
    )
    return f"{parts.scheme}://{place}", parts._replace(netloc=place, fragment="").geturl(), secret


def _reason(error: BaseException) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP {error.code}"
    cause = getattr(error, "reason", None)
    return type(cause if isinstance(cause, Exception) else error).__name__
