"""The Redis of a history: fakeredis on the history's clock, or a real server with an AOF.

Both restart from a prefix of what they were told.  fakeredis repeats the logged commands; the real
server is killed, and its append-only file is cut.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from unittest.mock import patch

import fakeredis
import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from resilience.store import Script
from rlm_tasks.testing import embedded

Command = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of one command, and redis-py's options for its answer."""
_NAMES = (
    "GET EXISTS HGET HMGET HGETALL HVALS HLEN ZRANGE ZRANGEBYSCORE ZSCORE ZCARD ZCOUNT ZSCAN "
    "XRANGE TIME PING INFO LRANGE LLEN MGET TTL SCAN TYPE STRLEN"
)
READS = frozenset(_NAMES.split())
REFUSALS = {
    "OOM": "OOM command not allowed when used memory > 'maxmemory'. script: on @user_script:179",
    "READONLY": "READONLY You can't write against a read only replica.",
    "MISCONF": "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to "
    "persist to disk.",
    "NOREPLICAS": "NOREPLICAS Not enough good replicas to write.",
    "BUSY": "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE",
    "MASTERDOWN": "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'",
    "CLUSTERDOWN": "CLUSTERDOWN The cluster is down",
    "LOADING": "LOADING Redis is loading the dataset in memory",
}
"""The answers of a server that cannot write now, as Redis words them."""
DEAF = frozenset({"BUSY", "MASTERDOWN", "LOADING"})
"""The states in which a server refuses reads, too."""


class HistoryServer(Protocol):
    """A Redis server as a history sees it."""

    words: Sequence[str]
    """The refusals that this server can be made to give for a while."""

    def execute(self, command: Command) -> Any:
        """Run one command and return its answer.  Raises redis-py's errors."""
        ...

    def acknowledge(self) -> None:
        """Note that the caller has received all answers until now."""
        ...

    def restart(self, lost_s: float) -> None:
        """Restart from what was written; `lost_s`: at most these last seconds of it are lost."""
        ...

    def refuse(self, word: str) -> None:
        """Refuse writes from now on; '': accept them again."""
        ...

    def forget_scripts(self) -> None:
        """Flush the script cache."""
        ...


@functools.cache
def scripts() -> dict[str, Script]:
    """Return each script that a loaded module holds, by its digest."""
    return {each.sha: each for each in gc.get_objects() if type(each) is Script}


def name_of(command: Sequence[Any]) -> str:
    """Return the short name of a command for the trace: the script's own, or the command's."""
    first = str(command[0]).upper()
    if first in ("EVALSHA", "EVAL"):
        by = "sha" if first == "EVALSHA" else "text"
        found = next((s for s in scripts().values() if command[1] in (s.sha, s.text)), None)
        return found.name if found else f"script {getattr(found, by, '?')}"
    return first.lower()


class FakeServer:
    """fakeredis on the clock of the history."""

    words = tuple(REFUSALS)

    def __init__(self, server_time: Callable[[], float], random: Any) -> None:
        self._time, self._random = server_time, random
        self._log: list[tuple[float, tuple[Any, ...]]] = []
        self._acknowledged = 0
        self._word = ""
        self._client = _fake_client()

    def execute(self, command: Command) -> Any:
        """Run one command.  Raises redis-py's errors."""
        args, options = command
        name = str(args[0]).upper()
        if self._word and (self._word in DEAF or name not in READS):
            raise refusal(self._word)
        answer = self._client.execute_command(*args, **options)  # type: ignore[no-untyped-call]
        if name not in READS:
            self._log.append((self._time(), _whole(args)))
        return answer

    def acknowledge(self) -> None:
        """Note that all answers until now have been received."""
        self._acknowledged = len(self._log)

    def restart(self, lost_s: float) -> None:
        """Repeat a prefix of the commands on an empty server.

        Without `lost_s` the prefix has every acknowledged command.
        """
        first = self._acknowledged
        while lost_s and first and self._log[first - 1][0] > self._time() - lost_s:
            first -= 1
        kept = self._log[: self._random.randint(first, len(self._log))]
        now = self._time
        self._client = _fake_client()
        try:
            for at, args in kept:
                _CLOCK.now = lambda at=at: at
                with suppress(RedisError):
                    self._client.execute_command(*args)  # type: ignore[no-untyped-call]
        finally:
            _CLOCK.now = now
        self._client.execute_command("SCRIPT FLUSH")  # type: ignore[no-untyped-call]
        self._log, self._acknowledged = kept, len(kept)

    def refuse(self, word: str) -> None:
        """Refuse writes from now on; '': accept them again."""
        self._word = word

    def forget_scripts(self) -> None:
        """Flush the script cache."""
        self._client.execute_command("SCRIPT FLUSH")  # type: ignore[no-untyped-call]


class RealServer:
    """A real server with an append-only file; its scripts read the clock of the history."""

    words = ("OOM", "READONLY", "NOREPLICAS")

    def __init__(self, server: embedded.Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._client = redis.Redis.from_url(server.url, retry=Retry(NoBackoff(), 0))
        self._client.config_set("auto-aof-rewrite-percentage", 0)

    def begin(self, server_time: Callable[[], float], random: Any) -> None:
        """Empty the server for the next history."""
        self._time, self._random = server_time, random
        self._loaded: set[str] = set()
        self._sizes: list[tuple[float, int]] = []  # time, bytes of the append-only file
        self.refuse("")
        self._client.flushall()
        self.acknowledge()

    def execute(self, command: Command) -> Any:
        """Run one command.  Raises redis-py's errors."""
        args, options = command
        name = str(args[0]).upper()
        if name == "TIME":
            return divmod(int(self._time() * 1_000_000), 1_000_000)
        if name == "EVALSHA" and args[1] not in self._loaded:
            raise NoScriptError("No matching script. Please use EVAL.")
        if name in ("EVALSHA", "EVAL"):
            script = next(s for s in scripts().values() if args[1] in (s.sha, s.text))
            args = ("EVAL", self._on_our_clock(script.text), *args[2:])
            self._loaded.add(script.sha)
        return self._client.execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def _on_our_clock(self, text: str) -> str:
        seconds, micros = divmod(int(self._time() * 1_000_000), 1_000_000)
        return text.replace("redis.call('TIME')", f"{{'{seconds}', '{micros}'}}")

    def acknowledge(self) -> None:
        """Note the size of the append-only file, in which all answered commands are."""
        size = self._newest_file().stat().st_size
        if not self._sizes or self._sizes[-1][1] != size:
            self._sizes.append((self._time(), size))

    def restart(self, lost_s: float) -> None:
        """Kill the server, cut its append-only file if writes are lost, and start it."""
        self._server.stop(kill=True)
        file = self._newest_file()
        least = next(
            (size for at, size in reversed(self._sizes) if at <= self._time() - lost_s),
            self._sizes[0][1],
        )
        if lost_s and least < file.stat().st_size:
            with file.open("r+b") as opened:
                opened.truncate(self._random.randint(least, file.stat().st_size))
        self._server.start()
        self._loaded.clear()
        self._sizes = []
        self.acknowledge()

    def _newest_file(self) -> Path:
        return max(self._folder.glob("appendonlydir/*.incr.aof"))

    def refuse(self, word: str) -> None:
        """Make the server refuse writes from now on; '': let it accept them again."""
        until = time.monotonic() + 5
        while True:  # its connections may be dead after a restart
            try:
                self._client.config_set("maxmemory", "1" if word == "OOM" else "0")
                self._client.config_set("min-replicas-to-write", int(word == "NOREPLICAS"))
                self._client.execute_command(  # type: ignore[no-untyped-call]
                    "REPLICAOF", *(("127.0.0.1", "1") if word == "READONLY" else ("NO", "ONE"))
                )
                return
            except RedisError:
                if time.monotonic() > until:
                    raise

    def forget_scripts(self) -> None:
        """Flush the script cache, and close every connection."""
        self._loaded.clear()
        with suppress(RedisError):
            self._client.script_flush()
            self._client.client_kill_filter(_type="normal", skipme=False)


def refusal(word: str) -> Exception:
    """Return the error that redis-py raises for a refusal."""
    from redis._parsers.base import BaseParser

    error: Exception = BaseParser.parse_error(REFUSALS[word])
    return error


def _fake_client() -> redis.Redis:
    client: redis.Redis = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    return client


def _whole(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a logged command in a form that an empty script cache knows."""
    if args[0] == "EVALSHA" and (script := scripts().get(args[1])):
        return ("EVAL", script.text, *args[2:])
    return args


_CLOCK = SimpleNamespace(now=time.time, monotonic=time.monotonic, sleep=time.sleep)
_CLOCK.time = lambda: float(_CLOCK.now())  # `now` changes with each history


@contextmanager
def fakeredis_on(server_time: Callable[[], float]) -> Iterator[None]:
    """Give fakeredis the clock of a history."""
    _CLOCK.now = server_time
    with (
        patch("fakeredis._socket._base.time", _CLOCK),
        patch("fakeredis._helpers.time", _CLOCK),
        patch("fakeredis.commands_mixins.server_mixin.time", _CLOCK),
    ):
        yield
    _CLOCK.now = time.time
