"""The fenced blocks of a page, and their treatment, which depends on language and title.

- A block with a file's name as title becomes that file.
- ``python`` runs in one interpreter for the whole page.  A line ``print(...)  # x`` must print x.
- ``sh`` runs in bash.  A worker, beat, Flower or fake provider runs until the page ends.  Exports
  and ``cd`` hold for the rest of the page.
- ``text title="prints"`` is the output of the block before it.  Plain ``text`` is a picture.
- ``json``, ``yaml``, ``ini`` and ``promql`` are parsed.

In expected output ``...`` stands for any text, and one space for several.  Commands of ELSEWHERE
are not run, but the files, make targets and extras that they name must exist.  This module only
reads; `page_reader` runs the blocks.  Begin with `read`."""

from __future__ import annotations

import ast
import configparser
import doctest
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
"""The text of every page, by its path."""
FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")
INFO = re.compile(r'(\w+)(?: title="([^"]+)")?')
SAID = re.compile(r"^\s*print\(.*\)  # (.+)$")
NAMED_FILE = re.compile(r"\.(ya?ml|json|txt|toml|py|md)$")
STAYING = ("worker", "beat", "flower")
PROVIDER = "rlm_tasks.testing.fake_provider"
ELSEWHERE = {
    # A test machine does not have them.
    *("docker", "kubectl", "helm", "redis-server", "redis-cli", "valkey-cli"),
    # They change the machine, or use the network.
    *("pip", "venv", "apt-get", "git", "source", "."),
    # They would end processes of other programs.
    *("pkill", "killall"),
    # It would create a virtual environment.
    "make",
}
"""Programs whose commands are not run."""


class Wrong(AssertionError):
    """A page does not do what it says; the message begins with page and line."""


@dataclass(frozen=True)
class Block:
    """A fenced block: the text between its fences, and the page's line at which the text begins."""

    page: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(name: str, text: str) -> list[Block]:
    """Return the blocks of a page in their order.

    Raises Wrong for a fence that cannot be read, or has an unknown language."""
    lines = text.splitlines()
    found, at = [], 0
    while at < len(lines):
        at += 1
        if (opened := FENCE.fullmatch(lines[at - 1])) is None:
            continue
        indent, ticks, info = opened.groups()
        inside = lines[at:]
        close = next((i for i, line in enumerate(inside) if line.strip() == ticks), None)
        if close is None:
            raise Wrong(f"{name}:{at}: this fence is never closed")
        body = "".join(line.removeprefix(indent) + "\n" for line in inside[:close])
        found.append(_block(name, at + 1, info, body))
        at += close + 1
    return found


def _block(name: str, line: int, info: str, body: str) -> Block:
    if (parsed := INFO.fullmatch(info.strip())) is None:
        raise Wrong(
            f'{name}:{line - 1}: a fence is ```language or ```language title="...", not ```{info};'
            f" use one of {KNOWN}"
        )
    language, title = parsed[1], parsed[2] or ""
    if language not in (*PARSERS, "sh", "text"):
        raise Wrong(
            f"{name}:{line - 1}: nobody knows how to run or parse {language!r}; use one of {KNOWN}"
        )
    if title and (
        language == "sh" or ("." not in title and (language, title) != ("text", "prints"))
    ):
        raise Wrong(
            f"{name}:{line - 1}: title={title!r} is neither a file's name"
            ' nor "prints" of a text block'
        )
    return Block(name, line, language, title, body)


def _promql(text: str) -> None:
    for opening, closing in ("()", "[]", "{}"):
        if text.count(opening) != text.count(closing):
            raise ValueError(f"{opening} and {closing} do not match")


def _ini(text: str) -> None:
    # Lines before the first section come from an env file.
    configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True).read_string(
        "[top]\n" + text
    )


PARSERS: dict[str, Callable[[str], object]] = {
    "python": ast.parse,
    "json": json.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
    "ini": _ini,
    "promql": _promql,
}
KNOWN = ", ".join((*PARSERS, "sh", "text"))


def parse(block: Block) -> None:
    """Raise Wrong for a block that its language's parser refuses."""
    try:
        PARSERS.get(block.language, str)(block.text)
    except Exception as error:
        raise Wrong(f"{block}: this is no {block.language}: {error}") from None


def alike(expected: str, printed: str) -> bool:
    """Return whether the output is as expected."""
    flags = doctest.ELLIPSIS | doctest.DONT_ACCEPT_TRUE_FOR_1 | doctest.DONT_ACCEPT_BLANKLINE
    return doctest.OutputChecker().check_output(_even(expected), _even(printed), flags)


def _even(text: str) -> str:
    return "".join(" ".join(line.split()) + "\n" for line in text.strip().splitlines())


# --- commands ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Lines of an sh block with one treatment: run, started and left running, or not run here."""

    line: int
    text: str
    starts: str = ""  # worker, beat, flower or provider
    elsewhere: str = ""  # the program


def steps(block: Block) -> Iterator[Step]:
    """Yield the steps of an sh block: it is cut around each command that is started, or not run."""
    script, begin = "", block.line
    for line, command in _commands(block):
        words = _words(command)
        starts, program = _starts(words), _program(words)
        if starts or program in ELSEWHERE:
            if script.strip():
                yield Step(begin, script)
            yield Step(line, command, starts, "" if starts else program)
            script, begin = "", line + command.count("\n")
        else:
            script += command
    if script.strip():
        yield Step(begin, script)


def _commands(block: Block) -> Iterator[tuple[int, str]]:
    """Yield a block's commands with their line numbers; a backslash joins a line with the next."""
    command, begin = "", block.line
    for number, line in enumerate(block.text.splitlines(keepends=True), start=block.line):
        command += line
        if not line.endswith("\\\n"):
            yield begin, command
            command, begin = "", number + 1


def _words(command: str) -> list[str]:
    """Return a command's words, from its program on; [] for an incomplete command."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        return []
    while words and (words[0] == "sudo" or re.match(r"[A-Za-z_]\w*=", words[0])):
        del words[0]
    return words


def _program(words: list[str]) -> str:
    if len(words) > 2 and words[0].startswith("python") and words[1] == "-m":
        return words[2]
    return words[0] if words else ""


def _starts(words: list[str]) -> str:
    """Return the kind of process that a command starts: one of STAYING, "provider", or ""."""
    if _program(words) == PROVIDER:
        return "provider"
    if _program(words) != "celery":
        return ""
    rest = iter(words[words.index("celery") + 1 :])
    for word in rest:
        if word in ("-A", "--app", "-b", "--broker", "--workdir"):
            next(rest, "")
        elif not word.startswith("-"):
            return word if word in STAYING else ""
    return ""


def missing(command: str, folder: Path) -> list[str]:
    """Return the files, make targets and extras that a command names and that do not exist."""
    words = _words(command)
    parts = [
        part
        for word in words
        for part in word.split("=")
        if "://" not in part and not part.startswith("/")
    ]
    files = [
        part
        for part in parts
        if NAMED_FILE.search(part)
        or ((ROOT / part.partition("/")[0] / "").is_dir() and "/" in part)
    ]
    found = [part for part in files if not any((at / part).exists() for at in (ROOT, folder))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"rlm-tasks\[([\w,]+)\]", command):
        found += [
            extra for extra in extras.split(",") if extra not in project["optional-dependencies"]
        ]
    if words[:1] == ["make"]:
        targets = re.findall(
            r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
        )
        found += [
            word for word in words[1:] if "=" not in word and word[0] != "-" and word not in targets
        ]
    return found
