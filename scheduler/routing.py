"""Which of several endpoints a call goes to, and which come next should it be away.

Decides by turns, weights, calls in flight, or the call's key, from what this process knows alone
(source document 3: local in memory, remote by consistent hashing).  Refuses to know what an
endpoint is, and whether it is well: the caller goes down the order, and whoever is left out of it
gives its calls to all others alike."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping
from fractions import Fraction
from hashlib import blake2b
from types import MappingProxyType
from typing import Literal, get_args

from resilience.errors import InvalidValue

Algorithm = Literal["round_robin", "least_connections", "weighted", "consistent_hash"]
POINTS = 1024
"""Places of the heaviest endpoint on the ring: shares are true to about 1 / sqrt(POINTS), three
percent.
"""


class Router:
    """The endpoints of one process, by name, and whose turn it is."""

    in_flight: Mapping[str, int]
    """Calls that began and have not ended, by name."""

    def __init__(self, weights: Mapping[str, float], algorithm: Algorithm) -> None:
        """A weight says how much an endpoint bears, beside the others; `round_robin` ignores it.
        Raises InvalidValue.
        """
        if algorithm not in get_args(Algorithm):
            raise InvalidValue(
                "algorithm", algorithm, f"must be one of {', '.join(get_args(Algorithm))}"
            )
        if not weights:
            raise InvalidValue("weights", {}, "must name one endpoint at least")
        for name, weight in weights.items():
            if not 0 < weight < math.inf:
                raise InvalidValue(f"weights[{name}]", weight, "must be a number above 0")
        self._algorithm, self._weights = algorithm, _whole(weights)
        self._began = dict.fromkeys(weights, 0)
        self.in_flight = MappingProxyType(self._began)
        self._turns = _Turns(
            dict.fromkeys(weights, 1) if algorithm == "round_robin" else self._weights
        )
        self._ring = _Ring(self._weights) if algorithm == "consistent_hash" else None

    def order(self, key: str = "") -> list[str]:
        """Return all names, the one to try first first; only `consistent_hash` asks for the call's
        key.
        """
        if self._ring is not None:
            return self._ring.walk(key)
        order = self._turns.take()
        if self._algorithm == "least_connections":  # ties by turns, as nginx has it
            order.sort(key=lambda name: self._began[name] / self._weights[name])
        return order

    def began(self, name: str) -> None:
        """Count a call that goes to an endpoint."""
        self._began[name] += 1

    def ended(self, name: str) -> None:
        """Count it no more."""
        self._began[name] -= 1


def _whole(weights: Mapping[str, float]) -> dict[str, int]:
    """Return weights as whole numbers of the same proportions: 0.1 is a tenth, so that shares are
    exact.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    unit = math.lcm(*(weight.denominator for weight in exact.values()))
    return {name: int(weight * unit) for name, weight in exact.items()}


class _Smooth:
    """Smooth weighted round robin (nginx, 2012): each earns its weight at every turn, and the
    richest pays for all.

    Of n, none is ever a whole turn ahead of its share, nor more than 1/2 + 1/3 + ... + 1/n of a
    turn behind it."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights, self._all = weights, sum(weights.values())
        self._credit = dict.fromkeys(weights, 0)

    def take(self) -> list[str]:
        """Return all names, the richest first, whose turn it was."""
        for name, weight in self._weights.items():
            self._credit[name] += weight
        order = sorted(self._credit, key=self._credit.__getitem__, reverse=True)
        for first in order[:1]:  # of none, when an only endpoint has nobody to stand in
            self._credit[first] -= self._all
        return order


class _Turns:
    """Turns, and for each endpoint those of the others that stand in for it: should it be away,
    they share its calls.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._first = _Smooth(weights)
        self._others = {
            name: _Smooth({each: weights[each] for each in weights if each != name})
            for name in weights
        }

    def take(self) -> list[str]:
        """Return all names in the order of their turn."""
        first = self._first.take()[0]
        return [first, *self._others[first].take()]


class _Ring:
    """Consistent hashing (Karger et al., 1997): a key belongs to the next place on a ring, and
    names have many by weight.

    Without a name, the order of the others stays as it was; only without the heaviest may keys move
    between them, because places are counted by its weight."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        heaviest = max(weights.values())
        counts = {
            name: max(1, round(POINTS * weight / heaviest)) for name, weight in weights.items()
        }
        places = sorted(
            (_place(f"{name}#{number}"), name)
            for name, count in counts.items()
            for number in range(count)
        )
        self._places, self._names = [place for place, _ in places], [name for _, name in places]

    def walk(self, key: str) -> list[str]:
        """Return all names as they come on the way around, from the place of a key on."""
        at = bisect(self._places, _place(key))
        return list(dict.fromkeys(self._names[at:] + self._names[:at]))


def _place(text: str) -> int:
    """Return a place on the ring: the same in every process, which Python's own hash is not."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
