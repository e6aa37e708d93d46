"""What a bug report holds, and that nothing of a user's data and secrets is in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from rlm_tasks import Client, JobNotFound, __version__
from rlm_tasks.diagnosis.bundle import collect
from rlm_tasks.testing import embedded
from scheduler.events import Event
from tests.integration.conftest import client_of, environment_of

SECRETS = {
    "the password of Redis": "p%40ss-word",
    "the webhook's secret": "hook-signing-key",
    "the key of the platform's own ports": "port-api-key",
    "the webhook's path": "T0KEN-in-a-path",
    "a password of the broker's options": "sentinel-pass",
    "the path of another webhook": "T0KEN-for-scaling",
    "a setting of the user's own": "own-setting",
    "an item": "item-confidential",
    "a parameter": "param-confidential",
    "a parameter's name": "param-name-confidential",
    "a description": "description-confidential",
    "an idempotency key": "key-confidential",
    "what a merge raised": "merge-confidential",
}
"""An item that fails is in its exception's message, too: see `spin_then_collect`."""


@pytest.fixture
def told(server: embedded.Server, worker_pid: int) -> Iterator[Client]:
    """A client of the session's worker that knows secrets."""
    with client_of(environment_of(server.url, "test")) as own:
        admin = own.ledger.store.client
        admin.acl_setuser(
            "reporter",
            enabled=True,
            passwords=["+p@ss-word"],
            categories=["+@all"],
            keys=["*"],
            channels=["*"],
        )
        environment = environment_of(
            server.url.replace("://", f"://reporter:{SECRETS['the password of Redis']}@"),
            "test",
            RLM_GUARD_TIMEOUT_S="5",
            RLM_ALERTS__WEBHOOK_URL="https://hooks.example.com/" + SECRETS["the webhook's path"],
            RLM_AUTOSCALE__WEBHOOK_URL="https://hooks.example.com/"
            + SECRETS["the path of another webhook"],
            RLM_ALERTS__WEBHOOK_SECRET=SECRETS["the webhook's secret"],
            RLM_API_KEY=SECRETS["the key of the platform's own ports"],
        )
        with client_of(environment) as client:
            conf = client.app.conf
            conf.own_credentials = {"name": SECRETS["a setting of the user's own"]}
            options = {
                **conf.broker_transport_options,
                "sentinel_kwargs": {"password": SECRETS["a password of the broker's options"]},
            }
            conf.broker_transport_options = options
            yield client
        admin.acl_deluser("reporter")


def failing(client: Client) -> str:
    """Run a job of secrets, of which one item fails, and return its id."""
    items = [{"ms": 0, "i": SECRETS["an item"], "fails": i == 1} for i in range(3)]
    job = client.submit(
        operation="spin_then_collect",
        items=items,
        params={SECRETS["a parameter's name"]: SECRETS["a parameter"]},
        description=SECRETS["a description"],
        continue_on_error=True,
        idempotency_key=SECRETS["an idempotency key"],
    )
    assert SECRETS["an item"] in job.result(timeout=60).failed[0].message
    return job.id


def raising(client: Client) -> str:
    """Open a job where no worker is, end it of an exception as a merge's does, and return its
    id.
    """
    job = client.submit(operation="echo", items=[{"own": SECRETS["an item"]}])
    error = {
        "index": -1,
        "type": "KeyError",
        "message": SECRETS["what a merge raised"],
        "traceback": SECRETS["an item"],
    }
    client.ledger.stop(job.id, "failed", detail="its merge raised", error=error, force=True)
    return job.id


def test_nothing_secret_and_nothing_of_a_users_data_is_in_it(
    told: Client, lonely_client: Client
) -> None:
    job, ended = failing(told), raising(lonely_client)
    quoted = f"could not reach {told.app.conf.broker_url}, nor {told.settings.alerts.webhook_url}, by {told.settings.api_key.get_secret_value()}"
    told.events.emit(Event("service.lost", quoted))

    document = collect(told, told.app, job)

    text = json.dumps(document)
    assert {what for what, secret in SECRETS.items() if secret in text} == set()
    assert "p@ss-word" not in text
    text = json.dumps(collect(lonely_client, lonely_client.app, ended))
    assert {what for what, secret in SECRETS.items() if secret in text} == set()


def test_what_helps_to_find_a_fault_is_in_it(told: Client) -> None:
    job = failing(told)

    document = collect(told, told.app, job)

    assert document["versions"]["rlm_tasks"] == __version__
    assert {"celery", "kombu", "redis", "pydantic"} <= set(document["versions"]["packages"])
    assert document["settings"]["namespace"] == "test"
    assert document["celery"]["worker_prefetch_multiplier"] == 1
    assert document["celery"]["own_credentials"] == "(dict)"
    assert document["celery"]["beat_schedule"] == ["rlm.monitor"]
    assert {"redis", "workers", "queues"} <= {each["check"] for each in document["findings"]}
    assert document["status"]["hosts"][0]["version"] == __version__
    assert set(document["queues"]) == {
        f"test.{each}" for each in ("critical", "high", "normal", "low")
    }
    for name in ("breakers", "limits", "alerts", "events"):
        assert "unknown" not in document[name], name
    told_of = {each["id"]: each for each in document["jobs"]}[job]
    assert (told_of["state"], told_of["n"], told_of["done"], told_of["failed"]) == (
        "succeeded",
        3,
        2,
        1,
    )
    assert told_of["explain"] == "It succeeded: 2 of 3 items done, 1 failed, 0 skipped."


def test_one_job_is_told_in_full_by_its_id(told: Client) -> None:
    document = collect(told, told.app, failing(told))["job"]

    assert document["failures"]["kinds"] == [
        {"type": "ValueError", "code": "OPERATION_FAILED", "items": 1}
    ]
    assert [each["index"] for each in document["failures"]["first"]] == [1]
    assert {"root", "merge"} <= {node["id"] for node in document["tree"]}
    assert document["events"][0]["event"] == "opened"
    assert document["request"]["operation"] == "spin_then_collect"
    assert document["request"]["params"] == ["str"]
    assert document["request"]["description_characters"] == len(SECRETS["a description"])
    assert document["quarantined"] == []


def test_a_job_that_raised_tells_the_type_and_not_the_words(lonely_client: Client) -> None:
    job = raising(lonely_client)

    [told] = collect(lonely_client, lonely_client.app)["jobs"]

    assert told["id"] == job
    assert told["explain"].startswith(
        f"It failed because KeyError: ({len(SECRETS['what a merge raised'])} characters)"
    )


def test_an_unknown_job_is_a_mistake(told: Client) -> None:
    with pytest.raises(JobNotFound):
        collect(told, told.app, "nothing")


def test_each_part_is_described(told: Client) -> None:
    described = set(re.findall(r"^    - ``(\w+)``", collect.__doc__ or "", re.MULTILINE))

    assert described == set(collect(told, told.app))


def test_while_redis_is_away_this_process_is_told() -> None:
    url = f"redis://:s3cret@127.0.0.1:{embedded.free_port()}/0"
    with client_of(environment_of(url, "away")) as client:
        document: dict[str, Any] = collect(client, client.app, "some-job")

    assert document["versions"]["rlm_tasks"] == __version__
    assert document["settings"]["namespace"] == "away"
    assert [each["check"] for each in document["findings"] if each["state"] == "fault"] == ["redis"]
    for name in ("status", "queues", "breakers", "alerts", "events", "jobs", "job"):
        assert set(document[name]) == {"unknown"}, name
    assert "s3cret" not in json.dumps(document)
