"""Measure jobs against a server of two slots, and the same calls by a script with a semaphore.

Run it as ``python -m tests.bench.in_flight``.  Both sides ask one server, one after the other.  The
script tries several sizes of its semaphore; the best one is the measure.  The job gets no size.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from rlm_tasks import Client
from rlm_tasks.testing import embedded, fake_provider
from tests.integration.conftest import client_of, environment_of

SLOTS, LATENCY_S, TIMEOUT_S, PROCESSES, CALLS, TURNS = 2, 0.2, 3.0, 4, 60, 3
SEMAPHORES = (1, 2, 3, 4, 8)


async def by_script(base_url: str, semaphore: int) -> float:
    """Return the calls a second of one process that keeps a fixed number in flight."""
    permits = asyncio.Semaphore(semaphore)
    async with AsyncOpenAI(api_key="any", base_url=base_url, max_retries=0) as client:

        async def call(number: int) -> None:
            async with permits:
                await client.chat.completions.create(
                    model="any",
                    messages=[{"role": "user", "content": f"SUM: {number}"}],
                    max_tokens=20,
                )

        await call(-1)  # it opens a connection
        began = time.perf_counter()
        await asyncio.gather(*(call(number) for number in range(CALLS)))
        return CALLS / (time.perf_counter() - began)


def by_job(client: Client, turn: int) -> float:
    """Return the calls a second of a job."""
    began = time.perf_counter()
    client.execute(
        operation="llm.map",
        items=[str(turn * CALLS + number) for number in range(CALLS)],
        params={"prompt": "SUM: {item}", "max_tokens": 20},
        timeout=120,
    )
    return CALLS / (time.perf_counter() - began)


def main() -> None:
    """Print the calls a second of each side, and the ratio to the best semaphore."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        server = stack.enter_context(embedded.server())
        provider = stack.enter_context(fake_provider.running(latency=LATENCY_S, slots=SLOTS))
        environment = environment_of(
            server.url,
            "bench",
            OPENAI_API_KEY="any",
            RLM_LLM__ENDPOINTS=json.dumps([{"name": "own", "base_url": provider.base_url}]),
            RLM_LLM__TOKENS="1e8",
            RLM_LLM__REQUESTS="1e6",
            RLM_LLM__TIMEOUT_S=str(TIMEOUT_S),
        )
        client = stack.enter_context(client_of(environment))
        stack.enter_context(
            embedded.worker(environment, log=folder / "worker.log", slots=PROCESSES)
        )
        found = {size: asyncio.run(by_script(provider.base_url, size)) for size in SEMAPHORES}
        provider.reset()
        ours = [by_job(client, turn) for turn in range(TURNS)]
        report = provider.report()
    table = Table("calls", "calls a second", "to the best")
    best = max(found.values())
    for size, rate in found.items():
        table.add_row(f"script, semaphore of {size}", f"{rate:.2f}", f"{rate / best:.2f}")
    for turn, rate in enumerate(ours, 1):
        table.add_row(f"job {turn}, {PROCESSES} processes", f"{rate:.2f}", f"{rate / best:.2f}")
    table.add_row("median of jobs", f"{median(ours):.2f}", f"{median(ours) / best:.2f}")
    Console().print(table)
    Console().print(
        f"{report['requests']} calls for {TURNS * CALLS} items, "
        f"at most {report['most_in_flight']} in flight"
    )


if __name__ == "__main__":
    main()
