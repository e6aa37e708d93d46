"""Syntax-tree metrics of Python files: what the demo computes over the standard library.

Pure functions from paths to plain data; partials of any split merge to the same report.
"""

from __future__ import annotations

import ast
import tokenize
import warnings
from collections.abc import Iterable
from heapq import nlargest
from typing import Any

_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.match_case, ast.BoolOp)
_NESTING = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match,
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
)  # fmt: skip
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
TOP = 10


def measure_file(path: str) -> dict[str, Any]:
    """Return the metrics of one file.  Raises SyntaxError and OSError, which fail that item only."""
    with tokenize.open(path) as file:
        text = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the files are none of our business
        tree = ast.parse(text, path)
    functions = [node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)]
    return {
        "files": 1,
        "lines": text.count("\n") + (not text.endswith("\n")),
        "functions": len(functions),
        "classes": sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree)),
        "branches": _branches(tree),
        "deepest": [_depth(tree), path],
        "complex": nlargest(TOP, ([1 + _branches(each), path, each.lineno, each.name] for each in functions)),
    }


def _branches(tree: ast.AST) -> int:
    return sum(isinstance(node, _BRANCHES) for node in ast.walk(tree))


def _depth(node: ast.AST) -> int:
    inner = max((_depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, _NESTING)


def merge_reports(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return one report of many.  Ties are broken by path and line, so every split gives the same."""
    total: dict[str, Any] = {
        "files": 0, "lines": 0, "functions": 0, "classes": 0, "branches": 0, "deepest": [0, ""], "complex": [],
    }  # fmt: skip
    for report in reports:
        for name in ("files", "lines", "functions", "classes", "branches"):
            total[name] += report[name]
        total["deepest"] = max(total["deepest"], list(report["deepest"]))
        total["complex"] = nlargest(TOP, [list(each) for each in (*total["complex"], *report["complex"])])
    return total
