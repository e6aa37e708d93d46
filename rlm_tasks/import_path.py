"""Find packages of the user that have the names of ours: `resilience` or `scheduler`.

Both ship beside `rlm_tasks`, and other projects have packages of such names.  `rlm_tasks` and the
doctor ask here.  Only the standard library is imported, so this works where the rest of the
platform cannot be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

NAMES = ("resilience", "scheduler")
HOME = Path(__file__).resolve().parents[1]
"""The folder of all three packages."""


def found_instead() -> dict[str, str]:
    """Return, by name, the file that was imported instead of ours, or that would be.

    Empty where Python finds ours.
    """
    files = {name: (*_imported(name), *_first(name)) for name in NAMES}
    return _first_of_others(files)


def hidden_by_ours() -> dict[str, str]:
    """Return, by name, a file of another package further down the path.

    Python finds ours first, as long as the path keeps its order.
    """
    files = {name: [file for entry in sys.path for file in _at(name, entry)] for name in NAMES}
    return _first_of_others(files)


def _first_of_others(files: Mapping[str, Sequence[str]]) -> dict[str, str]:
    others = {
        name: [file for file in found if Path(file).resolve().parent != HOME / name]
        for name, found in files.items()
    }
    return {name: found[0] for name, found in others.items() if found}


def _imported(name: str) -> tuple[str, ...]:
    file = getattr(sys.modules.get(name), "__file__", None)
    return (file,) if file else ()


def _first(name: str) -> tuple[str, ...]:
    """Return the file that an import would find now.

    `importlib.util.find_spec` would return the module that has been imported already.
    """
    specs = (finder.find_spec(name, None) for finder in sys.meta_path)
    return next(((spec.origin,) for spec in specs if spec is not None and spec.origin), ())


def _at(name: str, entry: str) -> tuple[str, ...]:
    spec = PathFinder.find_spec(name, [entry])
    if spec is None or not spec.origin:  # a folder that is no package has no origin
        return ()
    return (spec.origin,)
