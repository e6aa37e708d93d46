"""Check the prose of the project as CONTRIBUTING.md asks: docstrings, comments, messages, pages.

``python -m docs.prose`` refuses a sentence whose subject is a clause: it begins with a pronoun or
an amount, see `REFUSED`.  It also refuses a formula (`FORMULAS`), and a test name that begins so.
It warns of sentences over 25 words.  Questions are allowed, and so is all text in code blocks.
``python -m docs.prose PATH ...`` prints the warnings, too.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_WORDS = 25
REFUSED = re.compile(
    r"\b(who(ever|se)?|what(ever)?|of (a|an|all|the|what|which)|so (many|much|long)|"
    r"those (that|who|which)|that which)\b",
    re.IGNORECASE,
)
FORMULAS = re.compile(r"refuses? to know|source document \d|\bdocument [0-4]'s\b", re.IGNORECASE)
"""Phrases that mean nothing to a reader of the project."""
_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[\"'`*(]*[A-Z])|\n\s*\n|\n(?=\s*(?:[-*+|]|\d+\.)\s)")
_MARKUP = re.compile(r"^[\s>*_`\"'(#|+-]*(?:\d+\.\s+)?[*_`\"'(]*")
_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2\s*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"``.*?``|`[^`]*`")
_TEST = re.compile(r"test_(who|what|of_an?|so_many|so_much|those_(that|who))_")
_PLAIN_COMMENT = re.compile(r"#\s*(?!type:|noqa|pragma|!|fmt:|---)(.*)")


@dataclass(frozen=True, slots=True)
class Remark:
    """One sentence, with the rule that it breaks."""

    file: str
    line: int
    why: str
    text: str
    refused: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.why}: {' '.join(self.text.split())[:90]}"


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield each sentence of a text with the line that it begins at, from 0."""
    at = 0
    for part in _SENTENCE.split(text):
        found = text.find(part, at) if part else at
        at = found + len(part)
        lead = len(part) - len(part.lstrip())
        yield text.count("\n", 0, found + lead), part.strip()


def remarks(file: str, line: int, text: str, *, words: bool = True) -> Iterator[Remark]:
    """Yield the remarks on a text that begins at a line of a file."""
    for offset, sentence in sentences(text):
        bare = _MARKUP.sub("", sentence)
        if REFUSED.match(bare) and not bare.rstrip("*_\"') ").endswith("?"):
            yield Remark(file, line + offset, "its subject is a clause", bare, refused=True)
        if FORMULAS.search(bare):
            yield Remark(file, line + offset, "a formula", bare, refused=True)
        count = len(_CODE.sub("code", sentence).split())
        if words and count > MOST_WORDS:
            why = f"{count} words, {MOST_WORDS} at most"
            yield Remark(file, line + offset, why, bare, refused=False)


def of_page(file: str, text: str) -> Iterator[Remark]:
    """Yield the remarks on a page of Markdown; code blocks, tables and front matter are skipped."""
    text = _FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    prose = [
        ""
        if line.startswith((":::", "<", "[", "!", "|"))
        else re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line)
        for line in text.splitlines()
    ]
    yield from remarks(file, 1, "\n".join(prose))


def of_module(file: str, text: str) -> Iterator[Remark]:
    """Yield the remarks on a Python module: docstrings, comments, messages and test names."""
    tree = ast.parse(text)
    docstrings, parts = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(node.value)
        if isinstance(node, ast.FunctionDef) and _TEST.match(node.name):
            yield Remark(file, node.lineno, "a test name begins so", node.name, refused=True)
        if isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            yield from remarks(file, node.lineno, _text_of(node), words=False)
    for node in ast.walk(tree):
        if node in parts or not isinstance(node, ast.Constant):
            continue
        if isinstance(node.value, str) and " " in node.value:
            is_prose = node in docstrings
            yield from remarks(file, node.lineno, node.value, words=is_prose)
    yield from _of_comments(file, text)


def _text_of(formatted: ast.JoinedStr) -> str:
    """Return the text of an f-string, with N for each value."""
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else "N" for part in formatted.values
    )


def _of_comments(file: str, text: str) -> Iterator[Remark]:
    """Yield the remarks on comments; lines that follow each other are one text."""
    block: list[tuple[int, int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or not (found := _PLAIN_COMMENT.match(token.string)):
            continue
        line, column = token.start
        if block and block[-1][:2] != (line - 1, column):
            yield from remarks(file, block[0][0], "\n".join(each[2] for each in block))
            block = []
        block.append((line, column, found[1]))
    if block:
        yield from remarks(file, block[0][0], "\n".join(each[2] for each in block))


def of_script(file: str, text: str) -> Iterator[Remark]:
    """Yield the remarks on a Lua script's comments; lines that follow each other are one text."""
    begun, block = 0, []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if line.startswith("--") and not line.startswith("-- ---"):
            begun = begun or number
            block.append(line.removeprefix("--").strip())
        elif block:
            yield from remarks(file, begun, "\n".join(block))
            begun, block = 0, []


READERS = {".md": of_page, ".py": of_module, ".lua": of_script}
PLACES = ("rlm_tasks", "scheduler", "resilience", "tests", "docs")


def files(paths: list[str]) -> Iterator[Path]:
    """Yield the files that are read: those below some paths, or all of the project."""
    for place in [ROOT / path for path in paths or [*PLACES, *map(str, ROOT.glob("*.md"))]]:
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        yield from (file for file in found if file.suffix in READERS)


def main(paths: list[str]) -> int:
    """Print the remarks on the files below some paths, or on all; return 1 when one is refused."""
    found = [
        remark
        for file in files(paths)
        for remark in READERS[file.suffix](
            str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
        )
    ]
    refused = [each for each in found if each.refused]
    for remark in found if paths else refused:
        print(remark)
    print(f"prose: {len(refused)} sentences refused, {len(found) - len(refused)} are long")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
