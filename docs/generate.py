"""Write docs/configuration.md from the settings, or fail when the page differs from them.

``python -m docs.generate`` compares the page; ``python -m docs.generate --write`` writes it.
`make docs` calls it.  Begin with `rows`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rlm_tasks.settings.document import fields, variable

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Every setting is an environment variable, read once in each process.
Clients and workers of one platform need the same values.

An unknown `RLM_` variable, or a value that cannot be used, stops a process when it starts.
The message names the nearest variable or value.

| command | effect |
|---|---|
| `celery -A rlm_tasks rlm config show` | prints the settings of this environment |
| `celery -A rlm_tasks rlm config check` | reports wrong settings |
| `celery -A rlm_tasks rlm config export` | writes the settings as JSON, without secrets |
| `celery -A rlm_tasks rlm config import` | prints such JSON as environment variables |

This page is generated: `make docs ARGS=--write`.

| variable | default | what it does |
|---|---|---|
"""


def rows() -> Iterator[str]:
    """Yield a table row for each setting, sections last."""
    for place, field in fields():
        default = json.dumps(field.default) if isinstance(field.default, tuple) else field.default
        default = "" if default in (None, "[]") else default
        yield f"| `{variable(place)}` | `{default}` | {field.description} |".replace(
            "``", "(empty)"
        )


def main() -> int:
    """Write the page, or compare it; return 1 when it differs from the settings."""
    wanted = HEAD + "\n".join(rows()) + "\n"
    if "--write" in sys.argv:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        print(
            f"{PAGE.name} differs from the settings; run: make docs ARGS=--write",
            file=sys.stderr,
        )
        return 1
    print("docs are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
