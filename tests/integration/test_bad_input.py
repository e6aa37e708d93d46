"""Bad input is refused before anything is enqueued; the error names field, value and remedy."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from resilience import Aimd, Rate, Store, TokenBucket
from rlm_tasks import (
    Adaptive,
    Client,
    InvalidRequest,
    Job,
    JobNotFound,
    NWay,
    OptimizationConfig,
    Options,
    ResultTimeout,
    RlmError,
    StoreUnavailable,
    UnknownOperation,
    install,
)
from rlm_tasks.client.platform_status import Pressure
from rlm_tasks.testing import embedded
from rlm_tasks.testing.embedded import free_port
from scheduler.alerts import Alerts
from scheduler.events import Events
from scheduler.usage import Usage
from tests.integration.conftest import ROOT, client_of, environment_of
from tests.support import wait_until

CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"operation": "word_cout", "items": []},
        "operation='word_cout': unknown; did you mean 'word_count'",
    ),
    (
        {"operation": "sum", "items": [], "strategy": "zigzag"},
        "strategy='zigzag': unknown; must be one of binary, n_way, adaptive",
    ),
    ({"operation": "sum", "items": [], "strategy": 7}, "strategy=7: must be Binary"),
    (
        {"operation": "sum", "items": [], "itms": 1},
        "itms=1: unknown field; did you mean 'items'?",
    ),
    (
        {"operation": "sum", "items": [], "options": {"chunkSize": 4}},
        "chunkSize=4: belongs to the request; write chunk_size=... beside options",
    ),
    (
        {"operation": "sum", "items": [], "timeout": 5, "options": {"timeout_ms": 5}},
        "timeout=5: is given twice, also in options as timeout_ms; keep one of the two",
    ),
    ({"operation": "sum"}, "items: is missing; JobRequest needs operation and items"),
    ({"operation": "sum", "items": [], "type": "circular"}, "type='circular'"),
    ({"operation": "sum", "items": [], "type": "parallel", "chunk_size": 0}, "chunk_size=0"),
    (
        {"operation": "sum", "items": [], "type": "recursive", "chunk_size": 10},
        "chunk_size=10: belongs to type='parallel'",
    ),
    (
        {"operation": "sum", "items": [], "type": "sequential", "strategy": NWay()},
        "a sequential job takes none",
    ),
    ({"operation": "sum", "items": [], "timeout_ms": 0}, "timeout_ms=0"),
    ({"operation": "sum", "items": [], "timeout": 0}, "timeout=0: must be above 0 s"),
    (
        {"operation": "sum", "items": [], "timeout": "soon"},
        "timeout='soon': must be seconds or a timedelta",
    ),
    (
        {"operation": "sum", "items": [], "priority": "urgent"},
        "priority='urgent': must be one of critical, high, normal, low",
    ),
    (
        {"operation": "sum", "items": [], "error_threshold": 0.1},
        "error_threshold=0.1: needs continue_on_error=True",
    ),
    (
        {"operation": "sum", "items": [], "continue_on_error": True, "error_threshold": 2},
        "error_threshold=2",
    ),
    (
        {"operation": "sum", "items": [], "early_termination_threshold": 0},
        "early_termination_threshold=0",
    ),
    (
        {"operation": "echo", "items": [], "validate_before_process": True},
        "operation 'echo' has no validate",
    ),
    ({"operation": "sum", "items": 7}, "items=7: must be an iterable"),
    ({"operation": "sum", "items": "text"}, "items='text': must be an iterable"),
    ({"operation": "echo", "items": [1, 2, {"x": object()}]}, r"items\[2\].x=.* cannot be stored"),
    ({"operation": "echo", "items": [*range(3000), object()]}, r"items\[3000\]="),
    ({"operation": "sum", "items": [], "max_depth": 0}, "max_depth=0"),
    (
        {"operation": "sum", "items": [], "description": "\udce9"},
        r"description='\\udce9': has a lone surrogate",
    ),
    (
        {"operation": "sum", "items": [], "emit_metrics": {"kind": "\udce9"}},
        "emit_metrics='kind': has a lone surrogate",
    ),
]


@pytest.mark.parametrize(
    ("fields", "message"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_input_is_refused_before_anything_is_enqueued(
    client_without_worker: Client, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        client_without_worker.submit(**fields)

    assert client_without_worker.jobs() == []
    assert not list(
        client_without_worker.ledger.store.client.scan_iter(
            f"{client_without_worker.settings.namespace}:*"
        )
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Adaptive(min_chunk_size=500, max_chunk_size=50),
            "min_chunk_size=500: must not exceed max_chunk_size=50",
        ),
        (lambda: Adaptive(min_chunk_size=-1), "min_chunk_size=-1"),
        (lambda: NWay(split_factor=1), "split_factor=1"),
        (lambda: Options(timeout=timedelta(0)), "timeout=datetime.timedelta.0.: must be above 0 s"),
        (lambda: NWay(splits=3), "splits=3: unknown field; NWay has split_factor"),
    ],
)
def test_contradictory_sizes_are_refused_at_construction(make: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make()


def test_an_error_of_a_generator_of_items_is_raised_as_it_is(
    client_without_worker: Client,
) -> None:
    def items() -> Iterator[int]:
        yield from range(5000)
        raise redis.ConnectionError("the shop's own Redis is away")

    with pytest.raises(redis.ConnectionError, match="the shop's own Redis is away"):
        client_without_worker.submit(operation="echo", items=items())

    assert client_without_worker.jobs() == []


def test_an_iterator_that_would_be_read_twice_is_refused(client_without_worker: Client) -> None:
    """A second reading finds nothing: the job would succeed without its items."""
    client, items = client_without_worker, (number for number in range(3))
    with pytest.raises(InvalidRequest, match="a retry would find an empty iterator; pass a list"):
        client.execute_with_retry({"operation": "echo", "items": items})
    with pytest.raises(InvalidRequest, match="has been read to its end already"):
        client.batch_submit([{"operation": "echo", "items": items}] * 2)
    with pytest.raises(InvalidRequest, match="has been read to its end already"):
        client.submit(operation="echo", items=items)

    assert client.jobs() == []


@pytest.mark.parametrize("policy", [True, "5", 0.5, [5]])
def test_a_policy_of_retries_is_refused_before_anything_runs(
    client_without_worker: Client, policy: Any
) -> None:
    with pytest.raises(InvalidRequest, match=r"retry=.*must be a RetryPolicy, a dict"):
        client_without_worker.execute_with_retry(policy=policy, operation="echo", items=[1])


def test_an_item_over_the_limit_is_named(server: Any) -> None:
    with client_of(environment_of(server.url, "limited", RLM_MAX_ITEM_BYTES="1000")) as client:
        with pytest.raises(InvalidRequest, match=r"items\[1\]=.*more than RLM_MAX_ITEM_BYTES=1000"):
            client.submit(operation="echo", items=["small", "x" * 2_000_000])
        assert client.jobs() == []


CALLS: list[tuple[Callable[[Client], Any], str]] = [
    (lambda c: c.job(3), "job=3: must be the id of a job, a text"),
    (lambda c: c.job("\ud800"), "job '.ud800' is unknown"),
    (
        lambda c: c.execute(operation="sum", items=[1], timeout="soon"),
        "timeout='soon': must be a n",
    ),
    (lambda c: c.execute(operation="sum", items=[1], timeout=math.nan), "timeout=nan: must be a n"),
    (
        lambda c: c.batch_execute([{"operation": "sum", "items": [1]}], timeout=[1]),
        "timeout=.1.: m",
    ),
    (lambda c: c.batch_submit(7), "requests=7: must be a list of requests"),
    (lambda c: c.at_work("all"), "limit='all': must be a whole number"),
    (lambda c: c.pressure.history(0), "limit=0: must be a whole number of at least 1"),
    (lambda c: c.pressure.force("hihg"), "level='hihg': is no pressure level; there are normal"),
    (lambda c: c.events.recent(-1), "limit=-1: must be a whole number of at least 0"),
    (lambda c: c.alerts.history(True), "limit=True: must be a whole number"),
    (lambda c: c.on(None, print), "name=None: must be the name of an event"),
    (lambda c: c.snapshots(["sum"]), "operation=.'sum'.: must be a text of 1 to 200 print"),
    (lambda c: c.release_limit(["llm"]), "name=.'llm'.: must be a text of 1 to 200 print"),
    (lambda c: c.create_circuit_breaker("a", 7), "breaker=7: must be a preset's name"),
    (lambda c: install("shop"), "app='shop': must be a Celery app"),
    (lambda c: install(c.app, {}), "settings={}: must be Settings"),
    (lambda c: Client("shop"), "app='shop': the platform is not installed in it"),
    (lambda c: Store.from_url(7), "url='int': must be a text"),
    (lambda c: Store.from_url("http://:secret@x"), "url='http://:...@x': must start with redis://"),
    (lambda c: Rate(1, burst="x"), "burst='x': must be a number above 0"),
    (lambda c: Aimd("x"), "start='x': must be a number above 0"),
    (
        lambda c: TokenBucket("a", c.store, requests=Rate(1)).hold("x"),
        "retry_after_s='x': must be a",
    ),
    (
        lambda c: TokenBucket("a", c.store, requests=Rate(1)).acquire(requests=10**400),
        "requests of .* a: 1.79769e.308 at once can never be granted",
    ),
    (lambda c: OptimizationConfig.import_config(7), "the configuration is not JSON"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_a_wrong_argument_of_any_call_is_named(
    client_without_worker: Client, call: Callable[[Client], Any], message: str
) -> None:
    with pytest.raises(RlmError, match=f"^{message}"):
        call(client_without_worker)

    assert client_without_worker.jobs() == []


def test_a_wrong_argument_of_a_job_is_named(server: embedded.Server) -> None:
    job = client_of(environment_of(server.url, "wrong")).submit(operation="sum", items=[1])
    calls: dict[str, Callable[[], Any]] = {
        "timeout='x'": lambda: job.wait("x"),  # type: ignore[arg-type]
        "timeout=nan": lambda: job.result(timeout=math.nan),
        "timeout=True": lambda: job.get(timeout=True),
        "interval_s='x'": lambda: next(job.watch("x")),  # type: ignore[arg-type]
        "limit='x'": lambda: job.tree(limit="x"),  # type: ignore[arg-type]
        "index=[1]": lambda: job.drop_quarantined([1]),  # type: ignore[arg-type]
    }

    for said, call in calls.items():
        with pytest.raises(InvalidRequest, match=f"^{re.escape(said)}: "):
            call()
    with pytest.raises(ResultTimeout):
        job.wait(timeout=-1)
    job.cancel()
    assert job.wait(timeout=math.inf) == "cancelled"


def test_an_unknown_operation_is_an_invalid_request() -> None:
    assert issubclass(UnknownOperation, InvalidRequest)
    assert issubclass(InvalidRequest, ValueError)


def test_an_unknown_job_is_named(client: Client) -> None:
    with pytest.raises(JobNotFound, match="no-such-job"):
        client.job("no-such-job")


def members(kind: type) -> dict[str, tuple[Any, str]]:
    """Return name -> member and docstring of each public call that takes no argument."""
    found = {}
    for name, member in inspect.getmembers(kind):
        plain = member.fget if isinstance(member, property) else member
        if name.startswith("_") or not callable(plain) or name in WAITING:
            continue
        required = [
            each
            for each in inspect.signature(plain).parameters.values()
            if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
        ]
        if len(required) == 1:  # self
            found[name] = member, inspect.getdoc(plain) or ""
    return found


WAITING = {"wait", "watch", "follow", "result", "get", "close"}
"""Calls that wait for Redis, and the end of a client."""


@pytest.mark.parametrize("kind", [Job, Client, Pressure, Events, Alerts, Usage])
def test_each_call_promises_the_errors_that_it_raises(kind: type, server: embedded.Server) -> None:
    away = client_of(environment_of(f"redis://127.0.0.1:{free_port()}/0", "away"))
    idle = client_of(environment_of(server.url, "idle"))
    made: dict[type, Callable[[Client], Any]] = {
        Job: lambda client: Job(client.session, "no-such-job"),
        Client: lambda client: client,
        Pressure: lambda client: client.pressure,
        Events: lambda client: client.events,
        Alerts: lambda client: client.alerts,
        Usage: lambda client: client.usage,
    }
    kept, calls = [], 0
    with away, idle:
        for client in (away, idle):
            for name, (member, text) in members(kind).items():
                calls += 1
                try:
                    value = getattr(made[kind](client), name)
                    answer = value if isinstance(member, property) else value()
                    list(answer) if isinstance(answer, Iterator) else None
                except RlmError as error:
                    promised = text.partition("Raise")[2]
                    if not any(each.__name__ in promised for each in type(error).__mro__):
                        kept.append(f"{name}: {type(error).__name__}")

    assert calls > 4
    assert kept == [], kept


def test_an_unreachable_redis_is_one_line_without_the_password() -> None:
    url = f"redis://user:topsecret@127.0.0.1:{free_port()}/0"
    with client_of(environment_of(url, "nobody")) as client:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"redis://user:\*\*\*@127.0.0.1") as caught:
            client.submit(operation="sum", items=range(3))

    assert time.monotonic() - began < 2
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize("arguments", [["jobs"], ["job", "x"], ["submit"]])
def test_the_command_line_reports_an_unreachable_redis_in_one_line(arguments: list[str]) -> None:
    url = f"redis://:topsecret@127.0.0.1:{free_port()}/0"
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "rlm_tasks", "rlm", *arguments],
        input='{"operation": "sum", "items": [1, 2]}',
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        cwd=ROOT,
        env={**environment_of(url, "nobody"), "PATH": ""},
    )

    assert done.returncode == 69
    assert done.stderr.startswith("Error: Redis at redis://:***@127.0.0.1")
    assert done.stderr.count("\n") == 1
    assert "topsecret" not in done.stderr + done.stdout


NOTEBOOK = """
from rlm_tasks import Client, UnknownOperation, operation

@operation("in_a_cell")
def in_a_cell(item):
    return item

try:
    in_a_cell.submit([1, 2, 3])
except UnknownOperation as error:
    print(error)
print(len(Client().jobs()))
"""


def test_an_operation_of_a_notebook_cell_is_refused_at_submit(
    server: embedded.Server, logs: Path
) -> None:
    environment = environment_of(server.url, "notebook")
    with (
        embedded.worker(environment, log=logs / "notebook.log", slots=1),
        client_of(environment) as client,
    ):
        wait_until(lambda: any(host.queues for host in client.status().hosts))
        done = subprocess.run(
            [sys.executable, "-c", NOTEBOOK],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    said, jobs = done.stdout.splitlines()
    assert said.startswith("operation='in_a_cell': no live worker of queue notebook.normal knows")
    assert "it is defined in __main__, which workers cannot import" in said
    assert jobs == "0", "nothing was enqueued"
