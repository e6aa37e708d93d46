"""Sentences on a screen: wrapped at its width by words, without characters that control it.

`say` prints each sentence of the commands, and `tables` asks for the width and the colours.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import textwrap
from typing import Any

import click

from resilience import errors

_ESCAPE = f"\x00{secrets.token_hex(8)}"
"""Stands for the escape character in our own colours: no text from elsewhere can contain it."""
_COMMAND = re.compile(r"celery -A \S+(?: [\w./:=-]+)*")
_GLUE = "\u00a0"
"""A space at which no line is broken."""


def say(text: str, *, hang: int | None = None, err: bool = False, nl: bool = True) -> None:
    """Print a text by `click.echo`, without characters that control the terminal.

    Only colours of `styled` pass: the text may come from a request, an exception or a model.
    A line that is longer than the screen is wrapped by words.  Its next lines are indented by
    `hang` characters, by default as its first line.
    """
    shown = "\x1b".join(printable(part) for part in text.split(_ESCAPE))
    shown = wrapped(shown, hang=hang, err=err)
    click.echo(shown, err=err, nl=nl, color=None if may_color() else False)


def wrapped(text: str, *, hang: int | None = None, err: bool = False) -> str:
    """Return a text whose lines fit the screen, as `say` prints it."""
    width = screen_width(err=err)
    if width is None:
        return text
    return "\n".join(_wrapped(line, width, hang) for line in text.split("\n"))


def _wrapped(line: str, width: int, hang: int | None) -> str:
    indent = len(line) - len(line.lstrip()) if hang is None else hang
    wrapper = _Wrapper(
        width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    glued = _COMMAND.sub(lambda found: _in_one(found[0], width - indent), line)
    return wrapper.fill(glued).replace(_GLUE, " ")


class _Wrapper(textwrap.TextWrapper):
    """Wraps a text by the width of its words on the screen."""

    def _split(self, text: str) -> list[str]:
        return [_Word(each) for each in super()._split(text)]


class _Word(str):
    """A word whose length is its width on the screen: colours have none, some letters have two."""

    __slots__ = ()

    def __len__(self) -> int:
        plain = click.unstyle(self)
        if plain.isascii():
            return len(plain)
        from rich.cells import cell_len

        return cell_len(plain)


def _in_one(command: str, room: int) -> str:
    """Return a command that is not wrapped, so that it can be copied, if it fits in a line."""
    return command.replace(" ", _GLUE) if len(command) <= room else command


def screen_width(*, err: bool = False) -> int | None:
    """Return the columns of the terminal, else COLUMNS; None: a pipe, which has no width."""
    stream = sys.stderr if err else sys.stdout
    if stream.isatty() and (columns := os.get_terminal_size(stream.fileno()).columns):
        return columns
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) else None


def may_color() -> bool:
    """Return whether colours are not switched off, by NO_COLOR, TERM=dumb or ``--no-color``."""
    ctx = click.get_current_context(silent=True)
    off = getattr(ctx.obj, "no_color", False) if ctx else False
    return not (off or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb")


def styled(text: str, **style: Any) -> str:
    """Return a text in a colour, as `click.style` does, for `say`."""
    return click.style(printable(text), **style).replace("\x1b", _ESCAPE)


def printable(value: object) -> str:
    """Return a value's text in which control characters are escapes; lines and tabs stay."""
    return errors.printable(str(value))
