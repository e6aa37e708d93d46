"""The commands for jobs: list, watch, result, failures, events, submit; with short ids."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlm_tasks import Client
from tests.integration.conftest import ROOT, client_of, environment_of
from tests.integration.test_commands import run, run_json


@pytest.fixture(scope="module")
def ended(client: Client) -> str:
    """A job of 40 items of which half have failed."""
    job = client.submit(
        operation="fail_odd", items=range(40), continue_on_error=True, description="odd ones"
    )
    job.wait(timeout=30)
    return job.id


@pytest.fixture
def waiting(client_without_worker: Client) -> tuple[Client, str]:
    """A client of a platform without a worker, and a job that waits there."""
    return client_without_worker, client_without_worker.submit(operation="sum", items=[1, 2]).id


def cells(line: str) -> list[str]:
    """Return the cells of a row of a table."""
    return re.split(" {2,}", line.strip())


# --- the list ---------------------------------------------------------------------------------


def test_a_row_has_short_id_operation_status_progress_failures_and_age(
    client: Client, ended: str
) -> None:
    [row] = [line for line in run(client, "jobs").stdout.splitlines() if ended[:8] in line]

    assert cells(row)[:5] == [ended[:8], "fail_odd", "succeeded with failures", "100%", "20"]
    assert re.fullmatch(r"[\d.]+ (s|min)", cells(row)[5])


def test_wide_rows_have_the_description_and_the_time_of_submission(
    client: Client, ended: str
) -> None:
    printed = run(client, "jobs", "--wide").stdout
    [row] = [line for line in printed.splitlines() if ended[:8] in line]

    assert {"normal", "40", "odd ones"} <= set(cells(row))
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row)


@pytest.mark.parametrize(
    ("options", "is_listed"),
    [
        (["--operation", "fail_odd", "--status", "succeeded", "--since", "1h"], True),
        (["--since", "1h30min"], True),
        (["--since", "2020-01-01"], True),
        (["--status", "failed", "--status", "succeeded"], True),
        (["--operation", "fail_od"], False),
        (["--status", "failed"], False),
        (["--open"], False),
        (["--since", "0s"], False),
        (["--since", "2999-01-01T00:00:00"], False),
    ],
)
def test_jobs_are_filtered(client: Client, ended: str, options: list[str], is_listed: bool) -> None:
    listed = run(client, "jobs", *options, "--quiet", "--limit", "1000")

    assert listed.exit_code == 0, listed.output
    assert (ended in listed.stdout.split()) is is_listed
    in_json = {each["id"] for each in run_json(client, "jobs", *options, "--limit", "1000")}
    assert (ended in in_json) is is_listed


def test_a_list_says_when_more_jobs_exist(client_without_worker: Client) -> None:
    for _ in range(3):
        client_without_worker.submit(operation="sum", items=[1])

    assert "newest 2;" in run(client_without_worker, "jobs", "--limit", "2").stdout
    assert "newest" not in run(client_without_worker, "jobs", "--limit", "3").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["jobs", "--status", "faild"], "status='faild': is no status; there are pending"),
        (["jobs", "--status", "faild"], "did you mean 'failed'?"),
        (["jobs", "--since", "1 hour"], "--since='1 hour': give an age, such as 90s"),
        (["jobs", "--since", "60"], "--since='60': give an age, such as 90s"),
        (["jobs", "--since", f"{10**12}d"], "give an age, such as 90s"),
        (["jobs", "--open", "--status", "failed"], "leave out --open"),
        (["jobs", "--limit", "0"], "0 is not in the range"),
        (["submit", "--operation", "sum"], "--lines=None: give --operation NAME and --lines FILE"),
        (["submit", "--lines", "x.csv"], "--operation=None: give --operation NAME and --lines"),
        (["submit", "--priority", "low"], "--operation=None: give --operation NAME and --lines"),
        (["submit", "--operation", "sum", "--lines", "/no/x.csv"], "/no/x.csv"),
        (["submit", "--operation", "smu", "--lines", __file__], "did you mean 'sum'?"),
        (["submit", "--operation", "echo", "--lines", __file__, "--priority", "hihg"], "hihg"),
        (
            ["submit", "--operation", "echo", "--lines", __file__, "--params", "{x}"],
            "--params='{x}': is not JSON",
        ),
        (
            ["submit", "--operation", "echo", "--lines", __file__, "--params", "[1]"],
            "params",
        ),
        (
            ["submit", __file__, "--operation", "echo", "--lines", __file__],
            "--operation='echo': a request file has the whole request; leave out the file",
        ),
        (["submit", __file__, "--continue-on-error"], "--continue-on-error=True: a request file"),
        (["plan", "--operation", "sum"], "--lines=None: give --operation NAME and --lines FILE"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_enqueued(
    client_without_worker: Client, arguments: list[str], words: str
) -> None:
    done = run(client_without_worker, *arguments)

    assert done.exit_code == 2
    assert words in done.stderr
    assert client_without_worker.jobs() == []


@pytest.mark.parametrize("columns", [80, 40])
def test_lists_and_jobs_fit_the_screen(
    client: Client, ended: str, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in (["jobs"], ["job", ended], ["tree", ended], ["failures", ended]):
        lines = run(client, *arguments).stdout.splitlines()
        assert max(map(len, lines)) <= columns, arguments
    rows = [line for line in run(client, "jobs").stdout.splitlines() if ended[:8] in line]
    assert len(rows) == 1
    if columns == 80:
        assert cells(rows[0])[1:5] == ["fail_odd", "succeeded with failures", "100%", "20"]


# --- short ids --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["job", "ID", "--json"], 0),
        (["explain", "ID", "--json"], 0),
        (["tree", "ID", "--json"], 0),
        (["failures", "ID", "--json"], 0),
        (["events", "ID", "--json"], 0),
        (["result", "ID", "--json"], 0),
        (["cancel", "ID", "--json"], 0),
        (["retry", "ID", "--json"], 0),
        (["watch", "ID"], 0),
        (["quarantine", "list", "--job", "ID", "--json"], 0),
        (["quarantine", "show", "ID", "3"], 2),
        (["quarantine", "replay", "ID"], 2),
        (["quarantine", "drop", "ID"], 2),
    ],
)
def test_each_command_takes_the_beginning_of_an_id(
    client: Client, ended: str, arguments: list[str], code: int
) -> None:
    done = run(client, *(ended[:8] if each == "ID" else each for each in arguments))

    assert done.exit_code == code, done.output
    assert "is unknown" not in done.output
    if code == 0 and arguments[-1] == "--json":
        found = json.loads(done.stdout)
        if isinstance(found, dict) and arguments[0] != "retry":
            assert ended in (found.get("id"), found.get("job_id"))


# --- watch ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "items", "code", "texts"),
    [
        ("echo", [1, 2], 0, ["2 of 2 items, succeeded", "succeeded: 2 of 2", "rlm result"]),
        ("fail_odd", [2, 3, 4], 1, ["failed because an item failed", "rlm failures"]),
        ("bad_merge", [1], 1, ["failed", "ZeroDivisionError"]),
    ],
)
def test_watch_ends_with_the_outcome_and_its_exit_code(
    client: Client, operation: str, items: list[int], code: int, texts: list[str]
) -> None:
    job = client.submit(operation=operation, items=items)

    done = run(client, "watch", job.id[:8])

    assert done.exit_code == code, done.output
    for text in texts:
        assert text in done.stdout
    for line in done.stdout.splitlines():
        if "rlm " in line:
            assert job.id[:8] in line


def test_watch_in_a_pipe_prints_a_line_for_each_change(client: Client) -> None:
    job = client.submit(operation="nap", items=[300] * 6)

    lines = run(client, "watch", job.id).stdout.splitlines()

    counts = [found[0] for line in lines if (found := re.findall(r"\d+ of 6 items, \w+", line))]
    assert counts[-1] == "6 of 6 items, succeeded"
    assert len(counts) == len(set(counts)) >= 2


def command_line(*arguments: str) -> list[str]:
    """Return the words of a command."""
    return [sys.executable, "-m", "celery", "-A", "rlm_tasks", "rlm", *arguments]


@contextmanager
def in_terminal(
    environment: Mapping[str, str], *arguments: str, columns: int = 80
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a command in a terminal; yield its process and the terminal's other end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command_line(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        cwd=ROOT,
        env={
            **os.environ,
            **environment,
            "TERM": "xterm",
            "COLUMNS": str(columns),
            "LINES": "24",
        },
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, text: str) -> str:
    """Read a terminal until it shows a text; '' as text: until its command has ended."""
    found = ""
    while not text or text not in found:
        if not select.select([terminal], [], [], 30)[0]:
            raise AssertionError(f"{text!r} is not in {found!r}")
        try:
            found += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the command has ended
            break
    return found


@pytest.mark.parametrize("columns", [80, 40])
def test_ctrl_c_ends_watching_and_the_job_goes_on(
    waiting: tuple[Client, str], columns: int
) -> None:
    client, job = waiting
    namespace = client.settings.namespace
    environment = environment_of(client.settings.redis_url, namespace)

    with in_terminal(environment, "watch", job[:8], columns=columns) as (process, terminal):
        shown = read_until(terminal, "waited")
        process.send_signal(signal.SIGINT)
        shown += read_until(terminal, "")
        assert process.wait(30) == 130

    assert "0 of 2" in shown
    assert f"Job {job[:8]} goes on." in shown
    assert f"celery -A rlm_tasks rlm cancel {job[:8]}" in " ".join(shown.split())
    assert "Traceback" not in shown
    assert client.job(job).status == "pending"


# --- result, failures, events -----------------------------------------------------------------


def test_a_result_is_printed_for_people_and_for_programs(client: Client, ended: str) -> None:
    done = run(client, "result", ended[:8])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "succeeded with failures: 20 done, 20 failed, 0 skipped",
        "380",
    ]
    assert f"rlm failures {ended[:8]}" in done.stderr

    rows = client.submit(operation="return_even", items=range(100), continue_on_error=True)
    rows.wait(timeout=30)
    lines = run(client, "result", rows.id).stdout.splitlines()
    assert lines[1].startswith("0: ")
    assert lines[-1].endswith("more; --json prints all")
    assert run_json(client, "result", rows.id)["job_id"] == rows.id


def test_a_job_without_an_answer_exits_with_1_and_says_why(
    waiting: tuple[Client, str],
) -> None:
    client, job = waiting

    early = run(client, "result", job[:8])
    assert (early.exit_code, early.stdout) == (1, "")
    assert "for a worker" in early.stderr
    assert f"rlm result {job[:8]} --wait 60" in early.stderr

    client.job(job).cancel()
    done = run(client, "result", job[:8], "--json")
    assert (done.exit_code, json.loads(done.stdout)["status"]) == (1, "cancelled")
    done = run(client, "result", job[:8])
    assert done.stdout == "cancelled: 0 done, 0 failed, 2 skipped\n"


def test_a_result_that_is_too_large_says_what_to_do(
    client: Client, environment: dict[str, str], ended: str
) -> None:
    job = client.submit(operation="echo", items=["x" * 1000] * 10)
    job.wait(timeout=30)
    with client_of({**environment, "RLM_MAX_RESULT_BYTES": "5000"}) as small:
        done = run(small, "result", job.id[:8])
        assert run(small, "result", ended).exit_code == 0

    assert (done.exit_code, done.stdout) == (1, "")
    assert "more than RLM_MAX_RESULT_BYTES=5000; iterate over job.outputs()" in done.stderr


def test_failures_have_kind_code_place_and_index(
    client: Client, environment: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    submitted = run(
        client, "submit", "--operation", "fail_odd", "--lines", str(path), "--continue-on-error"
    )
    job = submitted.stdout.strip()
    client.job(job).wait(timeout=30)

    done = run(client, "failures", job[:8])
    assert done.exit_code == 0, done.output
    rows = [cells(line) for line in done.stdout.splitlines() if "TypeError" in line]
    assert rows == [
        ["TypeError", "OPERATION_FAILED", "0", f"{path}, line 1"],
        ["TypeError", "OPERATION_FAILED", "1", f"{path}, line 2"],
    ]
    assert "not all arguments" not in done.stdout
    assert f"rlm retry {job[:8]}" in done.stdout
    assert [set(each) for each in run_json(client, "failures", job)] == [
        {"index", "type", "code", "where"}
    ] * 2
    with client_of({**environment, "RLM_SHOW_MESSAGES": "1"}) as open_client:
        assert "not all arguments" in run(open_client, "failures", job).stdout
        assert "not all arguments" in run_json(open_client, "failures", job)[0]["message"]


def test_a_job_without_failures_says_so(waiting: tuple[Client, str]) -> None:
    client, job = waiting

    assert f"No item of job {job[:8]} has failed." in run(client, "failures", job).stdout
    assert run_json(client, "failures", job) == []


def test_events_are_followed_until_the_job_has_ended(client: Client) -> None:
    job = client.submit(operation="nap", items=[200] * 4)

    lines = run(client, "events", job.id[:8], "--follow").stdout.splitlines()
    names = [line.split()[2] for line in lines]
    assert (names[0], names[-1]) == ("opened", "closed")
    assert names == [each.event for each in job.events()]

    found = run(client, "events", job.id, "--follow", "--json").stdout.splitlines()
    assert [json.loads(line)["event"] for line in found] == names
    assert [each["event"] for each in run_json(client, "events", job.id)] == names


# --- submit, cancel, retry --------------------------------------------------------------------


def test_lines_of_a_file_are_submitted_and_watched(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("one\nthree\n", encoding="utf-8")
    options = ["--operation", "count_characters", "--lines", str(path), "--priority", "high"]

    done = run(client, "submit", *options, "--watch")

    assert done.exit_code == 0, done.output
    job = client.job(done.stdout.split()[0])
    assert "succeeded: 2 of 2 items done" in done.stdout
    assert job.get(timeout=5) == 8
    assert client.ledger.spec(job.id).priority == "high"  # type: ignore[union-attr]  # it is open


def test_params_of_the_command_reach_the_operation(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("one\n", encoding="utf-8")
    options = ["--operation", "echo", "--lines", str(path), "--params", '{"a": [1, null]}']

    job = client.job(run(client, "submit", *options).stdout.strip())

    assert client.ledger.spec(job.id).params == {"a": [1, None]}  # type: ignore[union-attr]


def test_lines_of_a_file_are_planned(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("one\nthree\n", encoding="utf-8")

    planned = run_json(client, "plan", "--operation", "count_characters", "--lines", str(path))

    assert [each["items"] for each in planned["rounds"]] == [2]


def test_cancel_says_what_happened(waiting: tuple[Client, str]) -> None:
    client, job = waiting

    first = run(client, "cancel", job[:8]).stdout
    again = run(client, "cancel", job[:8]).stdout

    assert first.startswith(f"Job {job[:8]} was cancelled")
    assert again.startswith(f"Job {job[:8]} had ended before; nothing was cancelled.")


def test_retry_prints_the_new_id_alone_and_names_it_beside(client: Client, ended: str) -> None:
    done = run(client, "retry", ended[:8])
    again = done.stdout.strip()

    assert client.job(again).result(timeout=30, propagate=False).total == 20
    assert f"Job {again[:8]} runs the failed items of job {ended[:8]} again." in done.stderr
    assert f"rlm watch {again[:8]}" in done.stderr


# --- the start of the command line ------------------------------------------------------------


NOT_FOR_A_LIST = (
    "rlm_tasks.client.client",
    "rlm_tasks.client.job",
    "rlm_tasks.client.planning",
    "rlm_tasks.client.submission",
    "rlm_tasks.compat",
    "rlm_tasks.diagnosis",
    "rlm_tasks.engine.node",
    "rlm_tasks.flower.pages",
    "rlm_tasks.llm.operations",
    "rlm_tasks.operations.builtin",
    "rlm_tasks.testing",
    "rlm_tasks.worker",
    "resilience.breaker",
    "resilience.retry",
    "scheduler.alerts",
    "tests.integration.ops",
    "openai",
    "opentelemetry.exporter",
    "rich.console",
)
"""Modules that `rlm jobs` must not import; the user's own operations are one of them."""


def test_a_list_of_jobs_imports_no_operations_and_no_client(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command_line("jobs")[1:]],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )

    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "rlm_tasks.client.job_search" in imported
    assert [
        name for name in imported if any(f"{name}.".startswith(f"{no}.") for no in NOT_FOR_A_LIST)
    ] == []


def completed(environment: Mapping[str, str], line: str) -> list[str]:
    """Return the completions that bash gets for a line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run(
        [Path(sys.executable).with_name("celery")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
        env={**os.environ, **environment, **words, "_CELERY_COMPLETE": "bash_complete"},
    )
    return [line.removeprefix("plain,") for line in done.stdout.split()]


def test_commands_and_ids_of_jobs_are_completed(environment: dict[str, str], ended: str) -> None:
    line = "celery -A rlm_tasks rlm"
    assert completed(environment, f"{line} wat") == ["watch"]
    assert ended[:8] in completed(environment, f"{line} explain {ended[:3]}")
    assert completed(environment, f"{line} job {ended[:20]}") == [ended]
    assert completed(environment, f"{line} jobs --status canc") == ["cancelled"]
    nowhere = {**environment, "RLM_REDIS_URL": "redis://127.0.0.1:1/0"}
    assert completed(nowhere, f"{line} explain {ended[:3]}") == []
