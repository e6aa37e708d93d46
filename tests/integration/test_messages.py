"""Messages of failures, which may contain items: nobody but their owner sees them.

A secret word stands in the message of each kind of failure on a real platform.  All that the
platform shows, writes and sends is searched for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlm_tasks import Client, Job
from rlm_tasks.diagnosis.bundle import collect
from rlm_tasks.flower import pages
from rlm_tasks.testing import embedded
from tests.integration.all_commands import readers, run_all
from tests.integration.conftest import client_of, environment_of
from tests.integration.flowers import flower
from tests.integration.traced_app import Collector, collector
from tests.support import wait_until

SECRET = "zorbanthe"
ENDED = {
    "tell_item": "Told",
    "tell_guarded": "ConnectionError",
    "tell_output": "TypeError",
    "tell_merge": "Told",
    "tell_round": "RoundFailed",
    "tell_merge_of_round": "RoundFailed",
    "tell_then": "Told",
    "tell_validation": "Told",
    "llm.map": "ProviderRefused",
}
"""Operation -> the class that its failure shows."""
WAITING = {"tell_wait": "the shop", "tell_wait_async": "the shop", "tell_cost": "the price list"}
"""Operation -> the guard that it names."""


class _Provider(BaseHTTPRequestHandler):
    """Refuses each call, and at last each check, in words of its own."""

    failing = threading.Event()

    def do_POST(self) -> None:
        self._answer(400)

    def do_GET(self) -> None:
        self._answer(500 if self.failing.is_set() else 429)

    def _answer(self, status: int) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps({"error": {"message": f"customer {SECRET} is blocked"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def provider() -> Iterator[str]:
    """Run a provider that only refuses; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Provider) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Told:
    """A platform on which each kind of failure has told the secret."""

    environment: dict[str, str]
    client: Client
    jobs: dict[str, Job]
    log: Path
    traces: Collector

    @property
    def ids(self) -> list[str]:
        """The ids of all jobs and of their rounds."""
        every = [
            *self.jobs.values(),
            *(each for job in self.jobs.values() for each in job.rounds()),
        ]
        return [each.id for each in every]


@pytest.fixture(scope="module")
def told(server: embedded.Server, logs: Path) -> Iterator[Told]:
    with collector() as traces, provider() as url:
        endpoint = {"name": "main", "base_url": url, "key_env": "MAIN_KEY"}
        environment = environment_of(
            server.url,
            "told",
            RLM_OPERATIONS="tests.integration.telling_ops",
            RLM_LLM__ENDPOINTS=json.dumps([endpoint]),
            MAIN_KEY="any",
            RLM_LLM__HEALTH_EVERY_S="0.3",
            RLM_LLM__HEALTH_STRIKES="1",
            RLM_ALERTS__CHANNELS='["log","stdout"]',
            RLM_LOG_FORMAT="json",
            **traces.environment,
        )
        log = logs / "told.log"
        with (
            embedded.worker(environment, log=log, level="DEBUG"),
            client_of(environment) as client,
        ):
            jobs = {name: _submitted(client, name) for name in (*ENDED, *WAITING)}
            for name in ENDED:
                jobs[name].wait(timeout=60)
            for name, guard in WAITING.items():
                wait_until(lambda job=jobs[name], guard=guard: guard in job.explain())  # type: ignore[misc]
            _Provider.failing.set()
            wait_until(lambda: any(not each.healthy for each in client.endpoints()))
            wait_until(lambda: any(e.name == "endpoint.ill" for e in client.events.recent(200)))
            for event in client.events.recent(200):
                client.alerts.process_event(event)
            told = Told(environment, client, jobs, log, traces)
            ended = {each.trace_id for each in (jobs[name] for name in ENDED)}
            wait_until(lambda: {each.trace for each in traces.spans} >= ended)
            yield told


def _submitted(client: Client, name: str) -> Job:
    fields: dict[str, Any] = {"items": [SECRET] * 15, "continue_on_error": True}
    if name in ("tell_round", "tell_merge_of_round", "tell_then"):
        fields |= {"params": {"told": SECRET}}
    if name == "tell_validation":
        fields |= {"validate_before_process": True}
    if name == "llm.map":
        fields |= {"items": ["a question"], "params": {"prompt": "{item}", "max_tokens": 20}}
    return client.submit(operation=name, **fields)


def test_each_kind_of_failure_tells_the_secret_to_its_owner(told: Told) -> None:
    for name, kind in ENDED.items():
        result = told.jobs[name].result(propagate=False)
        found = [*result.failed, *([result.error] if result.error else [])]
        assert found[0].type == kind, name
        assert any(SECRET in each.message for each in found) or name == "tell_output", name
    for name in WAITING:
        assert SECRET in told.jobs[name].explain()
        assert any(SECRET in node.why for node in told.jobs[name].tree())


def test_no_command_shows_a_message(told: Told) -> None:
    printed = run_all(told.environment, readers(told.ids))

    assert _around(printed) == []
    assert "!!" not in printed
    for shown in {*ENDED.values(), *WAITING.values()}:
        assert shown in printed


def test_commands_show_messages_when_the_setting_allows(told: Told) -> None:
    shows = {**told.environment, "RLM_SHOW_MESSAGES": "1"}
    names = ("tell_merge", "tell_then", *WAITING)

    for name in names:
        printed = run_all(shows, [["explain", told.jobs[name].id]])
        assert SECRET in printed, name


def test_a_result_on_the_command_line_has_no_message(told: Told) -> None:
    request = {"operation": "tell_item", "items": [SECRET], "continueOnError": True}
    for line in (["submit", "--wait", "20"], ["submit", "--wait", "20", "--json"]):
        for more in ({}, {"operation": "tell_merge"}):
            folder = told.log.parent
            (folder / "request.json").write_text(json.dumps({**request, **more}))
            printed = run_all(told.environment, [[*line, str(folder / "request.json")]])
            assert _around(printed) == []
            assert "Told" in printed


def test_no_page_of_flower_shows_a_message(told: Told) -> None:
    with flower(told.environment, told.log.with_name("told-flower.log")) as own:
        shown = [own.get(f"/rlm/{tab}?json=1")[1] for tab in pages.TABS]
        shown += [own.get(f"/rlm/job/{id}{more}")[1] for id in told.ids for more in ("", "?json=1")]
    assert _around("\n".join(shown)) == []
    for name in {*ENDED.values(), *WAITING.values()}:
        assert any(name in page for page in shown)


def test_flower_shows_messages_when_the_setting_allows(told: Told) -> None:
    with client_of({**told.environment, "RLM_SHOW_MESSAGES": "1"}) as client:
        for name in ("tell_item", "tell_merge", *WAITING):
            assert SECRET in json.dumps(pages.job(client, told.jobs[name].id).to_dict()), name
        page = pages.job(client, told.jobs["tell_item"].id).to_dict()
    [table] = [each for each in page["tables"] if each["title"].startswith("Messages")]
    assert table["rows"][0][2]["text"] == f"Told: customer {SECRET} is unknown, {SECRET}"
    assert "telling_ops.py" in table["rows"][0][2]["note"]


def test_no_bundle_holds_a_message_whatever_the_setting(told: Told) -> None:
    for setting in ("0", "1"):
        with client_of({**told.environment, "RLM_SHOW_MESSAGES": setting}) as client:
            for id in told.ids:
                assert _around(json.dumps(collect(client, client.app, id), default=str)) == []


def test_no_log_alert_or_span_holds_a_message(told: Told) -> None:
    assert _around(told.log.read_text()) == []
    alerts = told.client.alerts.history(1000)
    assert _around("\n".join(map(str, alerts))) == []
    assert {"faults.escalated", "endpoint.ill"} <= {each.kind for each in alerts}
    assert _around("\n".join(map(str, told.traces.spans))) == []
    spans = [each for each in told.traces.spans if each.trace in _traces(told, WAITING)]
    assert {each.about.get("rlm.reason") for each in spans} >= set(WAITING.values())


def _traces(told: Told, names: dict[str, str]) -> set[str]:
    return {told.jobs[name].trace_id for name in names}


def _around(text: str) -> list[str]:
    """Return the places where the secret stands, with what is around it."""
    low, found, at = text.lower(), [], -1
    while (at := low.find(SECRET, at + 1)) >= 0:
        found.append(text[max(0, at - 150) : at + 60])
    return found[:5]
