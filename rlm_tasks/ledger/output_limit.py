"""The largest output, partial or answer that a job may store.

The engine asks `OutputLimit.checked` before it sends a packed value.  Redis closes the connection
on a value that is too large, which looks like an outage: the same work would be done for ever.
"""

from __future__ import annotations

from resilience.store import Store
from rlm_tasks.errors import OutputTooLarge
from rlm_tasks.jobs.sizes import ALWAYS_TAKEN, largest_value


class OutputLimit:
    """The limit of one process; it asks the server when it first meets a value of some size."""

    def __init__(self, store: Store, max_bytes: int) -> None:
        self._store, self._max_bytes = store, max_bytes
        self._known = 0  # the limit, once the server has been asked

    def bytes_for(self, size: int) -> int:
        """Return the limit that counts for a value of `size` bytes."""
        if size <= min(self._max_bytes, ALWAYS_TAKEN):
            return self._max_bytes
        self._known = self._known or min(self._max_bytes, largest_value(self._store))
        return self._known

    def checked(self, packed: bytes, what: str) -> bytes:
        """Return the packed value.  Raises OutputTooLarge, which says `what` it is."""
        if len(packed) > (limit := self.bytes_for(len(packed))):
            raise OutputTooLarge(what, len(packed), limit)
        return packed
