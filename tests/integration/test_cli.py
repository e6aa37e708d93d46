"""The command line: it prints tables or JSON, and one sentence for a mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis

from rlm_tasks import Client
from rlm_tasks.testing import embedded
from tests.integration.conftest import ROOT
from tests.support import wait_until


def rlm(
    environment: dict[str, str], *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run ``celery -A rlm_tasks rlm`` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "rlm_tasks", "rlm", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_a_failed_job_shows_its_message_only_when_the_setting_allows(
    client: Client, environment: dict[str, str]
) -> None:
    request = json.dumps({"operation": "fail_odd", "items": [7]})
    shows = {**environment, "RLM_SHOW_MESSAGES": "1"}

    hidden, shown = (
        rlm(each, "submit", "--wait", "30", stdin=request).stderr.partition(" failed ")[2]
        for each in (environment, shows)
    )

    assert hidden == "at item 0: ValueError: (8 characters); 1 of 1 items failed\n"
    assert shown == "at item 0: ValueError: 7 is odd; 1 of 1 items failed\n"


def test_a_job_from_stdin_to_its_tree(client: Client, environment: dict[str, str]) -> None:
    request = json.dumps(
        {"operation": "fail_odd", "items": [2, 3, 4], "options": {"continueOnError": True}}
    )

    submitted = rlm(environment, "submit", "--wait", "30", "--json", stdin=request)
    assert submitted.returncode == 0, submitted.stderr
    result = json.loads(submitted.stdout)
    assert (result["output"], result["failed_count"], result["failure_rate"]) == (6, 1, 1 / 3)

    job = result["job_id"]
    printed = json.loads(rlm(environment, "job", job, "--json").stdout)
    assert (printed["status"], printed["trace_id"]) == ("succeeded", client.job(job).trace_id)
    failure = {"index": 1, "type": "ValueError", "code": "OPERATION_FAILED", "where": ""}
    assert printed["failures"] == [failure]
    [row] = [
        line for line in rlm(environment, "job", job).stdout.splitlines() if "ValueError" in line
    ]
    assert re.split(" {2,}", row) == [
        "ValueError",
        "OPERATION_FAILED",
        "1",
        "1",
    ]
    assert (
        rlm(environment, "explain", job).stdout
        == "It succeeded: 2 of 3 items done, 1 failed, 0 skipped.\n"
    )
    assert {"root", "merge"} <= {
        node["id"] for node in json.loads(rlm(environment, "tree", job, "--json").stdout)
    }
    [row] = [line for line in rlm(environment, "jobs").stdout.splitlines() if job[:8] in line]
    assert re.split(" {2,}", row)[1:5] == [
        "fail_odd",
        "succeeded with failures",
        "100%",
        "1",
    ]
    assert job not in rlm(environment, "jobs", "--open", "-q").stdout.split()
    assert job in {each["id"] for each in json.loads(rlm(environment, "jobs", "--json").stdout)}
    again = rlm(environment, "retry", job).stdout.strip()
    assert client.job(again).result(timeout=30, propagate=False).failed_count == 1
    assert "It succeeded" in rlm(environment, "cancel", job).stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "text"),
    [
        (["submit"], "{oops", 2, "is not JSON"),
        (["submit"], '{"operation": "smu", "items": []}', 2, "did you mean 'sum'"),
        (["submit"], '{"operation": "sum", "items": [], "priorty": 1}', 2, "mean 'priority'?"),
        (["submit"], '{"operation": "sum", "options": {"chunkSize": 3}}', 2, "beside options"),
        (["job", "nothing"], "", 1, "job nothing is unknown"),
        (["retry", "nothing"], "", 1, "job nothing is unknown"),
        (["demo", "--path", "/no/such/folder"], "", 2, "does not exist"),
    ],
)
def test_mistakes_are_one_sentence_and_an_exit_code(
    environment: dict[str, str],
    worker_pid: int,
    arguments: list[str],
    stdin: str,
    code: int,
    text: str,
) -> None:
    done = rlm(environment, *arguments, stdin=stdin)

    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_measures_any_folder(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(
            "def f(x):\n    return x if x else 0\n", encoding="utf-8"
        )
    (tmp_path / "bad.py").write_text("def :\n", encoding="utf-8")

    done = rlm({}, "demo", "--path", str(tmp_path), "--json")

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["output"]["files"], report["output"]["functions"], report["failed_count"]) == (
        40,
        40,
        1,
    )
    assert report["failed"][0]["type"] == "SyntaxError"
    assert report["receipt"] == []
    assert 0 < report["busy_share"] <= 1


def test_a_worker_with_missing_operations_ends_with_an_error(
    environment: dict[str, str],
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "rlm_tasks", "worker", "-c", "1"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment, "RLM_OPERATIONS": "no_such_module"},
    )

    assert done.returncode == 1
    assert (
        "Error: RLM_OPERATIONS='no_such_module': no such module on the import path" in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_behind(sent: signal.Signals) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "rlm_tasks", "rlm", "demo"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    own = psutil.Process(demo.pid)
    # The server, the worker, and its two pool processes.
    wait_until(lambda: len(own.children(recursive=True)) >= 4)
    started = own.children(recursive=True)

    demo.send_signal(sent)

    demo.wait(timeout=30)
    wait_until(
        lambda: (
            not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)
        )
    )


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_served_server_answers_until_a_signal(sent: signal.Signals, tmp_path: Path) -> None:
    port = str(embedded.free_port())
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "rlm_tasks",
        "rlm",
        "serve",
        "--port",
        port,
        "--dir",
        str(tmp_path),
    ]
    served = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert served.stdout is not None
    assert served.stdout.readline() == f"redis://127.0.0.1:{port}/0 answers; Ctrl-C ends it.\n"
    with redis.Redis(port=int(port)) as store:
        assert store.ping()
    taken = rlm({}, "serve", "--port", port)
    assert (taken.returncode, f"127.0.0.1:{port} already" in taken.stderr) == (1, True)

    served.send_signal(sent)

    served.wait(timeout=30)
    served.stdout.close()
    with redis.Redis(port=int(port)) as store, pytest.raises(redis.ConnectionError):
        store.ping()


def test_the_demo_refuses_a_folder_without_python_files(tmp_path: Path) -> None:
    done = rlm({}, "demo", "--path", str(tmp_path))

    assert done.returncode == 2
    assert "has no Python files" in done.stderr


def test_the_demo_prints_tables(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "class A:\n    def f(self):\n        return [i for i in range(3) if i]\n", encoding="utf-8"
    )

    done = rlm({}, "demo", "--slots", "1", "--path", str(tmp_path))

    assert done.returncode == 0, done.stderr
    for text in (
        "most complex functions",
        "slots' busy share",
        "speed-up",
        "one.py:2",
        "s on 1 slot\n",
    ):
        assert text in done.stdout


def test_no_text_of_a_job_controls_the_terminal(
    client: Client, environment: dict[str, str]
) -> None:
    controls = "\x1b]0;title\x07\x1b[2J\r\u202e"
    job = client.submit(operation="echo", items=[1])
    job.wait(timeout=20)
    store, keys = client.ledger.store.client, client.ledger.keys.of(job.id)
    root = json.loads(store.hget(keys.nodes, "root") or b"{}")
    store.hset(keys.nodes, "root", json.dumps({**root, "why": controls, "w": controls}))
    error = json.dumps({"type": "E", "message": controls})
    store.hset(keys.job, mapping={"state": "failed", "error": error})

    shows = {**environment, "RLM_SHOW_MESSAGES": "1"}
    for command in (("tree", job.id), ("job", job.id), ("explain", job.id), ("job", controls)):
        ran = rlm(shows, *command)
        shown = ran.stdout + ran.stderr
        assert "]0;title" in shown, "the text itself is shown"
        assert [
            each for each in ("\x1b]", "\x1b[2J", "\x07", "\r", "\u202e") if each in shown
        ] == []
