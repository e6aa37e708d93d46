"""Write docs/configuration.md from the settings, or fail when it has drifted.

``python -m docs.generate`` checks; ``python -m docs.generate --write`` renews.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rlm_tasks.settings.document import fields, variable

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Every setting, read from the environment once per process. Clients and workers of one platform need the same values.
An unknown `RLM_` variable or a value that cannot be used stops the process when it starts, with the nearest that would do.
`celery -A rlm_tasks rlm config show` prints what holds, `config check` what is wrong; `config export` and `config import`
carry settings from one deployment to another, without secrets.
This page is generated: `make docs ARGS=--write`.

| variable | default | what it does |
|---|---|---|
"""


def rows() -> Iterator[str]:
    """Yield a table row per setting, sections last."""
    for place, field in fields():
        default = json.dumps(field.default) if isinstance(field.default, tuple) else field.default
        default = "" if default in (None, "[]") else default
        yield f"| `{variable(place)}` | `{default}` | {field.description} |".replace(
            "``", "(empty)"
        )


def main() -> int:
    """Write or check the page."""
    wanted = HEAD + "\n".join(rows()) + "\n"
    if "--write" in sys.argv:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        print(
            f"{PAGE.name} has drifted from the settings; run: make docs ARGS=--write",
            file=sys.stderr,
        )
        return 1
    print("docs are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
