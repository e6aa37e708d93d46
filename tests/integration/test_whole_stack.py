"""The README's commands start the whole platform, and every view shows the example's job.

The views are Flower, the metrics, the command line and the trace."""

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

RLM = "celery -A rlm_tasks rlm"


def test_the_readmes_job_appears_in_every_view(server: embedded.Server, tmp_path: Path) -> None:
    with ExitStack() as stack:
        receiver = stack.enter_context(collector())
        reader, ports = reader_of("README.md", server.url, tmp_path, stack, **receiver.environment)
        stack.enter_context(reader)

        reader.carry_out(read("README.md", PAGES["README.md"]))

        client = stack.enter_context(client_of({**reader.environment, "RLM_OPERATIONS": ""}))
        [job] = client.jobs()
        lines = len((reader.folder / "example.py").read_text().splitlines())

        # the command line
        assert job.id[:8] in (reader.printed or "")
        reader.carry_out(
            [Block("commands", 1, "sh", "", f"{RLM} job {job.id} --json\n{RLM} status --json\n")]
        )
        printed, status = map(json.loads, (reader.printed or "").splitlines())
        assert (printed["status"], printed["done"], printed["failed"], printed["trace_id"]) == (
            "succeeded",
            lines,
            0,
            job.trace_id,
        )
        assert (status["monitored"], len(status["hosts"])) == (True, 1)

        # Flower
        flower = Flower(f"http://127.0.0.1:{ports[5555]}", 0)
        assert job.id in json.dumps(flower.data("/rlm/jobs"))
        assert "succeeded" in json.dumps(flower.data(f"/rlm/job/{job.id}"))
        metric = f'rlm_operation_items{{operation="line_lengths",outcome="done"}} {float(lines)}\n'
        wait_until(lambda: metric in flower.get("/metrics")[1])

        # the worker's metrics and health
        port = ports[8000]
        assert (
            f'rlm_items_total{{operation="line_lengths",outcome="done"}} {float(lines)}\n'
            in body_of(port, "metrics")
        )
        assert json.loads(body_of(port, "health"))["status"] == "ok"

        # the trace
        nodes = {node.id for node in job.tree()} - {"merge"}
        wait_until(
            lambda: nodes <= {each.about.get("rlm.node_id") for each in receiver.of(job.trace_id)}
        )
        assert "job line_lengths" in {each.name for each in receiver.of(job.trace_id)}


def body_of(port: int, path: str) -> str:
    """Return the body of a worker's answer."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
        return str(answer.read().decode())
