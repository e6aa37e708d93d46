"""Injected causes: each one has the right sentence in `explain`, the doctor, the status or Flower.

`CAUSES` is the table.  A row injects its cause on a real platform, and gives for each place the
text that it must show, as a regular expression.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from celery.worker.control import Panel

import rlm_tasks.worker.control  # noqa: F401  # it registers our commands with the panel
from resilience.errors import RlmError
from rlm_tasks import Client, Job
from rlm_tasks.cli import rlm
from rlm_tasks.diagnosis.doctor import examine
from rlm_tasks.flower import pages
from rlm_tasks.installation import command_of
from rlm_tasks.testing import embedded
from tests.faults.proxy import Proxy
from tests.faults.refusals import Refusing
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

OPERATIONS = {"RLM_OPERATIONS": "tests.integration.cause_ops"}
CALM = {
    **OPERATIONS,
    "CAUSE_VERSION": "1",
    "RLM_LEDGER__GRACE_S": "30",
    "RLM_LEDGER__STOP_GRACE_S": "30",
}
"""The settings of workers: no message is sent again while a test looks at it."""


class Site:
    """The server of all rows, its shared worker, and workers of single rows."""

    def __init__(self, server: embedded.Server, folder: Path, stack: ExitStack) -> None:
        self.server, self.folder, self._stack = server, folder, stack
        self._shared: Client | None = None
        self._count = 0

    @property
    def shared(self) -> Client:
        """The client of a worker with two slots, which several rows use."""
        if self._shared is None:
            environment = self.environment("causes")
            self._stack.enter_context(self.worker(environment))
            self._shared = self._stack.enter_context(client_of(environment))
        return self._shared

    def hold(self) -> str:
        """Make a file, and return its path: operations wait until it is gone."""
        self._count += 1
        path = self.folder / f"hold{self._count}"
        path.touch()
        return str(path)

    def environment(self, namespace: str = "", **more: str) -> dict[str, str]:
        """Return the environment of a process; without a name its namespace is new."""
        self._count += 1
        name = namespace or f"cause{self._count}"
        return environment_of(self.server.url, name, **{**CALM, **more})

    def worker(self, environment: Mapping[str, str], *options: str) -> Any:
        """Run a worker of this environment."""
        self._count += 1
        log = self.folder / f"worker{self._count}.log"
        return embedded.worker(environment, log=log, slots=2, options=options)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server that only this module uses."""
    with ExitStack() as stack:
        yield Site(stack.enter_context(embedded.server()), tmp_path_factory.mktemp("causes"), stack)


@dataclass(frozen=True)
class Scene:
    """An injected cause: the client that asks, and the job that it asks about."""

    client: Client
    job: Job | None = None
    environment: Mapping[str, str] | None = None  # that of the command `rlm doctor`

    def text(self, place: str) -> str:
        """Return all that one place tells."""
        try:
            return _TEXTS[place](self)
        except RlmError as error:
            return f"{type(error).__name__}: {error}"


def _explained(scene: Scene) -> str:
    assert scene.job is not None
    return scene.job.explain()


def _examined(scene: Scene) -> str:
    found = examine(scene.client, scene.client.app)
    return "\n".join(f"{each.state} {each.check}: {each.found}. {each.advice}" for each in found)


def _command(scene: Scene) -> str:
    """Return what `rlm doctor` prints in a process of its own."""
    environment = {**os.environ, **(scene.environment or {})}
    command = [sys.executable, "-m", "celery", "-A", "rlm_tasks", "rlm", "doctor"]
    ran = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=60
    )
    return ran.stdout


def _page(scene: Scene) -> str:
    assert scene.job is not None
    page = pages.job(scene.client, scene.job.id).to_dict()
    return f"{page['sentence']}\n{page['cards'][0]['value']}"


def _operations(scene: Scene) -> str:
    costs = scene.client.status().operations
    return "\n".join(f"{each['executor_id']} {each['circuit_breaker_state']}" for each in costs)


def _progress(scene: Scene) -> str:
    assert scene.job is not None
    at = scene.job.progress()
    return f"running {at.running}, eta {at.eta_s}, idle {at.idle_s > 0}"


_TEXTS: dict[str, Callable[[Scene], str]] = {
    "explain": _explained,
    "doctor": _examined,
    "doctor command": _command,
    "page": _page,
    "jobs page": lambda scene: str(pages.jobs(scene.client).to_dict()["tables"]),
    "pressure": lambda scene: scene.client.status().sentence(command_of(scene.client.app)),
    "pressure page": lambda scene: str(pages.pressure(scene.client).to_dict()["cards"]),
    "operations": _operations,
    "limits": lambda scene: "\n".join(map(str, scene.client.limits())),
    "endpoints": lambda scene: "\n".join(map(str, scene.client.endpoints())),
    "progress": _progress,
}

Injection = Callable[[Site], AbstractContextManager[Scene]]


# --- workers ----------------------------------------------------------------------------------


@contextmanager
def no_worker(site: Site) -> Iterator[Scene]:
    with client_of(site.environment()) as client:
        yield Scene(client, client.submit(operation="cause.newer", items=[1], priority="high"))


@contextmanager
def lost_worker(site: Site) -> Iterator[Scene]:
    environment, hold = site.environment(), site.hold()
    with client_of(environment) as client, site.worker(environment) as process:
        job = client.submit(operation="cause.held", items=[hold])
        wait_until(lambda: job.progress().running == 1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        yield Scene(client, job)


@contextmanager
def stopped_worker(site: Site) -> Iterator[Scene]:
    environment = site.environment()
    with client_of(environment) as client:
        with site.worker(environment):
            wait_until(lambda: any(host.queues for host in client.status().hosts))
        yield Scene(client, client.submit(operation="cause.fails", items=["x"]))


@contextmanager
def draining_worker(site: Site) -> Iterator[Scene]:
    environment, hold = site.environment(), site.hold()
    with client_of(environment) as client, site.worker(environment) as process:
        job = client.submit(operation="cause.held", items=[hold])
        wait_until(lambda: job.progress().running == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: all(host.draining for host in client.status().hosts))
        yield Scene(client, client.submit(operation="cause.fails", items=["x"]))
        Path(hold).unlink()


@contextmanager
def drained_worker(site: Site) -> Iterator[Scene]:
    environment = site.environment()
    with client_of(environment) as client, site.worker(environment):
        wait_until(lambda: any(host.queues for host in client.status().hosts))
        assert client.app.control.broadcast("rlm_drain", reply=True, limit=1, timeout=10)
        wait_until(lambda: all(not host.queues for host in client.status().hosts))
        yield Scene(client, client.submit(operation="cause.fails", items=["x"]))


@contextmanager
def deaf_worker(site: Site) -> Iterator[Scene]:
    """A worker whose own broker goes away."""
    environment = site.environment()
    with client_of(environment) as client, ExitStack() as stack:
        with embedded.server() as broker:
            stack.enter_context(site.worker({**environment, "RLM_BROKER_URL": broker.url}))
            wait_until(lambda: any(host.queues for host in client.status().hosts))
        yield Scene(client, client.submit(operation="cause.fails", items=["x"]))


@contextmanager
def wrong_queue(site: Site) -> Iterator[Scene]:
    environment = site.environment()
    low = f"{environment['RLM_NAMESPACE']}.low"
    with client_of(environment) as client, site.worker(environment, "-Q", low):
        wait_until(lambda: low in client.pressure.consumers())
        yield Scene(client, client.submit(operation="cause.fails", items=["x"]))


@contextmanager
def no_operations(site: Site) -> Iterator[Scene]:
    environment = site.environment()
    with client_of(environment) as client:
        job = client.submit(operation="cause.fails", items=["x"])  # refused when the worker lives
        with site.worker({**environment, "RLM_OPERATIONS": ""}):
            yield Scene(client, job)


@contextmanager
def other_settings(site: Site) -> Iterator[Scene]:
    environment = site.environment()
    other = {**environment, "RLM_NODE__TARGET_MS": "250"}
    with (
        client_of(environment) as client,
        site.worker(environment),
        site.worker(other, "-n", "other@%h"),
    ):
        yield Scene(client)


@contextmanager
def other_broker(site: Site) -> Iterator[Scene]:
    environment = site.environment()
    elsewhere = {**environment, "RLM_BROKER_URL": site.server.url.replace("/0", "/1")}
    with client_of(environment) as client, site.worker(elsewhere):
        wait_until(lambda: any(host.queues for host in client.status().hosts))
        yield Scene(client, client.submit(operation="cause.fails", items=["x"]))


@contextmanager
def broker_away(site: Site) -> Iterator[Scene]:
    with busy_slots(site) as scene:
        assert scene.job is not None
        away = f"redis://127.0.0.1:{embedded.free_port()}/0"
        with client_of(site.environment("causes", RLM_BROKER_URL=away)) as client:
            yield Scene(client, client.job(scene.job.id))


@contextmanager
def without_settings(site: Site) -> Iterator[Scene]:
    """A client without the endpoints, limits and operations of the worker."""
    endpoint = {"name": "main", "base_url": "http://127.0.0.1:9/v1", "key_env": "MAIN_KEY"}
    models = {
        "RLM_LLM__ENDPOINTS": json.dumps([endpoint]),
        "RLM_LLM__TOKENS": "10000000",
        "MAIN_KEY": "any",
    }
    environment = site.environment()
    without = {**environment, "RLM_OPERATIONS": ""}
    with client_of(without) as client, site.worker({**environment, **models}):
        yield Scene(client, environment=without)


# --- jobs of the shared worker ----------------------------------------------------------------


def submitted(ended: bool = False, **request: Any) -> Injection:
    """Return the injection of a job on the shared worker; "hold" stands for a file that exists."""

    @contextmanager
    def inject(site: Site) -> Iterator[Scene]:
        client, hold = site.shared, site.hold()
        items = [hold if item == "hold" else item for item in request["items"]]
        job = client.submit(**{**request, "items": items})
        try:
            if ended:
                job.wait(timeout=30)
            yield Scene(client, job)
        finally:
            Path(hold).unlink()
            job.cancel()
            job.wait(timeout=30)

    return inject


@contextmanager
def busy_slots(site: Site) -> Iterator[Scene]:
    two = {"type": "parallel", "chunk_size": 1, "priority": "high"}
    with submitted(operation="cause.held", items=["hold"] * 2, **two)(site) as holding:
        assert holding.job is not None
        wait_until(lambda: holding.job.progress().running == 2)
        with submitted(operation="cause.fails", items=["x"])(site) as scene:
            yield scene


@contextmanager
def stopping(site: Site) -> Iterator[Scene]:
    with submitted(operation="cause.held", items=["hold"])(site) as scene:
        assert scene.job is not None
        wait_until(lambda: scene.job.progress().running == 1)
        scene.job.cancel()
        yield scene


@contextmanager
def cancelled(site: Site) -> Iterator[Scene]:
    with client_of(site.environment()) as client:
        job = client.submit(operation="cause.fails", items=["x"])
        job.cancel()
        yield Scene(client, job)


@contextmanager
def delayed(site: Site) -> Iterator[Scene]:
    environment = site.environment("causes", RLM_PRESSURE__ENABLED="1")
    with client_of(environment) as client:
        client.pressure.force("high")
        job = client.submit(operation="cause.fails", items=["x"], priority="low", overload="delay")
        client.pressure.release()
        yield Scene(client, job)
        job.cancel()


def expired(**options: Any) -> Injection:
    """Return the injection of a job that no worker begins in time."""

    @contextmanager
    def inject(site: Site) -> Iterator[Scene]:
        with client_of(site.environment()) as client:
            job = client.submit(operation="cause.fails", items=["x"], **options)
            job.wait(timeout=20)
            yield Scene(client, job)

    return inject


# --- pressure ---------------------------------------------------------------------------------


@contextmanager
def pressure_off(site: Site) -> Iterator[Scene]:
    client = site.shared
    client.pressure.force("high")
    yield Scene(client)
    client.pressure.release()


@contextmanager
def too_little_memory(site: Site) -> Iterator[Scene]:
    environment = site.environment(RLM_PRESSURE__ENABLED="1")
    with client_of(environment) as client, site.worker(environment):
        client.pressure.force("normal")
        yield Scene(client, client.submit(operation="cause.large", items=[1], priority="critical"))


@contextmanager
def pressure_unknown(site: Site) -> Iterator[Scene]:
    with client_of(site.environment(RLM_PRESSURE__ENABLED="1")) as client:
        yield Scene(client)


# --- Redis ------------------------------------------------------------------------------------


def refusing(state: str) -> Injection:
    """Return the injection of a server that refuses; its job waits for a worker."""

    @contextmanager
    def inject(site: Site) -> Iterator[Scene]:
        folder = site.folder / f"server-{state}"
        folder.mkdir()
        server = embedded.Server(folder)
        server.start()
        try:
            url = server.url.replace("//", "//:wrong@")
            with client_of(environment_of(url, "refused", **CALM)) as client:
                job = client.submit(operation="cause.fails", items=["x"])
                with getattr(Refusing(server, folder), state)():
                    yield Scene(client, job)
        finally:
            server.stop(kill=True)

    return inject


@contextmanager
def slow_redis(site: Site) -> Iterator[Scene]:
    proxy = Proxy(site.server.port, delay_s=0.06)
    try:
        environment = environment_of(f"redis://127.0.0.1:{proxy.port}/0", "slow", **CALM)
        with client_of(environment) as client:
            yield Scene(client)
    finally:
        proxy.close()


# --- the table --------------------------------------------------------------------------------

NOBODY = r"Nobody works on it: "
CAUSES: dict[str, tuple[Injection, dict[str, str]]] = {
    "no worker": (
        no_worker,
        {
            "explain": NOBODY + r"no worker reports\. Type: celery -A \S+ worker; if one runs",
            "doctor": r"fault workers: no worker reports.* Type: celery -A \S+ worker",
            "page": r"Nobody works on it: no worker reports",
            "progress": r"running 0, eta None, idle True",
        },
    ),
    "a worker that was killed": (
        lost_worker,
        {
            "explain": r"It stands still, with 1 node left behind.*"
            + NOBODY
            + r"worker \S+ was last heard \d+ s ago, and no other worker consumes queue \S+\. "
            r"Type: celery -A \S+ worker",
            "doctor": r"so no job runs; worker \S+ was last heard \d+ m?s ago\. Type: celery -A",
            "progress": r"running 0, eta None, idle True",
            "jobs page": r"running, idle \d+ s",
            "page": r"It stands still.*was last heard",
        },
    ),
    "a worker that was stopped": (
        stopped_worker,
        {
            "explain": NOBODY + r"worker \S+ was stopped [\d.]+ m?s ago",
            "doctor": r"so no job runs; worker \S+ was stopped",
        },
    ),
    "a worker that ends": (
        draining_worker,
        {"explain": NOBODY + r"worker \S+ drains, and takes no more work"},
    ),
    "a worker that an operator drained": (
        drained_worker,
        {
            "explain": NOBODY + r"worker \S+ drains, and takes no more work\. If nobody stops it, "
            r"type: celery -A \S+ control rlm_resume",
            "doctor": r"warning workers: worker \S+ drains.*"
            r"fault queues: messages wait .*\. Type: celery -A \S+ control rlm_resume",
        },
    ),
    "a worker that lost its broker": (
        deaf_worker,
        {
            "explain": NOBODY + r"worker \S+ has consumed no queue for [\d.]+ s: the connection to "
            r"the broker \(redis://127\.0\.0\.1:\d+/0\) may be lost",
            "doctor": r"fault workers: worker \S+ has consumed no queue for .* "
            r"inspect active_queues",
        },
    ),
    "a worker of another queue": (
        wrong_queue,
        {
            "explain": NOBODY + r"no worker consumes queue (\w+)\.normal; worker \S+ consumes "
            r"\1\.low\. Type: celery -A \S+ worker -Q \1\.normal",
            "doctor": r"fault queues: messages wait that no worker consumes: 1 in \w+\.normal",
        },
    ),
    "a worker without the operation": (
        no_operations,
        {
            "explain": r"(parked|worker)\. No worker of queue \S+ knows operation "
            r"'cause\.fails': set RLM_OPERATIONS "
            r"of worker \S+ to tests\.integration\.cause_ops, and restart",
            "doctor": r"fault operations: no worker knows .* Set RLM_OPERATIONS="
            r"\S*tests\.integration\.cause_ops",
        },
    ),
    "an older version of the operation": (
        submitted(operation="cause.newer", items=[1]),
        {
            "explain": r"It needs version 2 of operation 'cause\.newer', and the workers of queue "
            r"\S+ have version 1",
            "doctor": r"fault operations: cause\.newer has version 2 here, and 1 on \S+\.",
        },
    ),
    "settings that differ between workers": (
        other_settings,
        {"doctor": r"warning settings: RLM_NODE__TARGET_MS differs between workers: \S+ and \S+"},
    ),
    "another broker": (
        other_broker,
        {"explain": r"1 message waits at redis://\S+/0, and worker \S+ consumes redis://\S+/1: "},
    ),
    "a broker that is away": (
        broker_away,
        {
            "explain": r"The broker does not answer, so no message reaches a worker",
            "doctor": r"fault broker: the broker at \S+ does not answer",
        },
    ),
    "slots that are all busy": (
        busy_slots,
        {
            "explain": r"All 2 slots of queue causes\.normal are busy \(cause\.held on 2\), and "
            r"\d+ messages? wait",
            "progress": r"running 0, eta None",
        },
    ),
    "a client without the worker's settings": (
        without_settings,
        {
            "limits": r"llm:MAIN_KEY.*tokens.*limit=10000000",
            "endpoints": r"name='main'",
            "doctor command": r"WARNING +operations: workers know .* cannot submit them",
        },
    ),
    "a node at work": (
        submitted(operation="cause.held", items=["hold"]),
        {
            "explain": r"It runs on 1 slot, with 0 nodes queued and 0 parked\.$",
            "progress": r"running 1",
        },
    ),
    "an open breaker": (
        submitted(operation="cause.broken", items=[0, 1], type="sequential"),
        {
            "explain": r"parked \(breaker sepa: its circuit is open\)\. "
            r"Type: celery -A \S+ rlm breakers$",
            "operations": r"cause\.broken open",
            "doctor": r"warning breakers: breakers refuse calls: sepa \(open\).* rlm breakers",
        },
    ),
    "a rate limit": (
        submitted(operation="cause.limited", items=[1, 2]),
        {"explain": r"It waits: 1 node is parked \(rate limit cause\.limited: "},
    ),
    "a bulkhead": (
        submitted(operation="cause.crowded", items=["hold"] * 2, type="parallel", chunk_size=1),
        {"explain": r"It runs on 1 slot, .* 1 parked \(bulkhead cause\.crowded: "},
    ),
    "a pause that the provider asked for": (
        submitted(operation="cause.paused", items=[1]),
        {
            "explain": r"rate limit cause\.paused: its provider asked for a pause until \d\d:\d\d",
            "doctor": r"warning limits: no call of cause\.paused is made for \S+ \w+: its provider "
            r"asked for it\. To end it: celery -A \S+ rlm limits release cause\.paused",
        },
    ),
    "a retry that is due later": (
        submitted(operation="cause.flaky", items=[1]),
        {"explain": r"It waits: 1 node is parked \(.*TimeoutError"},
    ),
    "too little memory": (
        too_little_memory,
        {"explain": r"cause\.large starts with 1e\+09 MB free"},
    ),
    "a round at work": (
        submitted(operation="cause.rounds", items=["hold"]),
        {"explain": r"All of its items are done, failed or skipped; its round 1 is at work: job"},
    ),
    "a merge at work": (
        submitted(operation="cause.merged", items=["hold"] * 2, type="parallel", chunk_size=1),
        {"explain": r"All of its items are done, failed or skipped; the answer is being merged"},
    ),
    "a job that is delayed": (
        delayed,
        {"explain": r"It has waited \S+ \w+ to be started: .*low jobs are accepted below high"},
    ),
    "a job that is stopping": (
        stopping,
        {
            "explain": r"It is stopping because it was cancelled \S+ m?s ago \(\S+ UTC\) by "
            r"\S+@\S+; 1 node is still in a slice"
        },
    ),
    "a cancelled job": (
        cancelled,
        {"explain": r"^It was cancelled \S+ m?s ago \(\S+ UTC\) by \S+@\S+: 0 of 1 items"},
    ),
    "a failed item": (
        submitted(ended=True, operation="cause.fails", items=["x"]),
        {
            "explain": r"It failed because an item failed: .* First failure: item 0: ValueError: "
            r"no date: x\.$",
            "page": r"First failure: item 0: ValueError: \(\d+ characters\)\.",
        },
    ),
    "a failed merge": (
        submitted(ended=True, operation="cause.unmerged", items=[1]),
        {"explain": r"It failed because ZeroDivisionError"},
    ),
    "an item that kills its process": (
        submitted(ended=True, operation="cause.dies", items=[1]),
        {
            "explain": r"It failed because an item failed",
            "doctor": r"warning quarantine: items that do not run again: 1",
        },
    ),
    "a timeout in the queue": (
        expired(queue_timeout=0.5),
        {"explain": r"It expired .*because no worker began it within its queue_timeout of 0\.5 s"},
    ),
    "a timeout": (expired(timeout=0.5), {"explain": r"It expired .*because its timeout passed"}),
    "pressure that is off": (
        pressure_off,
        {
            "pressure": r"^Pressure is switched off \(RLM_PRESSURE__ENABLED=0\)\. "
            r"The drill at high has no effect\.$",
            "pressure page": r"'value': 'off'",
        },
    ),
    "pressure without a worker": (
        pressure_unknown,
        {
            "pressure": r"^The pressure is not known: no worker reports\. Type: celery -A \S+",
            "pressure page": r"'Level', 'value': 'not known'.*'CPU', 'value': 'not known'",
        },
    ),
    "a full Redis": (
        refusing("full"),
        {
            "explain": r"No job goes on: Redis at \S+ is full .* raise its maxmemory[^.]*\.$",
            "doctor": r"fault writes: Redis at \S+ is full",
        },
    ),
    "a replica": (
        refusing("replica"),
        {
            "explain": r"No job goes on: Redis at \S+ takes no writes",
            "doctor": r"fault redis: .* is a replica: it takes no writes",
        },
    ),
    "a Redis that is away": (
        refusing("away"),
        {
            "explain": r"StoreUnavailable: Redis at \S+ does not answer .*start it, or set",
            "doctor": r"fault redis: Redis at \S+ does not answer",
        },
    ),
    "a wrong password": (
        refusing("password"),
        {
            "explain": r"StoreUnauthorised: Redis at \S+ refuses the user name or the password",
            "doctor": r"fault redis: Redis at \S+ refuses the user name or the password.*Correct",
        },
    ),
    "a slow Redis": (
        slow_redis,
        {"doctor": r"fault latency: Redis answers within \d+ ms; breakers wait 100 ms for it"},
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_has_the_right_sentence_in_each_place(site: Site, cause: str) -> None:
    inject, told = CAUSES[cause]
    with inject(site) as scene:
        for place, pattern in told.items():
            texts = [""]

            def right(place: str = place, pattern: str = pattern, texts: list[str] = texts) -> bool:
                texts[0] = scene.text(place)
                return bool(re.search(pattern, texts[0], re.DOTALL))

            with contextlib.suppress(AssertionError):
                wait_until(right, within_s=10)
            assert re.search(pattern, texts[0], re.DOTALL), f"{place}: {texts[0]}"
            check_commands(texts[0])


def check_commands(text: str) -> None:
    """Assert that each command that a text advises exists, with its options."""
    for found in re.findall(r"celery -A \S+((?: [\w@./:=-]*[\w@/=-])+)", text):
        name, *words = found.split()
        if name == "rlm":
            _resolve(rlm, words)
        elif name in ("inspect", "control"):
            assert words[0] in Panel.data, found
        else:
            assert name in ("worker", "beat"), found
            assert not words or words[0] == "-Q", found


def _resolve(group: click.Group, words: list[str]) -> None:
    """Parse a command of a group.  Raises UsageError for a wrong one."""
    with click.Context(group) as ctx:
        _, command, rest = group.resolve_command(ctx, words)
        assert command is not None
        if isinstance(command, click.Group) and rest:
            _resolve(command, rest)
        else:
            command.make_context(command.name, rest, parent=ctx)
