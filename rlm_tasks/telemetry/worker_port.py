"""One port of a worker for ``/metrics``, ``/livez``, ``/readyz`` and ``/health``.

The worker's boot step makes a `WorkerPort`.  This module has the rules for an alive and a ready
worker, and the content of the answers, which have no secrets.  It runs in threads of the worker's
main process, and never blocks its event loop.  Begin with `WorkerPort`, then `application`.
"""

from __future__ import annotations

import errno
import hmac
import json
import logging
import os
import shutil
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from celery import signals
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker import state as celery_state
from prometheus_client import REGISTRY, make_wsgi_app

from resilience.degradation import Level, level_of
from resilience.errors import StoreUnavailable
from resilience.store import guard_store
from rlm_tasks.engine.guards import breakers_of
from rlm_tasks.metrics import slot_files
from rlm_tasks.telemetry import exposition, health
from rlm_tasks.telemetry.exposition import WorkerState
from rlm_tasks.telemetry.limit_reports import limit_reports
from rlm_tasks.version import __version__
from scheduler.sampling import held_mb

logger = logging.getLogger(__name__)

STUCK_S = 120.0
"""A thread that has been silent for this long is stuck.

A Redis that hangs blocks the event loop for 30 s, and may do so again.
"""
LEDGER_AWAY_S = 5.0
"""The ledger counts as away after this time without an answer; it is called every second."""
FRESH_S = 5.0
"""Breakers are read from Redis once in this time at most, however often a scrape comes."""
CLIENT_S = 5.0
"""Longest time that a client may take to send its request."""


# --- the rules of the probes ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProbeInputs:
    """The values by which /livez and /readyz answer; times are seconds since the last activity."""

    supervisor_s: float
    loop_s: float  # 0 if the event loop cannot be watched, or has no reason to run
    ledger_s: float
    consuming: bool
    draining: bool


def not_alive(probed: ProbeInputs) -> str:
    """Return the reason to replace a worker, '' while it is alive.

    A broker or ledger that is away is no reason.
    """
    if probed.supervisor_s > STUCK_S:
        return f"its supervisor has been stuck for {probed.supervisor_s:.0f} s"
    if probed.loop_s > STUCK_S:
        return f"its event loop has been stuck for {probed.loop_s:.0f} s"
    return ""


def not_ready(probed: ProbeInputs) -> str:
    """Return the reason why a worker takes no work now, '' when it does."""
    if probed.draining:
        return "it drains"
    if not probed.consuming:
        return "it is not connected to its broker, or does not consume yet"
    if probed.ledger_s > LEDGER_AWAY_S:
        return f"the ledger has not answered for {probed.ledger_s:.0f} s"
    return not_alive(probed)


# --- the state of a worker --------------------------------------------------------------------


class WorkerHealth:
    """The health of one worker, read from other threads than its own."""

    def __init__(self, worker: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds, and is the clock of the supervisor's timestamps."""
        self._worker, self._clock = worker, clock
        self._runtime, self._store = worker.app.rlm_runtime(), guard_store(worker.app.rlm_settings)
        self._began = self._looped_at = clock()
        self._breakers = breakers_of(self._store, worker.app.rlm_settings)
        self._lock, self._read_at = threading.Lock(), float("-inf")
        self._states: dict[str, str] = {}
        # In other pools an item runs in the event loop, for any time.
        self._watches_loop = (
            isinstance(worker.pool, PreforkPool) and getattr(worker, "hub", None) is not None
        )
        if self._watches_loop:
            worker.hub.on_tick.add(self._tick)

    def _tick(self) -> None:
        self._looped_at = self._clock()

    def probed(self) -> ProbeInputs:
        """Return the present inputs of the probes."""
        now, consumer = self._clock(), self._worker.consumer
        supervisor = self._worker.app.rlm_supervisor
        connection = getattr(consumer, "connection", None)
        connected = connection is not None and bool(connection.connected)
        if not (connected and self._watches_loop):
            self._looped_at = now  # the loop does not run while the worker connects
        return ProbeInputs(
            supervisor_s=now - supervisor.ticked_at if supervisor.is_alive() else float("inf"),
            loop_s=now - self._looped_at,
            ledger_s=now - supervisor.answered_at,
            consuming=bool(supervisor.queues()),
            draining=self._runtime.page.draining,
        )

    def state(self) -> WorkerState:
        """Return the state that the gauges show."""
        report, page = self._worker.app.rlm_supervisor.host.report(), self._runtime.page
        thresholds = self._runtime.settings.pressure.thresholds
        return WorkerState(
            total=report.slots,
            busy=min(len(celery_state.reserved_requests), report.slots),
            draining=page.draining,
            level=int(page.level),
            memory_mb=sum(map(held_mb, self._pids())),
            memory_level=int(level_of(report.sample.memory_pct, thresholds))
            if report.sample is not None
            else None,
            breakers=self.breakers(),
        )

    def _pids(self) -> list[int]:
        processes = getattr(getattr(self._worker.pool, "_pool", None), "_pool", None) or ()
        return [os.getpid(), *(each.pid for each in list(processes) if hasattr(each, "pid"))]

    def breakers(self) -> dict[str, str]:
        """Return service -> state, a few seconds old at most; empty while Redis is away."""
        with self._lock:
            if self._clock() - self._read_at >= FRESH_S:
                try:
                    self._states = {
                        name: str(each["state"]) for name, each in self._breakers.status().items()
                    }
                except StoreUnavailable:
                    self._states = {}
                self._read_at = self._clock()
            return self._states

    def brief(self) -> dict[str, Any]:
        """Return status and why, without a call to Redis."""
        return self._status([], [])

    def detailed(self) -> dict[str, Any]:
        """Return status, why, and all figures of the worker, as plain data."""
        report, state = self._worker.app.rlm_supervisor.host.report(), self.state()
        redis_ms, reasons = health.redis_health(self._store)
        return {
            **self._status(reasons, health.breaker_reasons(state.breakers)),
            "worker": self._runtime.worker,
            "version": __version__,
            "uptime_s": round(self._clock() - self._began, 1),
            "draining": state.draining,
            "pressure": {
                "level": Level(state.level).label,
                "host": report.level.label,
                "why": report.why,
            },
            "slots": {"total": state.total, "busy": state.busy, "free": state.free},
            "memory_mb": round(state.memory_mb, 1),
            "latency": {"redis_ms": redis_ms},
            "quotas": self._quotas(),
            "circuit_breakers": state.breakers,
        }

    def _status(self, failing: Sequence[str], degraded: Sequence[str]) -> dict[str, Any]:
        probed, pressure = self.probed(), health.pressure_reasons(self._runtime.page.level)
        return health.status_of(
            [*filter(None, [not_alive(probed)]), *failing],
            [*filter(None, [not_ready(probed)]), *degraded, *pressure],
        )

    def _quotas(self) -> list[dict[str, Any]]:
        try:
            return health.quotas(limit_reports(self._runtime.guards))
        except StoreUnavailable:
            return []


# --- requests and answers ---------------------------------------------------------------------


Environ = dict[str, Any]
Respond = Callable[..., Any]
Answer = tuple[int, str, str]  # status, content type, body
_STATUS = {
    200: "200 OK",
    401: "401 Unauthorized",
    404: "404 Not Found",
    500: "500 Internal Server Error",
    503: "503 Service Unavailable",
}
_PATHS = "/metrics, /livez, /readyz, /health"
_PROBES = ("/livez", "/readyz")
"""They need no key, because process managers call them, and they show only the worker's state."""


def application(
    health: WorkerHealth, metrics: Callable[[Environ, Respond], Iterable[bytes]], api_key: str = ""
) -> Callable[..., Iterable[bytes]]:
    """Return the WSGI application of one worker.

    `metrics` answers ``/metrics``.  With an `api_key`, requests need it, except for the probes.
    """

    def answer(environ: Environ, respond: Respond) -> Iterable[bytes]:
        path, headers = environ["PATH_INFO"], []
        try:
            if path not in _PROBES and not _has_key(environ, api_key):
                kind, status = "text/plain", 401
                body = "send the key of RLM_API_KEY: Authorization: Bearer, or X-API-Key"
                headers = [("WWW-Authenticate", 'Bearer realm="rlm"')]
            elif path == "/metrics":
                return metrics(environ, respond)
            else:
                status, kind, body = _answer(health, path, environ.get("QUERY_STRING", ""))
        except Exception:  # any error gets an answer; the log has the error
            logger.exception("A request for %s failed", path)
            status, kind, body = 500, "text/plain", "it failed; the worker's log says why"
        respond(
            _STATUS[status],
            [("Content-Type", f"{kind}; charset=utf-8"), ("Cache-Control", "no-store"), *headers],
        )
        return [f"{body}\n".encode()]

    return answer


def _has_key(environ: Environ, api_key: str) -> bool:
    """Whether a request has the key, if one is set; the comparison takes constant time."""
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else environ.get("HTTP_X_API_KEY", "")
    # WSGI reads the bytes of a header as Latin-1.
    return not api_key or hmac.compare_digest(given.encode("latin-1", "replace"), api_key.encode())


def _answer(health: WorkerHealth, path: str, query: str) -> Answer:
    match path:
        case "/livez":
            return _probe_answer(not_alive(health.probed()))
        case "/readyz":
            return _probe_answer(not_ready(health.probed()))
        case "/health":
            short = parse_qs(query).get("detailed", ["true"])[-1].lower() in ("false", "0", "no")
            report = health.brief() if short else health.detailed()
            status = 503 if report["status"] == "failing" else 200
            return status, "application/json", json.dumps(report, indent=2)
    return 404, "text/plain", f"there are {_PATHS}"


def _probe_answer(why: str) -> Answer:
    return (503, "text/plain", why) if why else (200, "text/plain", "ok")


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without a query to the name service for the name of the address."""
        socketserver.TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a client that goes away, at level DEBUG only."""
        logger.debug("%s went away", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, *_: Any) -> None:
        """Log no request: a probe comes every few seconds."""


class WorkerPort:
    """The port of one worker, and the folder that its pool counts in.

    It is made before the pool forks.  The port is opened after that, and closed when the pool has
    ended, because a worker that drains for minutes is alive.
    """

    def __init__(self, worker: Any, port: int) -> None:
        self._worker, self._port = worker, port
        self._address = worker.app.rlm_settings.metrics.address
        self._folder, self._pid = Path(tempfile.mkdtemp(prefix="rlm-metrics-")), os.getpid()
        self._server: _Server | None = None
        slot_files.begin(self._folder)
        signals.worker_process_init.connect(self._leave_port, weak=False)

    def start(self) -> None:
        """Open the port; if that fails, log a warning, and the worker goes on without it."""
        health = WorkerHealth(self._worker)
        registry = exposition.registry(self._folder, health.state)
        if not isinstance(self._worker.pool, PreforkPool):
            registry.register(REGISTRY)  # one process, so the app's own metrics are here, too
        kind = _Server6 if ":" in self._address else _Server
        try:
            server = kind((self._address, self._port), _Handler)
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            logger.warning(
                "Port %d of %s %s: this worker goes on without metrics and probes. Give it another "
                "port by --metrics-port or CELERY_WORKER_METRICS_PORT (0: none), or another "
                "address by RLM_METRICS__ADDRESS",
                self._port,
                self._address,
                "is taken" if is_taken else f"cannot be opened ({error.strerror or error})",
            )
            return
        api_key = self._worker.app.rlm_settings.api_key.get_secret_value()
        server.set_app(application(health, make_wsgi_app(registry), api_key))
        self._server = server
        threading.Thread(target=server.serve_forever, name="rlm-health", daemon=True).start()

    def stop(self) -> None:
        """Close the port and remove the folder."""
        slot_files.end()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        if os.getpid() == self._pid:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _leave_port(self, **_: Any) -> None:
        """Close the port in a pool process, which may outlive the main process."""
        if self._server is not None and os.getpid() != self._pid:
            self._server.socket.close()
