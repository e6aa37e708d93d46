"""Stops the server that platforms of tests/unit/harness.py share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit import harness


@pytest.fixture(scope="session", autouse=True)
def stop_servers() -> Iterator[None]:
    """Stop the server at the end, if a test has started it."""
    yield
    harness.SERVERS.close()
