"""Checks of endpoints, made by one worker for all."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fakeredis._socket._base as server_keys
import pytest

from rlm_tasks.llm.endpoint_checks import CheckResult, Checks, check_all
from rlm_tasks.llm.endpoint_health import EndpointHealth
from rlm_tasks.settings.llm import EndpointSettings, LlmSettings
from scheduler.events import Events
from tests.support import wait_until
from tests.unit.world import World

__all__ = ["world"]


ROOT = Path(__file__).parents[3]


CLOSED = "http://127.0.0.1:1/v1"


SETTINGS = LlmSettings()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose keys expire by its own clock."""
    own = World()
    own.install(monkeypatch)
    monkeypatch.setattr(server_keys, "time", own)
    monkeypatch.setenv("UNIT_KEY", "sk-unit")
    return own


class Provider:
    """A server that lists its models with this status; with 0 it never answers."""

    def __init__(self, base_url: str) -> None:
        self.base_url, self.status, self.requests, self.ends = base_url, 200, 0, threading.Event()


@pytest.fixture(scope="module")
def one_provider() -> Iterator[Provider]:
    with _listening() as provider:
        yield provider


@pytest.fixture
def provider(one_provider: Provider) -> Provider:
    """A healthy provider without any requests so far."""
    one_provider.status, one_provider.requests = 200, 0
    return one_provider


@contextmanager
def _listening() -> Iterator[Provider]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            own.requests += 1
            if not own.status:
                own.ends.wait()
            self.send_response(own.status or 500)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        own = Provider(f"http://127.0.0.1:{server.server_address[1]}/v1")
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield own
        own.ends.set()
        server.shutdown()


def settings_of(*urls: str, **more: Any) -> LlmSettings:
    places = tuple(
        EndpointSettings(name=f"e{at}", base_url=url, key_env="UNIT_KEY")
        for at, url in enumerate(urls)
    )
    return LlmSettings(endpoints=places, **more)


def checks(world: World, settings: LlmSettings, worker: str = "a") -> Checks:
    """Return the checks of one worker."""
    store = world.store()
    return Checks(settings, store, Events(store), worker)


@pytest.mark.parametrize(
    ("status", "why", "failed"),
    [
        (200, "", False),
        (400, "", False),
        (404, "", False),
        (405, "", False),
        (429, "", False),
        (401, "it does not accept its key (401); see UNIT_KEY", False),
        (403, "forbids the call (403)", False),
        (402, "its quota is used up (402)", False),
        (500, "answers 500", True),
        (503, "answers 503", True),
        (0, "does not answer within 0.2 s", True),
    ],
)
def test_a_check_fails_only_without_an_answer_or_by_an_error_of_the_server(
    world: World, provider: Provider, status: int, why: str, failed: bool
) -> None:
    provider.status = status
    settings = settings_of(provider.base_url, health_timeout_s=5.0 if status else 0.2)

    [found] = asyncio.run(check_all(settings))

    assert (found.name, found.why[: len(why)], bool(found.why)) == ("e0", why, bool(why))
    assert (found.failed, found.latency_s > 0) == (failed, not failed)


def test_all_endpoints_are_checked_and_failures_have_a_reason(
    world: World, provider: Provider
) -> None:
    others = (
        EndpointSettings(name="keyless", base_url=provider.base_url, key_env="UNIT_NO_KEY"),
        EndpointSettings(name="unchecked", base_url=CLOSED, key_env="UNIT_KEY", health_path=""),
    )
    settings = settings_of(CLOSED, "http://127.0.0.1:99999/v1", provider.base_url)
    settings = settings.model_copy(update={"endpoints": (*settings.endpoints, *others)})

    away, wrong, well, keyless = asyncio.run(check_all(settings))

    assert away == CheckResult("e0", 0.0, "cannot be reached (ConnectError)", failed=True)
    assert wrong.failed
    assert (well.why, well.failed) == ("", False)
    assert (
        keyless.why == "UNIT_NO_KEY holds no key; set it, to any text if the endpoint needs no key"
    )
    assert not keyless.failed, "a call says so at once, instead of waiting"
    assert provider.requests == 1


def test_one_worker_checks_in_each_interval(world: World, provider: Provider) -> None:
    first, second = (
        checks(world, settings_of(provider.base_url), name) for name in ("first", "second")
    )

    assert first.check_in_turn() == 0.0
    world.sleep(10)
    assert (second.check_in_turn(), first.check_in_turn(), provider.requests) == (20.0, 20.0, 1)

    world.sleep(20.5)
    assert (second.check_in_turn(), first.check_in_turn(), provider.requests) == (0.0, 30.0, 2)


def test_an_endpoint_that_fails_and_recovers_emits_one_event_each(
    world: World, provider: Provider
) -> None:
    provider.status = 503
    workers = [checks(world, settings_of(provider.base_url), name) for name in ("first", "second")]

    def emitted() -> list[tuple[str, Any]]:
        return [(each.name, each.data) for each in reversed(Events(world.store()).recent())]

    for at in range(5):
        assert len(emitted()) == (at > 2)
        assert workers[at % 2].check_in_turn() == 0.0
        world.sleep(30.5)
    provider.status = 200
    for at in range(2):
        assert workers[at % 2].check_in_turn() == 0.0
        world.sleep(30.5)

    assert emitted() == [
        ("endpoint.ill", {"endpoint": "e0", "why": "answers 503"}),
        ("endpoint.well", {"endpoint": "e0"}),
    ]


def test_the_thread_stops_in_the_middle_of_a_check(world: World, provider: Provider) -> None:
    provider.status = 0
    thread = checks(
        world, settings_of(provider.base_url, health_every_s=600.0, health_timeout_s=600.0)
    )
    thread.start()
    wait_until(lambda: provider.requests == 1)

    thread.stop()

    wait_until(lambda: not thread.is_alive())


def test_the_thread_waits_until_redis_answers(
    world: World,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("rlm_tasks.llm.endpoint_checks.BACK_OFF_S", 0.01)
    store, tries = world.store(), []
    server = store.client.connection_pool.connection_kwargs["server"]
    server.connected = False
    call = store.call

    def counting(*what: Any, **more: Any) -> Any:
        tries.append(what)
        return call(*what, **more)

    monkeypatch.setattr(store, "call", counting)
    thread = Checks(settings_of(provider.base_url), store, Events(store), "a")
    thread.start()
    wait_until(lambda: len(tries) >= 3)
    server.connected = True
    wait_until(lambda: EndpointHealth(world.store(), SETTINGS).checkups() != [])
    thread.stop()

    assert (provider.requests, not thread.is_alive()) == (1, True)
    [said] = [each for each in caplog.records if "until Redis answers" in each.getMessage()]
    assert said.levelname == "WARNING"


BARE = """
import sys
from celery import Celery
from rlm_tasks.installation import install
from rlm_tasks.llm.endpoint_checks import checks_of
from rlm_tasks.operations import import_operations
from rlm_tasks.settings import settings
import rlm_tasks.worker.bootsteps
import_operations(settings().operations)
found = checks_of(install(Celery("unit", set_as_current=False)).rlm_runtime())
print(found is not None, "openai" in sys.modules)
"""


@pytest.mark.parametrize(
    ("environment", "said"),
    [({}, "False False"), ({"OPENAI_API_KEY": "sk-unit"}, "True True")],
)
def test_a_worker_without_endpoints_does_not_import_the_client(
    environment: dict[str, str], said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        cwd=ROOT,
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == said
