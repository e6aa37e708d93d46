"""Modules that have moved: their old paths work for one more version, with a warning.

Each old module calls `forward`.  `MOVED` is the only list of them; the layer test reads it.
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


def forward(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module that has moved: it warns, and answers from the new
    place.
    """
    home = MOVED[module]

    def load(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(home), name)
        warnings.warn(
            f"{module} is now {home}; import {name} from there", DeprecationWarning, stacklevel=2
        )
        return found

    return load
