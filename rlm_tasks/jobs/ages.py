"""The age of a time in words, such as "3 min ago", for lists and errors."""

from __future__ import annotations

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))


def ago(at: float, now: float) -> str:
    """Return the age of a time in the largest fitting unit; both are in seconds since 1970."""
    seconds = max(0.0, now - at)
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
