"""A TCP proxy whose connections can be reset and whose target can change, and one with TLS.

A changed target stands for the failover of an address.  The Redis and TLS tests use them."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any


class Proxy:
    """Forward connections of one port to another, each message `delay_s` seconds late."""

    def __init__(self, target: int, delay_s: float = 0.0) -> None:
        self.target, self._delay_s = target, delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._forgotten: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self._delay_s)
                if source not in self._forgotten:
                    sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def forget(self) -> int:
        """Forward nothing more on the open connections, and tell nobody; new ones work.

        Return the number of connections.
        """
        self._forgotten |= set(self._open)
        return len(self._open) // 2

    def reset(self) -> int:
        """Reset every connection, and return the number of connections."""
        found, self._open = self._open, []
        for each in found:
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        return len(found) // 2

    def close(self) -> None:
        """Stop listening, and reset the open connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        self.reset()


class TlsProxy:
    """A port with TLS in front of a server without."""

    def __init__(self, target: int, context: ssl.SSLContext) -> None:
        self._target, self._open = target, set[asyncio.StreamWriter]()
        self._loop = asyncio.new_event_loop()
        self._running = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._running.start()
        self._server = self._in_loop(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def _in_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, asked = await asyncio.open_connection("127.0.0.1", self._target)
        self._open |= {writer, asked}
        await asyncio.gather(_pump(reader, asked), _pump(answers, writer))
        self._open -= {writer, asked}

    def close(self) -> None:
        """Stop listening, and end the open connections."""
        self._in_loop(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._running.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for each in self._open:
            each.transport.abort()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    sink.close()
