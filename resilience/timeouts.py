"""The time limits of items, learned from earlier items of the operation on all workers.

The engine asks for the limit of each item; it is the engine that stops the item.  Begin with
`Timeouts.limit_s`.  A limit depends on the item's complexity, its caller's estimate, the durations
of earlier items, and the number of its retries.

Below `TimeoutSettings.min_samples` samples the limit is a safe guess from the base table.  With
more samples it is the 99th percentile x 1.5.  In simulation this stopped 0.1-0.3 % of the items
that would have succeeded; the timer of RFC 6298 (mean + 4 deviations) stopped 3-6 %.  TCP may send
a packet again too early, but an item that is stopped is lost work.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import Field

from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from resilience.validation import Seconds, readable

BUCKETS = 256
RATIO = 1.1
"""Each bucket is a tenth wider than the one before, so a percentile is at most 10 % too long."""
SHORTEST_S = 0.001
"""The upper edge of bucket 0; the last bucket ends far beyond any cap."""
SHARE = 0.99
"""The percentile that a limit is learned from, as a share."""
FADE_EVERY = 500
FADE = 0.5
"""After each FADE_EVERY samples all weights are multiplied by FADE.

So about the last 1,000 samples count, and a change is learned in 200.
"""
TTL_S = 30 * 24 * 3600
"""An operation that has not run for this long is forgotten."""
READ_EVERY_S = 30.0
"""A process reads the histogram of an operation at most this often."""
MOST_RETRIES = 64
"""Further retries do not lengthen a limit: it is far above any cap, and the power could overflow a
float.
"""

_LEARN = Script.load("resilience", "timing")
_READ = Script.load("resilience", "timing_read")


class TimeoutSettings(Seconds):
    """The base limits by complexity, and the bounds within which samples may change a limit."""

    simple_s: float = Field(default=300, gt=0, description="Base limit of a simple item.")
    medium_s: float = Field(
        default=900, gt=0, description="Base limit of an item of medium complexity."
    )
    complex_s: float = Field(default=2700, gt=0, description="Base limit of a complex item.")
    very_complex_s: float = Field(
        default=7200,
        gt=0,
        description="Base limit of an item that is very complex, or of unknown complexity.",
    )
    cap_s: float = Field(
        default=10_800, gt=0, description="The longest limit, whatever the samples say."
    )
    factor: float = Field(
        default=1.5,
        gt=0,
        description="Factor from the 99th percentile of the samples to the limit.",
    )
    retry_penalty: float = Field(
        default=1.5,
        ge=1,
        le=10,
        description="Factor by which each retry multiplies the limit of the try before.",
    )
    floor: float = Field(
        default=0.25,
        gt=0,
        description="Smallest share of the base to which samples may shorten the limit.",
    )
    least_s: float = Field(
        default=300,
        gt=0,
        description="Samples shorten a limit to this at the least, unless its base is shorter.",
    )
    min_samples: int = Field(
        default=50, gt=0, description="With fewer samples of an operation, the base table is used."
    )

    def base_s(self, complexity: str) -> float:
        """Return the base of a complexity in seconds; an unknown complexity has the longest."""
        table = {"simple": self.simple_s, "medium": self.medium_s, "complex": self.complex_s}
        return table.get(complexity, self.very_complex_s)


_DEFAULTS = TimeoutSettings()


class Timeouts:
    """The limits of all operations, learned by all workers that share a store."""

    def __init__(
        self,
        store: Store,
        *,
        multipliers: Mapping[str, float] | None = None,
        settings: TimeoutSettings = _DEFAULTS,
    ) -> None:
        """`multipliers`: operation -> factor for its base; other operations keep the base table.

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
        """Return the time limit of an item in seconds, never more than the cap.

        - `estimate_s`: the time that the caller expects; the limit is at least twice that time.
        - `retries`: the number of earlier tries of the item.
        - `stretch`: a factor that gives urgent work more time.
        - `remaining_s`: the time left to its job; the limit is at most this, and 0 if none is left.

        Redis is read at most every 30 s for each operation.  While it is away nothing is raised:
        the last value read counts, else the base table.
        """
        settings = self._settings
        base_s = self.base_s(operation, complexity)
        p99_s = self._p99_s(operation)
        least_s = max(settings.floor * base_s, min(settings.least_s, base_s))
        learned_s = base_s if p99_s is None else max(p99_s * settings.factor, least_s)
        first_s = max(learned_s, 2 * estimate_s)
        penalty = settings.retry_penalty ** min(retries, MOST_RETRIES)
        limit_s = min(stretch * first_s * penalty, settings.cap_s)
        return limit_s if remaining_s is None else max(0.0, min(limit_s, remaining_s))

    def base_s(self, operation: str, complexity: str = "") -> float:
        """Return the base limit of an operation's items in seconds, whatever was learned."""
        return self._settings.base_s(complexity) * self._multipliers.get(operation, 1.0)

    def learn(self, operation: str, durations_s: Sequence[float]) -> None:
        """Add the durations of items of an operation in seconds, in one round trip.

        If Redis is away they are lost.  For an item that was stopped, pass the limit that it
        reached.  It would have taken at least that long, and without it the limit could never grow.
        Pass nothing for an item that was retried (Karn's algorithm, RFC 6298 section 3).  Its limit
        was longer, so its duration says little about a first try.
        """
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
            return  # a few samples do not change a percentile, and the items themselves succeeded

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
            return p99_s  # not recorded as read: the store itself waits before it tries Redis again
        fields = [
            each for each in zip(answer[::2], answer[1::2], strict=True) if each[0] != b"since"
        ]
        weights = dict(readable("durations of an operation", fields, _weight))
        enough = sum(weights.values()) >= self._settings.min_samples
        self._read[operation] = now, percentile(weights, SHARE) if enough else None
        return self._read[operation][1]


def _weight(field: tuple[bytes, bytes]) -> tuple[int, float]:
    bucket, weight = int(field[0]), float(field[1])
    if not (0 <= bucket < BUCKETS and 0 <= weight < math.inf):
        raise ValueError
    return bucket, weight


def bucket_of(seconds: float) -> int:
    """Return the bucket of a duration in seconds, from 0 to 255."""
    if seconds <= SHORTEST_S:
        return 0
    # An upper edge belongs to its own bucket, but its logarithm may be rounded up.
    exact = math.log(min(seconds, upper_edge_s(BUCKETS - 1)) / SHORTEST_S, RATIO)
    return math.ceil(exact - 1e-6)


def upper_edge_s(bucket: int) -> float:
    """Return the longest duration of a bucket, in seconds."""
    return SHORTEST_S * RATIO**bucket


def percentile(weights: Mapping[int, float], share: float) -> float:
    """Return a percentile in seconds: the upper edge of the bucket in which it lies.

    `share` is from 0 to 1.  Raises ValueError if there are no weights.
    """
    left = share * sum(weights.values())
    for bucket in sorted(weights):
        left -= weights[bucket]
        if left <= 0:
            return upper_edge_s(bucket)
    return upper_edge_s(max(weights))  # rounding of the sum left a rest
