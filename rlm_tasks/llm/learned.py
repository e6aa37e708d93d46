"""What calls to each model have really taken, of all workers: by it the next ones are estimated.

Decides how sums become an estimate.  Refuses to know what is called and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from resilience.errors import StoreUnavailable
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from rlm_tasks.llm.endpoint import Answer

HALVE_AT = 1000
"""After so many calls all sums are halved, so that about the last thousand count."""
TTL_S = 30 * 24 * 3600
READ_EVERY_S = 10.0
FIRST_RATIO = 1.1
"""Tokens of a prompt over their estimate, before anything is known: a little too much is settled,
too little is a 429.
"""
FIRST_SECONDS = 2.0
_LEARN = Script.load("rlm_tasks.llm", "learn")


@dataclass(frozen=True, slots=True)
class Known:
    """What calls to a model take: means, and how far single calls lie from them (standard
    deviations).
    """

    calls: float = 0.0  # that this was learned from, the older ones counting less
    prompt_ratio: float = FIRST_RATIO  # tokens of a prompt over their estimate
    share: float = 0.5  # tokens of an answer over its max_tokens
    share_sd: float = 0.3
    seconds: float = FIRST_SECONDS
    seconds_sd: float = FIRST_SECONDS / 2


class Learned:
    """What one platform knows of its models."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._keys, self._clock = store, Keys(store.namespace), clock
        self._read: dict[str, tuple[float, Known]] = {}

    def learning(self, model: str, estimated: float, max_tokens: float, answer: Answer) -> Call:
        """Return the call that adds what one answer took, to share a round trip with others."""
        share = answer.completion_tokens / max_tokens
        sums = {
            "calls": 1,
            "estimated": estimated,
            "prompt": answer.prompt_tokens,
            "share": share,
            "share2": share**2,
            "seconds": answer.latency_s,
            "seconds2": answer.latency_s**2,
        }
        told = [each for pair in sums.items() for each in pair]
        return Call(_LEARN, (self._keys.model(model),), (HALVE_AT, TTL_S, *told))

    def of(self, model: str) -> Known:
        """Return what is known of a model, at most 10 s old; nothing while Redis is away and it was
        never asked.
        """
        read_at, known = self._read.get(model, (-math.inf, Known()))
        if self._clock() - read_at < READ_EVERY_S:
            return known
        try:
            found = self._store.call(lambda client: client.hgetall(self._keys.model(model)))
        except StoreUnavailable:
            return known
        sums = {name.decode(): float(amount) for name, amount in found.items()}
        self._read[model] = self._clock(), _known(sums) if sums.get("calls") else Known()
        return self._read[model][1]


def _known(sums: dict[str, float]) -> Known:
    calls = sums["calls"]

    def spread(name: str) -> tuple[float, float]:
        mean = sums[name] / calls
        return mean, math.sqrt(max(0.0, sums[f"{name}2"] / calls - mean**2))

    ratio = sums["prompt"] / sums["estimated"] if sums["estimated"] else FIRST_RATIO
    return Known(calls, ratio, *spread("share"), *spread("seconds"))
