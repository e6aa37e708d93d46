"""Each `raise` of the package is an RlmError, or stands in a short list with its reason.

The list has errors of Python's own protocols, and signals that never reach a caller.  Docstrings
that promise an error name a class that exists.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import redis

from resilience.errors import RlmError
from tests.unit.test_layers import trees

PROTOCOLS = "a protocol of Python asks for this class"
STOPS = "ends a process that cannot start; the message is its last line"
PYDANTIC = "a validator of a setting: the check of the settings turns it into InvalidSettings"
ITEM = "raised for an item: the item's failure has it"
SIGNAL = "caught in the same package; no caller of the platform meets it"
FRAMEWORK = "the framework that calls this code asks for this class"
ALLOWED: dict[tuple[str, str], str] = {
    ("AttributeError", "*"): PROTOCOLS,
    ("IndexError", "rlm_tasks.results"): PROTOCOLS,
    ("ImportError", "rlm_tasks"): PROTOCOLS,
    ("NotImplementedError", "resilience.settings"): PROTOCOLS,
    ("SystemExit", "rlm_tasks.worker.*"): STOPS,
    ("SystemExit", "rlm_tasks.telemetry.tracing"): STOPS,
    ("SystemExit", "rlm_tasks.installation"): STOPS,
    ("ValueError", "*.settings*"): PYDANTIC,
    ("ValueError", "resilience.address"): PYDANTIC,
    ("ValueError", "rlm_tasks.engine.work"): ITEM,
    ("TypeError", "rlm_tasks.engine.*"): ITEM,
    ("*Error", "rlm_tasks.operations.builtin"): ITEM,
    ("*Error", "rlm_tasks.operations.code_metrics"): ITEM,
    ("Raised", "rlm_tasks.engine.concurrent_work"): ITEM,
    ("Postponed", "rlm_tasks.engine.*"): SIGNAL,
    ("Unreadable", "rlm_tasks.jobs.stored_items"): SIGNAL,
    ("NotStorable", "rlm_tasks.jobs.*"): SIGNAL,
    ("_NoZone", "rlm_tasks.jobs.codec"): SIGNAL,
    ("ValueError", "rlm_tasks.jobs.codec"): SIGNAL,
    ("ValueError", "rlm_tasks.llm.learned"): SIGNAL,
    ("ValueError", "resilience.timeouts"): SIGNAL,
    ("Uncovered", "rlm_tasks.ledger.partials"): SIGNAL,
    ("BodyWithoutAnswer", "rlm_tasks.llm.wire.answers"): SIGNAL,
    ("NoExporter", "rlm_tasks.telemetry.spans"): SIGNAL,
    ("NoMessage", "rlm_tasks.worker.upstream"): SIGNAL,
    ("Refused", "resilience.connections"): SIGNAL,
    ("Forgotten", "resilience.connections"): SIGNAL,
    ("Garbled", "resilience.connections"): SIGNAL,
    ("ConnectionError", "resilience.connections"): SIGNAL,
    ("ConnectionError", "rlm_tasks.worker.upstream"): SIGNAL,
    ("HungUp", "rlm_tasks.testing.*"): SIGNAL,
    ("ValueError", "rlm_tasks.testing.*"): SIGNAL,
    ("HTTPError", "rlm_tasks.flower.*"): FRAMEWORK,
    ("Reject", "rlm_tasks.engine.message_handlers"): FRAMEWORK,
    ("BadParameter", "rlm_tasks.*"): FRAMEWORK,
    ("UsageError", "rlm_tasks.cli.*"): FRAMEWORK,
}
"""(class, modules) -> why the class is no RlmError; `*` stands for any characters."""


def raised(name: str) -> Iterator[tuple[int, type[BaseException]]]:
    """Yield line and class of each `raise` of a module whose class its source names."""
    module = importlib.import_module(name)
    for node in ast.walk(trees()[name]):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        made = node.exc
        while isinstance(made, ast.Call | ast.BoolOp):
            made = made.func if isinstance(made, ast.Call) else made.values[-1]
        found = _value(module, made)
        if inspect.isfunction(found):  # it returns the error
            home = importlib.import_module(found.__module__)
            found = _value(home, ast.parse(str(inspect.signature(found).return_annotation)).body[0])
        if inspect.isclass(found) and issubclass(found, BaseException):
            yield node.lineno, found


def _value(module: Any, expression: ast.AST) -> Any:
    """Return the value of a dotted name of a module, None for another expression."""
    path = ast.unparse(expression).strip("'").split(".")
    found = getattr(module, path[0], getattr(builtins, path[0], None))
    for part in path[1:]:
        found = getattr(found, part, None)
    return found


def reason(kind: type[BaseException], module: str) -> str | None:
    """Return why a module may raise a class that is no RlmError; None when it may not."""
    return next(
        (
            why
            for (name, modules), why in ALLOWED.items()
            if fnmatch(kind.__name__, name) and fnmatch(module, modules)
        ),
        None,
    )


def test_each_raise_is_an_error_of_the_platform_or_has_a_reason() -> None:
    every = [
        (name, line, kind)
        for name in trees()
        if not name.endswith("__main__")
        for line, kind in raised(name)
    ]

    assert len(every) > 250
    assert [
        f"{name}:{line} raises {kind.__name__}"
        for name, line, kind in every
        if not issubclass(kind, RlmError) and reason(kind, name) is None
    ] == []


def test_each_reason_is_still_needed() -> None:
    """A class that a module no longer raises leaves the list."""
    found = {
        (kind.__name__, name)
        for name in trees()
        if not name.endswith("__main__")
        for _, kind in raised(name)
        if not issubclass(kind, RlmError)
    }

    assert [
        key
        for key in ALLOWED
        if not any(fnmatch(kind, key[0]) and fnmatch(module, key[1]) for kind, module in found)
    ] == []


RAISES = re.compile(r"\bRaises ([^.:]*)")
CLASS = re.compile(r"\b(?:[A-Z][a-z]+){2,}\b|\b[A-Z]\w*Error\b|\bDenied\b|\bPostponed\b")


@pytest.mark.parametrize("package", ["resilience", "scheduler", "rlm_tasks"])
def test_each_error_that_a_docstring_promises_exists(package: str) -> None:
    known = {
        node.name
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    } | {*dir(builtins), *dir(redis.exceptions)}
    wrong = [
        f"{name}.{node.name}: {error}"
        for name, tree in trees().items()
        if name.partition(".")[0] == package
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for promise in RAISES.findall(" ".join((ast.get_docstring(node) or "").split()))
        for error in CLASS.findall(promise)
        if error not in known
    ]

    assert wrong == []
