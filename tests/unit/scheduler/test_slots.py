"""The board of free slots."""

from __future__ import annotations

import fakeredis

from resilience.keys import Keys
from resilience.store import Store
from scheduler.slots import SlotBoard


def test_free_slots_are_taken_once() -> None:
    store, keys = Store("redis://fake", client=fakeredis.FakeRedis()), Keys("unit")
    board = SlotBoard(store, keys)
    store.call(board.publish("a", 4, 2, ["high", "normal"]), board.publish("b", 4, 3, ["normal"]))

    assert store.call(board.take("normal", 4)) == [[4, 8]]
    assert store.call(board.take("normal", 4)) == [[1, 8]]
    assert store.call(board.take("high", 4)) == [[0, 4]]
    assert store.call(board.take("low", 4)) == [[0, 0]]
    store.call(board.publish("a", 4, 1, ["high", "normal"]))
    board.withdraw("b")
    assert store.call(board.take("normal", 4)) == [[1, 4]]
