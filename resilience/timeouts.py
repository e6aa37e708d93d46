"""How long an item of an operation may take before it is stopped.

Decides a limit in seconds from how complex the item is said to be, what its caller expects, what
items of the operation have taken on all workers, and how often this one was tried.  Refuses to know
how an item is stopped, and what counts as an item.

Until `TimeoutSettings.min_samples` are known the limit is a guess on the safe side; from then on it
is the 99th percentile x 1.5.  In simulation that stopped 0.1-0.3 % of the items that would have
ended well, where the timer of RFC 6298 (mean + 4 deviations) stopped 3-6 %: a retransmission may
come early, an item that is stopped is lost work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import Field

from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from resilience.validation import Seconds

BUCKETS = 256
RATIO = 1.1
"""Each bucket is a tenth wider than the one before: a percentile read from them is at most 10 % too
long.
"""
SHORTEST_S = 0.001
"""Bucket 0 holds everything up to this; the last bucket ends far beyond any cap."""
SHARE = 0.99
FADE_EVERY = 500
FADE = 0.5
"""After so many samples all weights shrink by this, so about the last 1,000 count: a change is
learned in 200.
"""
TTL_S = 30 * 24 * 3600
"""An operation nobody has run for this long starts anew."""
READ_EVERY_S = 30.0
"""A process reads what was learned about an operation at most this often."""
MOST_RETRIES = 64
"""Retries beyond this lengthen nothing: any cap is long passed, and a power of more could overflow
a float.
"""

_LEARN = Script.load("resilience", "timing")
_READ = Script.load("resilience", "timing_read")


class TimeoutSettings(Seconds):
    """The base table and how far a limit may move from it."""

    simple_s: float = Field(300, gt=0, description="Base of an item that is said to be simple.")
    medium_s: float = Field(
        900, gt=0, description="Base of an item that is said to be of medium complexity."
    )
    complex_s: float = Field(2700, gt=0, description="Base of an item that is said to be complex.")
    very_complex_s: float = Field(
        7200, gt=0, description="Base of an item that is very complex, or of which nothing is said."
    )
    cap_s: float = Field(
        10_800, gt=0, description="No item may take longer than this, whatever was learned."
    )
    factor: float = Field(
        1.5, gt=0, description="The limit is the learned 99th percentile times this."
    )
    retry_penalty: float = Field(
        1.5, ge=1, le=10, description="Each retry may take this much longer than the try before it."
    )
    floor: float = Field(
        0.25,
        gt=0,
        description="What was learned shortens the base to this share of it, and no further.",
    )
    min_samples: int = Field(
        50, gt=0, description="With fewer samples of an operation than this the base table decides."
    )

    def base_s(self, complexity: str) -> float:
        """Return the base of a complexity in seconds; a word that is not in the table gets the
        longest.
        """
        table = {"simple": self.simple_s, "medium": self.medium_s, "complex": self.complex_s}
        return table.get(complexity, self.very_complex_s)


_DEFAULTS = TimeoutSettings()


class Timeouts:
    """The limits of all operations, learned together by all workers that share a store."""

    def __init__(
        self,
        store: Store,
        *,
        multipliers: Mapping[str, float] | None = None,
        settings: TimeoutSettings = _DEFAULTS,
    ) -> None:
        """Stretch the base of each operation in `multipliers` by its number; the others keep
        theirs.

        Raises InvalidValue for a multiplier that is not a number above 0.
        """
        for operation, multiplier in (multipliers or {}).items():
            if not 0 < multiplier < math.inf:
                raise InvalidValue(f"multipliers.{operation}", multiplier, "give a number above 0")
        self._store, self._keys = store, Keys(store.namespace)
        self._multipliers, self._settings = multipliers or {}, settings
        self._read: dict[str, tuple[float, float | None]] = {}

    def limit_s(
        self,
        operation: str,
        complexity: str = "",
        *,
        estimate_s: float = 0.0,
        retries: int = 0,
        stretch: float = 1.0,
        remaining_s: float | None = None,
    ) -> float:
        """Return how many seconds an item may take: 0 if none remain, and never more than the cap.

        `stretch` is the factor by which urgent work gets more. `estimate_s` is how long the caller
        expects it to take, which counts until enough was learned; `retries` is how often the item
        was tried before; `remaining_s` is what is left of its job's time.  Asks Redis at most every
        30 s for each operation, and raises nothing if it is away: then what was last read counts,
        or the base table."""
        its = self._settings
        base_s, p99_s = (
            its.base_s(complexity) * self._multipliers.get(operation, 1.0),
            self._p99_s(operation),
        )
        first_s = (
            max(base_s, 2 * estimate_s)
            if p99_s is None
            else max(p99_s * its.factor, its.floor * base_s)
        )
        limit_s = min(
            stretch * first_s * its.retry_penalty ** min(retries, MOST_RETRIES), its.cap_s
        )
        return limit_s if remaining_s is None else max(0.0, min(limit_s, remaining_s))

    def learn(self, operation: str, durations_s: Sequence[float]) -> None:
        """Add how many seconds items of an operation took, in one round trip; if Redis is away they
        are lost.

        For an item that was stopped give the limit it ran into: it would have taken at least that
        long, and without it the limit could never grow.  Give nothing for an item that was retried
        (Karn's algorithm, RFC 6298 section 3): its limit was stretched, and what it took says
        little about a first try."""
        if not durations_s:
            return
        samples = Counter(map(bucket_of, durations_s))
        pairs = [number for pair in samples.items() for number in pair]
        try:
            self._store.call(
                Call(_LEARN, (self._keys.timing(operation),), (FADE_EVERY, FADE, TTL_S, *pairs)),
                on_outage="answer",
            )
        except StoreUnavailable:
            return  # a sample more or less changes no percentile, and the item itself has ended well

    def _p99_s(self, operation: str) -> float | None:
        read_at, p99_s = self._read.get(operation, (-math.inf, None))
        now = self._store.clock()
        if now - read_at < READ_EVERY_S:
            return p99_s
        try:
            [answer] = self._store.call(
                Call(_READ, (self._keys.timing(operation),), ()), on_outage="answer"
            )
        except StoreUnavailable:
            return p99_s  # not noted as read: the store itself knows how long to leave Redis alone
        fields = zip(answer[::2], answer[1::2], strict=True)
        weights = {int(bucket): float(weight) for bucket, weight in fields if bucket != b"since"}
        enough = sum(weights.values()) >= self._settings.min_samples
        self._read[operation] = now, percentile(weights, SHARE) if enough else None
        return self._read[operation][1]


def bucket_of(seconds: float) -> int:
    """Return the bucket, from 0 to 255, that a duration in seconds counts in."""
    if seconds <= SHORTEST_S:
        return 0
    # An upper edge belongs to its own bucket, although its logarithm may come out a hair too large.
    exact = math.log(min(seconds, upper_edge_s(BUCKETS - 1)) / SHORTEST_S, RATIO)
    return math.ceil(exact - 1e-6)


def upper_edge_s(bucket: int) -> float:
    """Return the longest duration, in seconds, that counts in a bucket."""
    return SHORTEST_S * RATIO**bucket


def percentile(weights: Mapping[int, float], share: float) -> float:
    """Return the seconds within which a share (0 to 1) of the weight lies: the upper edge of the
    bucket it ends in.

    Raises ValueError if there are no weights.
    """
    left = share * sum(weights.values())
    for bucket in sorted(weights):
        left -= weights[bucket]
        if left <= 0:
            return upper_edge_s(bucket)
    return upper_edge_s(max(weights))  # the sum was rounded
