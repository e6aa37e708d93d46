"""Draw the pictures of Flower's pages, docs/flower-*.png: ``make pictures``.

It starts a server, a worker with an embedded beat, Flower and Chromium.  The worker gets a minute
of an imaginary shop's work, so that the pages have content.  Then everything is stopped.  Begin
with `main`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from playwright.sync_api import Browser

from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate
from resilience.degradation import Level
from rlm_tasks import Adaptive, Context, operation
from rlm_tasks.testing import embedded
from tests.browser.chromium import chromium
from tests.integration.flowers import BEAT, USER, Flower, flower
from tests.support import wait_until

if TYPE_CHECKING:
    from rlm_tasks import Client, Job

HERE = Path(__file__).parent
MB = 2**20
SETTINGS = {
    "RLM_NAMESPACE": "shop",
    "RLM_OPERATIONS": "docs.pictures",
    "RLM_PRESSURE__MAX_MEMORY_MB": "1000",  # the reports fill most of it
    "RLM_PRESSURE__MONITOR_S": "1",
    "RLM_PRESSURE__RELEASE_S": "3",
    "RLM_ADMISSION__OVERLOAD": "delay",  # the machine may be under pressure already
    "PYTHONPATH": str(HERE.parent),
}
LOOKS = 30
"""Samples that the monitor takes before the pictures: then the reports raise no level any more."""
TOKENS = {"requests": 1, "tokens": 120}


class Shot(NamedTuple):
    """One picture: its page, its size in pixels and its theme."""

    page: str
    width: int = 1200
    height: int = 720
    theme: Literal["light", "dark"] = "light"


SHOTS = {
    "jobs": Shot("jobs", height=960),
    "job": Shot("job", height=1280),
    "dark": Shot("job", theme="dark"),
    "narrow": Shot("jobs", width=390, height=800),
    "breakers": Shot("breakers", height=540),
    "limits": Shot("limits", height=560),
    "queues": Shot("queues", height=580),
    "pressure": Shot("pressure", height=1000),
}


# --- the shop's work --------------------------------------------------------------------------


@operation
def thumbnail(image: int) -> None:
    """Wait as if for a picture; every 23rd cannot be read."""
    time.sleep(0.01)
    if image % 23 == 0:
        raise ValueError("the picture is truncated")


@operation
def embed(product: int, ctx: Context) -> int:
    """Index as many words of a product as pressure allows; one in ninety has no text."""
    time.sleep(0.02)
    if product % 90 == 7:
        raise LookupError("the product has no text")
    return ctx.limit(200)


@operation
def report(megabytes: int) -> int:
    """Hold pages in memory for a while."""
    pages = b"x" * (megabytes * MB)
    time.sleep(3)
    return len(pages)


@operation(
    service="llm",
    rate_limit={"requests": Rate(60, per_s=60), "tokens": Rate(9000, per_s=60)},
    cost=lambda _: TOKENS,
)
def summarise(review: int) -> None:
    """Ask a model whose provider allows sixty calls a minute."""


@operation(
    service="payments", breaker=BreakerConfig(failure_threshold=3, recovery_timeout_s=300), retry=5
)
def charge(order: int) -> None:
    """Call a service that is down."""
    raise ConnectionError("payments is down")


@operation(service="printer", bulkhead=2)
def label(parcel: int) -> None:
    """Use one of two printers."""
    time.sleep(0.5)


EARLY: tuple[dict[str, Any], ...] = (
    {
        "operation": "thumbnail",
        "description": "Thumbnails, autumn",
        "items": range(400),
        "continue_on_error": True,
    },
    {"operation": "thumbnail", "description": "Thumbnails of one supplier", "items": [46, 1, 2, 3]},
    {"operation": "summarise", "description": "Reviews of last week", "items": range(500)},
    {
        "operation": "charge",
        "description": "Orders of 21 November",
        "items": range(40),
        "chunk_size": 10,
    },
    {
        "operation": "thumbnail",
        "description": "Thumbnails, archive",
        "items": range(8000),
        "chunk_size": 100,
        "continue_on_error": True,
        "priority": "low",
    },
    {
        "operation": "report",
        "description": "Report of the year",
        "items": [250, 600],
        "type": "sequential",
        "priority": "critical",
    },
)
INDEX: dict[str, Any] = {
    "operation": "embed",
    "description": "Search index, nightly",
    "items": range(20_000),
    "continue_on_error": True,
    "strategy": Adaptive(target_execution_time_ms=1500),
    "priority": "high",
}
LABELS: dict[str, Any] = {
    "operation": "label",
    "items": range(300),
    "chunk_size": 50,
    "priority": "critical",
    "preempt_lower_priority": False,
}


def work(client: Client) -> Job:
    """Submit the shop's jobs; return the one with the most to show."""
    client.create_circuit_breaker("search").close()
    client.create_circuit_breaker("mail", failure_threshold=1).half_open()
    for fields in EARLY:
        client.submit(**fields)
    wait_until(lambda: client.status().level != "normal")
    index = client.submit(**INDEX)
    client.submit(**LABELS, description="Labels, second shift")
    client.submit(**LABELS, description="Labels, wrong printer").cancel()
    wait_until(lambda: Level[client.status().level.upper()] >= Level.HIGH, 60)
    wait_until(lambda: len(client.pressure.history(LOOKS)) == LOOKS, 60)
    return index


# --- pictures ---------------------------------------------------------------------------------


@contextmanager
def shop(folder: Path) -> Iterator[tuple[Client, Flower]]:
    """Run the platform and a Flower for the length of a block."""
    with embedded.server() as server:
        environment = {**SETTINGS, "RLM_REDIS_URL": server.url}
        os.environ.update(environment)
        from rlm_tasks import Client  # importing it reads the environment

        with (
            embedded.worker(
                environment,
                log=folder / "worker.log",
                slots=4,
                options=[*BEAT, "-n", "celery@shop"],
            ),
            flower(environment, folder / "flower.log", f"--basic_auth={USER}") as own,
            Client() as client,
        ):
            yield client, own


def draw(browser: Browser, url: str, name: str, shot: Shot, into: Path) -> None:
    """Write the picture of a page, after its first rows have appeared."""
    user, password = USER.split(":")
    page = browser.new_page(
        viewport={"width": shot.width, "height": shot.height},
        color_scheme=shot.theme,
        http_credentials={"username": user, "password": password},
    )
    page.goto(url)
    page.locator("#rlm-tables tbody tr").first.wait_for()
    page.screenshot(path=into / f"flower-{name}.png", animations="disabled")
    page.close()


def main(into: Path = HERE) -> None:
    """Draw all pictures."""
    embedded.clean_up_on_sigterm()
    with (
        chromium() as browser,
        tempfile.TemporaryDirectory() as folder,
        shop(Path(folder)) as (client, own),
    ):
        index = work(client)
        client.pressure.force("critical")
        for name, shot in SHOTS.items():
            path = f"job/{index.id}" if shot.page == "job" else shot.page
            draw(browser, f"{own.url}/rlm/{path}", name, shot, into)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
