"""The old paths of moved modules, which work for one more version, with a warning.

The module at each old path calls `forward`.  `MOVED` is the only list of these modules; the layer
test reads it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

MOVED = {
    "rlm_tasks.configuration": "rlm_tasks.settings.document",
    "rlm_tasks.embedded": "rlm_tasks.testing.embedded",
    "rlm_tasks.limits": "rlm_tasks.telemetry.limit_reports",
    "rlm_tasks.llm.fake": "rlm_tasks.testing.fake_provider",
    "rlm_tasks.pressure": "rlm_tasks.client.platform_status",
}
RENAMED = {("rlm_tasks.limits", "reports"): "limit_reports"}
"""Old path and old name -> new name, for names that changed with the move."""


def forward(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module at its old path.

    It returns the names of the module at its new path, with a DeprecationWarning.
    """
    home = MOVED[module]

    def load(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new_name = RENAMED.get((module, name), name)
        found = getattr(importlib.import_module(home), new_name)
        warnings.warn(
            f"{module} is now {home}; import {new_name} from there",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return load
