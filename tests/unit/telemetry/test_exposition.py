"""The metrics that a worker exposes: its gauges, and the names that docs/metrics.md lists."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlm_tasks.metrics.declared import DECLARED
from rlm_tasks.telemetry import exposition
from rlm_tasks.telemetry.exposition import WorkerState
from tests.unit.exposed_metrics import IDLE, ExposedMetrics, exposed, folder

__all__ = ["exposed", "folder"]

ROOT = Path(__file__).parents[3]


def test_metrics_of_prometheus_multiprocess_mode_are_exposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(theirs), "PYTHONPATH": str(ROOT)}
    count_theirs = (
        "from prometheus_client import Counter; Counter('theirs_total', 'Theirs.').inc(7)"
    )
    subprocess.run([sys.executable, "-c", count_theirs], env=environment, check=True)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(theirs))

    assert ExposedMetrics(ours)["theirs_total"] == {"": 7}


def test_gauges_show_the_state_of_the_worker(exposed: ExposedMetrics) -> None:
    breakers = {"llm": "open", "mail": "half-open", "search": "closed"}
    exposed.state = WorkerState(
        total=4,
        busy=3,
        draining=False,
        level=2,
        memory_mb=512.5,
        memory_level=1,
        breakers=breakers,
    )

    assert exposed["rlm_slots"] == {"state=busy": 3, "state=free": 1}
    assert exposed["rlm_concurrency_level"] == {"": 3}
    assert exposed["rlm_object_pool_utilization"] == {"": 0.75}
    assert exposed["rlm_memory_usage_mb"] == {"": 512.5}
    assert exposed["rlm_memory_pressure_level"] == {"": 1}
    assert exposed["rlm_pressure_level"] == {"": 2}
    assert exposed["rlm_circuit_breaker_state"] == {
        "service=llm": 2,
        "service=mail": 1,
        "service=search": 0,
    }
    assert exposed["rlm_draining"] == {"": 0}


def test_a_worker_that_drains_or_has_no_pool_has_no_free_slot(exposed: ExposedMetrics) -> None:
    exposed.state = replace(IDLE, draining=True, memory_level=None)
    assert (exposed["rlm_slots"]["state=free"], exposed["rlm_draining"][""]) == (0, 1)
    assert exposed["rlm_memory_pressure_level"] == {}, "it could not be measured"

    exposed.state = replace(IDLE, total=0)
    assert (exposed["rlm_slots"]["state=free"], exposed["rlm_object_pool_utilization"][""]) == (
        0,
        0,
    )


def test_the_page_lists_every_metric_with_its_labels(exposed: ExposedMetrics) -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(rlm_\w+)(?:\{(.*?)\})?`", page, re.MULTILINE))

    assert {name.removesuffix("_total") for name in listed} == {
        name.removesuffix("_total") for name in exposed.families() if name.startswith("rlm_")
    }
    declared = {
        name: ",".join(each.labels) for name, each in DECLARED.items() if name.startswith("rlm_")
    }
    assert {name: listed[name] for name in declared} == declared


def test_metrics_exist_under_their_promised_names() -> None:
    named = (
        "object_pool_utilization memory_usage_mb memory_pressure_level execution_time_ms "
        "cache_hit_rate concurrency_level error_rate"
    )
    named += " circuit_breaker_state recovery_success_rate"

    assert {f"rlm_{each}" for each in named.split()} <= {*exposition.GAUGES, *DECLARED}
