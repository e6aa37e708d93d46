"""Every command of the group ``rlm`` on a real server: its output, and its errors.

The commands run in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner, Result

from rlm_tasks import Client
from rlm_tasks.celery import configuration, install
from rlm_tasks.cli import rlm
from rlm_tasks.settings.document import import_config
from rlm_tasks.settings.model import Settings
from rlm_tasks.testing import embedded
from scheduler.events import Event, EventSeverity
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

WITHOUT_REDIS = "redis://127.0.0.1:1/0"


def run(client: Client, *arguments: str, stdin: str = "") -> Result:
    """Run a command as ``celery -A app rlm ...`` does, on the app of a client."""
    return CliRunner().invoke(
        rlm, arguments, obj=SimpleNamespace(app=client.app), input=stdin, catch_exceptions=False
    )


def run_json(client: Client, *arguments: str) -> Any:
    """Run a command with ``--json``; return its output, parsed."""
    done = run(client, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def idle(server: embedded.Server) -> Iterator[Client]:
    """A client of a platform without a worker."""
    modules = "tests.integration.ops,tests.integration.guarded_ops"
    with client_of(
        environment_of(server.url, "commands", pressed=True, RLM_OPERATIONS=modules)
    ) as own:
        yield own


# --- without a worker -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["status"], ["The pressure is not known", " worker", "Workers: none"]),
        (["jobs"], ["Jobs"]),
        (["pressure"], ["The pressure is not known", "Workers: none"]),
        (["pressure", "history"], ["Recent pressure: none"]),
        (["breakers"], ["fragile", "closed", "never"]),
        (["limits"], ["metered", "requests", "in 1 s", "narrow", "in flight"]),
        (["queues"], ["commands.critical", "NOBODY"]),
        (["operations"], ["Operations: none"]),
        (["alerts"], ["Alerts: none", "0 in all"]),
        (["quarantine", "list"], ["Nothing is in quarantine"]),
        (["config", "show"], ["RLM_NODE__TARGET_MS", "1000.0", "A node hands over"]),
        (["config", "check"], ["Nothing is wrong"]),
    ],
)
def test_a_command_works_with_no_worker_alive(
    idle: Client, arguments: Sequence[str], texts: Sequence[str]
) -> None:
    done = run(idle, *arguments)

    assert done.exit_code == 0, done.output
    for each in texts:
        assert each in done.stdout
    json.loads(run(idle, *arguments, "--json").stdout)


def test_a_job_without_a_worker_says_why_it_waits(idle: Client) -> None:
    submitted = run(
        idle, "submit", "--json", stdin=json.dumps({"operation": "sum", "items": [1, 2]})
    )
    job = json.loads(submitted.stdout)["id"]

    printed = run(idle, "job", job)
    assert "pending" in printed.stdout
    assert "for a worker" in printed.stdout
    assert "opened" in printed.stdout
    assert [each["event"] for each in run_json(idle, "job", job)["events"]] == ["opened"]
    assert {row["queue"]: row["depth"] for row in run_json(idle, "queues")}["commands.normal"] >= 1
    assert "cancelled" in run(idle, "cancel", job).stdout
    assert run_json(idle, "job", job)["events"][-1]["detail"] == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["pressure", "force", "hihg"],
            2,
            "level='hihg': is no pressure level; there are normal, elevated",
        ),
        (["pressure", "force", "high", "--for", "-1"], 2, "for_s=-1"),
        (["breakers", "reset"], 2, "name one breaker, or use --all"),
        (
            ["breakers", "reset", "nobody"],
            2,
            "name='nobody': there is no such breaker; there are: ",
        ),
        (["job", "nothing"], 1, "job nothing is unknown"),
        (["config", "import", "/no/such/file"], 2, "No such file"),
        (["quarantine", "show", "nothing", "1"], 1, "job nothing is unknown"),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(
    idle: Client, arguments: Sequence[str], code: int, words: str
) -> None:
    done = run(idle, *arguments)

    assert (done.exit_code, words in done.stderr) == (code, True), done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["jobs"],
        ["pressure"],
        ["breakers"],
        ["limits"],
        ["queues"],
        ["operations"],
        ["alerts"],
        ["quarantine", "list"],
    ],
)
def test_without_redis_each_command_names_the_url(arguments: Sequence[str]) -> None:
    settings = Settings(redis_url=WITHOUT_REDIS, operations=("tests.integration.guarded_ops",))
    app = install(Celery("nowhere", set_as_current=False), settings)
    app.config_from_object(configuration(settings))
    with Client(app) as client:
        done = run(client, *arguments)

    assert done.exit_code == 69
    assert WITHOUT_REDIS in done.stderr


# --- actions ----------------------------------------------------------------------------------


def test_pressure_that_is_off_has_no_level_on_any_host(client: Client) -> None:
    client.pressure.force("critical", 60)
    try:
        outputs = [run(client, name, "--wide").stdout for name in ("status", "pressure")]
    finally:
        client.pressure.release()

    for output in outputs:
        assert output.startswith("Pressure is switched off (RLM_PRESSURE__ENABLED=0).")
        [worker] = [line.split() for line in output.splitlines() if line.startswith("celery@")]
        assert worker[1] == "off"
        assert "Left out" not in output


def test_a_drill_starts_and_ends(idle: Client) -> None:
    assert (
        "All workers act on critical"
        in run(idle, "pressure", "force", "critical", "--for", "60").stdout
    )
    assert (run_json(idle, "pressure")["level"], idle.status().forced) == ("critical", "critical")

    assert "The drill has ended" in run(idle, "pressure", "release").stdout
    assert "There was no drill" in run(idle, "pressure", "release").stdout
    assert run_json(idle, "pressure", "release") == {"released": False}


@pytest.mark.parametrize("selection", [["reset-me"], ["--all"]])
def test_the_commands_show_and_close_an_open_breaker(idle: Client, selection: list[str]) -> None:
    breaker = idle.create_circuit_breaker("reset-me", failure_threshold=1)
    breaker.open()
    assert run_json(idle, "breakers")["reset-me"]["state"] == "open"
    assert "open" in run(idle, "breakers").stdout

    assert "reset-me" in run(idle, "breakers", "reset", *selection).stdout

    assert run_json(idle, "breakers")["reset-me"]["state"] == "closed"


def test_the_newest_alert_comes_first(idle: Client) -> None:
    for name in ("first", "second"):
        idle.alerts.process_event(
            Event("breaker.opened", f"{name} is open", EventSeverity.WARNING, {"breaker": name})
        )
    wait_until(lambda: len(idle.alerts.history()) == 2)

    found = run_json(idle, "alerts")
    assert [each["subject"] for each in found["alerts"]] == ["second", "first"]
    assert found["total_alerts"] == 2
    assert "second is open" in run(idle, "alerts", "--limit", "1").stdout
    assert "2 in all" in run(idle, "alerts").stdout


# --- the deployment ---------------------------------------------------------------------------


def test_the_doctor_names_faults_and_remedies(idle: Client) -> None:
    done = run(idle, "doctor")

    assert done.exit_code == 1
    assert "FAULT  workers" in done.stdout
    assert f"celery -A {idle.app.main} worker" in done.stdout
    found = {
        each["check"]: each["state"] for each in json.loads(run(idle, "doctor", "--json").stdout)
    }
    assert (found["redis"], found["packages"]) == ("ok", "ok")


def test_a_bundle_is_printed_or_saved_as_one_document(idle: Client, tmp_path: Path) -> None:
    job = idle.submit(operation="sum", items=[734_211])

    bundle = json.loads(run(idle, "bundle", "--job", job.id).stdout)
    assert bundle["job"]["id"] == job.id
    assert "734211" not in json.dumps(bundle)

    assert "read it before you send it" in run(idle, "bundle", str(tmp_path / "bundle.json")).stdout
    assert (
        json.loads((tmp_path / "bundle.json").read_text(encoding="utf-8"))["settings"]["namespace"]
        == "commands"
    )
    job.cancel()


# --- configuration ----------------------------------------------------------------------------


def test_settings_are_exported_to_a_file_and_imported(idle: Client, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    assert run(idle, "config", "export", str(file)).exit_code == 0
    assert import_config(file.read_text(encoding="utf-8")).operations == idle.settings.operations

    printed = run(idle, "config", "import", str(file)).stdout.splitlines()

    assert "RLM_LEDGER__LEASE_S=1.5" in printed
    assert "RLM_OPERATIONS=tests.integration.ops,tests.integration.guarded_ops" in printed
    assert "RLM_LEDGER__LEASE_S" in run(idle, "config", "show", "--changed").stdout
    assert "RLM_NODE__PULSE_MS" not in run(idle, "config", "show", "--changed").stdout


def test_a_settings_file_with_an_unknown_field_is_refused(idle: Client) -> None:
    done = run(idle, "config", "import", "-", stdin='{"node": {"target": 3}}')

    assert done.exit_code == 2
    assert "did you mean RLM_NODE__TARGET_MS?" in done.stderr
