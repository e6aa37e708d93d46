"""The times at which a running node ends a slice, and at which it asks the ledger.

`Work` asks `Pace` after each item.  A slice ends about every 50 ms and needs no round trip: the
shared page says whether the worker drains or a slot is free.  Round trips (pulses) are less
frequent, because on busy cores each one slows computing code by far more than its own time.
"""

from __future__ import annotations

from collections.abc import Callable

from rlm_tasks.engine.shared_page import SharedPage
from rlm_tasks.settings.sections import NodeSettings

FIRST_SLICE_MS = 10.0
"""The length of a node's first slice; each slice is at most twice as long as the one before.

The first slices are short so that short jobs, too, are shared with free slots.
"""


class Pace:
    """The timetable of one running node."""

    def __init__(
        self,
        clock: Callable[[], float],
        page: SharedPage,
        settings: NodeSettings,
        deadline_in_ms: int,
    ) -> None:
        self._clock, self._page, self._settings = clock, page, settings
        self.began = clock()
        self._deadline = self.began + deadline_in_ms / 1000 if deadline_in_ms >= 0 else float("inf")
        self.slice_ms = min(FIRST_SLICE_MS, settings.slice_ms)
        self._pulse_ms = self.slice_ms
        self._pulse_at = self.began
        self._recalls = page.recalls
        self.next_slice()

    @property
    def elapsed_ms(self) -> float:
        """The time since the node began, in ms."""
        return (self._clock() - self.began) * 1000

    @property
    def draining(self) -> bool:
        """Whether the worker is shutting down."""
        return self._page.draining

    def slice_is_over(self, now: float) -> bool:
        """Whether the slice is over.

        It ends early when the node is recalled, or when a slot of this worker is hungry.
        """
        if now >= self._boundary_at or self._page.recalls != self._recalls:
            return True
        return self._page.hungry and now >= self._early_at

    def next_slice(self) -> None:
        """Begin the next slice."""
        now = self._clock()
        self._boundary_at = now + self.slice_ms / 1000
        self._early_at = now + min(self.slice_ms, FIRST_SLICE_MS) / 1000
        self.slice_ms = min(self.slice_ms * 2, self._settings.slice_ms)

    def wants_pulse(self, *, sharable: bool) -> bool:
        """Whether the node pulses at this boundary: on time, when recalled, for a hungry slot."""
        now = self._clock()
        hungry = sharable and self._page.hungry
        return (
            hungry
            or now >= min(self._pulse_at, self._deadline)
            or self._page.recalls != self._recalls
        )

    def pulsed(self) -> None:
        """Plan the next pulse."""
        self._recalls = self._page.recalls
        self._pulse_at = self._clock() + self._pulse_ms / 1000
        self._pulse_ms = min(self._pulse_ms * 2, self._settings.pulse_ms)
