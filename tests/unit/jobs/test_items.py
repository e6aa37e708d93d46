"""Sources of items: how each kind is sampled, stored and described."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import fakeredis
import msgspec
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from resilience.store import Store
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs.items import BLOCK_BYTES, SAMPLED, Files, Lines, source_of
from rlm_tasks.jobs.stored_items import ItemReader, ItemWriter, LineSource, StoredItems


class Counted(Sequence[str]):
    """A million items that count how often one is read."""

    reads = 0

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, at: Any) -> Any:
        self.reads += 1
        return f"item {at}"


@given(st.integers(0, 5000), st.integers(0, 9))
def test_a_sample_lies_evenly_over_the_items(n: int, seed: int) -> None:
    found = source_of(range(n)).sample(Random(seed))

    indexes = [index for index, _ in found.items]
    assert found.total == n
    assert len(indexes) == min(n, SAMPLED)
    assert [item for _, item in found.items] == indexes == sorted(set(indexes))
    strides = [
        range(at * n // len(indexes), (at + 1) * n // len(indexes)) for at in range(len(indexes))
    ]
    assert all(index in stride for index, stride in zip(indexes, strides, strict=True))


def test_a_million_items_are_not_all_read() -> None:
    items = Counted()

    assert source_of(items).sample(Random(0)).total == 1_000_000
    assert items.reads == SAMPLED


@pytest.mark.parametrize("make", [lambda r: dict.fromkeys(r).keys(), deque, tuple])
def test_items_with_a_length_can_be_sampled(make: Callable[[Any], Any]) -> None:
    found = source_of(items := make(range(3000))).sample(Random(0))

    assert found.total == 3000
    assert len(found.items) == SAMPLED
    assert list(items) == list(range(3000))


def test_files_are_sampled_as_paths(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()

    assert source_of(Files(f"{tmp_path}/*.txt")).sample(Random(0)).items == [
        (0, f"{tmp_path}/a.txt"),
        (1, f"{tmp_path}/b.txt"),
    ]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ((at for at in range(3)), "would use up an iterator"),
        (map(str, range(3)), "would use up an iterator"),
        ("text", "must be an iterable of items"),
        (7, "must be an iterable of items"),
        (Lines("/no/such/file"), "cannot be read"),
    ],
)
def test_items_that_cannot_be_sampled_are_refused(items: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        source_of(items).sample(Random(0))

    assert refused.value.field == "items"


@pytest.mark.parametrize("text", ["", "one", "one\n", "one\r\ntwo", "\n\n", "one\n\ntwo\n"])
def test_lines_of_a_short_file_are_counted_as_they_are_read(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "lines").write_bytes(text.encode())

    found = source_of(Lines(path)).sample(Random(0))

    with path.open() as file:
        assert [line for _, line in found.items] == [line.rstrip("\n") for line in file]
    assert (found.total, found.exact) == (len(found.items), True)


def test_lines_of_a_long_file_are_estimated_from_some_blocks(tmp_path: Path) -> None:
    random = Random(3)
    lines = ["x" * random.randrange(200) for _ in range(40_000)]
    (path := tmp_path / "lines").write_text("\n".join(lines))

    found = source_of(Lines(path)).sample(Random(0))

    assert found.exact is False
    assert found.total == pytest.approx(len(lines), rel=0.03)
    assert len(found.items) == SAMPLED
    assert sum(len(line) for _, line in found.items) / SAMPLED == pytest.approx(99.5, rel=0.1)
    (path := tmp_path / "line").write_text("x" * 20 * BLOCK_BYTES)
    assert source_of(Lines(path)).sample(Random(0)).total == 1


# --- stored, read and described ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "about", "place"),
    [
        (range(10, 5000, 2), "3008 of a range", ""),
        ([f"item {at}" for at in range(3000)], "stored item 1499", ""),
        (Files("{folder}/*"), "stored item 1499", ""),
        (Lines("{folder}/lines"), "{folder}/lines, line 1500", "{folder}/lines, line 1500"),
    ],
)
def test_each_kind_is_read_as_it_is_iterated(
    items: Any, about: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / "lines").write_text("".join(f"line {at}\n" for at in range(3000)))
    if isinstance(items, Lines):
        items = Lines(tmp_path / "lines")
    if isinstance(items, Files):
        items = Files(f"{tmp_path}/*")
    store = Store("redis://fake", client=fakeredis.FakeRedis())

    writer = ItemWriter(store, "index", "blocks", max_item_bytes=1 << 20)
    stored, n = source_of(items).write(writer)

    reader = ItemReader(store)
    assert list(reader.read(stored, "index", "blocks", 0, n)) == list(source_of(items))
    assert stored.describe(1499) == about.replace("{folder}", str(tmp_path))
    found = reader.place(stored, "index", "blocks", 1499)
    assert found == place.replace("{folder}", str(tmp_path))


@pytest.mark.parametrize("written", ["payments.csv", "./link", "{folder}/payments.csv"])
def test_the_place_of_a_line_has_the_path_as_the_user_wrote_it(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "payments.csv").write_text("a\nb\n")
    (tmp_path / "link").symlink_to(tmp_path / "payments.csv")
    monkeypatch.chdir(tmp_path)
    written = written.replace("{folder}", str(tmp_path))
    store = Store("redis://fake", client=fakeredis.FakeRedis())
    writer = ItemWriter(store, "index", "blocks", max_item_bytes=1 << 20)

    stored, _ = Lines(written).write(writer)

    assert isinstance(stored, LineSource)
    assert stored.path == str(tmp_path / "payments.csv"), "workers read the resolved path"
    assert ItemReader(store).place(stored, "index", "blocks", 1) == f"{written}, line 2"
    monkeypatch.chdir("/")
    assert ItemReader(store).read(stored, "index", "blocks", 0, 2) == ["a", "b"]


def test_the_place_of_a_file_is_its_path_and_empty_when_its_block_is_lost(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    store = Store("redis://fake", client=fakeredis.FakeRedis())
    writer = ItemWriter(store, "index", "blocks", max_item_bytes=1 << 20)

    stored, _ = Files(f"{tmp_path}/*").write(writer)

    assert ItemReader(store).place(stored, "index", "blocks", 1) == f"{tmp_path}/b"
    store.client.flushall()
    assert ItemReader(store).place(stored, "index", "blocks", 1) == ""


@pytest.mark.parametrize("text", [b'{"type":"blocks"}', b'{"type":"blocks","later":1}'])
def test_stored_items_of_the_release_before_and_after_are_read(text: bytes) -> None:
    assert msgspec.json.decode(text, type=StoredItems).describe(7) == "stored item 7"


class Frame:
    """A data frame of pandas, as far as its looks go."""

    columns = ("name", "iban")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def to_dict(self, _: str) -> list[dict[str, str]]:
        return []


class Polars(Frame):
    def to_dicts(self) -> list[dict[str, str]]:
        return []


class Arrow(Frame):
    def to_pylist(self) -> list[dict[str, str]]:
        return []


class Point(NamedTuple):
    x: int
    y: int


class Order(BaseModel):
    id: int


@pytest.mark.parametrize(
    ("items", "advice"),
    [
        (Frame(), r"a data frame yields the names of its columns; pass .to_dict\("),
        (Polars(), r"pass .to_dicts\(\)"),
        (Arrow(), r"pass .to_pylist\(\)"),
        (numpy.arange(3), r"an array yields scalars of its own type; pass .tolist\(\)"),
        ({3, 1}, r"a set has no order; pass sorted"),
        (frozenset((3, 1)), r"a set has no order; pass sorted"),
        (Point(1, 2), "one record yields its fields"),
        (Order(id=1), "one record yields its fields"),
        (io.StringIO("a"), r"pass Lines\(path\)"),
        ("text", "must be an iterable of items"),
        (b"text", "must be an iterable of items"),
        (bytearray(b"text"), "must be an iterable of items"),
        (memoryview(b"text"), "must be an iterable of items"),
        (7, "must be an iterable of items"),
        (range(2**63), r"items=range\(0, 9223372036854775808\): has more than 99,999,999,999,999"),
        (range(0, -(10**15), -1), "has more than 99,999,999,999,999 items"),
    ],
)
def test_a_value_without_items_is_refused_with_advice(items: Any, advice: str) -> None:
    with pytest.raises(InvalidRequest, match=advice):
        source_of(items)


def test_a_dict_is_one_item() -> None:
    record = {"name": "Ada", "iban": "DE00"}

    assert list(source_of(record)) == [record]
    assert list(source_of({})) == [{}]
    assert source_of(range(10**14 - 1)).sample(Random(0)).total == 10**14 - 1
