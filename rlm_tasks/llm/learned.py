"""The tokens and seconds of earlier calls to each model, over all workers, for estimates.

`gate` adds each answer and estimates prompts; plans read the same figures.  Redis holds sums, and a
process reads them at most every 10 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from resilience.connections import RecordUnreadable
from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from resilience.validation import readable
from rlm_tasks.llm.wire.answers import Answer

HALVE_AT = 1000
"""After this number of calls all sums are halved, so about the last thousand calls count."""
TTL_S = 30 * 24 * 3600
READ_EVERY_S = 10.0
FIRST_RATIO = 1.1
"""Tokens of a prompt over their estimate, before the first call.

A reservation that is a little too large is settled later; one that is too small ends in a 429."""
MOST_MARKUP = 100.0
"""A bill above this many times our price is taken for this many times; later calls heal it."""
FIRST_SECONDS = 2.0
"""Seconds of a call, before the first one."""
_LEARN = Script.load("rlm_tasks.llm", "learn")


@dataclass(frozen=True, slots=True)
class CallStatistics:
    """Means and standard deviations of the calls to a model."""

    calls: float = 0.0  # number of calls behind the figures; older ones count less
    prompt_ratio: float = FIRST_RATIO  # tokens of a prompt over their estimate
    price_ratio: float = 1.0  # money that a gateway billed over that of our prices
    share: float = 0.5  # tokens of an answer over its max_tokens
    share_sd: float = 0.3
    seconds: float = FIRST_SECONDS
    seconds_sd: float = FIRST_SECONDS / 2


class Learned:
    """The figures of all models of one platform."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._keys, self._clock = store, Keys(store.namespace), clock
        self._read: dict[str, tuple[float, CallStatistics]] = {}

    def learning(
        self, model: str, *, estimated: float, max_tokens: float, answer: Answer, priced: float
    ) -> Call:
        """Return the call to Redis that adds one answer, to share a round trip with others.

        `priced` is the money of the answer by our prices.
        """
        usage = answer.usage
        share = (usage.completion_tokens or 0) / max_tokens
        sums = {
            "calls": 1,
            "estimated": estimated,
            "prompt": usage.prompt_tokens or 0,
            "share": share,
            "share2": share**2,
            "seconds": answer.latency_s,
            "seconds2": answer.latency_s**2,
            "priced": priced,
            "billed": priced if usage.money is None else min(usage.money, MOST_MARKUP * priced),
        }
        pairs = [each for pair in sums.items() for each in pair]
        args = (HALVE_AT, TTL_S, *pairs)
        return Call(_LEARN, (self._keys.model(model),), args, otherwise=None)

    def of(self, model: str) -> CallStatistics:
        """Return the figures of a model, at most 10 s old.

        While Redis is away they are older, or the defaults.
        """
        read_at, latest = self._read.get(model, (-math.inf, CallStatistics()))
        if self._clock() - read_at < READ_EVERY_S:
            return latest
        try:
            stored = self._store.call(lambda client: client.hgetall(self._keys.model(model)))
        except (StoreUnavailable, RecordUnreadable):
            return latest
        found = readable("the statistics of a model", [stored] if stored else [], _statistics)
        latest = found[0] if found else CallStatistics()
        self._read[model] = self._clock(), latest
        return latest


def _statistics(stored: Mapping[bytes, bytes]) -> CallStatistics:
    sums = {name.decode(): float(amount) for name, amount in stored.items()}
    calls = sums["calls"]

    def spread(name: str) -> tuple[float, float]:
        mean = sums[name] / calls
        return mean, math.sqrt(max(0.0, sums[f"{name}2"] / calls - mean**2))

    ratio = sums["prompt"] / sums["estimated"] if sums["estimated"] else FIRST_RATIO
    priced = sums.get("priced", 0.0)  # absent in sums of the release before
    price_ratio = sums["billed"] / priced if priced else 1.0
    return CallStatistics(calls, ratio, price_ratio, *spread("share"), *spread("seconds"))
