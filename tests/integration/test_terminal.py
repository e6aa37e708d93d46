"""A terminal shows escape sequences in data as text: no command and no alert sends them.

A worker, requests, items, files and exceptions are full of them.  The bytes of a real terminal are
searched for control characters; only the platform's own colours pass.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlm_tasks import Client, Files, Job, Lines
from rlm_tasks.testing import embedded
from scheduler.alerts import Alerts
from scheduler.events import EventKind, EventSeverity
from scheduler.settings import AlertSettings
from tests.integration.all_commands import readers, run_all, terminal
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

SEQUENCES = {
    "clear": "\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://x\x1b\\",
    "C1": "\x9b31m",
    "conceal": "\x1b[8m",
    "blink": "\x1b[5;7m",
    "bell": "\x07\x08\x0d",
    "bidi": "\u202egpj\u2066\u061c",
    "tag": "\U000e0041",
}
ODD = "".join(f"<{name}{each}>" for name, each in SEQUENCES.items())
OURS = re.compile(rb"\x1b\[(?:0|1|2|[39][0-6]|1;3[1236]|1;37;41)?m|\x1b\[(?:\?25[lh]|1?A|2?K)")
"""The colours of the platform, and what rich needs for a bar that moves."""
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


@dataclass(frozen=True)
class Odd:
    """A platform whose data are full of control characters."""

    environment: dict[str, str]
    client: Client
    jobs: dict[str, Job]
    log: Path


@pytest.fixture(scope="module")
def odd(
    server: embedded.Server, logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Odd]:
    environment = environment_of(
        server.url,
        "odd",
        RLM_OPERATIONS="tests.integration.ops,tests.integration.telling_ops",
        RLM_SHOW_MESSAGES="1",
        RLM_LEDGER__DEATH_LIMIT="1",
    )
    folder = tmp_path_factory.mktemp("odd")
    (folder / f"lines{SEQUENCES['clear']}{SEQUENCES['bidi']}").write_text("a\nb\n")
    log, options = logs / "odd.log", ("-n", f"odd{SEQUENCES['conceal']}{SEQUENCES['bidi']}@%h")
    with (
        embedded.worker(environment, log=log, options=options, level="INFO"),
        client_of(environment) as client,
    ):
        [lines] = folder.iterdir()
        jobs = {
            "echo": client.submit(operation="echo", items=[ODD, {"answer": ODD}], description=ODD),
            "told": client.submit(operation="tell_item", items=[ODD] * 12, continue_on_error=True),
            "merge": client.submit(operation="tell_merge", items=[ODD], description=ODD),
            "waits": client.submit(operation="tell_wait", items=[ODD]),
            "lines": client.submit(operation="tell_item", items=Lines(lines)),
            "files": client.submit(operation="tell_item", items=Files(f"{folder}/*")),
            "dies": client.submit(operation="die_always", items=Files(f"{folder}/*")),
            "cancelled": client.submit(operation="nap", items=[50.0] * 500, description=ODD),
        }
        jobs["cancelled"].cancel(by=ODD)
        wait_until(lambda: "the shop" in jobs["waits"].explain())
        for name, job in jobs.items():
            if name != "waits":
                job.wait(timeout=60)
        client.create_circuit_breaker("odd").open()
        yield Odd(environment, client, jobs, log)


def sent(odd: Odd, *lines: list[str]) -> str:
    """Return what commands send to a terminal, without the platform's own colours."""
    with terminal() as (file, found):
        run_all(odd.environment, lines, file)
    text = OURS.sub(b"", b"".join(found)).decode()
    assert "Traceback" not in text.partition("Traceback in the worker")[0]
    return text


def test_no_command_sends_a_sequence_of_its_data(odd: Odd) -> None:
    text = sent(odd, *readers([job.id for job in odd.jobs.values()]))

    assert _around(text) == []
    for shown in (r"\x1b[8m", r"\x1b]0;owned\x07", r"\x9b31m", r"\u202egpj", r"\U000e0041"):
        assert shown in text.replace("\n", "").replace("\r", ""), shown


@pytest.mark.parametrize(
    "line",
    [
        ["job", ODD.replace("\x00", "")],
        ["breakers", "reset", ODD],
        ["quarantine", "show", ODD, "1"],
        ["jobs", "--operation", ODD],
        ["jobs", "--since", ODD],
        ["submit", "--operation", ODD, "--lines", "/dev/null"],
        ["pressure", "force", ODD],
        ["limits", "release", ODD],
    ],
    ids=lambda line: " ".join(line)[:16],
)
def test_no_error_of_a_command_sends_a_sequence(odd: Odd, line: list[str]) -> None:
    assert _around(sent(odd, line)) == []


def test_commands_that_act_send_no_sequence(odd: Odd) -> None:
    told, dies = odd.jobs["told"].id, odd.jobs["dies"].id

    text = sent(
        odd,
        ["cancel", told],
        ["watch", told],
        ["result", odd.jobs["merge"].id],
        ["quarantine", "show", dies, "0"],
        ["retry", told],
        ["bundle", "--job", told],
        ["status", "--wide"],
    )

    assert _around(text) == []
    assert r"\x1b[2J" in text


def test_an_alert_on_a_terminal_sends_only_the_colour_of_its_severity(odd: Odd) -> None:
    settings = AlertSettings(channels=("stdout",))
    with terminal() as (file, found):
        stream = os.fdopen(os.dup(file), "w")
        alerts = Alerts(odd.client.ledger.store, settings, stream=stream)
        event = EventKind("breaker.opened", EventSeverity.WARNING, "", {"breaker": ""})
        assert alerts.process_event(event.event(f"breaker {ODD} opened", {"breaker": ODD}))
        stream.close()
    raw = b"".join(found)
    assert raw.startswith(b"\x1b[33mWARNING  breaker.opened [")
    assert _around(OURS.sub(b"", raw).decode()) == []


def test_the_log_of_a_worker_has_no_sequence(odd: Odd) -> None:
    odd.client.app.send_task("rlm.node", args=[ODD, ODD], queue="odd.normal")
    with contextlib.suppress(Exception):
        odd.client.submit(operation=ODD, items=[1])
    wait_until(lambda: "names no id" in odd.log.read_text())

    text = odd.log.read_text()
    assert _around(text[text.index("\n[20") :]) == [], "Celery's banner has the name as given"


def test_names_of_operations_with_control_characters_are_refused() -> None:
    from resilience.errors import InvalidValue
    from rlm_tasks import operation

    for each in SEQUENCES.values():
        with pytest.raises(InvalidValue, match="printable"):
            operation(f"odd{each}")(lambda item: item)


def _around(text: str) -> list[str]:
    """Return the control characters of a text, each with what is around it."""
    text = text.replace("\r\n", "\n")
    return [ascii(text[max(0, m.start() - 80) : m.end() + 20]) for m in CONTROL.finditer(text)][:8]
