"""Exceptions whose classes break every rule of an exception, made from a seed.

The tests of items that fail raise them in each place where the platform runs a user's code.  Begin
with `hostile`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

from resilience.errors import Denied, RlmError

BASES: tuple[type[BaseException], ...] = (
    Exception,
    BaseException,
    ValueError,
    KeyError,
    OSError,
    StopIteration,
    StopAsyncIteration,
    RecursionError,
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    asyncio.CancelledError,
    ExceptionGroup,
    BaseExceptionGroup,
    RlmError,
    Denied,
)
TEXTS: tuple[Callable[[], object], ...] = (
    lambda: "caf\udce9",
    lambda: b"\xff\x00",
    lambda: "\x00\x1b[2J\r\n\u2028",
    lambda: "y" * 2_000_000,
    lambda: float("nan"),
    lambda: "",
    lambda: ("\ud800", {"deep": [[[[]]]]}),
)


def _breaks(*_: object, **__: object) -> Any:
    raise AttributeError("this class has no such attribute")


def _breaks_off(*_: object, **__: object) -> Any:
    raise RuntimeError("an attribute whose code has a fault")


def _interrupts(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt("in the class of an exception")


def _no_text(*_: object) -> Any:
    return 7


class _Nameless(type):
    """A metaclass whose classes do not tell their names."""

    __name__ = property(_breaks)  # type: ignore[assignment]


def _members(random: Random) -> dict[str, Any]:
    """Return the members of a class, a few of which are broken."""
    members: dict[str, Any] = {}
    for method in ("__str__", "__repr__", "__reduce__", "__reduce_ex__", "with_traceback"):
        if random.random() < 0.35:
            members[method] = random.choice((_breaks, _interrupts, _no_text))
    for name in (
        *("code", "status_code", "status", "response", "headers", "reason", "retryable", "trips"),
        *("category", "severity", "retry_after_s", "guard", "why", "noted", "ends_as", "__cause__"),
        *("__traceback__", "__notes__", "__module__", "args", "error"),
    ):
        if random.random() < 0.2:
            members[name] = random.choice(
                (property(_breaks), property(_interrupts), float("nan"), "\udce9")
            )
    if random.random() < 0.1:
        members["__class__"] = property(_breaks_off)
    if random.random() < 0.05:
        members["__getattribute__"] = _breaks_off
    return members


def hostile(seed: int) -> BaseException:
    """Return an exception of a class of its own, the same one for the same seed.

    The name of its class is ``Hostile<seed>``.
    """
    random = Random(seed)
    base = BASES[seed % len(BASES)]
    kind = _Nameless if random.random() < 0.15 else type
    members = _members(random)
    if issubclass(base, BaseExceptionGroup):
        members.pop("args", None)
    made: type[BaseException] = kind(f"Hostile{seed}", (base,), members)
    if issubclass(base, BaseExceptionGroup):
        return made("several \udce9", [ValueError("\udce9")])
    error = made.__new__(made)
    # A denial without the attributes of one; StopIteration needs its own initialisation.
    start = BaseException if base is Denied else base
    start.__init__(error, random.choice(TEXTS)())
    if random.random() < 0.3:
        other = ValueError("a cause \udce9")
        BaseException.__cause__.__set__(error, other)  # type: ignore[attr-defined]  # a slot
        other.__cause__ = error  # a cycle
    return error


def raise_hostile(seed: int) -> None:
    """Raise a hostile exception, sometimes from many frames."""
    _from_frames(900 if seed % 7 == 0 else 1, hostile(seed))


def _from_frames(depth: int, error: BaseException) -> None:
    if depth > 1:
        _from_frames(depth - 1, error)
    raise error
