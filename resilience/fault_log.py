"""The recurring faults of all workers: which few keep coming back, how bad they are, whether
retries help.

Decides what counts as the same fault (service, code, fingerprint of the message), which patterns
are kept, and when one comes so often that it matters more.  Refuses to know what the services are,
what is done about a fault, and what a message said of the items at hand: a fingerprint leaves that
out."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from resilience.errors import Category, Severity, StoreUnavailable
from resilience.faults import Fault
from resilience.keys import Keys
from resilience.store import Argument, Call, Script, Store
from resilience.validation import Seconds

logger = logging.getLogger(__name__)

LENGTH = 120
"""A fingerprint has at most this many characters."""
_READ = 2000
"""Characters of a message that are looked at: some messages hold a whole item, and are megabytes
long.
"""

_RECORD = Script.load("resilience", "fault_log")
_PATTERNS = Script.load("resilience", "fault_patterns")

_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
# An earlier alternative hides what later ones would find inside of it.  A quote that is not closed
# reaches to the end, because messages are cut; one inside a word is an apostrophe.
_VARYING = re.compile(
    r"""
    (?<!\w) [bru]{0,2} (?: '(?:\\.|.)*?(?:'(?!\w)|\Z) | "(?:\\.|.)*?(?:"(?!\w)|\Z) )
    | [\u201c\u2018\xab] .*? (?: [\u201d\u2019\xbb](?!\w) | \Z )   # typographic quotes
    | (?<=://) [^\s/]+ (?=@)                                       # user and password of a URL
    | (?<=\?) \S+ | (?<=[\w/])\#\S+                                # query and fragment of a URL
    | (?P<kept> (?:password|passwd|secret|token|api[ _-]?key|authorization) \s?[:=]\s? (?:bearer\s|basic\s)? | \bbearer\s ) \S+
    | (?<![\w.%+-]) [\w.%+-]+ @ [\w.-]+                            # e-mail
    | \b [0-9a-f]{8} (?:-[0-9a-f]{4}){3} - [0-9a-f]{12} \b         # UUID
    | (?<![\w-]) (?=[a-z_-]*\d) [\w-]{20,} | [a-z0-9]{20,}         # keys and tokens
    | \b (?: 0x[0-9a-f]+ | (?=[a-f]*\d)[0-9a-f]{6,} ) \b           # addresses and other hexadecimal ids
    | [-+]? \d+ (?:[.,]\d+)* (?: e[-+]?\d+ )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_RUN = re.compile(r"#(?:\W{0,2}#)+")


def fingerprint(message: str) -> str:
    """Return what stays the same when a fault comes back: one line of at most `LENGTH` characters.

    ``#`` stands for what varies, or may be secret: numbers, ids, quoted strings, e-mail addresses,
    long tokens, passwords, queries of URLs; and for several of them in a row, so that lists of any
    length look alike."""
    line = _BLANK.sub(" ", message[:_READ]).strip()
    return _RUN.sub("#", _VARYING.sub(lambda found: f"{found['kept'] or ''}#", line))[:LENGTH]


class FaultLogSettings(Seconds):
    """How many patterns are kept, for how long, and how often one may be seen."""

    size: int = Field(
        50,
        ge=0,
        description="Number of patterns kept; the one seen longest ago is dropped first. "
        "0: nothing is counted.",
    )
    window_s: float = Field(
        60, ge=1, description="Length of the fixed windows in which faults are counted."
    )
    rate: int = Field(
        10,
        ge=1,
        description="A pattern seen more often in one window is escalated by one severity.",
    )
    keep_s: float = Field(
        7 * 86400, ge=1, description="A pattern not seen for this time is dropped."
    )


@dataclass(frozen=True)
class Pattern:
    """One recurring fault of one service; times are of the server's clock."""

    service: str
    code: str
    category: Category
    message: str  # the fingerprint
    count: int  # since it was first seen
    severity: Severity  # one step above its fault's while it is escalated
    escalated: bool
    per_minute: float  # in the last full window or in the current one, whichever had more
    first_seen_ms: int
    last_seen_ms: int


class FaultLog:
    """The recurring faults that all workers of a namespace share."""

    def __init__(self, store: Store, settings: FaultLogSettings = FaultLogSettings()) -> None:  # noqa: B008  # frozen
        self._store, self._settings = store, settings
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
        """Count faults of a service, each with its message, in one round trip; log those that now
        exceed their rate.

        `recovered` items failed and succeeded on a retry, `given_up` items used up their retries.
        While Redis is away nothing is kept, and nothing is raised."""
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
            (crossed,) = self._store.call(Call(_RECORD, self._keys, args), on_outage="answer")
        except StoreUnavailable:
            return
        for each in crossed:
            self._tell(each, latest[each.decode()].severity)

    def patterns(self) -> list[Pattern]:
        """Return the patterns that are kept, the one seen last first; raise StoreUnavailable while
        Redis is away.
        """
        now_ms, fields = self._read()
        found = [
            self._pattern(name, json.loads(value), now_ms)
            for name, value in fields.items()
            if name.startswith(b"[")
        ]
        return sorted(found, key=lambda each: each.last_seen_ms, reverse=True)

    def recovery_success_rate(self) -> float | None:
        """Return which share (0..1) of the items that were retried succeeded in the end, None while
        none is known.

        Raises StoreUnavailable while Redis is away.
        """
        _, fields = self._read()
        recovered, given_up = (int(fields.get(name, 0)) for name in (b"recovered", b"given_up"))
        return recovered / (recovered + given_up) if recovered + given_up else None

    def _read(self) -> tuple[int, dict[bytes, bytes]]:
        ((now_ms, flat),) = self._store.call(
            Call(_PATTERNS, self._keys[:1], ()), on_outage="answer"
        )
        return now_ms, dict(zip(flat[::2], flat[1::2], strict=True))

    def _pattern(self, name: bytes, kept: dict[str, Any], now_ms: int) -> Pattern:
        service, code, message = json.loads(name)
        most = self._most(kept, now_ms)
        escalated = most > self._settings.rate
        return Pattern(
            service=service,
            code=code,
            category=Category(kept["category"]),
            message=message,
            count=int(kept["count"]),
            severity=_severity(kept["severity"], escalated=escalated),
            escalated=escalated,
            per_minute=most * 60_000 / self._window_ms,
            first_seen_ms=int(kept["first"]),
            last_seen_ms=int(kept["last"]),
        )

    def _most(self, kept: dict[str, Any], now_ms: int) -> int:
        """Return how often a pattern was seen in the current or in the last full window, whichever
        is more.
        """
        age = now_ms // self._window_ms - kept["window"]
        return int({0: max(kept["here"], kept["before"]), 1: kept["here"]}.get(age, 0))

    def _tell(self, name: bytes, severity: Severity) -> None:
        service, code, message = json.loads(name)
        logger.warning(
            "%s fails with %s more than %d times within %g s, its severity is %s now: %s",
            service,
            code,
            self._settings.rate,
            self._settings.window_s,
            _severity(severity, escalated=True).name,
            message,
        )


def _severity(severity: int, *, escalated: bool) -> Severity:
    return Severity(min(int(severity) + escalated, Severity.CRITICAL))
