"""The demo: measure a folder of Python files with a worker that is started for it.

`cli.demo` calls `platform`, `run` and `compare`, and prints the outcome.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery

from rlm_tasks.celery import configuration, install
from rlm_tasks.client.client import Client
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.operations.code_metrics import python_files
from rlm_tasks.results import JobResult, Progress
from rlm_tasks.settings.environment import settings as environment_settings
from rlm_tasks.settings.model import Settings
from rlm_tasks.testing import embedded, plain_celery

TTL_S = 3600
CHUNKS = (5, 20, 50, 200)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of the demo, with its times."""

    folder: str
    slots: int
    wall_s: float
    result: JobResult

    @property
    def speed_up(self) -> float:
        """Summed item time over wall time."""
        return self.result.metrics.busy_ms / 1000 / self.wall_s

    @property
    def busy_share(self) -> float:
        """The share of the slots' time that items took, 0 to 1."""
        return self.speed_up / self.slots

    def to_dict(self) -> dict[str, Any]:
        """Return report and figures as plain data."""
        return {
            "folder": self.folder,
            "slots": self.slots,
            "wall_s": self.wall_s,
            "speed_up": self.speed_up,
            "busy_share": self.busy_share,
            **self.result.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Compared:
    """The same work in another way."""

    name: str
    wall_s: float
    same_report: bool


@contextlib.contextmanager
def platform(slots: int) -> Iterator[tuple[Client, dict[str, str], Path]]:
    """Run a worker for the demo, on the Redis of RLM_REDIS_URL or on an embedded server.

    Yields a client, the worker's environment and the folder of its logs.
    """
    with contextlib.ExitStack() as stack:
        own = environment_settings()
        url = (
            own.redis_url
            if "redis_url" in own.model_fields_set
            else stack.enter_context(embedded.server()).url
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlm-demo-")))
        environment = {
            "RLM_REDIS_URL": url,
            "RLM_BROKER_URL": url,
            "RLM_RESULT_BACKEND": url,
            "RLM_NAMESPACE": f"rlm-demo-{os.getpid()}",
            "RLM_RESULT_TTL_S": str(TTL_S),
        }
        settings = Settings(
            redis_url=url,
            broker_url=url,
            result_backend=url,
            namespace=environment["RLM_NAMESPACE"],
            result_ttl_s=TTL_S,
        )
        app = install(Celery("rlm_demo", set_as_current=False), settings)
        app.config_from_object(configuration(settings))
        client = stack.enter_context(Client(app))
        client.check()
        stack.enter_context(embedded.worker(environment, log=folder / "worker.log", slots=slots))
        yield client, environment, folder


def run(
    client: Client, folder: Path, slots: int, show: Callable[[Progress], None]
) -> tuple[Outcome, list[str]]:
    """Measure a folder and return the outcome and its files; `show` receives the progress.

    Raises InvalidRequest for a folder without Python files.
    """
    paths = python_files(folder)
    if not paths:
        raise InvalidRequest("--path", str(folder), "has no Python files")
    began = time.perf_counter()
    job = client.submit(
        operation="code_metrics",
        items=paths,
        continue_on_error=True,
        description=f"metrics of {folder}",
    )
    for progress in job.watch():
        show(progress)
    result = job.result()
    return Outcome(str(folder), slots, time.perf_counter() - began, result), paths


def compare(
    environment: dict[str, str], logs: Path, outcome: Outcome, paths: list[str]
) -> Iterator[Compared]:
    """Yield the times of the same work done serially, and by a plain chord for each chunk size."""
    began = time.perf_counter()
    report = plain_celery.measure_serially(paths)
    yield Compared(
        "serial, in one process", time.perf_counter() - began, report == outcome.result.output
    )
    plain_celery.app.conf.update(
        broker_url=environment["RLM_REDIS_URL"], result_backend=environment["RLM_REDIS_URL"]
    )
    with embedded.worker(
        environment,
        log=logs / "plain.log",
        app="rlm_tasks.testing.plain_celery",
        slots=outcome.slots,
    ):
        for chunk in CHUNKS:
            began = time.perf_counter()
            report = plain_celery.measure_by_chord(paths, chunk)
            yield Compared(
                f"plain Celery chord, chunks of {chunk}",
                time.perf_counter() - began,
                report == outcome.result.output,
            )
