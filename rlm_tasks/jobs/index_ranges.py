"""Indexes of items, kept as ranges, because a whole file of items may fail at once.

The ledger and the engine keep failed items in it.  It has only one class.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator


class IndexRanges:
    """Indexes in order, kept as ranges without overlap."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.ranges = sorted(ranges)  # first index, and the one behind the last
        self._starts = [lo for lo, _ in self.ranges]

    def __len__(self) -> int:
        return sum(hi - lo for lo, hi in self.ranges)

    def __iter__(self) -> Iterator[int]:
        for lo, hi in self.ranges:
            yield from range(lo, hi)

    def __contains__(self, index: int) -> bool:
        at = bisect_right(self._starts, index)
        return at > 0 and index < self.ranges[at - 1][1]

    def gaps(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """Return the parts of [lo, hi) that have none of the indexes."""
        found = []
        at = max(0, bisect_right(self._starts, lo) - 1)
        while at < len(self.ranges) and (start := self._starts[at]) < hi:
            if start > lo:
                found.append((lo, start))
            lo = max(lo, self.ranges[at][1])
            at += 1
        return [*found, (lo, hi)] if lo < hi else found
