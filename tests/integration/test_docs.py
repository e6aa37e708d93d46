"""Programs of docs/examples run as written, links are not broken, and `make help` is complete."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlm_tasks.testing import embedded
from tests.integration.conftest import ROOT, environment_of
from tests.integration.pages import PAGES, read

EXAMPLES = {
    "docs/examples/word_count.py": ["10000", "nodes"],
    "docs/examples/partial_failures.py": [
        "[1, 2, 4] 25% failed",
        "2 ValueError invalid literal",
        "1 failed again",
    ],
    "docs/examples/rate_limited.py": ["70210 0 failed", "closed"],
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_as_written(
    example: str, server: embedded.Server, tmp_path: Path, logs: Path
) -> None:
    name = Path(example).stem
    shutil.copy(ROOT / example, tmp_path)
    environment = environment_of(
        server.url, f"docs-{name}", RLM_OPERATIONS=name, PYTHONPATH=str(tmp_path)
    )

    with embedded.worker(environment, log=logs / f"{name}.log"):
        done = subprocess.run(
            [sys.executable, f"{name}.py"],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert done.returncode == 0, done.stderr
    for expected in EXAMPLES[example]:
        assert expected in done.stdout


def test_the_model_example_runs_alone() -> None:
    question = "Which functions return the index where to insert an item into a sorted list?"
    program = [
        sys.executable,
        str(ROOT / "docs/examples/ask_docstrings.py"),
        question,
        "--items",
        "400",
    ]
    own = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}

    done = subprocess.run(program, env=own, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert "llm.ask over 400 items" in done.stdout
    assert "Return the index where to insert item x in list a, assuming a is sorted." in done.stdout
    assert "bisect.bisect" in done.stdout
    assert "400 texts read" in done.stdout


def test_the_readmes_first_example_is_short() -> None:
    first = read("README.md", PAGES["README.md"])[0]

    assert first.language == "python"
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 12


def test_links_in_the_documentation_are_not_broken() -> None:
    broken = [
        f"{name}: {target}"
        for name, text in PAGES.items()
        for target in re.findall(r"\]\(([^)#:]+)\)", text)
        if not ((ROOT / name).parent / target).exists()
    ]
    assert broken == []


def test_the_makefile_lists_every_target() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout

    assert targets == set(re.findall(r"make ([a-z-]+)", listed))
    assert {
        "help",
        "demo",
        "test",
        "check",
        "bench",
        "worker",
        "beat",
        "flower",
        "lint",
        "types",
        "docs",
        "clean",
    } <= targets
