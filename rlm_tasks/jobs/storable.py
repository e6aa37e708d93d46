"""Which values can be stored as they are, and what to pass in place of all others.

The codec asks `types_in` before it packs a value, and `refusal` for the error.  The table of types
is in docs/guide.md.  Begin with `types_in`.
"""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from resilience.errors import short_repr

MOST_LEVELS = 200
"""A value may be nested this deep; a worker, whose stack is deeper, can still read it."""
MOST_VALUES = 1 << 27
"""Values on one level of nesting; more hardly fit into a value of Redis, which has 512 MB."""
NO_TEXT = "has a lone surrogate, which is no text; pass bytes, or replace it"
MOST_STEPS = 20
"""Steps of a value's place that an error shows."""
MANY = 4096
"""Lists and dicts on one level; so many may be the same ones, again and again."""

SCALARS = frozenset((type(None), bool, int, float, str, bytes))
PLAIN = SCALARS | {list, dict}
"""The types that MessagePack has itself."""
_NESTED = frozenset((list, dict, tuple, set, frozenset, Counter))
_ZONED = frozenset((datetime, time))
STORABLE = PLAIN | _NESTED | _ZONED | {date, timedelta, Decimal, Fraction, UUID, complex, bytearray}
"""The types that come back as they went.  Their subclasses are not among them."""


class NotStorable(TypeError):
    """A value that would not come back as it went.

    `where` is its place in the whole, such as ``[3].when``, or '' for the whole; `value` is the
    value itself; `why` says what is wrong and what to do.
    """

    def __init__(self, where: str, value: Any, why: str) -> None:
        self.where, self.value, self.why = where, value, why
        super().__init__(f"{where.removeprefix('.')}: {why}" if where else why)


def types_in(value: Any, levels: int = MOST_LEVELS) -> list[set[type]]:
    """Return the types in a value, level by level: first its own type, then those of its contents.

    Raises NotStorable when one of them cannot be stored, or when it is nested deeper than `levels`.
    """
    kinds = {type(value)}
    found, level, is_finite = [kinds], [value], False
    while kinds <= STORABLE and len(found) <= levels + 1:
        if not (nested := kinds & _NESTED):
            return found
        if nested < kinds:
            level = [each for each in level if type(each) in nested]
        if Counter in nested:  # a class written in Python: it refers to more than its contents
            level = [dict(each) if type(each) is Counter else each for each in level]
        if len(level) >= MANY and not is_finite and 2 * len(set(map(id, level))) < len(level):
            _refuse_endless(value, levels)
            is_finite = True
        if sum(map(len, level)) > MOST_VALUES:
            raise _too_many(value)
        # The contents of all containers of this level at C speed.  Keys that are exact strings may
        # be left out, which is all the same here.
        level = gc.get_referents(*level)
        kinds = set(map(type, level))
        found.append(kinds)
    raise refusal(value, levels)


def refusal(value: Any, levels: int = MOST_LEVELS) -> NotStorable:
    """Return the error for the first value in `value`, in its order, that cannot be stored.

    Raises it when `value` contains itself.
    """
    for where, each in _walk(value, levels):
        if why := _why_not(each, len(where) >= levels):
            if len(where) >= levels:
                _refuse_endless(value, levels)
            return NotStorable("".join(map(_named, where[:MOST_STEPS])), each, why)
    return NotStorable("", value, "cannot be packed in this thread: its stack is too deep")


def _refuse_endless(value: Any, levels: int) -> None:
    """Raise NotStorable for a value that contains itself, or too many values by repetition.

    Each list and dict is read once, however often the value contains it.
    """
    sizes: dict[int, int] = {}  # the values in each list or dict that was read to its end
    stack: list[tuple[int, Iterator[tuple[Path, Any]]]] = [(id(value), _contents((), value))]
    counts, open_ones = [0], {id(value)}
    while stack:
        own, contents = stack[-1]
        for path, each in contents:
            counts[-1] += 1 + sizes.get(id(each), 0)
            if id(each) in open_ones:
                raise NotStorable("".join(map(_named, path[:MOST_STEPS])), each, _ENDLESS)
            if type(each) in _NESTED and id(each) not in sizes and len(path) < levels:
                stack.append((id(each), _contents(path, each)))
                counts.append(0)
                open_ones.add(id(each))
                break
        else:
            stack.pop()
            open_ones.discard(own)
            sizes[own] = counts.pop()
            if counts:
                counts[-1] += sizes[own]
            if sizes[own] > MOST_VALUES:
                raise _too_many(value)


_ENDLESS = "contains itself; store an id in place of the reference back"


def _too_many(value: Any) -> NotStorable:
    return NotStorable("", value, f"has more than {MOST_VALUES:,} values; pass less at once")


def is_portable(zone: Any) -> bool:
    """Whether a time zone can be stored: none, a fixed offset, or a ZoneInfo with a name."""
    return zone is None or type(zone) is timezone or (type(zone) is ZoneInfo and bool(zone.key))


# --- the place of a value ----------------------------------------------------------------------

_KEY, _MEMBER = object(), object()
Path = tuple[Any, ...]


def _walk(value: Any, levels: int) -> Iterator[tuple[Path, Any]]:
    """Yield each value with its path, in order, without recursion."""
    stack: list[Iterator[tuple[Path, Any]]] = [iter([((), value)])]
    while stack:
        for path, each in stack[-1]:
            yield path, each
            if type(each) in _NESTED and len(path) < levels:
                stack.append(_contents(path, each))
                break
        else:
            stack.pop()


def _contents(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield (*path, _KEY), key
            yield (*path, key), each
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield (*path, index), each
    else:
        for each in value:
            yield (*path, _MEMBER), each


def _named(step: Any) -> str:
    if step is _KEY:
        return "{key}"
    if step is _MEMBER:
        return "{member}"
    return f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{short_repr(step)}]"


# --- why not, and what instead -----------------------------------------------------------------


def _why_not(value: Any, is_deepest: bool) -> str:
    """Return the reason why a value cannot be stored, without its contents; '' if it can be."""
    kind = type(value)
    if kind not in STORABLE:
        return f"{_type_name(kind)} cannot be stored; {_advice(value)}"
    if is_deepest and kind in _NESTED and value:
        return "is nested too deeply; flatten it, or pass it as JSON text"
    if kind is str and not is_text(value):
        return NO_TEXT
    if kind in _ZONED and not (is_portable(value.tzinfo) and is_text(str(value.tzinfo))):
        return (
            f"its time zone, {_type_name(type(value.tzinfo))}, cannot be stored; "
            "pass zoneinfo.ZoneInfo(...) or datetime.timezone"
        )
    return ""


def is_text(value: str) -> bool:
    """Whether a text has no lone surrogate, which cannot be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _type_name(kind: type) -> str:
    """Return a type with its package and an article: `a pandas Timestamp`."""
    package = kind.__module__.partition(".")[0]
    name = kind.__name__ if package in ("builtins", "__main__") else f"{package} {kind.__name__}"
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


_METHODS = (
    ("columns", 'pass .to_dict("records")'),  # data frames
    ("to_pydatetime", "pass .to_pydatetime()"),  # pandas.Timestamp
    ("to_pytimedelta", "pass .to_pytimedelta()"),
    ("model_dump", "pass .model_dump()"),  # pydantic
    ("__struct_fields__", "pass msgspec.structs.asdict(...)"),
    ("__attrs_attrs__", "pass attrs.asdict(...)"),
    ("tolist", "pass .tolist()"),  # arrays and series
)


def _advice(value: Any) -> str:
    """Return what to pass in place of a value."""
    kind = type(value)
    if issubclass(kind, Enum):
        return "pass its .value"
    if issubclass(kind, Awaitable):
        return "it was not awaited: make the operation an async def"
    if issubclass(kind, memoryview):
        return "pass bytes(...)"
    if dataclasses.is_dataclass(kind):
        return "pass dataclasses.asdict(...)"
    if hasattr(kind, "dtype") and not getattr(value, "shape", True):
        return "pass .item()"  # a scalar of numpy
    for name, advice in _METHODS:
        if hasattr(kind, name):
            return advice
    for base in kind.__mro__[1:-1]:
        if base in STORABLE:
            return f"pass {base.__name__}(...)"
    if issubclass(kind, PurePath):
        return "pass str(...)"
    if issubclass(kind, Iterable):
        return "pass list(...)"
    return "see the types of items in docs/guide.md"
