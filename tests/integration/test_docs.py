"""The README's example and every example of the docs run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlm_tasks import embedded
from tests.integration.conftest import ROOT, environment_of

EXAMPLES = {
    "README.md": ["succeeded", "nodes open"],
    "docs/examples/word_count.py": ["10000", "nodes"],
    "docs/examples/partial_failures.py": ["[1, 2, 4] 25% failed", "2 ValueError invalid literal", "1 failed again"],
    "docs/examples/rate_limited.py": ["70210 0 failed", "closed"],
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_as_written(example: str, server: embedded.Server, tmp_path: Path, logs: Path) -> None:
    text = (ROOT / example).read_text(encoding="utf-8")
    name = "example"
    if example.endswith(".md"):
        found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
        assert found is not None
        text = found[1]
        assert len([line for line in text.splitlines() if line.strip()]) <= 12
    else:
        name = Path(example).stem
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    environment = environment_of(server.url, f"docs-{name}", RLM_OPERATIONS=name, PYTHONPATH=str(tmp_path))

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


def test_links_of_the_documentation_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_makefile_lists_every_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert targets == set(re.findall(r"make ([a-z]+)", listed))
    assert {"help", "demo", "test", "check", "bench", "worker", "beat", "flower", "lint", "types", "docs", "clean"} <= targets
