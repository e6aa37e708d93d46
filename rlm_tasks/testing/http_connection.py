"""HTTP/1.1 of the fake provider: it reads requests, and sends good and odd answers.

A web framework would mend what an odd answer has to break, so this is done by hand.
"""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from rlm_tasks.testing.odd_responses import Response

MOST_BYTES = 64 * 2**20
"""Bytes of the longest accepted request."""

SLOW_S = 3.0
"""Seconds that a slow answer takes, from its first byte to its last."""


class Request(msgspec.Struct):
    """One HTTP request; names of headers are lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str:
        """Its API key; '' without one."""
        scheme, _, key = self.headers.get("authorization", "").partition(" ")
        return key if scheme.lower() == "bearer" else ""


class HungUp(ConnectionError):
    """The connection has ended."""


class Connection:
    """HTTP/1.1 over one connection: one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.counted = False

    async def request(self) -> Request:
        """Return the next request.

        Raises ConnectionError, EOFError and ValueError where none comes.
        """
        head, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head.split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        length = int(headers.get("content-length", "0"))
        if length > MOST_BYTES:
            raise ValueError("too long")
        return Request(method, path, headers, await self._reader.readexactly(length))

    async def send(
        self, status: int, content: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with JSON."""
        await self.send_parts(status, [msgspec.json.encode(content)], headers)

    async def send_parts(
        self,
        status: int,
        parts: Sequence[bytes],
        headers: Mapping[str, str] | None = None,
        *,
        chunked: bool = False,
        pause_s: float = 0.0,
        cut: bool = False,
    ) -> None:
        """Send an answer in parts: as events if it is `chunked`, else as JSON.

        With `cut`, the connection ends in the middle of the answer.
        """
        length = (
            {"Transfer-Encoding": "chunked"}
            if chunked
            else {"Content-Length": str(sum(map(len, parts)))}
        )
        about = {
            "Content-Type": "text/event-stream" if chunked else "application/json",
            **length,
            **(headers or {}),
        }
        lines = [
            f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}",
            *(f"{name}: {value}" for name, value in about.items()),
        ]
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        if chunked:
            parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
            parts[-1] += b"0\r\n\r\n"
        for part in parts[: len(parts) // 2] if cut else parts:
            if pause_s:
                await self.pause(pause_s)
            self._writer.write(part)
            await self._writer.drain()
        if cut:
            raise HungUp

    async def send_odd(self, response: Response) -> None:
        """Send an odd answer in its own way.  Raises HungUp where the connection ends with it."""
        if response.wire == "silence":
            await self.pause()
        if response.wire != "reset":
            head, body = _framed(response)
            self._writer.write(head)
            if response.wire in ("one-byte", "slow-bytes"):
                for at in range(len(body)):
                    self._writer.write(body[at : at + 1])
                    await self._writer.drain()
                    if response.wire == "slow-bytes":
                        await self.pause(SLOW_S / len(body))
            elif response.wire != "headers":
                self._writer.write(body)
            await self._writer.drain()
        if response.wire == "open-end":
            await self.pause()
        if response.wire in _ENDS:
            raise HungUp

    async def pause(self, seconds: float | None = None) -> None:
        """Send nothing for some seconds, or for ever.  Raises HungUp when the client hangs up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._reader.read(1)
            raise HungUp

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


_ENDS = {"reset", "headers", "short", "cut-chunks", "cut-at-end", "close", "http-1.0"}
"""The ways to send an answer after which the connection ends."""


def _framed(response: Response) -> tuple[bytes, bytes]:
    """Return the head and the body of an odd answer, as they are sent."""
    body, wire = response.body, response.wire
    version, framing = "HTTP/1.1", {"Content-Length": str(len(body))}
    if wire == "http-1.0":
        version, framing = "HTTP/1.0", {}
    elif wire == "close":
        framing["Connection"] = "close"
    elif wire == "short":
        framing = {"Content-Length": str(len(body) + 10)}
    elif wire in ("chunked", "cut-chunks", "cut-at-end", "open-end"):
        framing = {"Transfer-Encoding": "chunked"}
        half = len(body) // 2
        parts = [body[:half]] if wire == "cut-chunks" else [body[:half], body[half:]]
        body = b"".join(b"%x;part=1\r\n%b\r\n" % (len(part), part) for part in parts)
        body += b"0\r\n\r\n" if wire == "chunked" else b""
    lines = [
        f"{version} {response.status} {http.client.responses.get(response.status, 'Unknown')}",
        *(f"{name}: {value}" for name, value in {**response.headers, **framing}.items()),
    ]
    before = b"HTTP/1.1 103 Early Hints\r\n\r\n" if wire == "informational" else b""
    return before + "\r\n".join([*lines, "", ""]).encode("latin-1"), body
