"""A fake provider: a process that checks each request at its arrival, and reports all requests.

`tests.faults.guards` starts it.  A request is one line over TCP, and so is its answer:

- ``take <tokens>``: 200, or 429 beyond the requests or tokens of a true sliding window;
- ``call <kind>``: 200 or 500 after 10 to 80 ms; the first few fail;
- ``report``: requests taken and refused, and calls with the number in flight, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from contextlib import closing, suppress
from random import Random
from typing import Any


class Provider:
    """The limits, and the requests so far."""

    def __init__(self, window_s: float, requests: float, tokens: float, failing: int) -> None:
        self._window_s, self._requests, self._tokens, self._failing = (
            window_s,
            requests,
            tokens,
            failing,
        )
        self._window: deque[tuple[float, int]] = deque()  # (arrival, tokens) in the current window
        self._used = 0
        self.taken: list[tuple[float, int]] = []  # (arrival, tokens) of all answers with 200
        self.refused = 0
        # (kind, calls in flight with it, calls that had succeeded before)
        self.calls: list[tuple[str, int, int]] = []
        self._in_flight, self._well, self._random = 0, 0, Random(1)

    def take(self, tokens: int) -> int:
        """Return the status of a request that arrives now."""
        now = time.monotonic()
        while self._window and self._window[0][0] <= now - self._window_s:
            self._used -= self._window.popleft()[1]
        if len(self._window) + 1 > self._requests or self._used + tokens > self._tokens:
            self.refused += 1
            return 429
        self._window.append((now, tokens))
        self.taken.append((now, tokens))
        self._used += tokens
        return 200

    async def call(self, kind: str) -> int:
        """Return the status of a call after a delay; the first few fail."""
        self._in_flight += 1
        self.calls.append((kind, self._in_flight, self._well))
        well = len(self.calls) > self._failing
        await asyncio.sleep(self._random.uniform(0.01, 0.08))  # the time of the call
        self._in_flight -= 1
        self._well += well
        return 200 if well else 500

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection, line by line."""
        with suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(f"{await self._answer(*line.decode().split())}\n".encode())
        writer.close()

    async def _answer(self, verb: str, word: str = "") -> str:
        if verb == "report":
            return json.dumps({"taken": self.taken, "refused": self.refused, "calls": self.calls})
        return str(self.take(int(word)) if verb == "take" else await self.call(word))


class Line:
    """A connection to the provider."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("r")

    def ask(self, line: str) -> str:
        """Send a line and return the answer."""
        self._socket.sendall(f"{line}\n".encode())
        return self._file.readline().strip()

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()


def report(port: int) -> dict[str, Any]:
    """Return the report of the provider at a port: taken, refused, calls."""
    with closing(Line(port)) as line:
        found: dict[str, Any] = json.loads(line.ask("report"))
    return found


async def _run(provider: Provider) -> None:
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    # The end of stdin means that the test has ended.
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(0), daemon=True).start()
    print("at", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--window", type=float, default=1.0)
    options.add_argument("--requests", type=float, default=1.0)
    options.add_argument("--tokens", type=float, default=1.0)
    options.add_argument("--failing", type=int, default=0)
    asked = options.parse_args()
    asyncio.run(_run(Provider(asked.window, asked.requests, asked.tokens, asked.failing)))
