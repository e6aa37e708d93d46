"""The README's own commands start the whole platform, and its example's job is found wherever one
would look for it.
"""

from __future__ import annotations

import json
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of
from tests.integration.flowers import Flower
from tests.integration.page_reader import reader_of
from tests.integration.pages import PAGES, Block, read
from tests.integration.traced_app import collector
from tests.support import wait_until

LOOK = "celery -A rlm_tasks rlm"


def test_the_readmes_job_is_in_flower_the_metrics_the_command_line_and_the_trace(
    server: embedded.Server, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        receiver = stack.enter_context(collector())
        reader, ports = reader_of("README.md", server.url, tmp_path, stack, **receiver.environment)
        stack.enter_context(reader)

        reader.carry_out(read("README.md", PAGES["README.md"]))

        client = stack.enter_context(client_of({**reader.environment, "RLM_OPERATIONS": ""}))
        [job] = client.jobs()
        lines = len((reader.folder / "example.py").read_text().splitlines())

        # the command line
        assert job.id in (reader.printed or "")
        reader.carry_out(
            [Block("look", 1, "sh", "", f"{LOOK} job {job.id} --json\n{LOOK} status --json\n")]
        )
        told, status = map(json.loads, (reader.printed or "").splitlines())
        assert (told["status"], told["done"], told["failed"], told["trace_id"]) == (
            "succeeded",
            lines,
            0,
            job.trace_id,
        )
        assert (status["monitored"], len(status["hosts"])) == (True, 1)

        # Flower
        flower = Flower(f"http://127.0.0.1:{ports[5555]}", 0)
        shown = json.dumps(flower.data("/rlm/jobs"))
        assert job.id in shown
        assert "succeeded" in json.dumps(flower.data(f"/rlm/job/{job.id}"))
        told_of = f'rlm_operation_items{{operation="line_lengths",outcome="done"}} {float(lines)}\n'
        wait_until(lambda: told_of in flower.get("/metrics")[1])

        # the worker's metrics and health
        port = ports[8000]
        assert (
            f'rlm_items_total{{operation="line_lengths",outcome="done"}} {float(lines)}\n'
            in got(port, "metrics")
        )
        assert json.loads(got(port, "health"))["status"] == "ok"

        # the trace
        nodes = {node.id for node in job.tree()} - {"merge"}
        wait_until(
            lambda: nodes <= {each.about.get("rlm.node_id") for each in receiver.of(job.trace_id)}
        )
        assert "job line_lengths" in {each.name for each in receiver.of(job.trace_id)}


def got(port: int, path: str) -> str:
    """Return what a worker answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
        return str(answer.read().decode())
