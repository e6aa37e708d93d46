"""The one interpreter of all python blocks of a page, as in a reader's open prompt.

`page_reader.Interpreter` starts it as ``python -c`` with this text.  So the folder of the start is
on the import path, as with a prompt.  A request is a line of JSON on stdin.  The answer goes to the
file descriptor that the argument names: an error's traceback, and each `print` with its line."""

from __future__ import annotations

import builtins
import io
import json
import linecache
import os
import sys
import traceback
from types import ModuleType
from typing import Any, TextIO


def run(page: ModuleType, name: str, line: int, text: str) -> str:
    """Run one block that begins at a line of the page; return its traceback, or ""."""
    source = "\n" * (line - 1) + text
    # Without a modification time, linecache never checks whether the page has changed.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    try:
        exec(compile(source, name, "exec", dont_inherit=True), vars(page))  # noqa: S102  # the page's own code
    except BaseException as error:
        below = error.__traceback__ and error.__traceback__.tb_next
        return "".join(traceback.format_exception(type(error), error, below))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return ""


def main(answers: TextIO) -> None:
    """Run blocks until the end of stdin."""
    printed: list[tuple[int, str]] = []
    page = sys.modules["__main__"] = ModuleType("__main__")

    def recording_print(*values: Any, **options: Any) -> None:
        caller = sys._getframe(1)
        if caller.f_code.co_filename == name and options.get("file") is None:
            text = io.StringIO()
            builtins.print(*values, **{**options, "file": text})
            printed.append((caller.f_lineno, text.getvalue()))
        builtins.print(*values, **options)

    vars(page)["print"] = recording_print
    for request in sys.stdin:
        asked = json.loads(request)
        name = asked["name"]
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        error = run(page, name, asked["line"], asked["text"])
        answers.write(json.dumps({"error": error, "printed": printed}) + "\n")
        answers.flush()
        printed.clear()


if __name__ == "__main__":
    with open(int(sys.argv[1]), "w", encoding="utf-8") as own:  # noqa: PTH123  # a number, not a path
        main(own)
