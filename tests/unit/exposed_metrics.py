"""Metric files of this process, and what a worker exposes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rlm_tasks.engine.counts import count_node
from rlm_tasks.ledger.records import Report
from rlm_tasks.metrics import slot_files
from rlm_tasks.telemetry import exposition
from rlm_tasks.telemetry.exposition import WorkerState

IDLE = WorkerState(total=4, busy=0, draining=False, level=0, memory_mb=100.0, memory_level=0)


REPORT = Report(
    mid=100,
    done=90,
    failed=[1, 2, 3, 4, 5, 6],
    skipped=[7, 8, 9, 10],
    busy_us=480_000,
    peak_kb=2048,
)


class ExposedMetrics:
    """The exposed metrics of a folder: samples by name and labels."""

    def __init__(self, folder: Path) -> None:
        self.state, self.now = IDLE, 0.0
        self._registry = exposition.registry(folder, lambda: self.state, lambda: self.now)

    def families(self) -> set[str]:
        """Return the names in TYPE lines."""
        return set(
            re.findall(r"^# TYPE (\S+)", generate_latest(self._registry).decode(), re.MULTILINE)
        )

    def __getitem__(self, sample: str) -> dict[str, float]:
        families = text_string_to_metric_families(generate_latest(self._registry).decode())
        found = [each for family in families for each in family.samples if each.name == sample]
        return {
            ",".join(f"{name}={value}" for name, value in sorted(each.labels.items())): each.value
            for each in found
        }


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which this process counts."""
    slot_files.begin(tmp_path)
    yield tmp_path
    slot_files.end()


@pytest.fixture
def exposed(folder: Path) -> ExposedMetrics:
    """The exposed metrics of that folder."""
    return ExposedMetrics(folder)


def count(
    report: Report,
    *,
    hi: int = 100,
    recovered: int = 0,
    given_up: int = 0,
    validating: bool = False,
) -> None:
    count_node(
        "sum", report, hi, took_s=0.5, recovered=recovered, given_up=given_up, validating=validating
    )
