"""Jobs are found again by filters and by the beginning of an id, also in a long history."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis.connection

from rlm_tasks import Client, InvalidRequest, JobNotFound, Status, StoreUnavailable
from rlm_tasks.requests import JobRequest
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of

HISTORY = 5_000
HOUR_MS = 3_600_000


class Trips:
    """The number of round trips to Redis of a block."""

    count = 0


@contextmanager
def round_trips(patch: pytest.MonkeyPatch) -> Iterator[Trips]:
    """Count the commands and pipelines that are sent meanwhile."""
    trips = Trips()
    send: Any = redis.connection.AbstractConnection.send_packed_command

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        trips.count += 1
        return send(self, *args, **options)

    with patch.context() as patched:
        patched.setattr(redis.connection.AbstractConnection, "send_packed_command", counted)
        yield trips


def opened(client: Client, number: int, operation: str) -> list[str]:
    """Open many jobs in the ledger, without messages."""
    stored = [
        client._submission.store_items(
            JobRequest.parse({"operation": operation, "items": range(3)})
        )
        for _ in range(number)
    ]
    client.ledger.open(stored, 3600)
    return [spec.job for spec, _ in stored]


def aged(client: Client, jobs: list[str], hours: float) -> None:
    """Let jobs be older than they are."""
    at_ms = client.ledger.clock.now_ms() - hours * HOUR_MS
    client.store.client.zadd(client.session.keys.jobs, dict.fromkeys(jobs, at_ms))


@pytest.fixture(scope="module")
def history(server: embedded.Server) -> Iterator[tuple[Client, dict[str, list[str]]]]:
    """A client with 5,000 jobs: 4,990 old ones, then some of each kind."""
    with client_of(environment_of(server.url, "history")) as client:
        jobs = {"old": opened(client, HISTORY - 10, "sum")}
        aged(client, jobs["old"], 30)
        jobs["echo"] = opened(client, 4, "echo")
        aged(client, jobs["echo"], 2)
        jobs["new"] = opened(client, 6, "sum")
        jobs["cancelled"] = [*jobs["old"][:2], *jobs["echo"][:1], *jobs["new"][:1]]
        for job in jobs["cancelled"]:
            client.job(job).cancel()
        yield client, jobs


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"operation": "echo"}, ["echo"]),
        ({"status": "cancelled"}, ["cancelled"]),
        ({"status": Status.CANCELLED, "operation": "echo"}, ["echo", "cancelled"]),
        ({"status": ["cancelled", "failed"], "since": 3 * 3600}, ["recent", "cancelled"]),
        ({"since": timedelta(minutes=30)}, ["new"]),
        ({"since": 3 * 3600.0}, ["recent"]),
        ({"since": datetime.now(UTC) - timedelta(hours=3)}, ["recent"]),
        ({"since": datetime.now() - timedelta(hours=3)}, ["recent"]),  # local time
        ({"operation": "no such operation"}, []),
        ({"since": datetime.min, "operation": "echo"}, ["echo"]),
        ({"since": timedelta.max, "operation": "echo"}, ["echo"]),
        ({"since": datetime.max}, []),
    ],
)
def test_each_filter_that_is_given_must_match(
    history: tuple[Client, dict[str, list[str]]], filters: dict[str, Any], expected: list[str]
) -> None:
    client, kinds = history
    sets = {**kinds, "recent": [*kinds["echo"], *kinds["new"]]}
    wanted = set.intersection(*(set(sets[each]) for each in expected)) if expected else set()

    assert {job.id for job in client.jobs(**filters)} == wanted
    assert {spec.job for spec, _ in client.listed(**filters)} == wanted


def test_the_newest_matches_come_first_and_the_limit_counts_them(
    history: tuple[Client, dict[str, list[str]]],
) -> None:
    client, kinds = history
    [newest, second] = client.jobs(2, status="cancelled")

    assert (newest.id, second.id) == (kinds["new"][0], kinds["echo"][0])
    assert client.jobs(0) == []
    assert len(client.jobs(HISTORY + 100)) == HISTORY


@pytest.mark.parametrize(
    ("most", "filters"),
    [
        (2, {}),
        (12, {"status": "failed"}),
        (12, {"operation": "echo"}),
        (12, {"status": "cancelled", "operation": "sum"}),
        (3, {"since": 3 * 3600}),
        (10, {"limit": HISTORY, "since": 3 * 3600, "status": "pending"}),
        (22, {"limit": HISTORY}),
    ],
)
def test_a_list_takes_a_bounded_number_of_round_trips(
    history: tuple[Client, dict[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    filters: dict[str, Any],
) -> None:
    client, _ = history
    client.ledger.clock.now_ms()  # read once a minute

    with round_trips(monkeypatch) as trips:
        found = client.jobs(**filters)
    with round_trips(monkeypatch) as more:
        listed = client.listed(**filters)

    assert len(listed) == len(found)
    assert trips.count <= most
    assert more.count - trips.count <= -(-len(found) // 500)


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"status": "canceled"}, "status='canceled': is no status; there are pending, running"),
        ({"status": "canceled"}, "did you mean 'cancelled'?"),
        ({"status": ["failed", "FAILD"]}, "did you mean 'failed'?"),
        ({"status": 3}, "status=3: is no status"),
        ({"status": []}, "status=[]: is empty"),
        ({"operation": 3}, "operation=3: must be the name of an operation"),
        ({"operation": ""}, "operation='': must be the name of an operation"),
        ({"since": "1h"}, "since='1h': must be seconds, a timedelta or a datetime"),
        ({"since": datetime.now(UTC).date()}, "must be seconds, a timedelta or a datetime"),
        ({"since": True}, "must be seconds, a timedelta or a datetime"),
        ({"since": -1}, "since=-1: must be an age of 0 s or more"),
        ({"since": float("nan")}, "must be an age of 0 s or more"),
        ({"since": timedelta(hours=-1)}, "must be an age of 0 s or more"),
        ({"since": 1_790_000_000.5}, "for a time pass datetime.fromtimestamp(...)"),
        ({"limit": -1}, "limit=-1: must be a number of jobs"),
        ({"limit": "5"}, "limit='5': must be a number of jobs"),
    ],
)
def test_a_wrong_filter_is_refused_with_its_name_and_value(
    history: tuple[Client, dict[str, list[str]]], filters: dict[str, Any], words: str
) -> None:
    client, _ = history
    for method in (client.jobs, client.listed):
        with pytest.raises(InvalidRequest) as refused:
            method(**filters)
        assert words in str(refused.value)


# --- short ids --------------------------------------------------------------------------------


def test_the_beginning_of_an_id_finds_the_job(
    history: tuple[Client, dict[str, list[str]]],
) -> None:
    client, kinds = history
    [job] = opened(client, 1, "echo")

    for short in (
        job[:8],
        job[:13],
        job[:35],
        job[:8].upper(),
        f" {job[:8]}…",
        job,
        f"{job.upper()} ",
    ):
        assert client.job(short).id == job
    assert client.job(kinds["old"][7][:20]).id == kinds["old"][7]


def test_four_characters_are_enough_where_no_other_id_begins_so(
    client_without_worker: Client,
) -> None:
    [job] = opened(client_without_worker, 1, "sum")

    assert client_without_worker.job(job[:4]).id == job
    for unknown in (
        job[:3],
        "",
        "nothing",
        "*",
        "????????",
        job + "0",
        "0000" + job[4:8],
        "\udcff",
        "\0",
    ):
        with pytest.raises(JobNotFound):
            client_without_worker.job(unknown)


@pytest.mark.parametrize("no_id", [7, None, uuid.uuid4(), ["a"], b"4ac56bc0"])
def test_an_id_that_is_no_text_is_refused(client_without_worker: Client, no_id: Any) -> None:
    with pytest.raises(InvalidRequest, match="must be the id of a job, a text"):
        client_without_worker.job(no_id)


def test_an_ambiguous_beginning_lists_the_jobs(
    client_without_worker: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, ids = client_without_worker, [f"abcd{n}" + str(uuid.uuid4())[5:] for n in range(3)]
    ids.append(ids[2][:12] + ids[0][12:])
    waiting = iter(ids)
    monkeypatch.setattr(uuid, "uuid4", lambda: next(waiting))
    for operation in ("sum", "echo", "echo", "echo"):
        opened(client, 1, operation)
    aged(client, ids[:1], 26)
    client.store.client.hincrby(client.session.keys.of(ids[0]).job, "opened_ms", -26 * HOUR_MS)

    with pytest.raises(InvalidRequest) as refused:
        client.job("abcd")
    text = str(refused.value)
    assert text.startswith("job='abcd': 4 jobs have ids that begin so: ")
    assert "(sum, 26 h ago); give more characters" in text
    assert text.count("(echo, ") == 3
    shown = [each.partition(" (")[0] for each in text.split("begin so: ")[1].split(", ")[::2]]
    assert {client.job(each).id for each in shown} == set(ids)

    assert client.job("abcd0").id == ids[0]
    for job in ids[1:]:
        client.store.client.delete(*client.session.keys.of(job))
    assert client.job("abcd").id == ids[0], "expired jobs do not count"


def test_a_full_id_takes_one_round_trip(
    client_without_worker: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    [job] = opened(client_without_worker, 1, "sum")

    with round_trips(monkeypatch) as trips:
        client_without_worker.job(job)

    assert trips.count == 1


@pytest.mark.parametrize(
    ("command", "call"),
    [
        ("hgetall", lambda client: client.listed()),
        ("hmget", lambda client: client.jobs(status="pending")),
        ("hmget", lambda client: client.at_work()),
    ],
)
def test_a_missing_right_is_an_error_and_no_empty_list(
    server: embedded.Server, command: str, call: Callable[[Client], Any]
) -> None:
    environment = environment_of(server.url, f"without-{command}")
    with client_of(environment) as client:
        opened(client, 1, "sum")
        rights = ["+@all", f"-{command}"]
        client.store.client.acl_setuser(
            "limited", enabled=True, reset=True, nopass=True, keys=["*"], commands=rights
        )
    url = server.url.replace("redis://", "redis://limited:any@")
    with (
        client_of({**environment, "RLM_REDIS_URL": url}) as limited,
        pytest.raises(StoreUnavailable) as refused,
    ):
        call(limited)
    assert command in str(refused.value).lower()
