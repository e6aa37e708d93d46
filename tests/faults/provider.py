"""A fake provider: a process that judges every request by the time of its own arrival, and tells
what it has seen.

One line over TCP for each request, one for its answer:

    take <tokens>    200, or 429 beyond the requests or the tokens of a true sliding window
    call <what>      200 or 500 after some 10 ms; the first few fail, and those in flight are
    counted
    report           what was seen, as JSON
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
    """What it allows, and what it has seen."""

    def __init__(self, window_s: float, requests: float, tokens: float, failing: int) -> None:
        self._window_s, self._requests, self._tokens, self._failing = (
            window_s,
            requests,
            tokens,
            failing,
        )
        self._window: deque[tuple[float, int]] = deque()  # what counts still
        self._used = 0
        self.taken: list[
            tuple[float, int]
        ] = []  # (when it came, tokens) of all that was answered with 200
        self.refused = 0
        self.calls: list[
            tuple[str, int, int]
        ] = []  # (what, calls in flight with it, calls that had gone well before)
        self._in_flight, self._well, self._random = 0, 0, Random(1)

    def take(self, tokens: int) -> int:
        """Answer a request that comes now."""
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

    async def call(self, what: str) -> int:
        """Answer after a while; the first few go wrong."""
        self._in_flight += 1
        self.calls.append((what, self._in_flight, self._well))
        well = len(self.calls) > self._failing
        await asyncio.sleep(self._random.uniform(0.01, 0.08))  # what the call takes
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
    """One connection to it."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("r")

    def ask(self, line: str) -> str:
        """Send a line and return the answer."""
        self._socket.sendall(f"{line}\n".encode())
        return self._file.readline().strip()

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()


def report(port: int) -> dict[str, Any]:
    """Return what the provider at a port has seen: taken, refused, calls."""
    with closing(Line(port)) as line:
        found: dict[str, Any] = json.loads(line.ask("report"))
    return found


async def _run(provider: Provider) -> None:
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    threading.Thread(
        target=lambda: sys.stdin.read() or os._exit(0), daemon=True
    ).start()  # the test is gone
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
