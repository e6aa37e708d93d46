"""The recurring faults of all workers: their number, their severity, and whether retries help.

The engine records faults, operators read the patterns.  Begin with `FaultLog.record`.  Faults are
the same pattern if service, code and fingerprint of the message are equal.  A fingerprint leaves
out the varying parts of a message; the rest may still come from an item, so no log has it.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import Field

from resilience.errors import Category, Severity, StoreUnavailable
from resilience.faults import Fault
from resilience.keys import Keys
from resilience.store import Argument, Call, Script, Store
from resilience.validation import Seconds, readable

logger = logging.getLogger(__name__)

LENGTH = 120
"""The largest number of characters of a fingerprint."""
_READ = 2000
"""The number of characters read of a message: some contain a whole item, and are megabytes long."""

_RECORD = Script.load("resilience", "fault_log")
_PATTERNS = Script.load("resilience", "fault_patterns")

_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
# Alternatives are tried in this order, so an earlier one hides the later ones inside its match.  A
# quote that is not closed reaches to the end, because messages are cut.  A quote inside a word is
# an apostrophe.
_VARYING = re.compile(
    r"""
    (?<!\w) [bru]{0,2} (?: '(?:\\.|.)*?(?:'(?!\w)|\Z) | "(?:\\.|.)*?(?:"(?!\w)|\Z) )
    | [\u201c\u2018\xab] .*? (?: [\u201d\u2019\xbb](?!\w) | \Z )   # typographic quotes
    | (?<=://) [^\s/]+ (?=@)                                       # user and password of a URL
    | (?<=\?) \S+ | (?<=[\w/])\#\S+                                # query and fragment of a URL
    | (?P<kept>
        (?:password|passwd|secret|token|api[ _-]?key|authorization) \s?[:=]\s? (?:bearer\s|basic\s)?
        | \bbearer\s
      ) \S+                                                        # passwords and the like
    | (?<![\w.%+-]) [\w.%+-]+ @ [\w.-]+                            # e-mail
    | \b [0-9a-f]{8} (?:-[0-9a-f]{4}){3} - [0-9a-f]{12} \b         # UUID
    | (?<![\w-]) (?=[a-z_-]*\d) [\w-]{20,} | [a-z0-9]{20,}         # keys and tokens
    | \b (?: 0x[0-9a-f]+ | (?=[a-f]*\d)[0-9a-f]{6,} ) \b           # addresses, hexadecimal ids
    | [-+]? \d+ (?:[.,]\d+)* (?: e[-+]?\d+ )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_RUN = re.compile(r"#(?:\W{0,2}#)+")


def fingerprint(message: str) -> str:
    """Return the constant part of a message: one line of at most `LENGTH` characters.

    ``#`` replaces the parts that vary or may be secret.  These are numbers, ids, quoted strings,
    e-mail addresses, long tokens, passwords and queries of URLs.  Several of them in a row become
    one ``#``, so lists of any length have the same fingerprint.
    """
    line = _BLANK.sub(" ", message[:_READ]).strip()
    return _RUN.sub("#", _VARYING.sub(lambda match: f"{match['kept'] or ''}#", line))[:LENGTH]


class FaultLogSettings(Seconds):
    """The number of patterns kept, the time, and the rate above which one is escalated."""

    size: int = Field(
        default=50,
        ge=0,
        description="Number of patterns kept; the one seen longest ago is dropped first. "
        "0: nothing is counted.",
    )
    window_s: float = Field(
        default=60, ge=1, description="Length of the fixed windows in which faults are counted."
    )
    rate: int = Field(
        default=10,
        ge=1,
        description="A pattern seen more often in one window is escalated by one severity.",
    )
    keep_s: float = Field(
        default=7 * 86400, ge=1, description="A pattern not seen for this time is dropped."
    )


@dataclass(frozen=True)
class Pattern:
    """One recurring fault of one service.  Times are in ms of the server's clock."""

    service: str
    code: str
    category: Category
    message: str  # the fingerprint
    count: int  # of faults since the first one
    severity: Severity  # of its fault; one step higher while it is escalated
    escalated: bool
    per_minute: float  # rate in the last full window or the current one, the higher of both
    first_seen_ms: int
    last_seen_ms: int


class Escalation(NamedTuple):
    """A pattern that exceeds its rate from now on."""

    service: str
    code: str
    severity: Severity  # one step above that of its fault
    message: str  # the fingerprint


class FaultLog:
    """The recurring faults that all workers of a namespace share."""

    def __init__(
        self,
        store: Store,
        settings: FaultLogSettings = FaultLogSettings(),  # noqa: B008  # frozen
        on_escalation: Callable[[Escalation], object] = lambda _: None,
    ) -> None:
        """`on_escalation` is called once for each pattern that exceeds its rate from now on."""
        self._store, self._settings, self._on_escalation = store, settings, on_escalation
        self._keys = Keys(store.namespace).faults
        self._window_ms = round(settings.window_s * 1000)
        self._limits = (
            self._window_ms,
            settings.rate,
            settings.size,
            round(settings.keep_s * 1000),
        )

    def record(
        self,
        service: str,
        faults: Sequence[tuple[Fault, str]],
        *,
        recovered: int = 0,
        given_up: int = 0,
    ) -> None:
        """Count faults of a service, each with its message, in one round trip.

        Patterns that exceed their rate from now on are logged.  `recovered` items failed and then
        succeeded on a retry; `given_up` items used up their retries.  While Redis is away nothing
        is recorded, and nothing is raised.
        """
        if not self._settings.size or not (faults or recovered or given_up):
            return
        named = [
            (json.dumps([service, fault.code, fingerprint(message)]), fault)
            for fault, message in faults
        ]
        counts, latest = Counter(name for name, _ in named), dict(named)
        args: list[Argument] = [*self._limits, recovered, given_up]
        for name, fault in latest.items():
            args += (name, fault.category.value, int(fault.severity), counts[name])
        try:
            (escalated,) = self._store.call(Call(_RECORD, self._keys, args), on_outage="answer")
        except StoreUnavailable:
            return
        for each in escalated:
            self._warn(each, latest[each.decode()].severity)

    def patterns(self) -> list[Pattern]:
        """Return the patterns, the one seen last first.

        Raises StoreUnavailable while Redis is away.
        """
        now_ms, fields = self._read()
        patterns = readable(
            "a pattern of the fault log",
            [each for each in fields.items() if each[0].startswith(b"[")],
            lambda each: self._pattern(each[0], json.loads(each[1]), now_ms),
        )
        return sorted(patterns, key=lambda each: each.last_seen_ms, reverse=True)

    def recovery_success_rate(self) -> float | None:
        """Return the share (0 to 1) of retried items that succeeded in the end; None without any.

        Raises StoreUnavailable while Redis is away.
        """
        _, fields = self._read()
        counts = [fields.get(name, 0) for name in (b"recovered", b"given_up")]
        recovered, given_up, *_ = [*readable("a count of the fault log", counts, int), 0, 0]
        return recovered / (recovered + given_up) if recovered + given_up > 0 else None

    def _read(self) -> tuple[int, dict[bytes, bytes]]:
        ((now_ms, flat),) = self._store.call(
            Call(_PATTERNS, self._keys[:1], ()), on_outage="answer"
        )
        return now_ms, dict(zip(flat[::2], flat[1::2], strict=True))

    def _pattern(self, name: bytes, record: dict[str, Any], now_ms: int) -> Pattern:
        service, code, message = json.loads(name)
        most = self._most(record, now_ms)
        escalated = most > self._settings.rate
        return Pattern(
            service=service,
            code=code,
            category=Category(record["category"]),
            message=message,
            count=int(record["count"]),
            severity=_severity(record["severity"], escalated=escalated),
            escalated=escalated,
            per_minute=most * 60_000 / self._window_ms,
            first_seen_ms=int(record["first"]),
            last_seen_ms=int(record["last"]),
        )

    def _most(self, record: dict[str, Any], now_ms: int) -> int:
        """Return the faults in the current or in the last full window, whichever is larger."""
        age = now_ms // self._window_ms - record["window"]
        return int({0: max(record["here"], record["before"]), 1: record["here"]}.get(age, 0))

    def _warn(self, name: bytes, severity: Severity) -> None:
        service, code, message = json.loads(name)
        found = Escalation(service, code, _severity(severity, escalated=True), message)
        logger.warning(
            "%s fails with %s more than %d times within %g s; its severity is now %s",
            service,
            code,
            self._settings.rate,
            self._settings.window_s,
            found.severity.name,
        )
        self._on_escalation(found)


def _severity(severity: int, *, escalated: bool) -> Severity:
    return Severity(min(int(severity) + escalated, Severity.CRITICAL))
