"""One server, one worker with a beat within, one Flower and one browser for all tests; each test
has a tab of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from rlm_tasks import Client, Job
from rlm_tasks.testing import embedded
from tests.browser.chromium import NoChromium, chromium
from tests.integration.conftest import client_of, environment_of, logs, server
from tests.integration.flowers import BEAT, USER, Flower, flower

__all__ = ["logs", "server"]

LOGIN = dict(zip(("username", "password", "send"), (*USER.split(":"), "always"), strict=True))
PREFIX = "/ops"

expect.set_options(timeout=20_000)


@pytest.fixture(scope="session")
def environment(server: embedded.Server) -> dict[str, str]:
    """The environment of the worker and of Flower: pressure is on, and decided by the tests."""
    modules = "tests.browser.ops,tests.integration.ops,tests.integration.guarded_ops"
    return environment_of(
        server.url,
        "browser",
        RLM_PRESSURE__ENABLED="1",
        RLM_PRESSURE__MONITOR_S="1",
        RLM_OPERATIONS=modules,
    )


@pytest.fixture(scope="session")
def platform(environment: dict[str, str], logs: Path) -> Iterator[Client]:
    """A client of the worker."""
    with (
        embedded.worker(environment, log=logs / "browser.log", options=BEAT),
        client_of(environment) as own,
    ):
        own.pressure.force("normal", 3600)  # whatever else this machine does
        yield own


@pytest.fixture(scope="session")
def shown(platform: Client, environment: dict[str, str], logs: Path) -> Iterator[Flower]:
    """A Flower behind a login and under a prefix."""
    with flower(environment, logs / "flower.log", f"--basic_auth={USER}", prefix=PREFIX) as own:
        yield own


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The browser; without one the tests end, and say how to get it."""
    with ExitStack() as stack:
        try:
            own = stack.enter_context(chromium())
        except NoChromium as error:
            pytest.exit(str(error), returncode=1)
        yield own


@pytest.fixture
def open_page(browser: Browser, shown: Flower) -> Iterator[Callable[..., Page]]:
    """Return a new tab on Flower, of somebody who has logged in; whatever goes wrong on it fails
    the test.
    """
    with ExitStack() as stack:
        wrong: list[str] = []

        def open_page(url: str = shown.url, **options: Any) -> Page:
            context = stack.enter_context(
                browser.new_context(base_url=f"{url}/", **{"http_credentials": LOGIN, **options})
            )
            page = context.new_page()
            watch(page, wrong)
            return page

        yield open_page
        assert wrong == []


def watch(page: Page, wrong: list[str]) -> None:
    """Note each error of a page's scripts, and each request that is not answered well."""

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left
            wrong.append(f"{request.url}: {request.failure}")

    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", failed)
    page.on(
        "response",
        lambda answer: (
            wrong.append(f"{answer.url}: {answer.status}") if answer.status >= 400 else None
        ),
    )


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """A tab as most people have it."""
    return open_page()


@pytest.fixture
def hold(platform: Client, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Submit a job whose items end as files of their names appear in `tmp_path`; those that are
    left end with the test.
    """
    jobs: list[Job] = []

    def hold(items: int, **fields: Any) -> Job:
        params = {"folder": str(tmp_path)}
        jobs.append(
            platform.submit(
                operation="held", items=range(items), type="sequential", params=params, **fields
            )
        )
        return jobs[-1]

    yield hold
    (tmp_path / "all").touch()
    for job in jobs:
        job.wait(timeout=20)


@pytest.fixture
def calm(platform: Client) -> Iterator[None]:
    """Leave no drill behind but the one that all tests run under."""
    yield
    platform.pressure.force("normal", 3600)
