"""The clock of the ledger's Redis, in every process: the ages of messages are measured by it.

Senders stamp messages with it and readers compare with it, so a wrong clock of a machine changes no
age.  Begin with `ServerClock`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from resilience.errors import StoreUnavailable
from resilience.store import Store

READ_EVERY_S = 60.0
"""The server's time is read again after this; in between, the process counts the seconds itself."""
JUMP_S = 0.5
"""It is also read again after the machine's own clock was set, or the machine had slept."""


class ServerClock:
    """The server's time in seconds since 1970; call the object to get it.

    While Redis is away it goes on from the last reading; before the first one it is this machine's
    clock.
    """

    def __init__(self, store: Store, *, wall: Callable[[], float] = time.time) -> None:
        self._store, self._wall = store, wall
        self._read_at = float("-inf")  # by the clock of the process, as the next two
        self._ahead: float | None = None  # server's time less the clock of the process
        self._own_ahead = 0.0  # machine's time less the clock of the process

    def __call__(self) -> float:
        """Return the server's time; it costs a round trip once a minute."""
        now, own = self._store.clock(), self._wall()
        jumped = abs(own - now - self._own_ahead) > JUMP_S
        if jumped or now - self._read_at >= READ_EVERY_S:
            self._read_at, self._own_ahead = now, own - now
            self._read()
        return own if self._ahead is None else self._store.clock() + self._ahead

    def now_ms(self) -> int:
        """Return the server's time in ms since 1970."""
        return int(self() * 1000)

    def _read(self) -> None:
        began = self._store.clock()
        try:
            seconds, micros = self._store.call(lambda client: client.time())
        except StoreUnavailable:
            return
        self._ahead = seconds + micros / 1e6 - (began + self._store.clock()) / 2
