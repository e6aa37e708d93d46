"""Fixtures of the browser tests: one server, one worker with beat, one Flower and one browser.

All tests share them; each test opens its own tab."""

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
    """The environment of the worker and of Flower; pressure is on, and tests force its level."""
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
        own.pressure.force("normal", 3600)  # load on this machine must not change the level
        yield own


@pytest.fixture(scope="session")
def flower_site(platform: Client, environment: dict[str, str], logs: Path) -> Iterator[Flower]:
    """A Flower behind a login and under a prefix."""
    with flower(environment, logs / "flower.log", f"--basic_auth={USER}", prefix=PREFIX) as own:
        yield own


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The browser.  Without one the test run ends with a message that says how to install it."""
    with ExitStack() as stack:
        try:
            own = stack.enter_context(chromium())
        except NoChromium as error:
            pytest.exit(str(error), returncode=1)
        yield own


@pytest.fixture
def open_page(browser: Browser, flower_site: Flower) -> Iterator[Callable[..., Page]]:
    """A function that opens a tab on Flower with a login.  An error on the page fails the test."""
    with ExitStack() as stack:
        errors: list[str] = []

        def open_page(url: str = flower_site.url, **options: Any) -> Page:
            context = stack.enter_context(
                browser.new_context(base_url=f"{url}/", **{"http_credentials": LOGIN, **options})
            )
            page = context.new_page()
            watch(page, errors)
            return page

        yield open_page
        assert errors == []


def watch(page: Page, errors: list[str]) -> None:
    """Add each script error, failed request and error status of a page to `errors`."""

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # the test opened another page
            errors.append(f"{request.url}: {request.failure}")

    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", failed)
    page.on(
        "response",
        lambda answer: (
            errors.append(f"{answer.url}: {answer.status}") if answer.status >= 400 else None
        ),
    )


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """A tab with the browser's default options."""
    return open_page()


@pytest.fixture
def hold(platform: Client, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A function that submits a job of held items.

    An item ends when `tmp_path` has a file of its name.  The other items end with the test.
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
def normal_again(platform: Client) -> Iterator[None]:
    """After the test, force the normal level again, as for all other tests."""
    yield
    platform.pressure.force("normal", 3600)
