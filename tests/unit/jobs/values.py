"""Values of every type that can be stored, and how tests compare them."""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

BERLIN = ZoneInfo("Europe/Berlin")
_ZONES = st.sampled_from(
    [None, UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=1), "x"), BERLIN]
)
_TEXTS = st.text(st.characters(codec="utf-8"))
HASHABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | _TEXTS
    | st.binary()
    | st.complex_numbers()
    | st.dates()
    | st.datetimes(timezones=_ZONES, allow_imaginary=False)
    | st.times(timezones=_ZONES)
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.uuids(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
VALUES = st.recursive(
    HASHABLE | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner)
        | st.lists(st.tuples(inner, inner))
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=2).map(Counter)
        | st.sets(HASHABLE, max_size=3)
    ),
    max_leaves=20,
)

EXAMPLES: dict[str, Any] = {
    "None": None,
    "bool": True,
    "int": 2**70,
    "float": math.inf,
    "str": "naïve",
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"\x00\xff"),
    "list": [1, [2.5]],
    "tuple": (1, (2.5, "a"), ()),
    "dict": {"a": 1, 2: "b", (1, 2): None, None: 0.5, date(2026, 1, 1): b"x"},
    "Counter": Counter({"a": 2, (1, 2): 3}),
    "set": {1, "a", (2, 3)},
    "frozenset": frozenset((1, 2)),
    "date": date(2026, 11, 30),
    "datetime": datetime(2026, 11, 30, 9, 30, 0, 5),
    "datetime at an offset": datetime(2026, 11, 30, 9, 30, tzinfo=timezone(timedelta(hours=-3.5))),
    "datetime of a zone": datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=BERLIN),
    "time": time(9, 30, tzinfo=UTC),
    "timedelta": timedelta(days=-3, microseconds=7),
    "Decimal": Decimal("-10.20"),
    "Fraction": Fraction(-(2**70), 3),
    "UUID": UUID(int=2**127 + 5),
    "complex": complex(-0.0, math.inf),
}
"""One value of each type in the guide's table."""


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of the same types; NaN is the same as NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, set | frozenset):
        return same(sorted(one, key=_order), sorted(other, key=_order))
    if isinstance(one, datetime | time):
        return _time_parts(one) == _time_parts(other)
    return repr(one) == repr(other)


def _time_parts(value: datetime | time) -> tuple[Any, ...]:
    return (value.replace(tzinfo=None), value.fold, repr(value.tzinfo), type(value.tzinfo))


def _order(value: Any) -> str:
    return (
        f"{type(value).__name__} {value!r}" if not isinstance(value, frozenset) else _members(value)
    )


def _members(value: frozenset[Any]) -> str:
    return "frozenset " + " ".join(sorted(map(_order, value)))
