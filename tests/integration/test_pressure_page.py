"""docs/pressure.md matches the code: its tables, its picture, and its words about outages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from resilience.degradation import CONSTRAINTS, THRESHOLDS, Level
from rlm_tasks import StoreUnavailable, create_resource_manager
from rlm_tasks.testing import embedded
from scheduler.admission import SHED_FROM
from scheduler.alerts import RULES
from tests.integration.conftest import ROOT, client_of, environment_of

PAGE = (ROOT / "docs" / "pressure.md").read_text(encoding="utf-8")


def test_executor_hooks_work_while_redis_is_away() -> None:
    nowhere = f"redis://127.0.0.1:{embedded.free_port()}/0"
    with client_of(environment_of(nowhere, "page-away")) as client:
        manager, _ = create_resource_manager(client=client)

        assert manager.current_pressure == "elevated"
        with manager.executing("D3-Q3"):
            pass
        with pytest.raises(StoreUnavailable):
            manager.get_executor_metrics("D3-Q3")


def test_the_table_of_levels_matches_the_code() -> None:
    begins = dict(re.findall(r"^\| (\w+) \| (\d+) % \|", PAGE, re.MULTILINE))
    assert [float(begins[level.label]) for level in Level if level] == list(THRESHOLDS)

    limits = [
        int(CONSTRAINTS[level].entity_limit_factor * 100)
        for level in (Level.ELEVATED, Level.CRITICAL, Level.EMERGENCY)
    ]
    assert limits == [80, 50, 30]
    assert [f"look at {limit} %" in PAGE for limit in limits] == [True] * 3
    assert SHED_FROM == {"low": Level.HIGH, "normal": Level.CRITICAL, "high": Level.EMERGENCY}


def test_the_table_of_alerts_names_every_rule() -> None:
    named = set(
        re.findall(
            r"^\| `([a-z.]+)`", PAGE.partition("| alert |")[2].partition("\n\n")[0], re.MULTILINE
        )
    )
    assert named == {
        name if not name.startswith("pressure.") else "pressure.changed" for name in RULES
    }
    minutes = [RULES[f"pressure.{level.label}"].interval_s / 60 for level in Level if level]
    assert minutes == [10, 7, 4, 2]
    assert "| 10, 7, 4, 2 min |" in PAGE


def test_the_program_of_the_picture_records_a_run_and_ends_its_processes(
    tmp_path: Path,
) -> None:
    recorded = tmp_path / "run.json"
    program = [
        sys.executable,
        str(ROOT / "docs" / "examples" / "under_pressure.py"),
        "--out",
        str(recorded),
        "--seconds",
        "6",
    ]

    environment = {**os.environ, "STARTED_FROM": str(tmp_path)}
    done = subprocess.run(
        program,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    seen = json.loads(recorded.read_text(encoding="utf-8"))
    assert [row["phase"] for row in seen["rows"]] == ["calm", "overload", *["recovery"] * 4]
    assert sum(row["items"]["digest"] for row in seen["rows"]) > 0
    assert len(seen["critical_waits_s"]) == 3
    assert all(f"{phase}:" in done.stdout for phase in ("calm", "overload", "recovery"))
    assert started_from(tmp_path) == []


def started_from(folder: Path) -> list[str]:
    """Return the ids of processes that this folder's test has started, by an inherited variable."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"STARTED_FROM={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
        except OSError:  # the process has ended, or belongs to another user
            continue
    return found
