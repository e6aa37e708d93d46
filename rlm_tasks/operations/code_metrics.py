"""Metrics of Python files from their syntax trees; the demo runs them over the standard library.

The operation `code_metrics` calls it.  Pure functions from paths to plain data; the partials of any
split merge to the same report.
"""

from __future__ import annotations

import ast
import errno
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from heapq import nlargest
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rlm_tasks.jobs.file_roots import ANYWHERE, FilesRoot

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BRANCHES = frozenset(
    (
        ast.If,
        ast.For,
        ast.AsyncFor,
        ast.While,
        ast.ExceptHandler,
        ast.IfExp,
        ast.comprehension,
        ast.match_case,
        ast.BoolOp,
    )
)
_NESTING = frozenset(
    (
        ast.If,
        ast.For,
        ast.AsyncFor,
        ast.While,
        ast.With,
        ast.AsyncWith,
        ast.Try,
        ast.TryStar,
        ast.Match,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
    )
)
_SUMMED = ("files", "lines", "functions", "classes", "branches")
TOP = 10
_PYTHON = f"Python {sys.version_info.major}.{sys.version_info.minor}"
_root = [ANYWHERE]


def read_below(root: FilesRoot) -> None:
    """Set the folder below which this process measures files; a worker does at its start."""
    _root[:] = [root]


def standard_library() -> Path:
    """Return the folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def python_files(folder: Path) -> list[str]:
    """Return the Python files below a folder, sorted, without installed packages."""
    files = (
        path
        for path in folder.rglob("*.py")
        if not {"site-packages", "__pycache__"} & set(path.parts[len(folder.parts) :])
    )
    return sorted(str(path) for path in files)


class _Tally:
    """Counts of one file, in a single pass over its tree."""

    def __init__(self) -> None:
        self.functions: list[tuple[int, int, str]] = []
        self.classes = self.deepest = 0

    def visit(self, node: ast.AST, depth: int) -> int:
        """Return the number of branches at and below a node; count functions, classes, nesting."""
        kind = type(node)
        depth += kind in _NESTING
        self.deepest = max(self.deepest, depth)
        branches = int(kind in _BRANCHES)
        chained = node.orelse[0] if isinstance(node, ast.If) and len(node.orelse) == 1 else None
        for child in _children(node):
            # An `elif` is an `if` inside an `else`, but a reader does not see it as nested.
            branches += self.visit(
                child, depth - 1 if child is chained and isinstance(child, ast.If) else depth
            )
        if isinstance(node, _FUNCTIONS):
            self.functions.append((1 + branches, node.lineno, node.name))
        self.classes += kind is ast.ClassDef
        return branches


def _children(node: ast.AST) -> Iterator[ast.AST]:
    for name in node._fields:
        value = getattr(node, name, None)
        if isinstance(value, list):
            yield from (item for item in value if isinstance(item, ast.AST))
        elif isinstance(value, ast.AST):
            yield value


def measure_file(path: str) -> dict[str, Any]:
    """Return the metrics of one file.

    Raises SyntaxError, UnicodeError, OSError and FileOutsideRoot, which fail this item only.
    """
    text, tree = _parsed(_root[0].checked(path))
    tally = _Tally()
    branches = tally.visit(tree, 0)
    return {
        "files": 1,
        "lines": text.count("\n") + (text[-1:] not in ("", "\n")),
        "functions": len(tally.functions),
        "classes": tally.classes,
        "branches": branches,
        "deepest": [tally.deepest, path],
        "complex": nlargest(
            TOP, ([count, path, line, name] for count, line, name in tally.functions)
        ),
    }


def _parsed(path: Path) -> tuple[str, ast.AST]:
    """Return the text and the syntax tree of a file.  No error has a part of its text."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    try:
        with _root[0].open(path) as file:
            encoding, _ = tokenize.detect_encoding(file.readline)
            file.seek(0)
            with TextIOWrapper(file, encoding) as decoded:
                text = decoded.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # outdated escapes in the files do not matter here
            return text, ast.parse(text, str(path))
    except SyntaxError as error:
        place = f", line {error.lineno}" if error.lineno else ""
        raise SyntaxError(f"{path}{place}: this is no Python that {_PYTHON} can read") from None
    except UnicodeDecodeError as error:
        raise UnicodeError(f"{path}: this is no {error.encoding} text") from None


def merge_reports(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return one report of many.

    Path and line break ties, so each split gives the same report.
    """
    whole: dict[str, Any] = {**dict.fromkeys(_SUMMED, 0), "deepest": [0, ""], "complex": []}
    for report in reports:
        for name in _SUMMED:
            whole[name] += report[name]
        whole["deepest"] = max(whole["deepest"], list(report["deepest"]))
        whole["complex"] = nlargest(
            TOP, [list(each) for each in (*whole["complex"], *report["complex"])]
        )
    return whole
