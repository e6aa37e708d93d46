"""The one interpreter of a page's python blocks, as a reader has it open beside the page.

Run as ``python -c`` of this text, so that the folder it is started in is on the import path, as a
prompt's is. It reads one JSON object a line from stdin and answers each, on the file that its
argument numbers, by an error's traceback and by what each `print` of the page has written, with its
line.  Refuses to know what is right."""

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
    """Run one block, whose first line is the page's line `line`; return its traceback, or
    nothing.
    """
    source = "\n" * (line - 1) + text
    # Without a time of change the cache is never asked whether the page has changed.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    try:
        exec(compile(source, name, "exec", dont_inherit=True), vars(page))  # noqa: S102  # this is what it is for
    except BaseException as error:
        below = error.__traceback__ and error.__traceback__.tb_next
        return "".join(traceback.format_exception(type(error), error, below))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return ""


def main(answers: TextIO) -> None:
    """Run blocks until there are no more."""
    printed: list[tuple[int, str]] = []
    page = sys.modules["__main__"] = ModuleType("__main__")

    def told(*values: Any, **how: Any) -> None:
        caller = sys._getframe(1)
        if caller.f_code.co_filename == name and how.get("file") is None:
            text = io.StringIO()
            builtins.print(*values, **{**how, "file": text})
            printed.append((caller.f_lineno, text.getvalue()))
        builtins.print(*values, **how)

    vars(page)["print"] = told
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
