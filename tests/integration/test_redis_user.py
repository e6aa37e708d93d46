"""The rights of a user of Redis in docs/deployment.md: a worker and a client need no others."""

from __future__ import annotations

import re
from pathlib import Path

import redis

from rlm_tasks import Binary
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.integration.pages import PAGES
from tests.support import wait_until

NAMESPACE = "few"


def rights() -> list[str]:
    """Return the words of the page's command, for the namespace of this test."""
    block = re.search(r"```text\n(ACL SETUSER .*?)```", PAGES["docs/deployment.md"], re.DOTALL)
    assert block is not None
    return block[1].replace("rlm", NAMESPACE).split()


def test_the_documented_rights_of_a_user_of_redis_suffice(tmp_path: Path) -> None:
    with embedded.server() as server:
        admin = redis.Redis.from_url(server.url)
        admin.execute_command(*rights())
        url = server.url.replace("redis://", f"redis://{NAMESPACE}:PASSWORD@")
        environment = environment_of(url, NAMESPACE, RLM_PRESSURE__MONITOR_S="0.5")
        options = ["-E", "-B", "-s", str(tmp_path / "schedule"), "-S", "celery.beat:Scheduler"]
        with (
            embedded.worker(
                environment, log=tmp_path / "worker.log", slots=2, options=options
            ) as worker,
            client_of(environment) as client,
        ):
            job = client.submit(
                operation="sum",
                items=range(20_000),
                priority="critical",
                strategy=Binary(min_chunk_size=2_000),
            )
            assert job.get(timeout=30) == 199_990_000
            assert client.app.control.inspect(timeout=5).ping()
            wait_until(lambda: client.status().monitored)
            assert client.health_check(detailed=True)["status"] == "ok"
            assert worker.poll() is None
        denied = {each["object"] for each in admin.acl_log()}

    assert denied <= {"config|get"}, "the doctor's question, which it can do without"
