"""Write docs/configuration.md from the settings, or fail when it has drifted.

``python -m docs.generate`` checks; ``python -m docs.generate --write`` renews.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from rlm_tasks.settings import Settings

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Every setting, read from the environment once per process. Clients and workers of one platform need the same values.
This page is generated: `make docs ARGS=--write`.

| variable | default | what it does |
|---|---|---|
"""


def rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield a table row per setting, sections last."""
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from rows(type(field.default), f"{prefix}{name.upper()}__")
        else:
            default = json.dumps(field.default) if isinstance(field.default, tuple) else field.default
            default = "" if default in (None, "[]") else default
            yield f"| `{prefix}{name.upper()}` | `{default}` | {field.description} |".replace("``", "(empty)")


def main() -> int:
    """Write or check the page."""
    wanted = HEAD + "\n".join(rows(Settings, "RLM_")) + "\n"
    if "--write" in sys.argv:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        print(f"{PAGE.name} has drifted from the settings; run: make docs ARGS=--write", file=sys.stderr)
        return 1
    print("docs are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
