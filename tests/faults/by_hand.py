"""Call a model without the platform: ``python -m tests.faults.by_hand URL RATE``, until killed.

`tests.faults.llm` runs it to measure the load of RATE calls per second alone.  Any load beyond that
comes from the platform."""

from __future__ import annotations

import asyncio
import sys

from openai import AsyncOpenAI


async def call(url: str, rate: float) -> None:
    """Send requests at a steady rate per second, without a wait for earlier answers."""
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
