"""Blocks of items: their limits at submit, their life before the job opens, memory in a worker."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.client import Pipeline
from redis.exceptions import ReadOnlyError

from resilience.store import Store
from rlm_tasks.errors import InvalidRequest, ItemsUnreadable
from rlm_tasks.jobs import stored_items
from rlm_tasks.jobs.index_ranges import IndexRanges
from rlm_tasks.jobs.items import Lines, source_of
from rlm_tasks.jobs.sizes import estimated_bytes
from rlm_tasks.jobs.stored_items import (
    CACHE_BYTES,
    READ_BYTES,
    STAGED_S,
    ItemReader,
    ItemWriter,
    StoredItems,
    Unreadable,
)


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> Store:
    """A store on a fake server."""
    return Store("redis://fake", client=fakeredis.FakeRedis())


def writer_of(store: Store, most: int = 1 << 24, **more: Any) -> ItemWriter:
    """Return a writer of the keys `index` and `blocks`."""
    return ItemWriter(store, "index", "blocks", max_item_bytes=most, **more)


def test_a_generator_is_stored_whole_when_redis_moves_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_items, "PIPELINE_BYTES", 1)  # send after each block
    execute, sent = Pipeline.execute, itertools.count()

    def moves_once(self: Pipeline, raise_on_error: bool = True) -> Any:
        if next(sent) == 1:
            raise ReadOnlyError("You can't write against a read only replica.")
        return execute(self, raise_on_error)

    monkeypatch.setattr(Pipeline, "execute", moves_once)
    source, n = source_of(iter(range(5000))).write(writer_of(store))

    assert next(sent) > 5, "the second block was sent twice"
    assert (n, [*_read(store, source, n)]) == (5000, [*range(5000)])


def _read(store: Store, source: StoredItems, n: int) -> Iterator[Any]:
    reader, at = ItemReader(store), 0
    while at < n:
        items = reader.read(source, "index", "blocks", at, n)
        at += len(items)
        yield from items


# --- reading -----------------------------------------------------------------------------------


def test_each_reading_returns_new_objects(store: Store) -> None:
    source, n = source_of([{"v": [i]} for i in range(3000)]).write(writer_of(store))
    reader = ItemReader(store)

    for _ in range(2):
        rows = reader.read(source, "index", "blocks", 0, n)
        assert [row.pop("v") for row in rows] == [[i] for i in range(n)]
    assert reader.read(source, "index", "blocks", 1500, 1501) == [{"v": [1500]}]


PLAIN = st.one_of(st.integers(), st.text(max_size=3), st.lists(st.none()), st.uuids())


@given(
    st.one_of(
        st.lists(PLAIN, max_size=20),
        st.lists(st.tuples(PLAIN, PLAIN), max_size=20),
        st.lists(st.tuples(), max_size=20),
        st.lists(st.lists(st.tuples(PLAIN)), max_size=20),
    )
)
def test_any_part_of_a_block_is_read_alone(items: list[Any]) -> None:
    store = Store("redis://fake", client=fakeredis.FakeRedis())
    source, n = source_of(items).write(writer_of(store))
    reader = ItemReader(store)

    for lo in range(n):
        for hi in range(lo + 1, n + 1):
            assert reader.read(source, "index", "blocks", lo, hi) == items[lo:hi]


def test_memory_holds_few_bytes_however_long_the_file_is(tmp_path: Path, store: Store) -> None:
    (path := tmp_path / "long.txt").write_bytes((b"x" * 99 + b"\n") * 400_000)
    source, n = source_of(Lines(path)).write(writer_of(store))
    reader = ItemReader(store)

    at = most = largest = 0
    while at < n:
        items = reader.read(source, "index", "blocks", at, n)
        most, largest = max(most, reader.held_bytes), max(largest, len(items))
        at += len(items)

    assert path.stat().st_size > 4 * CACHE_BYTES
    assert CACHE_BYTES / 2 < most <= CACHE_BYTES
    assert largest * 100 <= READ_BYTES + (1 << 20)


def test_blocks_of_one_job_are_forgotten_alone(store: Store) -> None:
    reader = ItemReader(store)
    for name in ("one", "two"):
        writer = ItemWriter(store, f"{name}-index", name, max_item_bytes=1 << 20)
        source, _ = source_of(["text"] * 3000).write(writer)
        reader.read(source, f"{name}-index", name, 0, 3000)
    before = reader.held_bytes

    reader.forget("one")

    assert reader.held_bytes == before / 2
    reader.lookups()
    reader.read(source, "two-index", "two", 0, 3000)
    assert reader.lookups() == (3, 0)
    reader.forget()
    assert reader.held_bytes == 0


def test_a_damaged_block_fails_its_items_with_one_error(store: Store) -> None:
    source, n = source_of(["text"] * 3000).write(writer_of(store))
    store.client.hset("blocks", "1024:2048", b"\x01 damaged")
    reader = ItemReader(store)

    assert len(reader.read(source, "index", "blocks", 0, n)) == 1024, "up to the damaged one"
    with pytest.raises(Unreadable) as unreadable:
        reader.read(source, "index", "blocks", 1024, n)

    assert unreadable.value.until == 2048
    assert isinstance(unreadable.value.error, ItemsUnreadable)
    assert str(unreadable.value.error).startswith("stored items 1024 to 2047 are damaged")


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 5, 1500])
def test_a_large_item_among_small_ones_is_named(store: Store, at: int) -> None:
    items = ["small"] * 2000
    items[at] = "x" * 5000

    words = rf"items\[{at}\]='a str': packs to 5003 bytes, more than RLM_MAX_ITEM_BYTES=4000"
    with pytest.raises(InvalidRequest, match=words):
        source_of(items).write(writer_of(store, 4000))


def test_an_item_that_redis_does_not_take_is_refused_before_it_is_sent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    monkeypatch.setattr(
        store.client, "config_get", lambda name: {name: str(2 << 20)}, raising=False
    )

    with pytest.raises(InvalidRequest, match="larger than Redis takes"):
        source_of([1, random.Random(0).randbytes(3 << 20)]).write(writer_of(store))

    assert store.client.keys() == []


def test_staged_items_live_for_an_hour_after_the_last_flush(store: Store) -> None:
    source_of(range(10)).write(writer_of(store))
    source_of(["text"]).write(writer_of(store))

    assert {store.client.ttl(key) for key in ("index", "blocks")} == {STAGED_S}


def slow(clock: Clock, seconds: float) -> Iterator[str]:
    """Yield items with a long pause after the first 3,000."""
    yield from ["text"] * 3000
    clock.now += seconds
    yield from ["text"] * 1024


def test_a_slow_iterable_renews_the_items_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_items, "PIPELINE_BYTES", 1)  # each block is sent
    clock = Clock()
    expired: list[str] = []
    writer = writer_of(store, clock=clock)

    def watched() -> Iterator[str]:
        for at, item in enumerate(slow(clock, STAGED_S / 2)):
            if at == 3000:
                store.client.expire("blocks", 7)
            if at == 3002:
                expired.append(str(store.client.ttl("blocks")))
            yield item

    source_of(watched()).write(writer)

    assert expired == [str(STAGED_S)]


def test_items_that_have_expired_before_the_last_one_are_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_items, "PIPELINE_BYTES", 1)
    clock = Clock()

    def expiring() -> Iterator[str]:
        for at, item in enumerate(slow(clock, 2 * STAGED_S)):
            if at == 3000:
                store.client.delete("index", "blocks")
            yield item

    with pytest.raises(InvalidRequest, match="gave no item for more than 3600 s"):
        source_of(expiring()).write(writer_of(store, clock=clock))


# --- helpers -----------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 40)), st.integers(0, 41), st.integers(0, 41))
def test_ranges_of_indexes_are_like_a_set(indexes: set[int], lo: int, hi: int) -> None:
    runs: list[tuple[int, int]] = []
    for index in sorted(indexes):
        if runs and runs[-1][1] == index:
            runs[-1] = runs[-1][0], index + 1
        else:
            runs.append((index, index + 1))

    found = IndexRanges(reversed(runs))

    assert (list(found), len(found)) == (sorted(indexes), len(indexes))
    assert [index in found for index in range(42)] == [index in indexes for index in range(42)]
    gaps = [index for start, end in found.gaps(lo, hi) for index in range(start, end)]
    assert gaps == [index for index in range(lo, hi) if index not in indexes]


@pytest.mark.parametrize(
    ("value", "size"),
    [("x" * 2000, 2049), (["x" * 100] * 10, 1600), ({"a": "x" * 1000, "b": 1}, 1300), (7, 28)],
)
def test_the_memory_of_outputs_is_estimated_from_a_few(value: Any, size: int) -> None:
    assert estimated_bytes([value] * 1000) == pytest.approx(1000 * size, rel=0.3)
    assert estimated_bytes([value] * 10, 10) == 0
