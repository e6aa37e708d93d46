"""The contents of a bundle for bug reports: it holds no user data and no secrets."""

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
    "the error of a merge": "merge-confidential",
}
"""Kind of secret -> secret.  The message of `spin_then_collect`'s error quotes its item, too."""


@pytest.fixture
def client_with_secrets(server: embedded.Server, worker_pid: int) -> Iterator[Client]:
    """A client of the session's worker with secrets in its settings."""
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
    """Run a job with secrets, one of whose items fails, and return its id."""
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
    """Submit a job without a worker, fail it as a merge's exception does, and return its id."""
    job = client.submit(operation="echo", items=[{"own": SECRETS["an item"]}])
    error = {
        "index": -1,
        "type": "KeyError",
        "message": SECRETS["the error of a merge"],
        "traceback": SECRETS["an item"],
    }
    client.ledger.stop(job.id, "failed", detail="its merge raised", error=error, force=True)
    return job.id


def test_a_bundle_holds_no_secrets_and_no_user_data(
    client_with_secrets: Client, client_without_worker: Client
) -> None:
    client, settings = client_with_secrets, client_with_secrets.settings
    job, ended = failing(client), raising(client_without_worker)
    quoted = (
        f"could not reach {client.app.conf.broker_url}, nor {settings.alerts.webhook_url},"
        f" by {settings.api_key.get_secret_value()}"
    )
    client.events.emit(Event("endpoint.ill", quoted))

    document = collect(client, client.app, job)

    text = json.dumps(document)
    assert {kind for kind, secret in SECRETS.items() if secret in text} == set()
    assert "p@ss-word" not in text
    text = json.dumps(collect(client_without_worker, client_without_worker.app, ended))
    assert {kind for kind, secret in SECRETS.items() if secret in text} == set()


def test_a_bundle_holds_versions_settings_findings_and_jobs(client_with_secrets: Client) -> None:
    job = failing(client_with_secrets)

    document = collect(client_with_secrets, client_with_secrets.app, job)

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
    entry = {each["id"]: each for each in document["jobs"]}[job]
    assert (entry["state"], entry["n"], entry["done"], entry["failed"]) == ("succeeded", 3, 2, 1)
    assert entry["explain"] == "It succeeded: 2 of 3 items done, 1 failed, 0 skipped."


def test_a_bundle_describes_one_job_in_full_by_id(client_with_secrets: Client) -> None:
    job = failing(client_with_secrets)

    document = collect(client_with_secrets, client_with_secrets.app, job)["job"]

    short = collect(client_with_secrets, client_with_secrets.app, job[:8])["job"]
    assert (short["id"], short["tree"]) == (job, document["tree"])
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


def test_a_failed_job_shows_the_error_type_but_not_its_message(
    client_without_worker: Client,
) -> None:
    job = raising(client_without_worker)

    [entry] = collect(client_without_worker, client_without_worker.app)["jobs"]

    assert entry["id"] == job
    assert entry["explain"].startswith(
        f"It failed because KeyError: ({len(SECRETS['the error of a merge'])} characters)"
    )


def test_an_unknown_job_raises_job_not_found(client_with_secrets: Client) -> None:
    with pytest.raises(JobNotFound):
        collect(client_with_secrets, client_with_secrets.app, "nothing")


def test_the_docstring_describes_each_part(client_with_secrets: Client) -> None:
    described = set(re.findall(r"^    - ``(\w+)``", collect.__doc__ or "", re.MULTILINE))

    assert described == set(collect(client_with_secrets, client_with_secrets.app))


def test_without_redis_a_bundle_still_describes_this_process() -> None:
    url = f"redis://:s3cret@127.0.0.1:{embedded.free_port()}/0"
    with client_of(environment_of(url, "away")) as client:
        document: dict[str, Any] = collect(client, client.app, "some-job")

    assert document["versions"]["rlm_tasks"] == __version__
    assert document["settings"]["namespace"] == "away"
    assert [each["check"] for each in document["findings"] if each["state"] == "fault"] == ["redis"]
    for name in ("status", "queues", "breakers", "alerts", "events", "jobs", "job"):
        assert set(document[name]) == {"unknown"}, name
    assert "s3cret" not in json.dumps(document)
