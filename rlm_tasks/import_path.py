"""Whose `resilience` and `scheduler` Python finds: they ship beside `rlm_tasks`, and others have
packages of such names.

Decides which file is ours.  Imports the standard library alone, so that it answers where the rest
of the platform cannot be imported; refuses to know what becomes of the answer."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

NAMES = ("resilience", "scheduler")
HOME = Path(__file__).resolve().parents[1]
"""Where all three packages lie."""


def in_our_place() -> dict[str, str]:
    """Return, by name, the file that was imported instead of ours, or that a process with this path
    would import.
    """
    found = {name: (*_imported(name), *_first(name)) for name in NAMES}
    return {
        name: strangers[0] for name, files in found.items() if (strangers := _not_ours(name, files))
    }


def behind_ours() -> dict[str, str]:
    """Return, by name, another file of that name further down the path: ours hides it, until the
    path is another.
    """
    found = {name: [file for entry in sys.path for file in _at(name, entry)] for name in NAMES}
    return {
        name: strangers[0] for name, files in found.items() if (strangers := _not_ours(name, files))
    }


def _not_ours(name: str, files: tuple[str, ...] | list[str]) -> list[str]:
    return [file for file in files if Path(file).resolve().parent != HOME / name]


def _imported(name: str) -> tuple[str, ...]:
    file = getattr(sys.modules.get(name), "__file__", None)
    return (file,) if file else ()


def _first(name: str) -> tuple[str, ...]:
    """Return what would be imported: `importlib.util.find_spec` tells what was, once something
    is.
    """
    specs = (finder.find_spec(name, None) for finder in sys.meta_path)
    return next(((spec.origin,) for spec in specs if spec is not None and spec.origin), ())


def _at(name: str, entry: str) -> tuple[str, ...]:
    spec = PathFinder.find_spec(name, [entry])
    return (
        (spec.origin,) if spec is not None and spec.origin else ()
    )  # a folder that is no package has no origin
