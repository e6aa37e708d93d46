"""The app that sends when a program names none: the app that the platform is installed in.

The app of these tests has its broker in another database than the ledger.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from rlm_tasks.testing import embedded
from tests.integration.conftest import ROOT, environment_of

PACKAGE = {
    "__init__.py": "from bank.celery import app as app\n",
    "celery.py": """
import os
from celery import Celery
from rlm_tasks import install

app = Celery("bank", broker=os.environ["BANK_BROKER"])
app.autodiscover_tasks(["bank"])
install(app)
""",
    "operations.py": """
from rlm_tasks import operation

@operation("bank.double", merge=sum)
def double(item):
    return 2 * item
""",
}


@pytest.fixture(scope="module")
def bank(server: embedded.Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an app with a broker of its own."""
    folder = tmp_path_factory.mktemp("bank")
    (folder / "bank").mkdir()
    for name, text in PACKAGE.items():
        (folder / "bank" / name).write_text(text)
    return environment_of(
        server.url,
        "bank",
        RLM_OPERATIONS="bank.operations",
        BANK_BROKER=server.url.removesuffix("/0") + "/7",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(folder)]),
    )


@pytest.fixture(scope="module")
def working(bank: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A worker of that app."""
    log = tmp_path_factory.mktemp("logs") / "bank.log"
    with embedded.worker(bank, app="bank", log=log, slots=1):
        yield


def run(bank: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the environment of the app."""
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **bank},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(bank["PYTHONPATH"].split(os.pathsep)[1]),
    )


@pytest.mark.usefixtures("working")
def test_a_job_without_a_named_app_goes_to_the_broker_of_the_installed_app(
    bank: dict[str, str],
) -> None:
    code = """
from bank.operations import double
from rlm_tasks import Client
from rlm_tasks.client.client import default_client

print(double.submit([1, 2, 3]).get(timeout=30))
print(Client().execute(operation="bank.double", items=[4], timeout=30).output)
print(default_client().app.main)
"""
    done = run(bank, "-c", code)

    assert done.stdout.split() == ["12", "8", "bank"], done.stderr
    ledger = redis.Redis.from_url(bank["RLM_REDIS_URL"])
    assert not [*ledger.scan_iter("bank:bank.*")], "no message lies where no worker consumes"
    assert not [*ledger.scan_iter("bank:_kombu*")]


def test_the_app_may_be_installed_after_the_first_default_client(bank: dict[str, str]) -> None:
    code = """
import os
from rlm_tasks.client.client import default_client

first = default_client()
print(first.app.main, default_client() is first)
import bank.celery
second = default_client()
print(second.app.main, default_client() is second)
if not (child := os.fork()):
    print(default_client().app.main, default_client() is not second, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    done = run({**bank, "RLM_OPERATIONS": ""}, "-c", code)

    assert sorted(done.stdout.splitlines()) == ["bank True", "bank True", "rlm_tasks True"], (
        done.stderr
    )


def test_the_app_that_operations_import_sends_without_an_import_of_its_own(
    bank: dict[str, str],
) -> None:
    code = "from rlm_tasks.client.client import default_client; print(default_client().app.main)"

    assert run(bank, "-c", code).stdout == "bank\n"


def test_two_installed_apps_are_an_error_that_tells_how_to_choose(bank: dict[str, str]) -> None:
    code = """
import bank.celery
from bank.operations import double
from celery import Celery
from rlm_tasks import Client, InvalidRequest, install

other = install(Celery("shop", set_as_current=False))
for ask in (Client, lambda: double.submit([1])):
    try:
        ask()
    except InvalidRequest as error:
        print(error)
print(Client(other).app.main)
other.close()
print(Client().app.main)
"""
    done = run(bank, "-c", code)

    first, second, named, left = done.stdout.splitlines()
    assert first == second
    assert "'bank', 'shop'" in first
    assert "Client(app)" in first
    assert [named, left] == ["shop", "bank"]


def test_an_app_without_the_platform_is_refused_by_name(bank: dict[str, str]) -> None:
    code = "from celery import Celery; from rlm_tasks import Client; Client(Celery('plain'))"
    done = run(bank, "-c", code)

    assert "InvalidRequest: app='plain': the platform is not installed in it" in done.stderr


def test_doctor_finds_messages_that_no_worker_of_the_app_takes(
    bank: dict[str, str],
) -> None:
    ledger = redis.Redis.from_url(bank["RLM_REDIS_URL"])
    ledger.lpush("bank:bank.high", "a message")
    try:
        done = run(bank, "-m", "celery", "-A", "bank", "rlm", "doctor")
    finally:
        ledger.delete("bank:bank.high")

    said = " ".join(done.stdout.split())
    assert "1 in bank.high" in said
    assert "install(app)" in said
    assert "-A rlm_tasks" not in said
    assert "celery -A bank" in said, "its advice names the app's own command"
