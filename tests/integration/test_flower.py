"""The platform's tabs in a real Flower: their contents, login and permissions, and the address."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlm_tasks import Client
from rlm_tasks.flower.pages import TABS
from rlm_tasks.settings.environment import own_name
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.integration.flowers import USER, Flower, flower
from tests.support import wait_until


@pytest.fixture(scope="module")
def flower_environment(server: embedded.Server) -> dict[str, str]:
    modules = "tests.integration.ops,tests.integration.guarded_ops"
    return environment_of(server.url, "shown", RLM_OPERATIONS=modules)


@pytest.fixture(scope="module")
def platform(flower_environment: dict[str, str], logs: Path) -> Iterator[Client]:
    with (
        embedded.worker(flower_environment, log=logs / "shown.log"),
        client_of(flower_environment) as own,
    ):
        yield own


@pytest.fixture(scope="module")
def plain(flower_environment: dict[str, str], logs: Path) -> Iterator[Flower]:
    """A Flower with default options, which needs no login."""
    with flower(flower_environment, logs / "flower-plain.log") as own:
        yield own


@pytest.fixture(scope="module")
def locked(flower_environment: dict[str, str], logs: Path) -> Iterator[Flower]:
    """A Flower behind a login, and under a prefix."""
    with flower(
        flower_environment, logs / "flower-locked.log", f"--basic_auth={USER}", prefix="/ops"
    ) as own:
        yield own


def texts(table: dict[str, Any]) -> list[list[str]]:
    return [
        [cell if isinstance(cell, str) else cell["text"] for cell in row] for row in table["rows"]
    ]


# --- contents ---------------------------------------------------------------------------------


def test_flowers_bar_has_our_tabs_and_pages_have_flowers_style(plain: Flower) -> None:
    for path in ("/workers", *(f"/rlm/{tab}" for tab in TABS)):
        status, page = plain.get(path)
        assert status == 200
        for tab, title in TABS.items():
            assert re.search(rf'href="/rlm/{tab}">{title}</a>', page)
        assert "css/flower.css" in page
    assert 'nav-link active" aria-current="page" href="/rlm/limits"' in plain.get("/rlm/limits")[1]


def test_a_job_is_shown_with_tree_failures_and_events(plain: Flower, platform: Client) -> None:
    job = platform.submit(
        operation="fail_odd", items=[2, 3, 4, 5], continue_on_error=True, description="half are odd"
    )
    job.wait(timeout=20)

    [row] = [row for row in texts(plain.data("/rlm/jobs")["tables"][0]) if row[1] == job.id[:8]]
    assert row[:4] == ["fail_odd", job.id[:8], "normal", "succeeded with failures"]
    assert row[4:7] == ["100%", "4", "2"]
    picture = plain.data(f"/rlm/job/{job.id}")
    assert (picture["heading"], picture["about"]) == (
        "half are odd",
        f"fail_odd · normal priority · {job.id}",
    )

    assert plain.data(f"/rlm/job/{job.id[:8]}")["about"] == picture["about"]

    tables = {table["title"].partition(":")[0]: table for table in picture["tables"]}
    assert picture["sentence"].startswith("It succeeded: 2 of 4 items done, 2 failed")
    assert {"root", "merge"} <= {row[0] for row in texts(tables["Tree"])}, "it may have split"
    assert texts(tables["Failures"]) == [["ValueError", "OPERATION_FAILED", "2", "1, 3"]]
    assert tables["Receipt"]["rows"] == []
    assert texts(tables["Events"])[-1][1:] == ["closed", "succeeded"]


def test_an_items_error_message_is_not_shown(plain: Flower, platform: Client) -> None:
    job = platform.submit(operation="fail_odd", items=[734_211], continue_on_error=True)
    job.wait(timeout=20)

    assert "734211" not in json.dumps(plain.data(f"/rlm/job/{job.id}")).replace(",", "")


def test_the_error_message_of_a_merge_is_not_shown(plain: Flower, platform: Client) -> None:
    job = platform.submit(operation="bad_merge", items=[1, 2])
    job.wait(timeout=20)

    assert "division by zero" in job.explain()
    page = plain.data(f"/rlm/job/{job.id}")
    assert page["sentence"].startswith("It failed because ZeroDivisionError: (16 characters)")
    assert "division by zero" not in json.dumps(page)


def test_every_tab_shows_the_state_of_the_platform(plain: Flower, platform: Client) -> None:
    platform.create_circuit_breaker("broken", failure_threshold=1).open()
    wait_until(lambda: len(platform.pressure.consumers()) == 4)

    pressure, breakers, limits, queues = (
        plain.data(f"/rlm/{tab}") for tab in ("pressure", "breakers", "limits", "queues")
    )

    assert pressure["sentence"] == "Pressure is switched off (RLM_PRESSURE__ENABLED=0)."
    assert pressure["cards"][0]["value"] == "off"
    assert pressure["chart"]["levels"] == ["normal", "elevated", "high", "critical", "emergency"]
    assert [row[3] for row in texts(pressure["tables"][0])] == ["0 of 2"]
    assert texts(breakers["tables"][0])[0][:2] == ["broken", "open"]
    assert ["metered", "requests", "0 of 20", "1 s"] in [
        row[:4] for row in texts(limits["tables"][0])
    ]
    assert {row[0] for row in texts(queues["tables"][0])} == {
        f"shown.{each}" for each in ("critical", "high", "normal", "low")
    }
    assert all("@" in row[5] for row in texts(queues["tables"][0]))


def test_running_and_parked_nodes_are_counted_by_queue(plain: Flower, platform: Client) -> None:
    runs = platform.submit(operation="nap", items=[100] * 100, type="sequential", priority="low")
    wait_until(lambda: runs.progress().done >= 1)

    counted = {row[0]: row[3:5] for row in texts(plain.data("/rlm/queues")["tables"][0])}

    assert counted["shown.low"] == ["0", "1"]
    runs.cancel()
    runs.wait(timeout=10)


def test_an_unknown_job_is_a_404_with_a_message(plain: Flower) -> None:
    status, text = plain.get("/rlm/job/nothing?json=1")

    assert status == 404
    assert "job nothing is unknown" in json.loads(text)["error"]
    assert plain.get("/rlm/nothing")[0] == 404


def test_flowers_metrics_include_the_cluster(plain: Flower, platform: Client) -> None:
    platform.create_circuit_breaker("measured", failure_threshold=1).open()
    runs = platform.submit(operation="nap", items=[100] * 200, type="sequential", priority="high")

    def has_metric(line: str) -> bool:
        return f"\n{line}\n" in plain.get("/metrics")[1]

    for line in (
        "rlm_up 1.0",
        "rlm_cluster_workers 1.0",
        'rlm_circuit_breaker_state{service="measured"} 2.0',
        'rlm_limit_fill{limit="requests",service="metered"} 0.0',
        'rlm_queue_messages{queue="shown.critical"} 0.0',
        'rlm_nodes_open{queue="shown.high",state="running"} 1.0',
        'rlm_jobs{state="running"} 1.0',
    ):
        # Flower measures the platform every five seconds.
        wait_until(lambda line=line: has_metric(line))  # type: ignore[misc]
    assert (
        "flower_worker_online" in plain.get("/metrics")[1]
        or "flower_events_total" in plain.get("/metrics")[1]
    )
    runs.cancel()
    runs.wait(timeout=10)


# --- login and permissions --------------------------------------------------------------------


def test_without_a_login_flower_is_local_and_refuses_actions(
    plain: Flower,
) -> None:
    listening = [
        each.laddr.ip
        for each in psutil.Process(plain.pid).net_connections()
        if each.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}

    assert plain.data("/rlm/jobs")["may_act"] is False
    assert "--basic_auth" in plain.data("/rlm/jobs")["hint"]
    assert plain.post("release")[0] == 401


def test_behind_a_login_every_page_needs_it(locked: Flower) -> None:
    for path in (*(f"/rlm/{tab}" for tab in TABS), "/rlm/job/nothing"):
        assert locked.get(path)[0] == 401
        assert locked.get(f"{path}?json=1")[0] == 401
    page = locked.get("/rlm/jobs", USER)[1]
    assert 'href="/ops/rlm/pressure"' in page
    script = re.search(r'src="(/ops/rlm/static/rlm.js)"', page)
    assert script is not None
    assert locked.get("/rlm/static/rlm.js")[1].startswith("/* Draws a page")


@pytest.mark.parametrize(
    ("user", "site", "status"),
    [("", "same-origin", 401), ("me:wrong", "same-origin", 401), (USER, "cross-site", 403)],
)
def test_an_action_without_permission_is_refused(
    locked: Flower, platform: Client, user: str, site: str, status: int
) -> None:
    assert locked.post("force", user, site=site, level="critical")[0] == status
    assert platform.status().forced == ""


def test_a_job_that_a_visitor_cancels_has_the_name_of_the_login(
    locked: Flower, platform: Client
) -> None:
    job = platform.submit(operation="nap", items=[50.0] * 1000)

    assert locked.post("cancel", USER, job=job.id, by="another")[0] == 200

    job.wait(timeout=20)
    assert f" by me in Flower of {own_name()}: " in job.explain()
    assert "secret-of-me" not in job.explain()


def test_a_logged_in_user_can_act(locked: Flower, platform: Client) -> None:
    job = platform.submit(operation="nap", items=[100] * 200)
    platform.create_circuit_breaker("to-close", failure_threshold=1).open()
    assert locked.data("/rlm/jobs", USER)["may_act"] is True

    assert locked.post("cancel", USER, job=job.id) == (200, {"done": "It is cancelled"})
    assert locked.post("reset", USER, breaker="to-close") == (
        200,
        {"done": "Breaker to-close is closed"},
    )
    assert locked.post("force", USER, level="high")[0] == 200
    assert platform.status().forced == "high"
    assert locked.post("release", USER) == (200, {"done": "The drill has ended"})

    assert job.wait(timeout=10) == "cancelled"
    wait_until(lambda: platform.breakers.status()["to-close"]["state"] == "closed")


@pytest.mark.parametrize(
    ("action", "about", "status", "text"),
    [
        ("cancel", {"job": "nothing"}, 404, "job nothing is unknown"),
        ("reset", {"breaker": "nobody"}, 400, "there is no such breaker"),
        ("force", {"level": "hihg"}, 400, "no pressure level"),
        ("fly", {}, 404, "There is no such action"),
    ],
)
def test_a_wrong_action_is_answered_with_a_message(
    locked: Flower, action: str, about: dict[str, str], status: int, text: str
) -> None:
    answered, answer = locked.post(action, USER, **about)

    assert (answered, text in answer["error"]) == (status, True), answer


def test_a_read_only_flower_shows_pages_and_refuses_actions(
    flower_environment: dict[str, str], logs: Path
) -> None:
    with flower(
        flower_environment, logs / "flower-readonly.log", f"--basic_auth={USER}", "--read_only"
    ) as own:
        assert own.data("/rlm/jobs", USER)["hint"] == "This Flower is read-only."
        assert own.post("release", USER)[0] == 403
