"""How a worker answers for itself, on one port: ``/metrics``, ``/livez``, ``/readyz`` and
``/health``.

Decides when a worker counts as alive and as ready, what is told of it, and to whom; nothing secret
is.  It runs in threads of the worker's main process and never waits in its event loop.  Refuses to
know what is counted (`metrics`)."""

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
from celery.worker import state
from prometheus_client import REGISTRY, make_wsgi_app

from resilience.degradation import Level, level_of
from resilience.errors import StoreUnavailable
from resilience.store import guard_store
from rlm_tasks.engine.guards import breakers_of
from rlm_tasks.metrics import slot_files
from rlm_tasks.telemetry import exposition, health, limit_reports
from rlm_tasks.telemetry.exposition import WorkerState
from rlm_tasks.version import __version__
from scheduler.sampling import held_mb

logger = logging.getLogger(__name__)

STUCK_S = 120.0
"""A thread that has been silent for longer will not go on.  A hung Redis keeps the event loop for
30 s, and again.
"""
UNHEARD_S = 5.0
"""The guard asks the ledger every second; one that has not answered for so long is away."""
FRESH_S = 5.0
"""What is asked of Redis for a scrape is asked no more often."""
CLIENT_S = 5.0
"""Nobody may take longer to send a request."""


# --- when a worker is well --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vitals:
    """Signs of life: how long each part has been silent, in seconds, and what the worker is
    doing.
    """

    guard_s: float
    loop_s: float  # 0 where the event loop cannot be watched, or has nothing to go round for
    ledger_s: float
    consuming: bool
    draining: bool


def not_alive(at: Vitals) -> str:
    """Return why a worker is to be replaced, '' while it lives.  A broker or ledger that is away is
    no reason.
    """
    if at.guard_s > STUCK_S:
        return f"its guard has been stuck for {at.guard_s:.0f} s"
    if at.loop_s > STUCK_S:
        return f"its event loop has been stuck for {at.loop_s:.0f} s"
    return ""


def not_ready(at: Vitals) -> str:
    """Return why a worker takes no work now, '' when it does."""
    if at.draining:
        return "it drains"
    if not at.consuming:
        return "it is not connected to its broker, or does not consume yet"
    if at.ledger_s > UNHEARD_S:
        return f"the ledger has not answered for {at.ledger_s:.0f} s"
    return not_alive(at)


# --- what is known of a worker ----------------------------------------------------------------


class WorkerHealth:
    """One worker, asked from other threads than its own."""

    def __init__(self, worker: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds; the guard's stamps are compared with it."""
        self._worker, self._clock = worker, clock
        self._runtime, self._store = worker.app.rlm_runtime(), guard_store(worker.app.rlm_settings)
        self._began = self._looped_at = clock()
        self._breakers = breakers_of(self._store, worker.app.rlm_settings)
        self._asking, self._asked_at = threading.Lock(), float("-inf")
        self._states: dict[str, str] = {}
        # Elsewhere an item may keep the loop for as long as it likes.
        self._watches_loop = (
            isinstance(worker.pool, PreforkPool) and getattr(worker, "hub", None) is not None
        )
        if self._watches_loop:
            worker.hub.on_tick.add(self._tick)

    def _tick(self) -> None:
        self._looped_at = self._clock()

    def vitals(self) -> Vitals:
        """Return the signs of life."""
        now, guard, consumer = self._clock(), self._worker.app.rlm_supervisor, self._worker.consumer
        connection = getattr(consumer, "connection", None)
        connected = connection is not None and bool(connection.connected)
        if not (connected and self._watches_loop):
            self._looped_at = now  # it tries to connect, and goes round afterwards
        consuming = connected and bool(
            getattr(consumer, "task_consumer", None) and consumer.task_consumer.queues
        )
        return Vitals(
            guard_s=now - guard.ticked_at if guard.is_alive() else float("inf"),
            loop_s=now - self._looped_at,
            ledger_s=now - guard.answered_at,
            consuming=consuming,
            draining=self._runtime.page.draining,
        )

    def standing(self) -> WorkerState:
        """Return what gauges tell."""
        report, page = self._worker.app.rlm_supervisor.host.report(), self._runtime.page
        thresholds = self._runtime.settings.pressure.thresholds
        return WorkerState(
            total=report.slots,
            busy=min(len(state.reserved_requests), report.slots),
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
        """Return service -> state, as known a few seconds ago at most; nothing while Redis is
        away.
        """
        with self._asking:
            if self._clock() - self._asked_at >= FRESH_S:
                try:
                    self._states = {
                        name: str(each["state"]) for name, each in self._breakers.status().items()
                    }
                except StoreUnavailable:
                    self._states = {}
                self._asked_at = self._clock()
            return self._states

    def brief(self) -> dict[str, Any]:
        """Return status and why, without asking Redis."""
        return self._judged([], [])

    def detailed(self) -> dict[str, Any]:
        """Return all there is to tell of the worker, as plain data."""
        report, at = self._worker.app.rlm_supervisor.host.report(), self.standing()
        redis_ms = health.latency_ms(self._store)
        return {
            **self._judged(health.silent(redis_ms), health.shut(at.breakers)),
            "worker": self._runtime.worker,
            "version": __version__,
            "uptime_s": round(self._clock() - self._began, 1),
            "draining": at.draining,
            "pressure": {
                "level": Level(at.level).label,
                "host": report.level.label,
                "why": report.why,
            },
            "slots": {"total": at.total, "busy": at.busy, "free": at.free},
            "memory_mb": round(at.memory_mb, 1),
            "latency": {"redis_ms": redis_ms},
            "quotas": self._quotas(),
            "circuit_breakers": at.breakers,
        }

    def _judged(self, failing: Sequence[str], unwell: Sequence[str]) -> dict[str, Any]:
        vitals = self.vitals()
        failing = [*filter(None, [not_alive(vitals)]), *failing]
        return health.judged(
            failing,
            [
                *filter(None, [not_ready(vitals)]),
                *unwell,
                *health.pressed(self._runtime.page.level),
            ],
        )

    def _quotas(self) -> list[dict[str, Any]]:
        try:
            return health.quotas(limit_reports.reports(self._runtime.guards))
        except StoreUnavailable:
            return []


# --- how it is asked --------------------------------------------------------------------------


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
"""Asked by who starts and stops workers, and answered without a key: they tell of nothing but that
worker's state.
"""


def application(
    health: WorkerHealth, exposed: Callable[[Environ, Respond], Iterable[bytes]], api_key: str = ""
) -> Callable[..., Iterable[bytes]]:
    """Return the WSGI application of one worker; `exposed` answers ``/metrics``; with an `api_key`
    who asks shows it.
    """

    def answered(environ: Environ, respond: Respond) -> Iterable[bytes]:
        path, headers = environ["PATH_INFO"], []
        try:
            if path not in _PROBES and not _shows(environ, api_key):
                status, kind, body = (
                    401,
                    "text/plain",
                    "show the key of RLM_API_KEY: Authorization: Bearer, or X-API-Key",
                )
                headers = [("WWW-Authenticate", 'Bearer realm="rlm"')]
            elif path == "/metrics":
                return exposed(environ, respond)
            else:
                status, kind, body = _answer(health, path, environ.get("QUERY_STRING", ""))
        except Exception:  # who asks is answered, whatever is wrong; the log says what
            logger.exception("A question for %s could not be answered", path)
            status, kind, body = 500, "text/plain", "it failed; the worker's log says why"
        respond(
            _STATUS[status],
            [("Content-Type", f"{kind}; charset=utf-8"), ("Cache-Control", "no-store"), *headers],
        )
        return [f"{body}\n".encode()]

    return answered


def _shows(environ: Environ, api_key: str) -> bool:
    """Whether a request shows the key, if there is one; how long that takes tells nothing of it."""
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    shown = token.strip() if scheme.lower() == "bearer" else environ.get("HTTP_X_API_KEY", "")
    # WSGI reads the bytes of a header as Latin-1.
    return not api_key or hmac.compare_digest(shown.encode("latin-1", "replace"), api_key.encode())


def _answer(health: WorkerHealth, path: str, query: str) -> Answer:
    match path:
        case "/livez":
            return _probed(not_alive(health.vitals()))
        case "/readyz":
            return _probed(not_ready(health.vitals()))
        case "/health":
            short = parse_qs(query).get("detailed", ["true"])[-1].lower() in ("false", "0", "no")
            told = health.brief() if short else health.detailed()
            return (
                503 if told["status"] == "failing" else 200,
                "application/json",
                json.dumps(told, indent=2),
            )
    return 404, "text/plain", f"there are {_PATHS}"


def _probed(why: str) -> Answer:
    return (503, "text/plain", why) if why else (200, "text/plain", "ok")


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking the name service what the address is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = (
            str(self.server_address[0]),
            int(self.server_address[1]),
        )
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""
        logger.debug("%s went away", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_S

    def log_message(self, *_: Any) -> None:
        """A probe every few seconds is no news."""


class Station:
    """The port of one worker, and the folder that its pool counts in.

    Made before the pool forks; the port is opened after, and closed when the pool has ended: a
    worker that drains for minutes is alive."""

    def __init__(self, worker: Any, port: int) -> None:
        self._worker, self._port, self._address = (
            worker,
            port,
            worker.app.rlm_settings.metrics.address,
        )
        self._folder, self._pid = Path(tempfile.mkdtemp(prefix="rlm-metrics-")), os.getpid()
        self._server: _Server | None = None
        slot_files.begin(self._folder)
        signals.worker_process_init.connect(self._leave_port, weak=False)

    def start(self) -> None:
        """Open the port, if it can be had; a worker without it works all the same."""
        health = WorkerHealth(self._worker)
        registry = exposition.registry(self._folder, health.standing)
        if not isinstance(self._worker.pool, PreforkPool):
            registry.register(REGISTRY)  # one process: what its owner counts is here, too
        kind = _Server6 if ":" in self._address else _Server
        try:
            server = kind((self._address, self._port), _Handler)
        except OSError as error:
            logger.warning(
                "Port %d of %s %s: this worker goes on without metrics and probes. Give it a port of its own by "
                "--metrics-port or CELERY_WORKER_METRICS_PORT (0: none), or another address by RLM_METRICS__ADDRESS",
                self._port,
                self._address,
                "is taken"
                if error.errno == errno.EADDRINUSE
                else f"cannot be opened ({error.strerror or error})",
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
        """Let a pool process not keep the port: it may outlive the main process."""
        if self._server is not None and os.getpid() != self._pid:
            self._server.socket.close()
