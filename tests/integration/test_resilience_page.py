"""The examples of docs/resilience.md run as they are written, and print what their comments say."""

from __future__ import annotations

import re
import subprocess
import sys

from rlm_tasks import embedded
from tests.integration.conftest import ROOT

PAGE = (ROOT / "docs" / "resilience.md").read_text(encoding="utf-8")


def test_every_example_prints_what_it_says(server: embedded.Server) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    expected = re.findall(r"print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(expected) >= 20

    done = subprocess.run(
        [sys.executable, "-c", f"url = {server.url!r}\n{code}"],
        env={"RLM_REDIS_URL": server.url, "RLM_NAMESPACE": "page", "PATH": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    # The loop over attempts prints one of its lines twice, in the order of what happens.
    again = expected.index("no route to host")
    expected = [*expected[: again - 1], *["no route to host"] * 2, expected[again - 1], *expected[again + 1 :]]
    assert printed == expected


def test_the_order_of_the_guards_is_told_as_it_is() -> None:
    from rlm_tasks.guards import ORDER

    assert ORDER == ("deadline", "retry", "rate_limit", "breaker", "bulkhead")
    assert "time limit, retry, rate limit, breaker, bulkhead" in PAGE
