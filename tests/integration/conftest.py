"""Fixtures: one real server, one real prefork worker and their client for the whole session.

Tests with other settings use `environment_of` and `client_of`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery import Celery

from rlm_tasks.celery import configuration, install
from rlm_tasks.client.client import Client
from rlm_tasks.settings.model import Settings
from rlm_tasks.testing import embedded, fake_provider

ROOT = Path(__file__).parents[2]
SLOTS = 2


NO_PRESSURE = {
    "RLM_PRESSURE__ENABLED": "0",
    "RLM_ADMISSION__WAIT_HIGH_S": "0",
    "RLM_ADMISSION__WAIT_NORMAL_S": "0",
    "RLM_ADMISSION__WAIT_LOW_S": "0",
}
"""Settings that turn pressure off: other load on the machine must not change a test."""


def environment_of(
    url: str, namespace: str, *, pressed: bool = False, **more: str
) -> dict[str, str]:
    """Return the environment of a worker on a test's server; with `pressed` pressure is on."""
    return {
        **({} if pressed else NO_PRESSURE),
        "CELERY_WORKER_METRICS_PORT": "0",  # several workers run on this machine at once
        "RLM_REDIS_URL": url,
        "RLM_NAMESPACE": namespace,
        "RLM_OPERATIONS": "tests.integration.ops",
        "PYTHONPATH": str(ROOT),
        "RLM_LEDGER__LEASE_S": "1.5",
        "RLM_LEDGER__SWEEP_S": "0.3",
        "RLM_LEDGER__GRACE_S": "1.0",
        **more,
    }


def client_of(environment: dict[str, str]) -> Client:
    """Return a client with the settings of a process in this environment."""
    kept = dict(os.environ)
    os.environ.update(environment)
    try:
        settings = Settings()
    finally:
        os.environ.clear()
        os.environ.update(kept)
    app = install(Celery(f"tests-{settings.namespace}", set_as_current=False), settings)
    app.config_from_object(configuration(settings))
    return Client(app)


@contextmanager
def one_provider(
    url: str, namespace: str, log: Path, *, slots: int, **more: str
) -> Iterator[tuple[Client, fake_provider.Running]]:
    """Run a fake provider, named main, and a worker that calls it; yield a client and the provider.

    `more` are further settings of the worker and the client.
    """
    with fake_provider.running() as provider:
        main = {"name": "main", "base_url": provider.base_url, "key_env": "MAIN_KEY"}
        endpoints = {"RLM_LLM__ENDPOINTS": json.dumps([main]), "MAIN_KEY": "any"}
        environment = environment_of(url, namespace, **endpoints, **more)
        with client_of(environment) as client, embedded.worker(environment, log=log, slots=slots):
            yield client, provider


@pytest.fixture(scope="session")
def server() -> Iterator[embedded.Server]:
    """The session's server."""
    with embedded.server() as own:
        yield own


@pytest.fixture(scope="session")
def environment(server: embedded.Server) -> dict[str, str]:
    """The environment of the session's worker."""
    return environment_of(server.url, "test")


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the workers' logs."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def worker_pid(environment: dict[str, str], logs: Path) -> Iterator[int]:
    """The process id of the session's worker."""
    with embedded.worker(environment, log=logs / "worker.log", slots=SLOTS) as process:
        yield process.pid


@pytest.fixture(scope="session")
def client(environment: dict[str, str], worker_pid: int) -> Iterator[Client]:
    """A client of the session's worker."""
    with client_of(environment) as own:
        yield own


@pytest.fixture
def client_without_worker(
    server: embedded.Server, request: pytest.FixtureRequest
) -> Iterator[Client]:
    """A client in a namespace without a worker."""
    with client_of(
        environment_of(server.url, f"lonely-{abs(hash(request.node.nodeid)) % 10**8}")
    ) as own:
        yield own
