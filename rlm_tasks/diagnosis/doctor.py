"""The doctor: it checks a deployment and yields findings, each with a state and advice.

`rlm doctor` and the bundle call `examine`.  The doctor changes nothing, needs no worker, and checks
this machine also while Redis is away.  `worker.preflight` and `conflicts` have the rules on
settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from redis.exceptions import RedisError

from resilience.address import SENTINEL, SENTINEL_TIMEOUT_S
from resilience.errors import StoreUnavailable
from resilience.store import Store, masked
from rlm_tasks import import_path
from rlm_tasks.diagnosis.comparisons import compare
from rlm_tasks.errors import JobUnreadable
from rlm_tasks.installation import command_of
from rlm_tasks.ledger.obstacles import Deployment, connects, obstacle
from rlm_tasks.operations import registry
from rlm_tasks.version import __version__
from rlm_tasks.words import age, count, duration
from rlm_tasks.worker.preflight import Finding as Finding
from rlm_tasks.worker.preflight import State, of_celery, of_redis, of_urls

if TYPE_CHECKING:
    from celery import Celery

    from rlm_tasks.client.client import Client
    from scheduler.board import Board, HostReport
    from scheduler.queues import QueueReport

DISTRIBUTION = "rlm-tasks"
SKEW_WARNING_S, SKEW_FAULT_S = 0.5, 5.0
"""A greater difference of clocks makes the ages of queues wrong.

A message carries the time when it was sent, by its sender's clock."""
_SAMPLES = 3


def examine(
    client: Client, app: Celery, *, clock: Callable[[], float] = time.time
) -> list[Finding]:
    """Return the findings: on this machine first, then on the shared parts.

    While Redis is away, one fault replaces the findings on the shared parts.  Errors of Redis and
    of the broker become findings.

    The Celery app `app` sends jobs; `clock` returns seconds since the epoch.
    """
    store = client.ledger.store
    here = (
        *packages(),
        *versions(requirements()),
        _operations(client),
        _files(client.settings.files_root),
        *_settings(client, app),
        *_sentinels(store),
    )
    try:
        return [*here, *_shared(client, app, clock)]
    except StoreUnavailable as error:
        away = str(error)
    except RedisError as error:
        away = str(store.unavailable(error))
    fault = _in_two("redis", "fault", away)
    return [*here, fault, *([_broker(client)[0]] if _has_own_broker(client, app) else [])]


def _shared(client: Client, app: Celery, clock: Callable[[], float]) -> Iterator[Finding]:
    """Yield the findings on Redis, the broker and the workers.  Raises the errors of Redis."""
    from scheduler.board import Board

    store = client.ledger.store
    board = Board(store, client.ledger.keys, client.settings.pressure)
    _reach(store)
    yield from of_redis(store, client.settings)
    if (refused := store.refusal()) is not None:
        yield _in_two("writes", "fault", str(refused))
    clock_here, latency_s = _clock_here(store, clock)
    yield clock_here
    yield _latency(latency_s, client.settings.guard_timeout_s)
    broker, depths = _broker(client)
    yield broker
    command = command_of(app)
    deployment = Deployment(
        board.workers(), depths, masked(str(client.app.conf.broker_url)), command
    )
    hosts = deployment.workers.live
    yield from compare(deployment, client.settings)
    yield from _clocks_there(board, hosts)
    if not connects(hosts):  # a worker that connects may soon consume all queues
        yield from _queues(_names(client), hosts, depths, command)
        yield from _stuck(client, deployment)
    yield from _astray(client, app)
    yield from _dead_letters(client)
    yield from _monitor(board, hosts, client, command)
    yield _quarantine(client, command)
    yield _breakers(store, command)
    # These read by the ledger's connection, too: the one of guards gives up early.
    yield from _paused(client, hosts, command)
    yield from _endpoints(client, hosts, command)
    yield from _faults(store, client.ledger.clock.now_ms(), command)
    yield from decided_alone(store)


def _reach(store: Store) -> None:
    """Raise StoreUnavailable unless Redis answers, also for a text that is no URL."""
    try:
        store.check()
    except ValueError:  # its text may hold a part of the password
        raise StoreUnavailable(store.url, "that is no URL of a Redis") from None


# --- this machine -----------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Yield findings on other packages with the names of ours on the import path."""
    wrong, hidden = import_path.found_instead(), import_path.hidden_by_ours()
    for name, file in wrong.items():
        found = f"`import {name}` finds {file}, not the platform's own in {import_path.HOME}"
        yield Finding(
            "packages",
            "fault",
            found,
            f"Rename that package, or set PYTHONPATH={import_path.HOME} before its folder",
        )
    for name, file in hidden.items():
        if name not in wrong:
            found = (
                f"the platform's {name} hides another package of this name, {file}; with another "
                "order of the path, that one would hide the platform's"
            )
            yield Finding(
                "packages", "warning", found, "Rename it, or remove its folder from PYTHONPATH"
            )
    if not wrong and not hidden:
        yield Finding("packages", "ok", f"{' and '.join(import_path.NAMES)} are the platform's own")


def requirements() -> Sequence[str] | None:
    """Return the requirements of our distribution; None when it is not installed."""
    try:
        return metadata.requires(DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        return None


def versions(requirements: Sequence[str] | None) -> Iterator[Finding]:
    """Yield findings on installed versions that do not meet the requirements; None: unknown."""
    if requirements is None:
        found = (
            f"{DISTRIBUTION} {__version__} is on the import path but not installed: its "
            "requirements are not known"
        )
        yield Finding("versions", "warning", found, "Type: pip install -e . in its folder")
        return
    wanted = [
        each
        for each in map(Requirement, requirements)
        if each.marker is None or each.marker.evaluate({"extra": ""})
    ]
    wrong = [
        f"{each.name} {installed(each.name) or 'is missing'}" for each in wanted if not _fits(each)
    ]
    if wrong:
        missing = " ".join(f"'{each.name}{each.specifier}'" for each in wanted if not _fits(each))
        found = f"versions that do not fit RLM Tasks {__version__}: {', '.join(wrong)}"
        yield Finding("versions", "fault", found, f"Type: pip install {missing}")
    elif (other := installed(DISTRIBUTION)) not in ("", __version__):
        found = f"RLM Tasks {__version__} runs, but {other} is installed: there are two copies"
        yield Finding(
            "versions",
            "warning",
            found,
            f"Type: pip install --force-reinstall {DISTRIBUTION}=={__version__}",
        )
    else:
        named = ", ".join(f"{name} {installed(name)}" for name in ("celery", "kombu", "redis"))
        yield Finding("versions", "ok", f"RLM Tasks {__version__}, {named}")


def installed(name: str) -> str:
    """Return the version of a distribution; '' when there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _fits(wanted: Requirement) -> bool:
    version = installed(wanted.name)
    return bool(version) and wanted.specifier.contains(version, prereleases=True)


def _operations(client: Client) -> Finding:
    modules = client.settings.operations
    origin = (
        f"from RLM_OPERATIONS={','.join(modules)} and the built-in ones"
        if modules
        else "RLM_OPERATIONS is empty"
    )
    return Finding(
        "operations", "ok", f"{len(registry.names())} operations are known here ({origin})"
    )


def _files(root: str) -> Finding:
    if root:
        return Finding("files", "ok", f"jobs read files below {root} only")
    found = "a job may name any file that a worker can read; RLM_FILES_ROOT limits it to one folder"
    return Finding("files", "ok", found)


def _settings(client: Client, app: Celery) -> Iterator[Finding]:
    from rlm_tasks.conflicts import conflicts

    yield from of_urls(client.settings)
    yield from of_celery(client.settings, app.conf)
    for sentence in conflicts(app):
        yield _in_two("celery", "warning", sentence)


def _in_two(check: str, state: State, sentence: str) -> Finding:
    found, _, advice = sentence.partition("; ")
    return Finding(check, state, found, advice[:1].upper() + advice[1:])


# --- sentinels --------------------------------------------------------------------------------


def _sentinels(store: Store) -> Iterator[Finding]:
    """Yield a finding: do sentinels answer, know the primary, and have a quorum for a failover?"""
    address = store.address
    if not address.is_watched:
        return
    with closing(address.sentinels(socket_connect_timeout=SENTINEL_TIMEOUT_S)) as watch:
        faults = [_fault_of(each, address.master) for each in tuple(watch.sentinels)]
    distinct = sorted({each for each in faults if each})
    good = faults.count("")
    found = (
        f"{good} of {len(faults)} answer, watch {address.master!r} and could agree on another"
        f"{': ' if distinct else ''}{'; '.join(distinct)}"
    )
    if not distinct:
        yield Finding("sentinels", "ok", found)
        return
    advice = "Start them, or set RLM_REDIS_URL, RLM_SENTINEL_MASTER and RLM_SENTINEL_PASSWORD"
    yield Finding("sentinels", "warning" if good else "fault", found, advice)


def _fault_of(sentinel: Any, master: str) -> str:
    """Return the fault of one sentinel; '' when it has none."""
    try:
        known = sentinel.sentinel_masters()
        if master not in known:
            return f"they watch {', '.join(sorted(known)) or 'no primary'}"
        sentinel.sentinel_ckquorum(master)
    except (RedisError, OSError) as error:
        return str(error)
    return ""


# --- clocks -----------------------------------------------------------------------------------


def _clock_here(store: Store, clock: Callable[[], float]) -> tuple[Finding, float]:
    """Return a finding on this machine's clock, and the fastest of some round trips in seconds."""
    ahead_s, within_s = min(
        (_compared(store, clock) for _ in range(_SAMPLES)), key=lambda sample: sample[1]
    )
    precision = f", give or take {within_s:.3f} s"
    found = _clock("this machine's clock", ahead_s, precision, abs(ahead_s) - within_s)
    return found, 2 * within_s


def _latency(round_trip_s: float, guard_timeout_s: float) -> Finding:
    """Return a finding on the time of a call of Redis: guards give up after theirs."""
    found = f"Redis answers within {duration(round_trip_s)}"
    if round_trip_s < guard_timeout_s / 4:
        return Finding("latency", "ok", found)
    slow = f"{found}; breakers wait {duration(guard_timeout_s)} for it (RLM_GUARD_TIMEOUT_S)"
    state: State = "fault" if round_trip_s >= guard_timeout_s else "warning"
    advice = "Type: redis-cli --latency, then redis-cli SLOWLOG GET; keep Redis near its workers"
    return Finding("latency", state, slow, advice)


def _compared(store: Store, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds that a clock is ahead of the server's, and their error.

    The error is half of the round trip.
    """
    before = clock()
    seconds, micros = store.call(lambda client: client.time())
    after = clock()
    return (before + after) / 2 - seconds - micros / 1e6, (after - before) / 2


def _clocks_there(board: Board, hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Yield a finding on the worst of the workers' clocks, by their latest reports."""
    known = {host.worker for host in hosts}
    clocks = [
        (abs(ahead_s), ahead_s, worker)
        for worker, ahead_s in board.clocks().items()
        if worker in known
    ]
    if clocks:
        apart_s, ahead_s, worker = max(clocks)
        late = ", or its report has taken that time" if ahead_s < 0 else ""
        yield _clock(f"the worst of the workers' clocks, {worker}'s,", ahead_s, late, apart_s)


def _clock(whose: str, ahead_s: float, precision: str, least_s: float) -> Finding:
    side = "ahead of" if ahead_s > 0 else "behind"
    found = f"{whose} is {abs(ahead_s):.3f} s {side} Redis'{precision}"
    state: State = (
        "fault" if least_s > SKEW_FAULT_S else "warning" if least_s > SKEW_WARNING_S else "ok"
    )
    return Finding(
        "clock", state, found, "" if state == "ok" else "Set both by NTP: timedatectl set-ntp true"
    )


# --- broker and workers -----------------------------------------------------------------------


def _broker(client: Client) -> tuple[Finding, Mapping[str, QueueReport] | None]:
    """Return a finding on the broker, and the state of its queues; None when unknown."""
    try:
        return Finding(
            "broker", "ok", f"the broker at {masked(str(client.app.conf.broker_url))} answers"
        ), client.queues()
    except StoreUnavailable as error:
        found = f"the broker at {error.url} does not answer ({error.cause})"
    except Exception as error:  # each transport has its own; the text may hold the password
        found = f"the broker does not answer ({type(error).__name__})"
    return Finding("broker", "fault", found, "Start it, or set RLM_BROKER_URL"), None


def _has_own_broker(client: Client, app: Celery) -> bool:
    """Return whether the broker is another server than the ledger's Redis, or may be one."""
    try:
        ledger: dict[str, Any] = client.ledger.store.client.connection_pool.connection_kwargs
        broker = app.connection_for_read()
        if client.ledger.store.address.is_watched:
            return not str(app.conf.broker_url).startswith(SENTINEL)
        here = (broker.transport.driver_type, broker.hostname or "localhost", broker.port or 6379)
    except Exception:  # one of the addresses cannot be read: they differ
        return True
    return here != ("redis", ledger.get("host", "localhost"), ledger.get("port", 6379))


def _names(client: Client) -> list[str]:
    from rlm_tasks.messaging.queue_names import queue_names

    return queue_names(client.settings)


def _queues(
    names: Iterable[str],
    hosts: Sequence[HostReport],
    depths: Mapping[str, QueueReport] | None,
    command: str,
) -> Iterator[Finding]:
    """Yield a finding on queues that no worker consumes: a fault where messages wait in them."""
    left = [name for name in names if not any(name in host.queues for host in hosts)]
    waiting = {
        name: depths[name].depth
        for name in left
        if depths and name in depths and depths[name].depth
    }
    drained = {name for host in hosts for name in host.drained}
    how = "control rlm_resume" if drained.issuperset(left) else f"worker -Q {','.join(left)}"
    advice = f"Type: {command} {how}"
    if waiting:
        counts = ", ".join(f"{depth} in {name}" for name, depth in waiting.items())
        found = f"messages wait that no worker consumes: {counts}"
        yield Finding("queues", "fault", found, advice)
    elif left and hosts:
        yield Finding("queues", "warning", f"no worker consumes {', '.join(left)}", advice)
    elif hosts:
        yield Finding("queues", "ok", "each has a worker")


STUCK = 50
"""The doctor looks at this many open jobs."""


def _stuck(client: Client, deployment: Deployment) -> Iterator[Finding]:
    """Yield a finding for each reason why open jobs cannot run, with one of these jobs."""
    reasons: dict[str, list[str]] = {}
    for job in client.ledger.due.jobs(STUCK):
        try:
            spec = client.ledger.spec(job)
        except JobUnreadable:
            continue
        if spec is not None and (why := obstacle(spec, deployment)):
            reasons.setdefault(why, []).append(job)
    for why, jobs in reasons.items():
        found, _, typed = why.rstrip(".").partition(" Type: ")
        advice = f"Type: {typed}" if typed else f"Type: {deployment.command} rlm job {jobs[0]}"
        yield Finding("jobs", "fault", f"{count(len(jobs), 'open job')}: {found}", advice)


def _astray(client: Client, app: Celery) -> Iterator[Finding]:
    """Yield a finding on messages in the ledger's Redis, if it is not the broker of this app.

    The platform's own app has its broker there, so a program without this app sends them there.
    """
    from rlm_tasks.messaging.broker_kinds import broker

    names, store, keys = _names(client), client.ledger.store, client.ledger.keys
    prefix = (app.conf.broker_transport_options or {}).get("global_keyprefix", "")
    if prefix == keys.prefix and app.conf.broker_url == broker(client.settings)["broker_url"]:
        return
    depths = store.call(lambda redis: [int(redis.llen(keys.queue(each))) for each in names])
    waiting = [f"{depth} in {name}" for name, depth in zip(names, depths, strict=True) if depth]
    if waiting:
        yield Finding(
            "queues",
            "fault",
            f"messages wait in the Redis of the ledger, at {store.url}, where no worker of this "
            f"app takes them: {', '.join(waiting)}",
            "Their sender lacks this app: let it import the module that calls install(app)",
        )


def _dead_letters(client: Client) -> Iterator[Finding]:
    """Yield a finding on entries of queues that were no messages, if there are any."""
    from rlm_tasks.worker.dead_letters import DeadLetters

    key = client.ledger.keys.dead
    if count := DeadLetters(client.ledger.store, key).count():
        found = f"{count} entries of queues were no messages; the newest ones are kept"
        advice = (
            f"See them: redis-cli XREVRANGE {key} + - COUNT 10; then delete: redis-cli DEL {key}"
        )
        yield Finding("dead letters", "warning", found, advice)


def _monitor(
    board: Board, hosts: Sequence[HostReport], client: Client, command: str
) -> Iterator[Finding]:
    """Yield findings on the monitor that beat starts, and on a drill."""
    orders, stale_s = board.orders(), client.settings.pressure.stale_s
    if orders.cluster is not None:
        yield Finding("beat", "ok", f"a monitor has run within the last {stale_s:g} s")
    elif hosts:
        found = (
            f"no monitor has run for {stale_s:g} s: there are no alerts, and delayed jobs stay "
            "delayed"
        )
        yield Finding("beat", "warning", found, f"Type: {command} beat")
    else:
        yield Finding(
            "beat",
            "warning",
            "not known without a worker, because a worker runs the monitor",
            f"Start a worker, then: {command} beat",
        )
    if orders.forced is not None:
        found = f"a drill holds level {orders.forced.label} for {orders.forced_for_s:.0f} s more"
        yield Finding(
            "pressure",
            "warning",
            found,
            f"To end it: {command} control release_pressure; to see it: {command} rlm pressure",
        )


def _quarantine(client: Client, command: str) -> Finding:
    items = client.quarantine()
    if not items:
        return Finding("quarantine", "ok", "it is empty")
    jobs = len({item.job_id for item in items})
    found = f"items that do not run again: {len(items)}, in jobs: {jobs}"
    return Finding("quarantine", "warning", found, f"Type: {command} rlm quarantine list")


def decided_alone(store: Store) -> Iterator[Finding]:
    """Yield a finding on limits that guards kept by themselves, because Redis did not answer."""
    counts, age_s = store.alone()
    if counts:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
        yield Finding(
            "guards",
            "warning",
            f"guards decided {sum(counts.values())} times without Redis ({kinds}), the last time "
            f"{age_s / 60:.0f} minutes ago",
            "See why Redis did not answer: its load, SLOWLOG, the network; limits may have been "
            "passed meanwhile",
        )


def _breakers(store: Store, command: str) -> Finding:
    """Return a finding on breakers that are not closed.

    It reads by the ledger's connection, because that of guards gives up after a tenth of a second.
    """
    from resilience.breaker import CircuitBreakers

    states = {name: str(about["state"]) for name, about in CircuitBreakers(store).status().items()}
    limiting = [f"{name} ({state})" for name, state in sorted(states.items()) if state != "closed"]
    if not limiting:
        return Finding("breakers", "ok", f"{len(states)} are known, all closed")
    return Finding(
        "breakers",
        "warning",
        f"breakers refuse calls: {', '.join(limiting)}",
        f"Type: {command} rlm breakers",
    )


def _paused(client: Client, hosts: Sequence[HostReport], command: str) -> Iterator[Finding]:
    """Yield a finding on each limit that its provider has paused."""
    from rlm_tasks.engine.guards import ProcessGuards
    from rlm_tasks.telemetry.limit_reports import limit_reports

    guards = ProcessGuards(client.ledger.store, client.settings, lambda _: None)
    paused = {each.service: each.hold_s for each in limit_reports(guards, hosts) if each.hold_s}
    for service, hold_s in paused.items():
        found = f"no call of {service} is made for {duration(hold_s)}: its provider asked for it"
        advice = f"To end it: {command} rlm limits release {service}"
        yield Finding("limits", "warning", found, advice)


def _endpoints(client: Client, hosts: Sequence[HostReport], command: str) -> Iterator[Finding]:
    """Yield a finding on endpoints of models that get no calls, and one if all do."""
    from resilience.breaker import CircuitBreakers
    from rlm_tasks.llm.reports import endpoint_reports

    store = client.ledger.store
    reports = endpoint_reports(store, client.settings.llm, CircuitBreakers(store), hosts)
    for each in reports:
        if not each.healthy:
            found = f"endpoint {each.name} gets no calls: {each.why}"
            yield Finding("endpoints", "fault", found, f"Type: {command} rlm endpoints --check")
    if reports and all(each.healthy for each in reports):
        yield Finding("endpoints", "ok", f"{count(len(reports), 'endpoint')}, all healthy")


RECENT_S = 600.0
"""A fault that recurs counts for the doctor if it was seen within this time."""


def _faults(store: Store, now_ms: int, command: str) -> Iterator[Finding]:
    """Yield a finding on the most frequent fault of each service that was seen lately."""
    from resilience.fault_log import FaultLog

    patterns = [
        each for each in FaultLog(store).patterns() if now_ms - each.last_seen_ms < 1000 * RECENT_S
    ]
    worst = {each.service: each for each in sorted(patterns, key=lambda each: each.count)}
    for service, each in worst.items():
        if each.escalated:
            last = age((now_ms - each.last_seen_ms) / 1000)
            found = (
                f"calls of {service} fail: {each.code}, {count(each.count, 'time')}, "
                f"the last one {last}"
            )
            advice = f"Type: {command} rlm jobs --status failed, then rlm failures with one of them"
            yield Finding("faults", "warning", found, advice)
