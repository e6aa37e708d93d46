"""The glossary names the public classes, and no class that does not exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import resilience
import rlm_tasks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
PACKAGES = ("rlm_tasks", "scheduler", "resilience")
MOST_SENTENCES = 3
CODE = re.compile(r"`([^`]+)`")
CLASS = re.compile(r"[A-Z]\w*[a-z]\w*")
"""A class in code font: a capital first, and not capitals alone, as constants have."""

ENTRIES = re.findall(r"^\*\*(.+?)\*\*: (.+?)(?=\n\n|\n*\Z)", PAGE, re.MULTILINE | re.DOTALL)
"""(term, text) of each entry, in the order of the page."""
NAMED = {name for _, text in ENTRIES for name in CODE.findall(text) if CLASS.fullmatch(name)}


def public_classes() -> set[str]:
    """Return the names of the public classes; errors have a page of the reference.

    A class with a second public name has its own name here.
    """
    found = [
        getattr(package, name) for package in (rlm_tasks, resilience) for name in package.__all__
    ]
    return {
        each.__name__
        for each in found
        if isinstance(each, type) and not issubclass(each, BaseException)
    }


def classes() -> set[str]:
    """Return the names of all classes of the three packages."""
    return {
        node.name
        for package in PACKAGES
        for module in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def test_each_paragraph_below_a_letter_is_an_entry() -> None:
    _, *letters = re.split(r"^## .$", PAGE, flags=re.MULTILINE)
    paragraphs = [each for text in letters for each in text.strip().split("\n\n")]

    assert [each for each in paragraphs if not each.startswith("**")] == []
    assert len(paragraphs) == len(ENTRIES)


def test_each_public_class_is_in_the_glossary() -> None:
    assert sorted(public_classes() - NAMED) == []


def test_each_class_that_the_glossary_names_exists() -> None:
    assert len(NAMED) > 50
    assert sorted(NAMED - classes()) == []


def test_entries_are_in_alphabetical_order_below_their_letter() -> None:
    lines = re.findall(r"^(?:## (.)$|\*\*(.+?)\*\*: )", PAGE, re.MULTILINE)
    order = [letter.lower() or term.lower() for letter, term in lines]

    assert order == sorted(set(order))


def test_each_entry_is_short() -> None:
    ends = {term: len(re.findall(r"[.!?](?=\s|\Z)", CODE.sub("", text))) for term, text in ENTRIES}

    assert {term: count for term, count in ends.items() if not 1 <= count <= MOST_SENTENCES} == {}
