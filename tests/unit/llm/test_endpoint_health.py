"""How endpoints are found to be ill and well again, by one worker for all; and what of it is
counted and shown.
"""

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

from resilience.errors import CallTimeout, Category, RateLimited
from rlm_tasks.engine import guards
from rlm_tasks.llm import metrics
from rlm_tasks.llm.endpoint import (
    Allowance,
    Answer,
    ProviderDown,
    ProviderRefused,
    Told,
    UnusableAnswer,
)
from rlm_tasks.llm.endpoint_checks import CheckResult, Checks, ask
from rlm_tasks.llm.endpoint_health import EndpointHealth
from rlm_tasks.metrics import slot_files
from rlm_tasks.settings.llm import EndpointSettings, LlmSettings
from rlm_tasks.settings.model import Settings
from rlm_tasks.telemetry import exposition
from scheduler.events import Events
from tests.support import wait_until
from tests.unit.world import World

ROOT = Path(__file__).parents[3]
CLOSED = "http://127.0.0.1:1/v1"
SETTINGS = LlmSettings()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose keys expire by its own clock, too."""
    own = World()
    own.install(monkeypatch)
    monkeypatch.setattr(server_keys, "time", own)
    monkeypatch.setenv("UNIT_KEY", "sk-unit")
    return own


class Provider:
    """A server that lists its models with this status; 0: it never answers."""

    def __init__(self, base_url: str) -> None:
        self.base_url, self.status, self.asked, self.ends = base_url, 200, 0, threading.Event()


@pytest.fixture(scope="module")
def one_provider() -> Iterator[Provider]:
    with _listening() as provider:
        yield provider


@pytest.fixture
def provider(one_provider: Provider) -> Provider:
    """A provider that is well, and that nobody has asked."""
    one_provider.status, one_provider.asked = 200, 0
    return one_provider


@contextmanager
def _listening() -> Iterator[Provider]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            own.asked += 1
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
    """Return what one worker asks with."""
    store = world.store()
    return Checks(settings, store, Events(store), worker)


# --- what is believed -------------------------------------------------------------------------


def test_an_endpoint_is_ill_after_three_checks_in_a_row_and_well_after_one(world: World) -> None:
    health = EndpointHealth(world.store(), SETTINGS)
    for why in ("away", "away", "", "away", "away"):
        health.tell("main", latency_s=0.0 if why else 0.25, why=why)
    assert EndpointHealth(world.store(), SETTINGS).ill() == frozenset()

    assert health.tell("main", why="away").strikes == 3
    assert EndpointHealth(world.store(), SETTINGS).ill() == {"main"}

    assert health.tell("main", latency_s=0.25).latency_ms == 250
    assert EndpointHealth(world.store(), SETTINGS).ill() == frozenset()


def test_word_is_read_once_a_second_and_believed_for_three_intervals(world: World) -> None:
    asks, told = EndpointHealth(world.store(), SETTINGS), EndpointHealth(world.store(), SETTINGS)
    assert asks.ill() == frozenset()
    for _ in range(3):
        told.tell("main", why="away")
    assert asks.ill() == frozenset(), "it was read a moment ago"

    world.sleep(1)
    assert asks.ill() == {"main"}
    world.sleep(3 * SETTINGS.health_every_s)
    assert asks.ill() == frozenset(), "nobody has looked for a while"


# --- what counts as an answer -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (200, ""),
        (404, ""),
        (405, ""),
        (429, ""),
        (401, "it does not accept its key (401); see UNIT_KEY"),
        (402, "its account is used up (402); no waiting helps, see its plan and billing"),
        (503, "answers 503"),
        (0, "does not answer within 0.2 s"),
    ],
)
def test_a_server_is_well_when_it_answers_for_its_key(
    world: World, provider: Provider, status: int, why: str
) -> None:
    provider.status = status
    settings = settings_of(provider.base_url, health_timeout_s=5.0 if status else 0.2)

    [found] = asyncio.run(ask(settings))

    assert (found.name, found.why) == ("e0", why)
    assert (found.latency_s > 0) is (why == "")


def test_all_are_asked_and_those_that_cannot_be_say_why(world: World, provider: Provider) -> None:
    keyless = EndpointSettings(name="keyless", base_url=provider.base_url, key_env="UNIT_NO_KEY")
    settings = settings_of(CLOSED, "http://127.0.0.1:99999/v1", provider.base_url)
    settings = settings.model_copy(update={"endpoints": (*settings.endpoints, keyless)})

    away, wrong, well, closed_to_us = asyncio.run(ask(settings))

    assert away == CheckResult("e0", 0.0, "cannot be reached (ConnectError)")
    assert wrong.why
    assert well.why == ""
    assert (
        closed_to_us.why == "UNIT_NO_KEY holds no key; set it, to any word where none is asked for"
    )
    assert provider.asked == 1


# --- who asks ---------------------------------------------------------------------------------


def test_one_of_all_workers_asks_in_each_interval(world: World, provider: Provider) -> None:
    first, second = (
        checks(world, settings_of(provider.base_url), name) for name in ("first", "second")
    )

    assert first.look() == 0.0
    world.sleep(10)
    assert (second.look(), first.look(), provider.asked) == (20.0, 20.0, 1)

    world.sleep(20.5)
    assert (second.look(), first.look(), provider.asked) == (0.0, 30.0, 2)


def test_people_are_told_once_that_an_endpoint_is_ill_and_once_that_it_is_well_whoever_asks(
    world: World, provider: Provider
) -> None:
    provider.status = 503
    workers = [checks(world, settings_of(provider.base_url), name) for name in ("first", "second")]

    def told() -> list[tuple[str, Any]]:
        return [(each.name, each.data) for each in reversed(Events(world.store()).recent())]

    for at in range(5):
        assert len(told()) == (at > 2)
        assert workers[at % 2].look() == 0.0
        world.sleep(30.5)
    provider.status = 200
    for at in range(2):
        assert workers[at % 2].look() == 0.0
        world.sleep(30.5)

    assert told() == [
        ("endpoint.ill", {"endpoint": "e0", "why": "answers 503"}),
        ("endpoint.well", {"endpoint": "e0"}),
    ]


def test_who_asks_stops_in_the_middle_of_a_round(world: World, provider: Provider) -> None:
    provider.status = 0
    thread = checks(
        world, settings_of(provider.base_url, health_every_s=600.0, health_timeout_s=600.0)
    )
    thread.start()
    wait_until(lambda: provider.asked == 1)

    thread.stop()

    wait_until(lambda: not thread.is_alive())


def test_who_asks_waits_for_its_turn_and_for_a_redis_that_is_away(
    world: World,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("rlm_tasks.llm.endpoint_checks.BACK_OFF_S", 0.01)
    store, tries = world.store(), []
    server = store.client.connection_pool.connection_kwargs["server"]
    server.connected = False
    reached = store.reached

    def counting(command: Any) -> Any:
        tries.append(command)
        return reached(command)

    monkeypatch.setattr(store, "reached", counting)
    thread = Checks(settings_of(provider.base_url), store, Events(store), "a")
    thread.start()
    wait_until(lambda: len(tries) >= 3)
    server.connected = True
    wait_until(lambda: EndpointHealth(world.store(), SETTINGS).checkups() != [])
    thread.stop()

    assert (provider.asked, not thread.is_alive()) == (1, True)
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
def test_a_worker_that_knows_no_endpoint_does_without_the_client(
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


# --- what is shown and counted ----------------------------------------------------------------


def test_models_are_protected_where_an_endpoint_is_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def services(settings: LlmSettings) -> set[str]:
        return {
            each.service
            for each in guards.declared(Settings(llm=settings))
            if each.service.startswith("llm:")
        }

    models = {SETTINGS.small, SETTINGS.medium, SETTINGS.large}
    assert services(SETTINGS) == set()
    assert services(settings_of(CLOSED)) == {"llm:e0", *(f"llm:UNIT_KEY:{each}" for each in models)}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-unit")
    assert services(SETTINGS) == {"llm:default", *(f"llm:OPENAI_API_KEY:{each}" for each in models)}


def test_calls_are_counted_by_how_they_ended_and_answers_by_what_they_took(tmp_path: Path) -> None:
    unsaid = Allowance()
    answer = Answer("some", "four", 30, 20, "stop", Told(unsaid, unsaid), 0.3)
    ends: dict[str, BaseException | None] = {
        "rate_limited": RateLimited("endpoint", 1.0, "429"),
        "timeout": CallTimeout("endpoint", 60.0),
        "failed": ProviderDown("main", "away"),
        "refused": ProviderRefused("main", Category.AUTH, "UNAUTHORISED", "no"),
        "unusable": UnusableAnswer("main", "empty"),
    }
    slot_files.begin(tmp_path)
    try:
        metrics.answered("small", "main", answer, 0.5)
        for error in ends.values():
            metrics.failed("small", "main", error)
        metrics.failed("small", "main", asyncio.CancelledError())
        registry = exposition.registry(
            tmp_path, lambda: exposition.WorkerState(1, 0, False, 0, 1.0)
        )

        def counted(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(name, {"model": "small", **labels})

        calls = {
            end: counted("rlm_llm_calls_total", endpoint="main", outcome=end)
            for end in ("ok", *ends)
        }
        assert calls == {"ok": 1, **dict.fromkeys(ends, 1), "failed": 2}
        assert (counted("rlm_llm_call_seconds_count"), counted("rlm_llm_call_seconds_sum")) == (
            1,
            0.3,
        )
        assert [
            counted("rlm_llm_tokens_total", kind=kind) for kind in ("prompt", "completion")
        ] == [30, 20]
        assert counted("rlm_llm_money_total") == 0.5
    finally:
        slot_files.end()
