"""The codec of values: each comes back as it went, or is refused by name."""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_tasks.jobs import codec
from rlm_tasks.jobs.storable import MOST_LEVELS, STORABLE, NotStorable
from tests.unit.jobs.values import EXAMPLES, VALUES, same


@given(VALUES)
def test_a_value_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    assert same(codec.unpack(codec.pack(value)), value)


@pytest.mark.parametrize("value", EXAMPLES.values(), ids=EXAMPLES)
def test_each_type_of_the_guides_table_comes_back(value: Any) -> None:
    for whole in (value, [value], (value, value), [(value, 1), (value,)], {"of": value}):
        assert same(codec.unpack(codec.pack(whole)), whole)


def test_the_guides_table_has_every_type_that_can_be_stored() -> None:
    assert {type(each) for each in EXAMPLES.values()} == STORABLE
    page = (Path(__file__).parents[3] / "docs" / "guide.md").read_text(encoding="utf-8")
    for kind in STORABLE - {type(None)}:
        assert f"`{kind.__name__}`" in page, kind


class Colour(enum.Enum):
    RED = 1


class Word(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


class Pair(NamedTuple):
    x: int


@dataclasses.dataclass(frozen=True)
class Row:
    x: int


class Model(pydantic.BaseModel):
    x: int


class Struct(msgspec.Struct, frozen=True):
    x: int


class Awaited:
    def __await__(self) -> Iterator[None]:
        yield


class Zone(tzinfo):
    def utcoffset(self, _: datetime | None) -> timedelta:
        return timedelta(0)


class Odd:
    """An object that raises at every look."""

    def __getattribute__(self, name: str) -> Any:
        raise KeyError(name)


class Frame:
    """Stands for a data frame of pandas, polars or pyarrow."""

    columns = ("a", "b")


REFUSED: dict[Any, tuple[Any, str]] = {
    "enum": (Colour.RED, "a tests Colour cannot be stored; pass its .value"),
    "str enum": (Word.RED, "a tests Word cannot be stored; pass its .value"),
    "int enum": (Number.ONE, "a tests Number cannot be stored; pass its .value"),
    "str subclass": (Text("a"), "a tests Text cannot be stored; pass str(...)"),
    "named tuple": (Pair(1), "a tests Pair cannot be stored; pass tuple(...)"),
    "dataclass": (Row(1), "a tests Row cannot be stored; pass dataclasses.asdict(...)"),
    "pydantic": (Model(x=1), "a tests Model cannot be stored; pass .model_dump()"),
    "struct": (Struct(1), "a tests Struct cannot be stored; pass msgspec.structs.asdict(...)"),
    "ordered": (OrderedDict(a=1), "a collections OrderedDict cannot be stored; pass dict(...)"),
    "default": (defaultdict(int), "a collections defaultdict cannot be stored; pass dict(...)"),
    "deque": (deque(), "a collections deque cannot be stored; pass list(...)"),
    "generator": ((x for x in "a"), "a generator cannot be stored; pass list(...)"),
    "awaitable": (
        Awaited(),
        "a tests Awaited cannot be stored; it was not awaited: make the operation an async def",
    ),
    "range": (range(3), "a range cannot be stored; pass list(...)"),
    "path": (Path("a"), "a pathlib PosixPath cannot be stored; pass str(...)"),
    "memoryview": (memoryview(b"a"), "a memoryview cannot be stored; pass bytes(...)"),
    "numpy integer": (numpy.int64(1), "a numpy int64 cannot be stored; pass .item()"),
    "numpy float": (numpy.float64(1), "a numpy float64 cannot be stored; pass .item()"),
    "numpy text": (numpy.str_("a"), "a numpy str_ cannot be stored; pass .item()"),
    "numpy array": (numpy.zeros(3), "a numpy ndarray cannot be stored; pass .tolist()"),
    "frame": (Frame(), 'a tests Frame cannot be stored; pass .to_dict("records")'),
    "odd": (Odd(), "a tests Odd cannot be stored; see the types of items in docs/guide.md"),
    "object": (object(), "an object cannot be stored; see the types of items in docs/guide.md"),
    "surrogate": ("\ud800", "has a lone surrogate, which is no text; pass bytes, or replace it"),
    "zone": (
        datetime(2026, 1, 1, tzinfo=Zone()),
        "its time zone, a tests Zone, cannot be stored; "
        "pass zoneinfo.ZoneInfo(...) or datetime.timezone",
    ),
}


@pytest.mark.parametrize(("value", "why"), REFUSED.values(), ids=REFUSED)
def test_any_other_type_is_refused_with_what_to_pass_instead(value: Any, why: str) -> None:
    for whole, where in (
        (value, ""),
        ([1, {"rows": [value]}], "[1].rows[0]"),
        (({"a b": (0, value)},), "[0]['a b'][1]"),
    ):
        with pytest.raises(NotStorable) as raised:
            codec.pack(whole)
        assert str(raised.value) == (f"{where}: {why}" if where else why)
        assert raised.value.value is value


@pytest.mark.parametrize("key", [Colour.RED, Word.RED, Number.ONE, Text("a"), Pair(1), Row(1)])
def test_a_key_of_another_type_is_refused_beside_plain_keys(key: Any) -> None:
    for whole in ({key: 1}, {"a b": 1, key: 2}, [{1: 1}, {key: 1}], {(1, key): 1}, {key}):
        with pytest.raises(NotStorable, match="cannot be stored; pass"):
            codec.pack(whole)


def nested(levels: int, of: Any = list) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if of is dict else of([value])
    return value


@pytest.mark.parametrize("kind", [list, dict, tuple])
def test_a_value_that_a_worker_could_not_read_is_refused(kind: Any) -> None:
    deep = nested(MOST_LEVELS, kind)
    assert codec.encode_all([deep])
    assert codec.unpack(codec.pack(deep)) == deep
    for levels in (MOST_LEVELS + 1, 950, 5000, 100_000):
        with pytest.raises(NotStorable, match="is nested too deeply; flatten it") as raised:
            codec.pack(nested(levels, kind))
        assert len(str(raised.value)) < 300


def _looped() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def _tree_with_parents() -> dict[str, Any]:
    root: dict[str, Any] = {"name": "root", "parent": None}
    root["children"] = [{"name": "leaf", "parent": root, "children": []} for _ in range(3)]
    return root


def _mutual_friends() -> dict[str, Any]:
    ann: dict[str, Any] = {"name": "Ann"}
    ann["friends"] = tuple({"name": name, "friends": ann} for name in "ab")
    return ann


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (_looped(), r"\[0\]"),
        (_tree_with_parents(), r"children\[0\].parent"),
        (_mutual_friends(), r"friends\[0\].friends"),
    ],
)
def test_a_value_that_contains_itself_is_refused_by_place_at_once(value: Any, where: str) -> None:
    with pytest.raises(NotStorable, match=f"^{where}: contains itself; store an id in place"):
        codec.pack(value)


def test_a_value_that_repeats_its_parts_is_read_once_for_each_part() -> None:
    value: Any = [1]
    for _ in range(15):
        value = [value, value]
    assert codec.unpack(codec.pack(value)) == value
    for _ in range(45):
        value = [value, value]
    with pytest.raises(NotStorable, match="more than 134,217,728 values"):
        codec.pack(value)


def test_a_zone_whose_name_is_no_text_is_refused_by_place() -> None:
    zone = timezone(timedelta(hours=1), "\ud800")
    with pytest.raises(NotStorable, match="at: its time zone"):
        codec.pack({"at": datetime(2026, 11, 30, tzinfo=zone)})


def test_a_value_that_grows_without_end_is_refused_before_memory_does() -> None:
    value: Any = [0] * 1000
    for _ in range(12):
        value = [value] * 1000
    with pytest.raises(NotStorable, match="more than 134,217,728 values"):
        codec.pack(value)


def test_data_of_the_release_before_can_be_read() -> None:
    stored = msgspec.msgpack.encode(
        [(1, "a"), {1: 2}, {(1, 2): 3}, datetime(2026, 1, 1, tzinfo=UTC)]
    )
    big = msgspec.msgpack.encode(msgspec.msgpack.Ext(1, (2**70).to_bytes(9, "big", signed=True)))
    assert codec.decode(stored) == [
        [1, "a"],
        {1: 2},
        {(1, 2): 3},
        datetime(2026, 1, 1, tzinfo=UTC),
    ]
    assert codec.decode(big) == 2**70


def test_an_extension_of_a_later_release_is_named() -> None:
    with pytest.raises(ValueError, match="unknown extension type 99: a later release"):
        codec.decode(msgspec.msgpack.encode(msgspec.msgpack.Ext(99, b"")))


def test_long_data_is_compressed() -> None:
    assert len(codec.pack(["the same"] * 1000)) < 200


@given(st.binary(max_size=3000), st.integers(1, 2000))
def test_the_unpacked_size_is_known_before_unpacking(data: bytes, times: int) -> None:
    assert codec.unpacked_bytes(codec.compress(data * times)) == len(data) * times


def test_data_that_grows_beyond_all_bounds_is_not_unpacked() -> None:
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little")

    with pytest.raises(ValueError, match="more than"):
        codec.decompress(b"\x01" + frame)
