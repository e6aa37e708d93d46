"""mypy (without plugins) and pyright accept a user's program and the code of the documentation.

Each checker runs once, over all of it.  `typed_user.py` has the mistakes that a checker must find.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.pages import PAGES, ROOT, read

USER = Path(__file__).with_name("typed_user.py")
MYPY = """
[mypy]
strict = true
warn_unused_ignores = true
follow_imports = silent
explicit_package_bases = true
ignore_missing_imports = true

[mypy-pages.*]
# People write their own functions without annotations, and one page defines a name twice.
strict = false
check_untyped_defs = true
allow_untyped_defs = true
allow_untyped_calls = true
allow_incomplete_defs = true
allow_untyped_decorators = true
allow_any_generics = true
disable_error_code = no-redef, no-any-return, union-attr, var-annotated
"""
PYRIGHT = {
    "include": ["."],
    "extraPaths": [str(ROOT)],
    "typeCheckingMode": "standard",
    "reportUnnecessaryTypeIgnoreComment": "error",
    "enableTypeIgnoreComments": False,
    # Celery has no types, and neither have modules that only a page's own folder has.
    "reportMissingImports": False,
    "reportMissingModuleSource": False,
    "reportFunctionMemberAccess": False,
    "reportOptionalMemberAccess": False,
    "reportRedeclaration": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's program, and with a package for each page of the documentation."""
    folder = tmp_path_factory.mktemp("typed")
    shutil.copy(USER, folder)
    for page, text in PAGES.items():
        package = folder / "pages" / page.removesuffix(".md").replace("/", "_").lower()
        lines: list[str] = []
        for block in (each for each in read(page, text) if each.language == "python"):
            if block.title:
                file = package / block.title
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, encoding="utf-8")
            else:  # all blocks of a page are one program, with the line numbers of the page
                lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
        if lines:
            package.mkdir(parents=True, exist_ok=True)
            (package / "page.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(folder: Path, *command: str) -> str:
    """Return what a checker prints about a folder."""
    environment = {"MYPYPATH": f"{ROOT}:{folder}", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    ).stdout


def test_mypy_accepts_the_documentation_and_a_users_program(folder: Path) -> None:
    (folder / "mypy.ini").write_text(MYPY, encoding="utf-8")

    found = run(folder, "mypy", "--config-file", "mypy.ini", "--no-color-output", ".")

    assert found.startswith("Success: no issues found in "), found


def test_pyright_accepts_the_documentation_and_a_users_program(folder: Path) -> None:
    settings = {**PYRIGHT, "pythonVersion": "3.11"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")

    found = json.loads(run(folder, "pyright", "--outputjson", "--pythonpath", sys.executable))

    problems = [
        f"{each['file']}:{each['range']['start']['line'] + 1}: {each['message']}"
        for each in found["generalDiagnostics"]
    ]
    assert problems == []
    assert found["summary"]["filesAnalyzed"] > len(list(folder.rglob("*.py"))) - 5
