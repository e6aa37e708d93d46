"""The site has every page in its navigation and every public name in its reference.

`make docs` builds it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import resilience
import rlm_tasks
import scheduler

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DIRECTIVES = [
    name
    for page in sorted((DOCS / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
PUBLIC = [
    f"{package.__name__}.{name}"
    for package in (rlm_tasks, resilience, scheduler)
    for name in getattr(package, "__all__", ())
]


class Plain(yaml.SafeLoader):
    """A YAML loader that ignores the tags of mkdocs.yml."""


Plain.add_multi_constructor("", lambda *_: None)


def pages_of(nav: Any) -> Iterator[str]:
    """Yield the pages of a part of the navigation."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages_of(part)


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_each_page_is_in_the_navigation_once() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Plain)  # noqa: S506  # a SafeLoader

    assert sorted(pages_of(config["nav"])) == sorted(
        page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_is_in_the_reference_once(name: str) -> None:
    # An error that is public in two packages is described once.
    assert len([each for each in DIRECTIVES if named(each) is named(name)]) == 1


def test_nothing_is_in_the_reference_twice() -> None:
    assert sorted(set(DIRECTIVES)) == sorted(DIRECTIVES)


def test_the_first_page_shows_the_example_of_the_readme() -> None:
    readme, home = (
        re.search(r"```python.*?\n(?:# .*\n)?(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for page in (ROOT / "README.md", DOCS / "index.md")
    )

    assert readme is not None
    assert home is not None
    assert home[1] == readme[1]
