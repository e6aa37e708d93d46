"""The pages for developers and for programs name files, folders, targets and pages that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = ["AGENTS.md", "CONTRIBUTING.md", "SECURITY.md", "docs/testing.md"]
NAMING = [*GUIDES, "docs/architecture.md", "docs/design.md"]
"""Pages that use names of classes, functions and fields."""
ROOTS = ("rlm_tasks/", "scheduler/", "resilience/", "tests/", "docs/")
CODE = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"[A-Za-z_]\w+(\.[A-Za-z_]\w+)*")
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
MOST_LINES = 60


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GUIDES)
def test_files_that_a_guide_names_exist(name: str) -> None:
    """A part in capitals, such as SUBJECT, stands for any name."""
    named = [each for each in CODE.findall(read(name)) if each.startswith(ROOTS)]
    patterns = [re.sub(r"\b[A-Z]+\b", "*", each).rstrip("/") for each in named]

    assert [each for each in patterns if not list(ROOT.glob(each))] == []


@cache
def words_of_code() -> set[str]:
    """Return each word of the modules and scripts."""
    files = [file for root in ROOTS for file in (ROOT / root).rglob("*.*")]
    texts = [each.read_text(encoding="utf-8") for each in files if each.suffix in (".py", ".lua")]
    return {word for text in texts for word in re.findall(r"\w+", text)}


@pytest.mark.parametrize("name", NAMING)
def test_names_in_code_font_occur_in_the_code(name: str) -> None:
    """Other tests check files and variables; the examples of a page are code, too."""
    text = read(name)
    known = words_of_code() | set(re.findall(r"\w+", " ".join(BLOCK.findall(text))))
    spans = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    names = [each for each in spans if NAME.fullmatch(each) and not each.startswith("RLM_")]
    named = [each for each in names if not re.search(r"\.(py|lua|md|toml|txt)$", each)]

    assert [each for each in named if not {*each.split(".")} <= known] == []


@pytest.mark.parametrize("name", GUIDES)
def test_links_of_a_guide_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)|^\[\w+\]: (\S+)$", read(name), re.MULTILINE)
    targets = [(ROOT / name).parent / (inline or defined) for inline, defined in links]

    assert [str(each) for each in targets if not each.exists()] == []


@pytest.mark.parametrize("name", GUIDES)
def test_make_targets_that_a_guide_names_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))

    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", read(name), re.MULTILINE)) <= targets


def test_the_map_has_each_folder_and_no_other() -> None:
    map_of_code = read("CONTRIBUTING.md").partition("## The map")[2].partition("\n## ")[0]
    folders = {each.parent.name for each in (ROOT / "rlm_tasks").glob("*/__init__.py")}

    assert set(re.findall(r"^\|[^|]*\| `(\w+)/` \|", map_of_code, re.MULTILINE)) == folders


def test_the_page_for_programs_is_short() -> None:
    assert len(read("AGENTS.md").splitlines()) <= MOST_LINES


def test_llms_txt_links_to_each_page_once() -> None:
    text = read("docs/llms.txt")
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    links = [re.fullmatch(r"- \[[^]]+\]\((\S+)\.html\): \S.*", line) for line in lines]
    pages = [page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")]

    assert re.match(r"# .+\n\n> .+\n\n", text)
    assert [line for line, link in zip(lines, links, strict=True) if link is None] == []
    assert sorted(link[1] for link in links if link is not None) == sorted(pages)
