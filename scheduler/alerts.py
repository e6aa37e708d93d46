"""Alerts: which events raise one, how often at most, and the channels that they are sent to.

`RULES` lists the events that raise alerts.  Over all processes, a second alert of one kind and
subject is held back until its interval has passed, unless it is more severe.  The monitor calls
`Alerts.process_event`; clients read `history` and `summary`.  Begin with `RULES`, then
`process_event`.
"""

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
from resilience.errors import InvalidValue, StoreUnavailable, refuse_unless_count
from resilience.keys import Keys
from resilience.retry import Retry, RetryPolicy
from resilience.store import Argument, Call, Script, Store
from resilience.validation import readable
from scheduler.events import (
    ALERT_RAISED,
    BREAKER_OPENED,
    BREAKERS_OPEN,
    CPU_HIGH,
    DEGRADATION_STARTED,
    ENDPOINT_ILL,
    ERRORS_HIGH,
    EXECUTION_SLOW,
    FAULTS_ESCALATED,
    LEVEL_SEVERITIES,
    MEMORY_HIGH,
    NEWEST,
    PERFORMANCE_DEGRADED,
    PRESSURE_CHANGED,
    Event,
    Events,
    EventSeverity,
    one_line,
    paired,
)
from scheduler.settings import AlertSettings

__all__ = ["Alert", "AlertChannel", "Alerts", "ResourcePressureEvent", "Webhook", "sign", "verify"]

logger = logging.getLogger(__name__)
log = logging.getLogger("rlm.alerts")
"""The logger of the channel LOG: one line for each alert, with its fields in the record's
``alert``.
"""

SEVERAL = 3
"""This number of breakers that are open at once raises a separate alert."""
MEMORY_PCT = THRESHOLDS[Level.HIGH - 1]
"""A host with this percentage of its memory in use raises `memory.high`: the threshold of high, at
which expensive work is left out.
"""
TIMEOUT_S = 5.0
"""A webhook's receiver that does not answer for this long counts as failed."""
ATTEMPTS = RetryPolicy(max_attempts=3, initial_delay_s=1.0, max_delay_s=10.0, deadline_s=60.0)
WAITING = 100
"""Most alerts that wait for a webhook; further alerts are in the history, but not sent to it."""
RECENT = 10
REMEMBERED = 1000
"""Most pairs of kind and subject that a process remembers, for the time when Redis is away."""
_MINUTE = 60.0

_RAISE, _COUNTS = Script.load("scheduler", "alert"), Script.load("scheduler", "alert_counts")


class AlertChannel(StrEnum):
    """The places that alerts are sent to."""

    LOG = "log"
    WEBHOOK = "webhook"
    SIGNAL = "signal"  # a callback
    STDOUT = "stdout"


class AlertRule(NamedTuple):
    """The alert that an event raises."""

    severity: EventSeverity
    interval_s: float  # shortest time between two alerts as severe of one kind and subject
    about: str = ""  # field of the event's data with the subject; '' or missing: the cluster


RULES: dict[str, AlertRule] = {
    MEMORY_HIGH.name: AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "host"),
    CPU_HIGH.name: AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "host"),
    "pressure.elevated": AlertRule(LEVEL_SEVERITIES[Level.ELEVATED], 10 * _MINUTE, "host"),
    "pressure.high": AlertRule(LEVEL_SEVERITIES[Level.HIGH], 7 * _MINUTE, "host"),
    "pressure.critical": AlertRule(LEVEL_SEVERITIES[Level.CRITICAL], 4 * _MINUTE, "host"),
    "pressure.emergency": AlertRule(LEVEL_SEVERITIES[Level.EMERGENCY], 2 * _MINUTE, "host"),
    BREAKER_OPENED.name: AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "breaker"),
    ENDPOINT_ILL.name: AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "endpoint"),
    BREAKERS_OPEN.name: AlertRule(EventSeverity.ERROR, 5 * _MINUTE),
    DEGRADATION_STARTED.name: AlertRule(EventSeverity.INFO, 10 * _MINUTE, "host"),
    EXECUTION_SLOW.name: AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "operation"),
    ERRORS_HIGH.name: AlertRule(EventSeverity.WARNING, 10 * _MINUTE, "operation"),
    FAULTS_ESCALATED.name: AlertRule(EventSeverity.WARNING, 5 * _MINUTE, "service"),
    PERFORMANCE_DEGRADED.name: AlertRule(EventSeverity.WARNING, 10 * _MINUTE, "operation"),
}
"""The rule of each event that raises an alert, by the event's name.

An event ``pressure.changed`` has its rule under ``pressure.<level>``, by the level in its data.
All levels of a host are one kind, so a worse level than the last raises an alert at once.
"""


@dataclass(frozen=True, slots=True)
class ResourcePressureEvent:
    """The load and the pressure of a host or of the cluster at one time."""

    timestamp: datetime
    pressure_level: Level | str | int
    cpu_percent: float
    memory_mb: float
    memory_percent: float
    worker_count: int  # number of slots
    active_executors: int  # number of busy slots
    degradation_applied: Sequence[str] = ()  # strategies in force
    circuit_breakers_open: Sequence[str] = ()  # names of breakers
    message: str = ""
    host: str = ""  # name of the worker; '' for the cluster

    def events(self, cpu_pct: float, memory_pct: float = MEMORY_PCT) -> Iterator[Event]:
        """Yield the events of the record.  Raises InvalidValue for an unknown level."""
        level, host = as_level(self.pressure_level), {"host": self.host} if self.host else {}
        cpu, memory = f"{self.cpu_percent:.4g} %", f"{self.memory_percent:.4g} %"
        load = {
            "cpu_percent": self.cpu_percent,
            "memory_percent": self.memory_percent,
            "memory_mb": self.memory_mb,
        }
        work = {"worker_count": self.worker_count, "active_executors": self.active_executors}
        message = self.message or f"pressure is {level.label}: memory {memory}, CPU {cpu}"
        yield PRESSURE_CHANGED.event(
            message, {**host, "level": level.label, **load, **work}, LEVEL_SEVERITIES[level]
        )
        if self.memory_percent >= memory_pct:
            message = f"memory is {memory} in use ({self.memory_mb:.0f} MB)"
            yield MEMORY_HIGH.event(message, host | load)
        if self.cpu_percent >= cpu_pct:
            yield CPU_HIGH.event(f"CPU is {cpu} in use", host | load)
        for name in self.circuit_breakers_open:
            yield BREAKER_OPENED.event(f"breaker {name} is open", host | {"breaker": name})
        if self.degradation_applied:
            strategies = list(self.degradation_applied)
            message = f"degraded: {', '.join(strategies)}"
            yield DEGRADATION_STARTED.event(message, host | {"strategies": strategies})


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert, as every channel gets it."""

    kind: str  # name of the event
    subject: str  # the host, breaker, service, endpoint or operation, or ``cluster``
    severity: EventSeverity
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)  # data of the event
    id: str = ""
    held_back: int = 0  # number of alerts like it that were held back since the last one
    at: float = 0.0  # seconds of the server's clock

    @property
    def pressure_level(self) -> str:
        """The pressure level in the alert's data; empty if the alert is about something else."""
        return str(self.data.get("level", ""))

    def fields(self) -> dict[str, Any]:
        """Return the alert as a dict of plain JSON."""
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
    """The alerts of one platform.  Several processes may process the same event: it raises one
    alert.
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
        """`callback` runs in the caller's thread, and should be quick.

        `stream` None is the standard output.  `colour` None colours a terminal; pass False if
        NO_COLOR is set.  `clock` returns seconds since 1970.  Raises InvalidValue for a webhook
        without a usable URL.
        """
        self._store, self._settings, self._events, self._clock = store, settings, events, clock
        self._keys = Keys(store.namespace)
        self._stream, self._colour = stream, colour
        self._last: dict[str, _Last] = {}
        self._webhook = _webhook(settings, clock, sleep, store.random)
        known: dict[str, Callable[[Alert], object]] = {"log": _write_log, "stdout": self._print}
        if self._webhook:
            known["webhook"] = self._webhook.send_alert
        self._channels = {AlertChannel(name): known[name] for name in settings.channels}
        if callback:
            self._channels[AlertChannel.SIGNAL] = callback

    @property
    def channels(self) -> tuple[AlertChannel, ...]:
        """The channels that alerts are sent to."""
        return tuple(self._channels)

    @property
    def webhook_url(self) -> str:
        """Scheme and host of the webhook's URL, without its secrets; empty without a webhook."""
        return self._webhook.shown if self._webhook else ""

    def process_event(self, event: Event | ResourcePressureEvent) -> list[Alert]:
        """Raise the alerts of an event, send them to all channels, and return them.

        Alerts that are held back are counted, and not returned.  While Redis is away each process
        limits its own alerts.  Raises ValueError for an unknown pressure level.
        """
        drafts = [draft for each in self._events_of(event) if (draft := _draft(each))]
        raised = self._raise(drafts) if drafts else []
        for alert in raised:
            self._send(alert)
        if self._events:
            self._events.keep(
                *(ALERT_RAISED.event(each.message, each.fields(), each.severity) for each in raised)
            )
        return raised

    def history(self, limit: int = 50) -> list[Alert]:
        """Return the newest alerts, newest first.  Raises InvalidValue, StoreUnavailable."""
        refuse_unless_count("limit", limit, least=0)
        [entries] = self._store.call(self._newest(limit), on_outage="answer")
        return _alerts(entries)

    def get_alert_summary(self) -> dict[str, Any]:
        """Return `summary`, under the name that other orchestrators use.

        Raises StoreUnavailable.
        """
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Return the number of alerts in all, of the last hour and day, and by severity, with the
        last ten alerts.

        Alerts that were raised while Redis was away do not count.  Raises StoreUnavailable.
        """
        _, day, totals = self._keys.alerts()
        (hour, last_day, flat), entries = self._store.call(
            Call(_COUNTS, (day, totals), ()), self._newest(RECENT), on_outage="answer"
        )
        totals_by_severity = {
            name.decode(): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)
        }
        return {
            "total_alerts": sum(totals_by_severity.values()),
            "last_hour": hour,
            "last_24_hours": last_day,
            "by_severity": {
                each.label: totals_by_severity.get(each.label, 0) for each in EventSeverity
            },
            "recent_alerts": [each.fields() for each in _alerts(entries)],
        }

    def close(self, timeout_s: float = 5.0) -> bool:
        """Send the alerts that wait for the webhook; return whether all were sent in time."""
        return self._webhook.close(timeout_s) if self._webhook else True

    # --- raising -------------------------------------------------------------------------------

    def _events_of(self, event: Event | ResourcePressureEvent) -> Iterator[Event]:
        """Yield the events to alert; three or more open breakers also make one event together."""
        if isinstance(event, ResourcePressureEvent):
            yield from event.events(self._settings.cpu_pct)
            opened = event.circuit_breakers_open
        else:
            yield event
            opened = event.data.get("open", ()) if event.name == BREAKER_OPENED.name else ()
        if len(opened) >= SEVERAL:
            message = f"{len(opened)} breakers are open: {', '.join(opened)}"
            yield BREAKERS_OPEN.event(message, {"open": list(opened)})

    def _raise(self, drafts: Sequence[_Draft]) -> list[Alert]:
        gates = [self._keys.alert(each.alert.kind, each.alert.subject) for each in drafts]
        args: list[Argument] = [self._settings.history]
        for alert, interval_s in drafts:
            severity, interval_ms = alert.severity, round(interval_s * 1000)
            args += (alert.id, severity.label, int(severity), interval_ms)
            args.append(json.dumps(alert.fields(), default=str))
        try:
            [answers] = self._store.call(
                Call(_RAISE, (*self._keys.alerts(), *gates), args), on_outage="answer"
            )
        except StoreUnavailable:
            return [own for each in drafts if (own := self._raise_alone(*each))]
        verdicts = zip(drafts, answers, strict=True)
        raised = [
            _completed(draft.alert, float(at), held_back)
            for draft, (is_raised, held_back, at) in verdicts
            if is_raised
        ]
        for alert in raised:
            self._remember(alert)
        return raised

    def _raise_alone(self, alert: Alert, interval_s: float) -> Alert | None:
        """Apply the script's rule to the alerts that this process has raised itself."""
        last = self._last.get(f"{alert.kind}:{alert.subject}")
        if (
            last
            and self._store.clock() - last.at_s < interval_s
            and alert.severity <= last.severity
        ):
            last.held_back += 1
            return None
        self._remember(alert)
        return _completed(alert, self._clock(), last.held_back if last else 0)

    def _remember(self, alert: Alert) -> None:
        gate = f"{alert.kind}:{alert.subject}"
        self._last.pop(gate, None)  # an entry moves to the end: the first is the oldest
        self._last[gate] = _Last(self._store.clock(), alert.severity)
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]

    def _newest(self, limit: int) -> Call:
        return Call(NEWEST, (self._keys.alerts().history,), (limit,))

    # --- sending -------------------------------------------------------------------------------

    def _send(self, alert: Alert) -> None:
        for channel, send in self._channels.items():
            try:
                send(alert)
            except Exception:
                name = getattr(send, "__qualname__", send)
                logger.exception(
                    "Alert %s was not sent to channel %s (%s)", alert.id, channel.value, name
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
    level = event.data.get("level")
    rule = RULES.get(f"pressure.{level}" if event.name == PRESSURE_CHANGED.name else event.name)
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


def _completed(alert: Alert, at: float, held_back: int) -> Alert:
    """Return an alert with its time, and with the number of alerts that were held back."""
    more = f" ({held_back} more like this were held back)" if held_back else ""
    return replace(alert, at=at, held_back=held_back, message=alert.message + more)


def _alerts(entries: Sequence[tuple[bytes, Sequence[bytes]]]) -> list[Alert]:
    """Return the alerts in entries of the history."""
    return readable("an alert of the history", [entry for _, entry in paired(entries)], _alert)


def _alert(entry: Mapping[bytes, bytes]) -> Alert:
    fields = json.loads(entry[b"alert"])
    alert = Alert(
        kind=fields["kind"],
        subject=fields["subject"],
        severity=EventSeverity[fields["severity"].upper()],
        message=fields["message"],
        data=fields["data"],
        id=fields["id"],
    )
    return _completed(alert, float(entry[b"at"]), int(entry[b"held"]))


def _write_log(alert: Alert) -> None:
    parts = (alert.severity.label, alert.kind, alert.subject, alert.message)
    log.log(alert.severity, "%s %s [%s]: %s", *parts, extra={"alert": alert.fields()})


# --- webhooks ---------------------------------------------------------------------------------


def sign(body: bytes, timestamp: str, secret: str) -> str:
    """Return the value of ``X-RLM-Signature``: the HMAC-SHA256 of ``<timestamp>.<body>``."""
    return (
        "sha256="
        + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    )


def verify(body: bytes, timestamp: str, signature: str, secret: str) -> bool:
    """Return whether the sender of a webhook knows the secret; the comparison takes constant time.

    Pass the raw body and the headers ``X-RLM-Timestamp`` and ``X-RLM-Signature``.  Refuse a request
    whose timestamp (seconds since 1970) is some minutes old: it may be a replay.
    """
    return hmac.compare_digest(sign(body, timestamp, secret).encode(), signature.encode())


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any) -> None:
        """Follow no redirect: a request that is signed for one receiver is not for another."""


class Webhook:
    """POSTs JSON to one receiver from a separate thread, so that no caller waits for it."""

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
        """`clock` returns seconds since 1970; `retry` None makes up to three attempts.

        Raises InvalidValue for a URL that is not http or https, or that names no host.
        """
        self.shown, self._url, self._authorization = _parts(url)
        self._secret, self._clock, self._timeout_s = secret, clock, timeout_s
        self._retry = retry or Retry(ATTEMPTS)
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._waiting: queue.Queue[tuple[str, bytes] | None] = queue.Queue(waiting)
        self._thread: threading.Thread | None = None
        self._starting, self._failing = threading.Lock(), False

    def send_alert(self, alert: Alert) -> None:
        """Send an alert.  By its id the receiver can recognise a second delivery of one alert."""
        self.send(alert.id, alert.fields())

    def send(self, id: str, fields: Mapping[str, Any]) -> None:
        """Queue a JSON object for the thread; if the queue is full, it is dropped, and logged."""
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
        """Send the queue and end the thread; return whether this was done in time.

        A later `send` starts the thread again.
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
            logger.info("Webhook at %s answers again", self.shown)
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
        """Log the first failure of an outage.

        The URL and the text of an error may contain secrets, so neither is logged.
        """
        if not self._failing:
            logger.warning(
                "Webhook at %s fails (%s); messages that it misses are not sent again",
                self.shown,
                why,
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
    """Return scheme and host of a URL, the URL without user and password, and the header with user
    and password.

    Raises InvalidValue.
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
    netloc = f"[{host}]" if ":" in host else host
    netloc += f":{port}" if port else ""
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    header = (
        {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}
        if parts.username
        else {}
    )
    return f"{parts.scheme}://{netloc}", parts._replace(netloc=netloc, fragment="").geturl(), header


def _reason(error: BaseException) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP {error.code}"
    cause = getattr(error, "reason", None)
    return type(cause if isinstance(cause, Exception) else error).__name__
