"""Calls to a model without the platform, so many in a second: ``python -m tests.faults.by_hand URL
RATE``, until it is killed.

What such calls cost a machine is the same whoever makes them; what is beyond that is the
platform's."""

from __future__ import annotations

import asyncio
import sys

from openai import AsyncOpenAI


async def call(url: str, rate: float) -> None:
    """Ask for sums, whether the answers before have come or not."""
    client, asked = (
        AsyncOpenAI(base_url=url, api_key="any", max_retries=0),
        set[asyncio.Task[object]](),
    )
    for number in range(sys.maxsize):
        prompt = f"What is the sum of these two? SUM: {number} {2 * number}"
        question = client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": prompt}], max_tokens=4
        )
        asked.add(task := asyncio.ensure_future(question))
        task.add_done_callback(asked.discard)
        await asyncio.sleep(1 / rate)


if __name__ == "__main__":
    asyncio.run(call(sys.argv[1], float(sys.argv[2])))
