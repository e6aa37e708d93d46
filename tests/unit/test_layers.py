"""Imports go one way: rlm_tasks -> scheduler -> resilience; Celery and kombu stay in rlm_tasks."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CELERY = {"celery", "kombu", "billiard", "flower"}
FORBIDDEN = {
    "resilience": {"scheduler", "rlm_tasks"} | CELERY,
    "scheduler": {"rlm_tasks"} | CELERY,
    "rlm_tasks": {"tests", "docs"},
}


def imported(module: Path) -> set[str]:
    """Return the top-level packages that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    modules = list((ROOT / package).rglob("*.py"))

    wrong = {
        str(module.relative_to(ROOT)): imported(module) & FORBIDDEN[package] for module in modules
    }

    assert modules
    assert {name: bad for name, bad in wrong.items() if bad} == {}


def test_a_wheel_has_all_packages_and_their_files() -> None:
    """Setuptools finds packages by name; every file that is no module needs a pattern of package
    data.
    """
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = setuptools["packages"]["find"]["include"]
    data = setuptools["package-data"]

    assert found == [f"{package}*" for package in ("rlm_tasks", "resilience", "scheduler")]
    for package in FORBIDDEN:
        folders = {module.parent for module in (ROOT / package).rglob("*.py")}
        assert [str(each) for each in folders if not (each / "__init__.py").exists()] == []
        for file in (
            each for each in (ROOT / package).rglob("*.*") if each.suffix not in (".py", ".pyc")
        ):
            owner = next(each for each in file.parents if each in folders)
            patterns = [*data["*"], *data.get(".".join(owner.relative_to(ROOT).parts), [])]
            assert any(file.relative_to(owner).match(each) for each in patterns), file


def test_every_module_has_a_docstring() -> None:
    modules = [module for package in FORBIDDEN for module in (ROOT / package).rglob("*.py")]

    assert [
        str(each)
        for each in modules
        if not ast.get_docstring(ast.parse(each.read_text(encoding="utf-8")))
    ] == []


def test_no_message_is_ever_sent_with_an_eta_or_a_countdown() -> None:
    """Delayed nodes wait in Redis: an ETA message would wait in the memory of a worker and die with
    it.
    """
    for path in (ROOT / "rlm_tasks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert not {"eta", "countdown"} & {keyword.arg for keyword in node.keywords}, (
                    f"{path}:{node.lineno}"
                )
                assert not (isinstance(node.func, ast.Attribute) and node.func.attr == "retry"), (
                    f"{path}:{node.lineno}"
                )
