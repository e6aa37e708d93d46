"""What hosts say of their load, what follows for all of them, and what is ordered for a drill.

Decides which of it is still to be trusted: what nobody has renewed is gone.  Refuses to know how
load is measured, and how a level follows from many hosts'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from resilience.degradation import Level, as_level
from resilience.errors import InvalidValue
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from scheduler.queues import QueueReport
from scheduler.sampling import Sample
from scheduler.settings import PressureSettings

_PUBLISH, _LOOK, _HOSTS, _ANNOUNCE, _TURN = (
    Script.load("scheduler", f"board_{verb}")
    for verb in ("publish", "look", "hosts", "announce", "turn")
)
_json = msgspec.json.Encoder()


class HostReport(msgspec.Struct, frozen=True):
    """One worker's host, as that worker sees it."""

    worker: str  # as -n names it
    level: int  # 0 normal to 4 emergency
    percent: float  # of the signal that decides, on the scale of the thresholds
    why: str  # which signal decides, in words; '' at normal
    slots: int  # of its pool
    busy: int  # of those
    queues: tuple[str, ...]  # that it consumes
    active: dict[str, int]  # operation -> nodes that run here
    sample: Sample | None = None
    version: str = ""  # of its release; '' from one that did not tell
    schema: int = 0  # of the jobs it reads, beside those of the one before; 0: it does not tell
    at: float = 0.0  # seconds of its own clock as it told this; 0: it does not tell


class ClusterReport(msgspec.Struct, frozen=True):
    """The whole platform, as the monitor has last seen it."""

    level: int  # 0 normal to 4 emergency
    why: str  # which signal decides, in words; '' at normal
    at: float  # seconds of the server's clock
    hosts: int = 0  # workers that told of theirs
    slots: int = 0  # of all of them
    busy: int = 0  # of those
    cpu_pct: float = 0.0  # mean of the hosts, by their slots
    memory_pct: float = 0.0  # the same
    redis_pct: float | None = None  # None: Redis has no limit
    queues: dict[str, QueueReport] = {}
    rising_to: str = ""  # the level that is expected within a minute
    rising_in_s: float = 0.0
    desired_workers: int = 0  # 0: not known
    desired_why: str = ""  # the trigger


class Orders(msgspec.Struct, frozen=True):
    """What every worker acts on beside its own host."""

    cluster: ClusterReport | None  # None: nobody has looked for a while
    forced: Level | None  # a drill
    forced_for_s: float = 0.0


def acted_on(own: Level | None, orders: Orders | None) -> Level:
    """Return the level to act on: what is forced, else the worse of one's own host and the cluster.

    Of a host that could not be measured nothing good is assumed: ELEVATED.
    """
    if orders is not None and orders.forced is not None:
        return orders.forced
    mine = Level.ELEVATED if own is None else own
    cluster = (
        orders.cluster.level if orders is not None and orders.cluster is not None else Level.NORMAL
    )
    return max(mine, Level(cluster))


def prevailing(hosts: Sequence[HostReport]) -> Level:
    """Return the highest level that at least half of the live slots have reached."""
    slots = sum(host.slots for host in hosts)
    reached = {level: sum(host.slots for host in hosts if host.level >= level) for level in Level}
    return max(
        (level for level in Level if slots and 2 * reached[level] >= slots), default=Level.NORMAL
    )


def mean(hosts: Sequence[HostReport], field: str) -> float:
    """Return the mean of a figure of the hosts' samples, by their slots."""
    told: list[tuple[float, int]] = [
        (getattr(host.sample, field), host.slots) for host in hosts if host.sample
    ]
    slots = sum(each for _, each in told)
    return sum(value * each for value, each in told) / slots if slots else 0.0


def _readable(report: bytes) -> list[HostReport]:
    """Return a report; none that another release wrote in a way this one does not know."""
    try:
        return [msgspec.json.decode(report, type=HostReport)]
    except msgspec.MsgspecError:
        return []


class Board:
    """What is published of one platform's pressure."""

    def __init__(self, store: Store, keys: Keys, settings: PressureSettings) -> None:
        self._store, self._keys, self._settings = store, keys.pressure(), settings
        self._stale_ms = int(settings.stale_s * 1000)

    # --- hosts ---------------------------------------------------------------------------------

    def publish(self, report: HostReport) -> Call:
        """Return the call by which a worker tells of its host."""
        return Call(
            _PUBLISH, (self._keys.hosts,), (report.worker, _json.encode(report), self._stale_ms)
        )

    def hosts(self) -> list[HostReport]:
        """Return what the hosts that still report have said.  Raises StoreUnavailable."""
        [found] = self._store.call(Call(_HOSTS, (self._keys.hosts,), (self._stale_ms,)))
        return sorted(
            (report for each in found for report in _readable(each)), key=lambda host: host.worker
        )

    def clocks(self) -> dict[str, float]:
        """Return by how many seconds each worker's clock is ahead of the server's, less what its
        report was on its way.

        Raises StoreUnavailable.
        """
        found = self._store.call(lambda client: client.hgetall(self._keys.hosts))
        entries = [entry.partition(b" ") for entry in found.values()]
        told = [
            (int(at_ms) / 1000, host) for at_ms, _, report in entries for host in _readable(report)
        ]
        return {host.worker: host.at - at for at, host in told if host.at}

    def withdraw(self, worker: str) -> None:
        """Take a worker's host off the board."""
        self._store.client.hdel(self._keys.hosts, worker)

    # --- what all act on -----------------------------------------------------------------------

    def look(self) -> Call:
        """Return the call that answers what to act on: see `read`."""
        return Call(_LOOK, (self._keys.cluster, self._keys.forced), ())

    @staticmethod
    def read(answer: Any) -> Orders:
        """Return the orders that `look` was answered with."""
        cluster, forced, forced_for_ms = answer
        report = msgspec.json.decode(cluster, type=ClusterReport) if cluster else None
        return Orders(
            report, as_level(forced.decode()) if forced else None, max(0, forced_for_ms) / 1000
        )

    def orders(self) -> Orders:
        """Return what every worker acts on.  Raises StoreUnavailable."""
        return self.read(self._store.call(self.look())[0])

    def force(self, level: Level | str | int, for_s: float = 600.0) -> None:
        """Make all workers act on a level, for a drill, until it is released or `for_s` seconds are
        over.

        Raises InvalidValue, StoreUnavailable.
        """
        try:
            forced = as_level(level)
        except ValueError as error:
            raise InvalidValue("level", level, str(error)) from None
        if not 0.001 <= for_s < math.inf:
            raise InvalidValue("for_s", for_s, "must be a number of seconds above 0")
        self._store.call(
            lambda client: client.set(self._keys.forced, forced.label, px=int(for_s * 1000))
        )

    def release(self) -> bool:
        """End a drill; say whether there was one.  Raises StoreUnavailable."""
        return bool(self._store.call(lambda client: client.delete(self._keys.forced)))

    # --- the monitor's -------------------------------------------------------------------------

    def take_turn(self, worker: str, for_ms: int) -> float | None:
        """Say to one of all who ask within `for_ms` that it is to look; it gets the server's time
        in seconds.
        """
        [now_ms] = self._store.call(Call(_TURN, (self._keys.turn,), (worker, for_ms)))
        return int(now_ms) / 1000 if int(now_ms) else None

    def memory(self) -> bytes | None:
        """Return what the last monitor wanted to remember."""
        return self._store.call(lambda client: client.get(self._keys.state))  # type: ignore[no-any-return]  # bytes without decode_responses

    def announce(self, report: ClusterReport, memory: bytes) -> None:
        """Publish the cluster's level, keep it in the history, tell who listens, and remember."""
        keys = (self._keys.cluster, self._keys.history, self._keys.state, self._keys.changes)
        told = (
            _json.encode(report),
            memory,
            self._stale_ms,
            self._settings.history,
            int(report.level),
        )
        self._store.call(Call(_ANNOUNCE, keys, told))

    def history(self, limit: int = 100) -> list[ClusterReport]:
        """Return the latest reports, the newest first.  Raises StoreUnavailable."""
        found = self._store.call(lambda client: client.xrevrange(self._keys.history, count=limit))
        return [msgspec.json.decode(entry[b"report"], type=ClusterReport) for _, entry in found]
