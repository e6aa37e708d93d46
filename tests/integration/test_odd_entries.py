"""Entries of queues that are no messages: the worker keeps them aside, and goes on."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from rlm_tasks import Client
from rlm_tasks.diagnosis.doctor import examine
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

APP = "tests.integration.pools_app"
BODY = base64.b64encode(b"[[1], {}, {}]").decode()
INFO = {"exchange": "", "routing_key": "odd.normal"}
PROPERTIES = {"delivery_tag": "t", "delivery_info": INFO, "body_encoding": "base64"}
HEADERS = {"task": "rlm.node", "id": "1", "lang": "py"}
GOOD: dict[str, Any] = {
    "body": BODY,
    "content-encoding": "utf-8",
    "content-type": "application/json",
    "headers": HEADERS,
    "properties": PROPERTIES,
}


def but(**changed: Any) -> str:
    """Return an entry that is a message but for these parts."""
    return json.dumps({**GOOD, **changed})


NOT_READ = [
    *("", "x", "{", "[", "nul", "NaNs", "\x00", "'a'", "{'a': 1}", "a" * 100_000),
    *(b"\xff\xfe", b"\x80abc", b"\x93\x01\x02", b"\x1f\x8b\x08"),
    *("1", "-1.5", "true", "null", '"text"', "[]", "[1]", "{}", '{"a": 1}', "[" * 50_000),
    '{"__type__": "datetime", "__value__": 7}',
    *(json.dumps({**GOOD, "properties": each}) for each in (None, 1, [], {}, "x")),
    *(
        but(properties={**PROPERTIES, "delivery_tag": each})
        for each in (None, [], {"a": 1}, [["b"]])
    ),
    *(but(properties={**PROPERTIES, "delivery_info": each}) for each in (None, 3, [], {}, "x")),
    but(properties={**PROPERTIES, "body_encoding": "rot13"}),
    but(properties={**PROPERTIES, "delivery_info": {"exchange": [], "routing_key": {}}}),
    *(but(body=each) for each in ({"a": 1}, 7, [1], "not base64", True)),
    *(but(headers=each) for each in ([1], "x", 7)),
    *(but(**{"content-type": each}) for each in (1, {}, [])),
]
"""Entries that kombu or Celery cannot read at all; upstream most of them end the worker."""
NO_TASK = [
    but(headers={}),
    but(headers={**HEADERS, "task": ["rlm.node"]}),
    but(headers={**HEADERS, "task": {"a": 1}}),
    but(headers={**HEADERS, "task": None}),
    but(headers={"task": "no.such.task"}),
    but(headers={"task": "rlm.node"}),
    but(headers={**HEADERS, "task": "no.such.task"}),
    but(headers={**HEADERS, "id": "a" * 100_000}),
    but(headers={**HEADERS, "id": "\x1b[2J"}),
    but(headers={**HEADERS, "group": ["g"]}),
    but(headers={**HEADERS, "eta": 5}),
    but(headers={**HEADERS, "expires": {}}),
    but(headers={**HEADERS, "timelimit": 5}),
    but(headers={"task": "rlm.node", "id": []}),
    but(**{"content-type": "application/x-python-serialize", "headers": {}}),
]
"""Messages that are no task."""


def called(*args: Any, **header: Any) -> str:
    """Return the message of a node with these arguments and this header."""
    body = base64.b64encode(json.dumps([args, {}, {}]).encode()).decode()
    return but(body=body, headers={**HEADERS, "id": "odd-node", "rlm": header.get("rlm", {})})


ODD_NODES = [
    *(called(job, "root") for job in ("", 7, None, ["j"], {"a": 1}, "j" * 100_000, "\x1b[2Jj")),
    *(called("no-such-job", node) for node in ("", 7, None, "n" * 100_000, "\x1b]0;title\x07")),
    *(called("no-such-job", "root", rlm=header) for header in (7, "x", [1], {"schema": "x"})),
    called("no-such-job", "root", rlm={"operation": "o" * 100_000, "version": {}, "message": []}),
    *(called(), called("only-a-job"), called(1, 2, 3)),
]
"""Messages of nodes that no node of ours would send."""


@pytest.fixture(scope="module")
def odd(server: embedded.Server) -> dict[str, str]:
    """The environment of an app with a broker of its own."""
    return environment_of(server.url, "odd", POOLS_BROKER=server.url.removesuffix("/0") + "/10")


@pytest.fixture
def client(odd: dict[str, str], logs: Path) -> Iterator[Client]:
    """A client of a worker of that app; the worker writes to odd.log."""
    with (
        embedded.worker(odd, app=APP, log=logs / "odd.log", slots=1, options=["-n", "odd@%h"]),
        client_of(odd) as client,
    ):
        client.app.conf.broker_url = odd["POOLS_BROKER"]
        client.app.conf.broker_transport_options = {}
        yield client


def test_a_worker_outlives_entries_that_are_no_messages(
    client: Client, odd: dict[str, str], logs: Path
) -> None:
    broker = redis.Redis.from_url(odd["POOLS_BROKER"])
    for entry in ODD_NODES:
        broker.lpush("odd.normal", entry)
    for entry in (*NOT_READ, *NO_TASK):
        broker.lpush("odd.normal", entry)
        text = entry if isinstance(entry, bytes) else entry.encode()
        broker.lpush("celery", text.replace(b"odd.normal", b"celery"))
    assert broker.publish("/10.celery.pidbox", "{}"), "the worker listens"
    broker.publish("/10.celery.pidbox", but(body="not base64"))
    wait_until(lambda: not broker.llen("odd.normal") + broker.llen("celery"), within_s=15)

    assert client.execute(operation="sum", items=range(100), timeout=30).output == 4950
    wait_until(lambda: not broker.hlen("unacked"))
    log = (logs / "odd.log").read_text()
    assert "Unrecoverable" not in log
    assert log.count("of queue odd.normal is no message") == len(NOT_READ) + len(NO_TASK)
    assert log.count("of queue celery is no message") >= len(NOT_READ)
    assert log.count("pidbox is no message") == 2
    assert log.count("A message is dropped, because it names no id") == 12
    assert "\x1b" not in log
    assert max(map(len, log.splitlines())) < 2_000
    kept = client.store.client.xrange("odd:dead")
    assert len(kept) == 100, "the newest"
    assert all(len(fields[b"entry"]) <= 2_000 for _, fields in kept)
    assert 0 < client.store.client.ttl("odd:dead") <= 30 * 86_400
    [found] = [each for each in examine(client, client.app) if each.check == "dead letters"]
    assert found.state == "warning"
    assert str(2 * len(NOT_READ)) <= found.found.split()[0]
    broker.flushdb()
