"""The names of Redis keys, and that `resilience.keys` alone builds them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilience.keys import Keys

ROOT = Path(__file__).parents[3]
PACKAGES = ("resilience", "scheduler", "rlm_tasks")
KEYS_MODULE = ROOT / "resilience/keys.py"
NO_KEYS = {"rlm_tasks/client/submission.py: f'{self._settings.namespace}:{idempotency_key}'"}
"""Texts with a namespace that are no keys: here, the text from which a job's id is derived."""
HASH_TAG = re.compile(r":\{|\}:")
REDIS = re.compile(r"(^|[._])(client|pipe)$")
KEY = re.compile(r"(^|[._])keys(\.|\[|$)")
NAMESPACE = re.compile(r"(^|[._])namespace$")


def texts(node: ast.AST) -> Iterator[str]:
    """Yield the texts of an expression, as far as they are written there."""
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value


def names(node: ast.AST) -> Iterator[str]:
    """Yield the names and attributes of an expression, as ``self._store.namespace``."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name | ast.Attribute):
            yield ast.unparse(each)


def is_joined(node: ast.AST) -> bool:
    """Whether an expression makes one text of several."""
    return (
        isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mod))
        or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("join", "format")
        )
    )


def builds_a_key(node: ast.AST) -> bool:
    """Whether an expression makes a key: of a namespace, with a hash tag, of another key, or as the
    literal argument of a Redis command.
    """
    if is_joined(node):
        of_namespace = any(map(NAMESPACE.search, names(node))) and ":" in "".join(texts(node))
        has_tag = any(map(HASH_TAG.search, texts(node)))
        of_key = isinstance(node, ast.BinOp | ast.JoinedStr) and any(map(KEY.search, names(node)))
        return of_namespace or has_tag or of_key
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and bool(REDIS.search(ast.unparse(node.func.value)))
        and bool(node.args)
        and isinstance(node.args[0], ast.JoinedStr | ast.Constant)
        and ":" in "".join(texts(node.args[0]))
    )


def built_keys() -> set[str]:
    """Return each expression outside of `resilience.keys` that makes a key, with its module."""
    return {
        f"{module.relative_to(ROOT)}: {ast.unparse(node)}"
        for package in PACKAGES
        for module in (ROOT / package).rglob("*.py")
        if module != KEYS_MODULE
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if builds_a_key(node)
    }


def test_keys_of_a_job_share_its_hash_tag_and_namespace() -> None:
    keys = Keys("acme").of("j1")

    assert all(key.startswith("acme:{j1}:") for key in keys)
    assert len(set(keys)) == len(keys)


def test_no_other_module_builds_a_key() -> None:
    assert built_keys() == NO_KEYS


def test_scripts_build_no_key() -> None:
    scripts = [path for package in PACKAGES for path in (ROOT / package).rglob("*.lua")]

    assert scripts
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"KEYS\[\w+\]\s*\.\.|\.\.\s*KEYS\[", text), script
        assert not re.search(r"\bcall\('[A-Z]+',\s*['\"]", text), script


@pytest.mark.parametrize(
    "text",
    [
        "f'{store.namespace}:events'",
        "self.namespace + ':events'",
        "'%s:events' % namespace",
        "'{}:events'.format(namespace)",
        "':'.join((namespace, 'events'))",
        "f'rlm:{{{job}}}:nodes'",
        "self._keys.of(job).nodes + ':more'",
        "f'{keys.due}:places'",
        "client.get('rlm:due')",
    ],
)
def test_a_built_key_is_found_in_each_form(text: str) -> None:
    assert builds_a_key(ast.parse(text, mode="eval").body)
