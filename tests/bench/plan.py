"""Measure the time to plan model calls over a million items, and to count their tokens by hand.

Run it as ``python -m tests.bench.plan``; the median of several turns counts.  A plan calls no
provider, so none is started."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rlm_tasks import Lines
from rlm_tasks.llm.wire.answers import estimated_tokens
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of

ITEMS = 1_000_000
TURNS = 7
PROMPT = (
    "Summarise the following record in one sentence, and name the people and the places"
    " that it mentions: {item}"
)


def median_ms(run: Callable[[], object]) -> float:
    """Return the median time of TURNS calls, in milliseconds."""
    took = []
    for _ in range(TURNS):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return median(took) * 1000


def main() -> None:
    """Print a line for each way to plan."""
    items = [
        f"record {number}: " + "a few words about something " * (number % 7)
        for number in range(ITEMS)
    ]
    with (
        TemporaryDirectory() as folder,
        embedded.server() as server,
        client_of(environment_of(server.url, "bench")) as client,
    ):
        file = Path(folder) / "items.txt"
        file.write_text("\n".join(items))
        params = {"prompt": PROMPT}
        ways: dict[str, Callable[[], object]] = {
            "llm.map": lambda: client.plan(operation="llm.map", items=items, params=params),
            "llm.map_reduce": lambda: client.plan(
                operation="llm.map_reduce", items=items, params=params
            ),
            "llm.ask": lambda: client.plan(
                operation="llm.ask", items=items, params={"question": "Who was where?"}
            ),
            "llm.map, lines of a file": lambda: client.plan(
                operation="llm.map", items=Lines(file), params=params
            ),
            "sum of a range": lambda: client.plan(operation="sum", items=range(ITEMS)),
            "by hand: count the tokens of all": lambda: sum(map(estimated_tokens, items)),
        }
        for name, run in ways.items():
            print(f"{name:40} {median_ms(run):8.1f} ms for {ITEMS:,} items")


if __name__ == "__main__":
    main()
