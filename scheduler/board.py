"""The board of pressure in Redis: the reports of the hosts, the cluster level, and drills.

Workers publish their hosts here, the monitor announces the cluster level, and all workers read
their orders once a second.  An entry that is not renewed expires.  Begin with `Board`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from resilience.degradation import Level, as_level
from resilience.errors import InvalidValue, refuse_unless_count
from resilience.keys import Keys
from resilience.store import Call, Script, Store
from resilience.validation import readable
from scheduler.queues import QueueReport
from scheduler.sampling import Sample
from scheduler.settings import PressureSettings

_PUBLISH, _WITHDRAW, _ORDERS, _HOSTS, _ANNOUNCE, _TURN = (
    Script.load("scheduler", f"board_{name}")
    for name in ("publish", "withdraw", "orders", "hosts", "announce", "turn")
)
_json = msgspec.json.Encoder()


LevelNumber = Annotated[int, msgspec.Meta(ge=0, le=int(max(Level)))]
LIVE_MS = 5000
"""A worker that has not reported for this long, five times in a row, counts as lost.

Its level counts for longer, for `stale_s`, so that a moment of silence does not change it."""
REMEMBERED_MS, MOST_REMEMBERED = 3_600_000, 20
"""The board remembers workers that are gone for this long, and this many of them."""


class DeclaredLimit(msgspec.Struct, frozen=True, array_like=True):
    """A rate limit or a bulkhead, as a worker's operations and settings declare it."""

    service: str
    unit: str  # the name of a rate; '' for a bulkhead
    limit: float
    per_s: float = 0.0  # the window of a rate in seconds
    burst: float = 0.0  # the most at once; 0: the default of `resilience.bucket.Rate`
    moves: bool = False  # a bulkhead whose limit follows errors or the demand


class DeclaredEndpoint(msgspec.Struct, frozen=True, array_like=True):
    """An endpoint of models, as a worker's settings declare it; it has no key."""

    name: str
    host: str  # and port; '' if OPENAI_BASE_URL sets it
    models: tuple[str, ...]  # our names of its models; empty: it has all
    weight: float
    checked: bool  # the workers check its health


class HostReport(msgspec.Struct, frozen=True):
    """One worker's report on its host."""

    worker: str  # its name, as -n gives it
    level: LevelNumber  # 0 normal to 4 emergency
    percent: float  # value of the worst signal, on the scale of the thresholds
    why: str  # the worst signal in words; '' at normal
    slots: int  # number of slots of its pool
    busy: int  # number of busy slots
    queues: tuple[str, ...]  # names of the queues that it consumes
    active: dict[str, int]  # operation -> number of nodes that run here
    sample: Sample | None = None
    version: str = ""  # version of the package; '' if not reported
    schema: int = 0  # newest schema of jobs that it reads, besides the one before; 0: not reported
    at: float = 0.0  # seconds of its own clock at the report; 0: not reported
    refusing: int = -1  # the level by which jobs are refused; -1: not reported, `level`
    refusing_why: str = ""  # the worst signal of that level in words
    operations: dict[str, int] | None = None
    """Operation, or its `fingerprint`, -> version here; None: not reported, or too many."""
    services: dict[str, str] = {}  # operation -> service of its guards, if it has another name
    draining: bool = False  # it takes no more work, because it ends or an operator said so
    drained: tuple[str, ...] = ()  # names of the queues that it consumes again after rlm_resume
    deaf_s: float = 0.0  # seconds for which it has consumed no queue; 0: it consumes one
    broker: str = ""  # URL of its broker without the password; '' if not reported
    limits: tuple[DeclaredLimit, ...] = ()
    endpoints: tuple[DeclaredEndpoint, ...] = ()
    settings: dict[str, str] | None = None
    """Changed variable -> `fingerprint` of its value; None: not reported."""


class ClusterReport(msgspec.Struct, frozen=True):
    """The monitor's last report on the whole platform."""

    level: LevelNumber  # 0 normal to 4 emergency
    why: str  # the worst signal in words; '' at normal
    at: float  # seconds of the server's clock
    hosts: int = 0  # number of workers that report
    slots: int = 0  # number of slots of all workers
    busy: int = 0  # number of busy slots
    cpu_pct: float = 0.0  # mean CPU of the hosts, weighted by slots
    memory_pct: float = 0.0  # mean memory of the hosts, weighted by slots
    redis_pct: float | None = None  # used memory of Redis; None: it has no limit, or is unknown
    queues: dict[str, QueueReport] = {}
    rising_to: str = ""  # the level that is expected within a minute
    rising_in_s: float = 0.0  # seconds until then
    desired_workers: int = 0  # the advised number; 0: unknown
    desired_why: str = ""  # the reason for the advised number
    refusing: int = -1  # the level by which jobs are refused; -1: not reported, `level`
    refusing_why: str = ""  # the worst signal of that level in words


class Departed(NamedTuple):
    """A worker that reports no more."""

    report: HostReport  # its last one
    ago_s: float  # seconds since then
    stopped: bool  # it was stopped; False: it was lost, with its process or its network


class Workers(NamedTuple):
    """The workers of the platform: those that report, and those that have ceased to."""

    live: Sequence[HostReport]  # by name
    departed: Sequence[Departed]  # the latest first

    def of_queue(self, queue: str) -> list[HostReport]:
        """Return the live workers that consume a queue."""
        return [host for host in self.live if queue in host.queues]

    def last_of_queue(self, queue: str) -> Departed | None:
        """Return the worker of a queue that was heard last of those that are gone.

        A worker that had not reported its queues yet may be one of this queue.
        """
        return next(
            (each for each in self.departed if queue in (each.report.queues or (queue,))), None
        )


MOST_NAMED, MOST_OPERATIONS, LONGEST_NAME = 100, 2_000, 100
"""A report names this many operations, has fingerprints of more, and no list of even more."""


def reported(versions: Mapping[str, int]) -> dict[str, int] | None:
    """Return the operations of a worker, name -> version, in the form of its report."""
    if len(versions) > MOST_OPERATIONS:
        return None
    short = len(versions) <= MOST_NAMED
    return {
        name if short and len(name) <= LONGEST_NAME else fingerprint(name): version
        for name, version in versions.items()
    }


def fingerprint(text: str) -> str:
    """Return a short hash of a text, such as the name of an operation."""
    return f"#{zlib.crc32(text.encode()):08x}"


def version_on(hosts: Sequence[HostReport], name: str) -> int | None:
    """Return the highest version of an operation on some hosts.

    It is 0 if none has the operation, and None if that is not known.
    """
    keys = (name, fingerprint(name))
    if any(host.operations is None for host in hosts) or not hosts:
        return None
    return max(
        host.operations.get(key, 0) for host in hosts if host.operations is not None for key in keys
    )


class Orders(msgspec.Struct, frozen=True):
    """The cluster level and the drill, on which every worker acts beside its own host's level."""

    cluster: ClusterReport | None  # None: no monitor has reported for `stale_s`
    forced: Level | None  # the level of a drill
    forced_for_s: float = 0.0  # remaining seconds of the drill


def acted_on(own: Level | None, orders: Orders | None) -> Level:
    """Return the level to act on: the drill's, else the higher of the own host's and the cluster's.

    A host that could not be measured (None) counts as ELEVATED.
    """
    if orders is not None and orders.forced is not None:
        return orders.forced
    of_host = Level.ELEVATED if own is None else own
    cluster = (
        orders.cluster.level if orders is not None and orders.cluster is not None else Level.NORMAL
    )
    return max(of_host, Level(cluster))


def refused_at(own: Level, orders: Orders | None) -> Level:
    """Return the level by which jobs are refused: `acted_on` without the pressure of busy CPUs."""
    if orders is None or orders.forced is not None or orders.cluster is None:
        return acted_on(own, orders)
    return max(own, Level(refusing(orders.cluster)))


def refusing(report: HostReport | ClusterReport) -> int:
    """Return the level by which a host or the cluster refuses jobs."""
    return report.level if report.refusing < 0 else report.refusing


def prevailing(
    hosts: Sequence[HostReport], of: Callable[[HostReport], int] = lambda host: host.level
) -> Level:
    """Return the highest level that at least half of the live slots have reached.

    By default it counts the levels of hosts, with ``of=refusing`` those by which they refuse jobs.
    """
    slots = sum(host.slots for host in hosts)
    reached = {level: sum(host.slots for host in hosts if of(host) >= level) for level in Level}
    return max(
        (level for level in Level if slots and 2 * reached[level] >= slots), default=Level.NORMAL
    )


def refusing_why(hosts: Sequence[HostReport], level: Level) -> str:
    """Return the reason why a host refuses jobs at a level, with its name; '' if it has none."""
    found = (host for host in hosts if refusing(host) >= level and host.refusing_why)
    return next((f"{host.refusing_why} on {host.worker}" for host in found), "")


def mean(hosts: Sequence[HostReport], field: str) -> float:
    """Return the mean of one field of the hosts' samples, weighted by slots; 0 without samples."""
    values: list[tuple[float, int]] = [
        (getattr(host.sample, field), host.slots) for host in hosts if host.sample
    ]
    all_slots = sum(slots for _, slots in values)
    return sum(value * slots for value, slots in values) / all_slots if all_slots else 0.0


def _host(report: bytes) -> HostReport:
    return msgspec.json.decode(report, type=HostReport)


def _dated(entry: bytes) -> tuple[float, HostReport]:
    at_ms, _, report = entry.partition(b" ")
    return int(at_ms) / 1000, _host(report)


def _departed(entry: Sequence[Any]) -> Departed:
    ago_ms, stopped, report = entry[:3]
    return Departed(_host(report), int(ago_ms) / 1000, bool(stopped))


def _cluster(report: bytes) -> ClusterReport:
    return msgspec.json.decode(report, type=ClusterReport)


def _drill(level: bytes) -> Level:
    return as_level(level.decode())


class Board:
    """The published pressure of one platform."""

    def __init__(self, store: Store, keys: Keys, settings: PressureSettings) -> None:
        self._store, self._keys, self._settings = store, keys.pressure(), settings
        self._stale_ms = int(settings.stale_s * 1000)

    # --- hosts ---------------------------------------------------------------------------------

    def publish(self, report: HostReport) -> Call:
        """Return the call that publishes a worker's report on its host."""
        return Call(
            _PUBLISH,
            (self._keys.hosts,),
            (report.worker, _json.encode(report), REMEMBERED_MS),
            otherwise=None,
        )

    def hosts(self) -> list[HostReport]:
        """Return the reports that are not older than `stale_s`, by worker.

        Raises StoreUnavailable.
        """
        return list(self.read_workers(self._store.call(self._hosts_call(self._stale_ms))[0]).live)

    def workers(self) -> Workers:
        """Return the live workers, and those that were stopped or lost within the last hour.

        Raises StoreUnavailable.
        """
        return self.read_workers(self._store.call(self.workers_call())[0])

    def workers_call(self) -> Call:
        """Return the call that reads all workers; `read_workers` decodes its answer."""
        return self._hosts_call(min(LIVE_MS, self._stale_ms))

    def _hosts_call(self, live_ms: int) -> Call:
        args = (live_ms, REMEMBERED_MS, MOST_REMEMBERED)
        return Call(_HOSTS, (self._keys.hosts,), args, otherwise=((), ()))

    @staticmethod
    def read_workers(answer: Sequence[Any]) -> Workers:
        """Return the workers in the answer of `workers_call`, without what cannot be read."""
        live, gone = answer
        reports = readable("a host's report on the board", live, _host)
        departed = readable("a host's report on the board", gone, _departed)
        return Workers(sorted(reports, key=lambda host: host.worker), departed)

    def clocks(self) -> dict[str, float]:
        """Return the seconds by which each worker's clock is ahead of the server's clock.

        The time that a report takes to arrive counts as behind.  Raises StoreUnavailable.
        """
        fields = self._store.call(lambda client: client.hgetall(self._keys.hosts))
        reports = readable("a host's report on the board", fields.values(), _dated)
        return {host.worker: host.at - arrived_s for arrived_s, host in reports if host.at}

    def withdraw(self, worker: str) -> None:
        """Remove a worker's report from the live ones; the board remembers that it was stopped."""
        self._store.call(Call(_WITHDRAW, (self._keys.hosts,), (worker,), otherwise=None))

    # --- orders --------------------------------------------------------------------------------

    def orders_call(self) -> Call:
        """Return the call that reads the orders; `read` decodes its answer."""
        return Call(_ORDERS, (self._keys.cluster, self._keys.forced), (), otherwise=(b"", b"", 0))

    @staticmethod
    def read(answer: Any) -> Orders:
        """Return the orders in the answer of `orders_call`, without what cannot be read."""
        cluster, forced, forced_for_ms = answer
        reports = readable("the report on the cluster", [cluster] if cluster else [], _cluster)
        drills = readable("the drill on the board", [forced] if forced else [], _drill)
        return Orders(
            reports[0] if reports else None,
            drills[0] if drills else None,
            max(0, forced_for_ms) / 1000,
        )

    def orders(self) -> Orders:
        """Return the orders that every worker acts on.  Raises StoreUnavailable."""
        return self.read(self._store.call(self.orders_call())[0])

    def force(self, level: Level | str | int, for_s: float = 600.0) -> None:
        """Start a drill: all workers act on a level for `for_s` seconds, or until `release`.

        Raises InvalidValue for an unknown level or time, and StoreUnavailable.
        """
        forced = as_level(level)
        if not 0.001 <= for_s < math.inf:
            raise InvalidValue("for_s", for_s, "must be a number of seconds above 0")
        self._store.call(
            lambda client: client.set(self._keys.forced, forced.label, px=int(for_s * 1000))
        )

    def release(self) -> bool:
        """End a drill, and return whether there was one.  Raises StoreUnavailable."""
        return bool(self._store.call(lambda client: client.delete(self._keys.forced)))

    # --- for the monitor -----------------------------------------------------------------------

    def take_turn(self, worker: str, for_ms: int) -> float | None:
        """Elect one caller for `for_ms`: return the server's time in seconds to it, None to others.

        Raises StoreUnavailable.
        """
        [now_ms] = self._store.call(Call(_TURN, (self._keys.turn,), (worker, for_ms)))
        return int(now_ms) / 1000 if int(now_ms) else None

    def memory(self) -> bytes | None:
        """Return the state that the last measurement stored; None without one.

        Raises StoreUnavailable.
        """
        state: bytes | None = self._store.call(lambda client: client.get(self._keys.state))
        return state

    def announce(self, report: ClusterReport, memory: bytes) -> None:
        """Publish the cluster level, add it to the history, notify subscribers, and store the
        monitor's state.

        Raises StoreUnavailable.
        """
        keys = (self._keys.cluster, self._keys.history, self._keys.state, self._keys.changes)
        history, level = self._settings.history, int(report.level)
        args = (_json.encode(report), memory, self._stale_ms, history, level)
        self._store.call(Call(_ANNOUNCE, keys, args))

    def history(self, limit: int = 100) -> list[ClusterReport]:
        """Return the latest reports, the newest first.  Raises InvalidValue, StoreUnavailable."""
        refuse_unless_count("limit", limit)
        entries = self._store.call(lambda client: client.xrevrange(self._keys.history, count=limit))
        reports = [entry.get(b"report", b"") for _, entry in entries]
        return readable("a report of the cluster's history", reports, _cluster)
