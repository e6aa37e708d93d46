"""Every fenced block of every page of docs/ does what it says; new pages are included.

The README has a separate test, test_whole_stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rlm_tasks.testing import embedded
from tests.integration.page_reader import reader_of
from tests.integration.pages import PAGES, Wrong, read

LIGHT_FIRST = sorted(
    PAGES.keys() - {"README.md"},
    key=lambda name: (PAGES[name].count("\n```sh"), PAGES[name].count("\n```python"), name),
)


@pytest.fixture(scope="module")
def stopping() -> Iterator[ExitStack]:
    """The stack that waits for the end of processes, while other pages are read."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("name", LIGHT_FIRST)
def test_every_block_of_the_page_does_what_it_says(
    name: str, server: embedded.Server, stopping: ExitStack, tmp_path: Path
) -> None:
    with reader_of(name, server.url, tmp_path, stopping)[0] as reader:
        try:
            reader.carry_out(read(name, PAGES[name]))
        except Wrong as error:
            raise pytest.fail.Exception(str(error), pytrace=False) from None
