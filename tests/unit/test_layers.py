"""Imports run down: order of folders, no loop of files, size of folders, one home for each class.

`ORDER` is the only list of storeys.  Every form of an import counts: at the top, inside a function,
and under TYPE_CHECKING.  Only the modules of `rlm_tasks.moved` forward up, by name.
"""

from __future__ import annotations

import ast
import tomllib
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest

from rlm_tasks.moved import MOVED

ROOT = Path(__file__).parents[2]
PACKAGES = ("rlm_tasks", "scheduler", "resilience")
ORDER = (
    # faces
    "rlm_tasks",
    "rlm_tasks.cli",
    "rlm_tasks.flower",
    "rlm_tasks.diagnosis",
    "rlm_tasks.compat",
    "rlm_tasks.testing",
    # users
    "rlm_tasks.client",
    # app
    "rlm_tasks.celery",
    "rlm_tasks.installation",
    "rlm_tasks.conflicts",
    # worker
    "rlm_tasks.worker",
    "rlm_tasks.telemetry",
    # models
    "rlm_tasks.llm",
    "rlm_tasks.llm.wire",
    # engine
    "rlm_tasks.engine",
    # transport
    "rlm_tasks.messaging",
    # truth
    "rlm_tasks.ledger",
    # vocabulary
    "rlm_tasks.operations",
    "rlm_tasks.requests",
    "rlm_tasks.metrics",
    "rlm_tasks.settings",
    "rlm_tasks.jobs",
    "rlm_tasks.errors",
    "rlm_tasks.results",
    "rlm_tasks.words",
    "rlm_tasks.tones",
    "rlm_tasks.version",
    "rlm_tasks.import_path",
    "rlm_tasks.lazy",
    "rlm_tasks.moved",
    # rules and machines, then Redis
    "scheduler",
    "resilience",
)
"""Folders and root modules, the top first: each imports only itself and those after it."""
MOST_MODULES = 18
"""In one folder, `__init__.py` not counted."""
MOST_METHODS, MOST_POSITIONAL = 20, 6
"""Of one class, its operators not counted, and of one constructor."""
FOREIGN = {
    "resilience": {"celery", "kombu", "billiard", "flower"},
    "scheduler": {"celery", "kombu", "billiard", "flower"},
    "rlm_tasks": {"tests", "docs"},
}


@cache
def trees() -> dict[str, ast.Module]:
    """Return the syntax tree of each module, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imported(name: str) -> set[str]:
    """Return the dotted names that a module imports in any form, modules where they are ours."""
    found: set[str] = set()
    for node in ast.walk(trees()[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relative to itself"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in trees() else str(node.module))
    return found - {name}


def graph() -> dict[str, set[str]]:
    """Return the modules of ours that each module imports."""
    return {name: imported(name) & set(trees()) for name in trees() if name not in MOVED}


def storey(name: str) -> str:
    """Return the folder or root module of `ORDER` that a module belongs to."""
    while name not in ORDER:
        name = name.rpartition(".")[0]
    return name


def test_every_folder_and_root_module_has_a_storey() -> None:
    inner = {name for name in trees() if name.count(".") == 1 and name.startswith("rlm_tasks.")}

    assert inner - set(ORDER) - set(MOVED) == set()
    assert set(ORDER) <= set(trees())


def test_imports_run_down() -> None:
    up = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if ORDER.index(storey(other)) < ORDER.index(storey(name))
    ]

    assert sorted(up) == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    left = graph()
    while leaves := [name for name, others in left.items() if not others & set(left)]:
        for name in leaves:
            del left[name]

    assert sorted(left) == [], "these files are in a loop, or import one that is"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_no_foreign_package_of_a_higher_storey(package: str) -> None:
    wrong = {
        name: {other.partition(".")[0] for other in imported(name)} & FOREIGN[package]
        for name in trees()
        if name.partition(".")[0] == package
    }

    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize("name", MOVED)
def test_a_moved_module_only_forwards(name: str) -> None:
    names = {node.id for node in ast.walk(trees()[name]) if isinstance(node, ast.Name)}

    assert names <= {"forward", "__getattr__", "__name__", "runpy"}


def test_no_folder_holds_too_many_modules() -> None:
    modules = Counter(
        file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")
    )

    crowded = {str(each): count - 1 for each, count in modules.items() if count - 1 > MOST_MODULES}
    assert crowded == {}


def test_every_folder_says_what_it_is_for_and_where_to_begin() -> None:
    for folder in (ROOT / "rlm_tasks").iterdir():
        if (folder / "__init__.py").exists():
            text = ast.get_docstring(trees()[f"rlm_tasks.{folder.name}"]) or ""
            assert "Begin with" in " ".join(text.split()), f"{folder.name}: {text}"


def test_a_public_class_has_one_home() -> None:
    homes = defaultdict(list)
    for name, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)

    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_no_class_is_a_grab_bag() -> None:
    methods, arguments = {}, {}
    for name, tree in trees().items():
        for node in (each for each in ast.walk(tree) if isinstance(each, ast.ClassDef)):
            functions = [
                each
                for each in node.body
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            named = {each.name for each in functions if not each.name.startswith("__")}
            methods[f"{name}.{node.name}"] = len(named)
            for each in functions:
                if each.name == "__init__":
                    arguments[f"{name}.{node.name}"] = len(each.args.args) - 1

    assert {name: count for name, count in methods.items() if count > MOST_METHODS} == {}
    assert {name: count for name, count in arguments.items() if count > MOST_POSITIONAL} == {}


def test_a_wheel_has_all_packages_and_their_files() -> None:
    """Setuptools finds packages by name; every file that is no module needs a pattern of package
    data.
    """
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = setuptools["packages"]["find"]["include"]
    data = setuptools["package-data"]

    assert found == [f"{package}*" for package in ("rlm_tasks", "resilience", "scheduler")]
    for package in PACKAGES:
        folders = {module.parent for module in (ROOT / package).rglob("*.py")}
        assert [str(each) for each in folders if not (each / "__init__.py").exists()] == []
        for file in (
            each for each in (ROOT / package).rglob("*.*") if each.suffix not in (".py", ".pyc")
        ):
            owner = next(each for each in file.parents if each in folders)
            patterns = [*data["*"], *data.get(".".join(owner.relative_to(ROOT).parts), [])]
            assert any(file.relative_to(owner).match(each) for each in patterns), file


def test_every_module_has_a_docstring() -> None:
    modules = [module for package in PACKAGES for module in (ROOT / package).rglob("*.py")]

    assert [
        str(each)
        for each in modules
        if not ast.get_docstring(ast.parse(each.read_text(encoding="utf-8")))
    ] == []


def test_every_default_of_a_field_is_named() -> None:
    """Type checkers take a field for required when its default is not named."""
    calls = [
        (name, node)
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Field"
    ]

    assert len(calls) > 200
    assert [f"{name}:{node.lineno}" for name, node in calls if node.args] == []


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
