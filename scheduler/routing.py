"""The order in which a call tries several endpoints: by turns, weights, calls in flight or a key.

`rlm_tasks.llm.endpoint_pool` calls it, and skips unhealthy endpoints; all others share the calls of
a skipped endpoint.  The state is local to the process, but `consistent_hash` gives the same order
in every process.  Begin with `Router.order`.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping
from fractions import Fraction
from hashlib import blake2b
from types import MappingProxyType
from typing import Literal, get_args

from resilience.errors import InvalidValue

RoutingAlgorithm = Literal["round_robin", "least_connections", "weighted", "consistent_hash"]
"""All algorithms; the setting `llm.routing` accepts the same names."""
POINTS = 1024
"""Number of points of the heaviest endpoint on the ring.  Shares are exact to about
1 / sqrt(POINTS), three percent.
"""


class Router:
    """The endpoints of one process by name, with the turns and the calls in flight."""

    in_flight: Mapping[str, int]
    """Number of calls in flight, by name."""

    def __init__(self, weights: Mapping[str, float], algorithm: RoutingAlgorithm) -> None:
        """A weight is an endpoint's share of the calls, relative to the others; `round_robin`
        ignores weights.

        Raises InvalidValue for an unknown algorithm, for no weight at all, and for one that is not
        above 0.
        """
        if algorithm not in get_args(RoutingAlgorithm):
            raise InvalidValue(
                "algorithm", algorithm, f"must be one of {', '.join(get_args(RoutingAlgorithm))}"
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
        """Return all names in the order to try them; only `consistent_hash` uses the call's key."""
        if self._ring is not None:
            return self._ring.walk(key)
        order = self._turns.take()
        if self._algorithm == "least_connections":  # turns break ties, as in nginx
            order.sort(key=lambda name: self._began[name] / self._weights[name])
        return order

    def began(self, name: str) -> None:
        """Count a call that begins at an endpoint."""
        self._began[name] += 1

    def ended(self, name: str) -> None:
        """Count a call that has ended at an endpoint."""
        self._began[name] -= 1


def _whole(weights: Mapping[str, float]) -> dict[str, int]:
    """Return weights as integers in the same proportions, so that shares are exact; 0.1 counts as
    one tenth.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    unit = math.lcm(*(weight.denominator for weight in exact.values()))
    return {name: int(weight * unit) for name, weight in exact.items()}


class _Smooth:
    """Smooth weighted round robin (nginx, 2012).

    At every turn each name gains its weight as credit.  The name with the most credit has the turn,
    and pays the sum of all weights.  With n names, no name is ever a whole turn ahead of its share.
    None is more than 1/2 + 1/3 + ... + 1/n of a turn behind it.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights, self._sum = weights, sum(weights.values())
        self._credit = dict.fromkeys(weights, 0)

    def take(self) -> list[str]:
        """Return all names by credit; the first has this turn."""
        for name, weight in self._weights.items():
            self._credit[name] += weight
        order = sorted(self._credit, key=self._credit.__getitem__, reverse=True)
        for first in order[:1]:  # an only endpoint has no substitutes, so the order may be empty
            self._credit[first] -= self._sum
        return order


class _Turns:
    """Turns, with separate turns of the others as substitutes for each endpoint: they share its
    calls while it is skipped.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._first = _Smooth(weights)
        self._others = {
            name: _Smooth({each: weights[each] for each in weights if each != name})
            for name in weights
        }

    def take(self) -> list[str]:
        """Return all names: the one whose turn it is, then its substitutes in their order."""
        first = self._first.take()[0]
        return [first, *self._others[first].take()]


class _Ring:
    """Consistent hashing (Karger et al., 1997): a key belongs to the next point on a ring.

    A name has many points, by its weight.  If a name is removed, the order of the others stays.
    Only without the heaviest name may keys move between the others: its weight sets the number of
    points.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        heaviest = max(weights.values())
        counts = {
            name: max(1, round(POINTS * weight / heaviest)) for name, weight in weights.items()
        }
        points = sorted(
            (_point(f"{name}#{number}"), name)
            for name, count in counts.items()
            for number in range(count)
        )
        self._points, self._names = [point for point, _ in points], [name for _, name in points]

    def walk(self, key: str) -> list[str]:
        """Return all names in the order of the ring, from the point of a key on."""
        start = bisect(self._points, _point(key))
        return list(dict.fromkeys(self._names[start:] + self._names[:start]))


def _point(text: str) -> int:
    """Return the point of a text on the ring: the same in every process, unlike Python's hash."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
