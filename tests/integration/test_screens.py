"""Each command of the group ``rlm`` can be read in 80 and in 40 columns, and keeps its JSON.

The platform has long names: of its worker, namespace, operations, services and endpoints."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from resilience.degradation import Level
from rlm_tasks import Client, __version__
from rlm_tasks.cli import rlm
from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.ledger.records import ROOT as ROOT_NODE
from rlm_tasks.ledger.records import Report
from rlm_tasks.results import QuarantinedItem
from rlm_tasks.settings.document import export_config
from rlm_tasks.testing import embedded
from scheduler.board import Board, ClusterReport, HostReport
from scheduler.events import Event, EventSeverity
from scheduler.queues import QueueReport
from scheduler.sampling import Sample
from tests.integration.conftest import ROOT, client_of, environment_of
from tests.integration.long_ops import EXTRACTION, REMITTANCE
from tests.integration.test_commands import run
from tests.support import wait_until

FIELDS = Path(__file__).with_name("json_fields.json")
"""Command -> the names of the fields of its JSON; for a list, of its first entry."""
OTHER = {"serve", "demo"}
"""`serve` never ends, and `demo` runs a platform of its own."""
DOCUMENTS = {"config export", "config import", "bundle"}
"""They print documents that are no sentences, and are copied into files."""
CHANGING = {"cancel", "retry", "submit", "doctor", "pressure release", "quarantine replay"}
"""They print something else when they are run again."""
WORKER = "payments-worker-of-the-europe-west-0001"
WHY = "memory is 91 % of 8,192 MB, above the threshold of 90 %, for 34 s"


def commands(group: click.Group = rlm, *above: str) -> Iterator[tuple[str, click.Command]]:
    """Yield each command and group that can be run, with its name as it is typed."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            if command.invoke_without_command:
                yield " ".join((*above, name)), command
            yield from commands(command, *above, name)
        elif name not in OTHER:
            yield " ".join((*above, name)), command


@dataclass(frozen=True)
class Platform:
    """A platform with a worker, a job with failures, an open breaker and quarantined items."""

    client: Client
    environment: dict[str, str]
    job: str  # it has ended, with failures
    quarantined: str  # a job with quarantined items
    items: Iterator[int]  # quarantined items that a command may take
    folder: Path

    def arguments(self, name: str, command: click.Command) -> list[str]:
        """Return an argument for each parameter that the command has."""
        exported = self.folder / "settings.json"
        exported.write_text(export_config(self.client.settings), encoding="utf-8")
        request = self.folder / "request.json"
        request.write_text(json.dumps({"operation": EXTRACTION, "items": [2, 4]}))
        given = {
            "job_id": lambda: self.quarantined if "quarantine" in name else self.job,
            "index": lambda: "0",
            "indexes": lambda: str(next(self.items)),
            "level": lambda: "high",
            "request_file": lambda: str(request),
            "file": lambda: str(exported) if name == "config import" else None,
        }
        found = [
            given.get(each.name or "", lambda: "payments-gateway-of-the-european-subsidiaries")()
            for each in command.params
            if isinstance(each, click.Argument)
        ]
        return [each for each in found if each is not None]

    def publish(self) -> None:
        """Publish the reports of a monitor and of one more worker, which expire."""
        store, keys = self.client.ledger.store, self.client.ledger.keys
        board = Board(store, keys, self.client.settings.pressure)
        names = tuple(self.client.queues())
        now = store.now_ms() / 1000
        report = HostReport(
            worker=f"celery@{WORKER.replace('0001', '0002')}",
            level=Level.CRITICAL,
            percent=91.0,
            why=WHY,
            slots=16,
            busy=12,
            queues=names,
            active={REMITTANCE: 12_000, EXTRACTION: 3},
            sample=Sample(91.2, 7471.0, 8192.0, 721.0, "cgroup2", cpu_pct=97.3),
            version=__version__,
            schema=SCHEMA,
            at=now,
        )
        store.call(board.publish(report))
        queues = dict.fromkeys(names, QueueReport(12_345, 61.0))
        cluster = ClusterReport(Level.CRITICAL, WHY, now, 2, 18, 14, 97.0, 91.0, queues=queues)
        board.announce(cluster, b"")


@pytest.fixture(scope="module")
def platform(
    server: embedded.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """The platform of these tests."""
    folder = tmp_path_factory.mktemp("screens")
    endpoint = {
        "name": "gateway-of-the-language-models-in-europe-west",
        "base_url": "http://language-models-gateway.europe-west.example.com:8443/openai/v1",
        "key_env": "GATEWAY_KEY",
    }
    environment = environment_of(
        server.url,
        "production-europe-west",
        RLM_OPERATIONS="tests.integration.long_ops",
        RLM_LLM__ENDPOINTS=json.dumps([endpoint]),
        GATEWAY_KEY="any",
    )
    worker = embedded.worker(environment, log=folder / "log", slots=1, options=("-n", WORKER))
    with client_of(environment) as client:
        quarantined = _quarantined(client)
        with worker:
            yield Platform(
                client, environment, _ended(client), quarantined, iter(range(1, 20)), folder
            )


def _ended(client: Client) -> str:
    """Run a job with failures, open a breaker and raise an alert; return the job."""
    job = client.submit(
        operation=REMITTANCE,
        items=range(10),
        continue_on_error=True,
        description="The remittances of all subsidiaries in the third quarter",
    )
    job.result(timeout=60)
    client.create_circuit_breaker("payments-gateway-of-the-european-subsidiaries").open()
    text = "the breaker of the payments gateway is open: 5 of 5 calls in a row have failed"
    client.alerts.process_event(
        Event("breaker.opened", text, EventSeverity.WARNING, {"breaker": "payments-gateway"})
    )
    wait_until(lambda: len(client.alerts.history()) == 1)
    return job.id


def _quarantined(client: Client) -> str:
    """Return a job whose items have all killed their process, as its worker reports it."""
    items = range(20)
    job = client.submit(operation=REMITTANCE, items=items, continue_on_error=True)
    records = [
        QuarantinedItem(job.id, n, REMITTANCE, f"contracts-of-2026.csv, line {n}", 3, "SIGKILL")
        for n in items
    ]
    report = Report(
        20,
        failed=[*items],
        quarantined=[(n, msgspec.json.encode(each).decode()) for n, each in enumerate(records)],
    )
    client.ledger.finish(client.ledger.claim(job.id, ROOT_NODE, "token", "w1"), report, b"")
    return job.id


# --- the screens ------------------------------------------------------------------------------


def words(text: str) -> set[str]:
    """Return the words of a text with one digit for each number, which differs between runs."""
    return {
        re.sub(r"\d[\d.,:]*", "0", word.strip(".,;:")) for word in text.split() if "…" not in word
    }


NOTE = words("Not shown cut short Cut In full --wide or --json ms s min")
"""Words of the last line of a table, and units."""
BOX = re.compile(r"[\u2500-\u257f]")
RUNS = sorted(dict(commands()).items())


@pytest.mark.parametrize(("name", "command"), RUNS, ids=[name for name, _ in RUNS])
def test_a_command_is_readable_in_80_and_in_40_columns(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, name: str, command: click.Command
) -> None:
    printed: dict[str, str] = {}
    for columns in ("", "80", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        platform.publish()
        done = run(platform.client, *name.split(), *platform.arguments(name, command))
        assert done.exit_code in (0, 1 if name == "doctor" else 0), done.output
        assert not BOX.search(done.output)
        printed[columns] = done.stdout
    if name in DOCUMENTS:
        return
    for columns in ("80", "40"):
        long = [line for line in printed[columns].splitlines() if len(line) > int(columns)]
        assert [line for line in long if " " in line.strip()] == []
        if name not in CHANGING:
            assert words(printed[columns]) <= words(printed[""]) | NOTE


@pytest.mark.parametrize("columns", [40, 80])
def test_the_help_of_each_command_fits_the_screen(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))

    for name in ("", "quarantine", "config", *(name for name, _ in RUNS)):
        printed = run(platform.client, *name.split(), "--help").stdout
        assert max(map(len, printed.splitlines())) <= columns, name


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["jobs", "--limit", "0"], 2),
        (["jobs", "--wid"], 2),
        (["breakers", "reset", "the-gateway-of-nobody"], 2),
        (["job", "00000000"], 1),
    ],
)
def test_an_error_is_wrapped_by_words(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    narrow = run(platform.client, *arguments)
    monkeypatch.delenv("COLUMNS")

    error = narrow.stderr.partition("Error: ")[2]
    assert narrow.exit_code == code
    assert [line for line in error.splitlines() if len(line) > 40 and " " in line] == []
    assert error.split() == run(platform.client, *arguments).stderr.partition("Error: ")[2].split()


def keys(document: Any) -> list[str]:
    """Return the fields of a document, or of the first entry of a list."""
    if isinstance(document, list):
        return keys(document[0]) if document else []
    return sorted(document)


IN_JSON = [
    (name, command)
    for name, command in RUNS
    if "--json" in str([each.opts for each in command.params])
]


@pytest.mark.parametrize(("name", "command"), IN_JSON, ids=[name for name, _ in IN_JSON])
def test_the_json_of_a_command_keeps_its_fields(
    platform: Platform, name: str, command: click.Command
) -> None:
    platform.publish()
    done = run(platform.client, *name.split(), *platform.arguments(name, command), "--json")

    assert done.exit_code in (0, 1 if name == "doctor" else 0), done.output
    stored = json.loads(FIELDS.read_text(encoding="utf-8"))
    assert set(stored[name]) <= set(keys(json.loads(done.stdout)))


def in_terminal(environment: dict[str, str], columns: int, *arguments: str) -> str:
    """Return the output of a command in a terminal of this width."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, columns))
    command = [sys.executable, "-m", "celery", "-A", "rlm_tasks", "rlm", *arguments]
    given = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")
    }
    process = subprocess.Popen(
        command, stdout=its, stderr=its, cwd=ROOT, env={**given, "TERM": "xterm", **environment}
    )
    os.close(its)
    text = b""
    with closing(os.fdopen(ours, "rb", buffering=0)) as screen, suppress(OSError):  # it has ended
        while part := screen.read(65_536):
            text += part
    assert process.wait(30) == 0, text
    return text.decode().replace("\r\n", "\n")


def test_a_terminal_gets_its_width_and_colours_unless_they_are_off(platform: Platform) -> None:
    platform.client.create_circuit_breaker("payments-gateway-of-the-european-subsidiaries").open()
    colored = in_terminal(platform.environment, 40, "breakers")
    plain = in_terminal({**platform.environment, "NO_COLOR": "1"}, 40, "breakers")

    assert "\x1b[31mopen" in colored
    assert "\x1b" not in plain
    # The time until the next probe passes between the two commands.
    texts = [re.sub(r"\d[\d.]*", "0", each) for each in (click.unstyle(colored), plain)]
    assert texts[0].split() == texts[1].split()
    assert max(map(len, plain.splitlines())) <= 40
