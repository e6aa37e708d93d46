"""Tables on a screen: no wider than it, without the columns that matter least where it is narrow.

Commands call `table`.  It draws the columns that `_fitting` keeps, with the widths of `_widths`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import click

from rlm_tasks.cli.screen import may_color, printable, say, screen_width, styled

if TYPE_CHECKING:
    from rlm_tasks.tones import Tone

Cell: TypeAlias = "str | int | tuple[str, Tone]"
"""A text, a number, or a word with its tone, such as the word of a status."""
Row: TypeAlias = "Iterable[Cell]"
_COLORS = {"success": "green", "active": "cyan", "warning": "yellow", "danger": "red"}
_GAP = 2
_LEAST, _LEAST_SENTENCE = 14, 24
"""Longer texts are cut, or a sentence wrapped, at this width before a minor column is left out."""
_FIGURE = re.compile(r"[-+]?[\d.,]+( ?(%|ms|s|min|h|d|MB))?|\??")
_WIDE = "rlm_tasks.wide"
"""The place of the option in the memory of a command."""


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_WIDE] = value or ctx.meta.get(_WIDE, False)


wide_option = click.option(
    "--wide",
    is_flag=True,
    expose_value=False,  # `table` reads it
    callback=_remember,
    help="All columns, and no text cut short.",
)


def colored(word: str, tone: Tone) -> str:
    """Return a word in the colour of its tone, for `say`."""
    return styled(word, fg=_COLORS[tone]) if tone else word


@dataclass(frozen=True, slots=True)
class _Column:
    """One column: its texts, the colour of each, and what may be done where it is too wide."""

    name: str
    cells: Sequence[tuple[str, str]]
    natural: int  # the width of its longest text
    is_figure: bool  # its texts are numbers
    is_last: bool  # its texts are wrapped by words

    def least(self, sentence: int) -> int:
        """Return its least width: figures and states are never cut, the last column is wrapped."""
        from rich.cells import cell_len

        is_state = any(color for _, color in self.cells) and not self.is_last
        least = sentence if self.is_last else _LEAST
        if self.is_figure or is_state:
            return self.natural
        return min(self.natural, max(cell_len(self.name), least))

    def shown(self, width: int) -> list[str]:
        """Return its texts, cut at this width."""
        cut = _cut_words if self.is_last else _cut
        return [cut(text, width) for text, _ in self.cells]


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Row],
    *,
    minor: Sequence[str] = (),
    stacked: bool = False,
) -> None:
    """Print a table of at most the width of the screen.  Without rows, one line says so.

    Where it is too wide, the columns of `minor` are left out, its first name first.  Then long
    texts are cut, or wrapped by words in the last column.  A last line says what is not shown.
    With `stacked`, such a table has a line for each cell instead, and shows all.  A pipe and
    ``--wide`` (see `wide_option`) show all.
    """
    cells = [[_cell(each) for each in row] for row in rows]
    if not cells:
        say(f"{title}: none")
        return
    width = _room()
    whole = [*_columns(columns, cells)]
    if title:
        say(styled(title, bold=True))
    if stacked and not has_room(sum(each.natural for each in whole) + _gaps(whole)):
        _stack(columns, cells)
    else:
        _print(whole, _fitting(whole, minor, width), width)


def _stack(names: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Print each cell on a line of its own, below the first one of its row."""
    margin = max(map(len, names)) + 4
    for row in rows:
        say(row[0][0])
        for name, (text, _) in zip(names[1:], row[1:], strict=True):
            if text:
                say(f"  {name:{margin - 2}}{text}", hang=margin)


def _print(whole: Sequence[_Column], shown: Sequence[_Column], width: int | None) -> None:
    """Print the columns that are shown, and a line on the others."""
    widths = _widths(shown, width)
    for line in _drawn(shown, widths):
        click.echo(line, color=None if may_color() else False)
    cut = [
        each.name
        for each in shown
        if each.shown(widths[each.name]) != [text for text, _ in each.cells]
    ]
    _say_rest([each.name for each in whole if each.name not in widths], cut)


def has_room(width: int) -> bool:
    """Return whether tables may be so wide: on a screen of this width, in a pipe, with --wide."""
    room = _room()
    return room is None or room >= width


def _room() -> int | None:
    """Return the greatest width of a table, None for any width."""
    ctx = click.get_current_context(silent=True)
    return None if ctx and ctx.meta.get(_WIDE) else screen_width()


def _cell(value: Cell) -> tuple[str, str]:
    """Return the text of a cell, on one line, and its colour."""
    text, tone = value if isinstance(value, tuple) else (value, "")
    shown = f"{text:,}" if isinstance(text, int) else str(text)
    return " ".join(printable(shown).split()), _COLORS.get(tone, "")


def _columns(names: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> Iterable[_Column]:
    from rich.cells import cell_len

    for name, cells in zip(names, zip(*rows, strict=True), strict=True):
        texts = [text for text, _ in cells]
        yield _Column(
            name,
            cells,
            natural=max(map(cell_len, (name, *texts))),
            is_figure=all(map(_FIGURE.fullmatch, texts)),
            is_last=name == names[-1],
        )


# --- widths -----------------------------------------------------------------------------------


def _fitting(columns: list[_Column], minor: Sequence[str], width: int | None) -> list[_Column]:
    """Return the columns that fit, in their order: first without minor ones, then without last."""
    others = [each.name for each in columns[1:] if each.name not in minor]
    for name in (*minor, *reversed(others)):
        least = _LEAST_SENTENCE if name in minor else _LEAST
        if width is None or sum(each.least(least) for each in columns) + _gaps(columns) <= width:
            break
        columns = [each for each in columns if each.name != name]
        columns[-1] = replace(columns[-1], is_last=True)
    return columns


def _gaps(columns: Collection[_Column]) -> int:
    return _GAP * (len(columns) - 1)


def _widths(columns: Sequence[_Column], width: int | None) -> dict[str, int]:
    """Return the width of each column by its name: a sentence gives way first, then long texts."""
    widths = {each.name: each.natural for each in columns}
    if width is None:
        return widths
    room = width - _gaps(columns)
    for sentences in (True, False):
        for cap in range(max(widths.values()), 0, -1):
            if sum(widths.values()) <= room:
                return widths
            for each in columns:
                if each.is_last or not sentences:
                    least = min(room, each.least(_LEAST_SENTENCE if sentences else _LEAST))
                    widths[each.name] = min(widths[each.name], max(cap, least))
    return widths


def _cut(text: str, width: int) -> str:
    """Return a text that fits: a sentence without its end, a name without its middle."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    if " " in text:
        return set_cell_size(text, width - 1).rstrip() + "…"
    tail = text[-(width // 2) :] if width > 1 else ""
    while cell_len(tail) > width // 2:
        tail = tail[1:]
    return set_cell_size(text, width - 1 - cell_len(tail)) + "…" + tail


def _cut_words(text: str, width: int) -> str:
    """Return a text that can be wrapped: each of its words fits."""
    return " ".join(_cut(word, width) for word in text.split(" "))


# --- lines ------------------------------------------------------------------------------------


def _drawn(columns: Sequence[_Column], widths: Mapping[str, int]) -> Iterator[str]:
    """Yield the lines of a table with these widths."""
    yield from _lines(columns, widths, [(_cut(e.name, widths[e.name]), "") for e in columns], True)
    texts = zip(*(each.shown(widths[each.name]) for each in columns), strict=True)
    colors = zip(*([color for _, color in each.cells] for each in columns), strict=True)
    for row in zip(texts, colors, strict=True):
        yield from _lines(columns, widths, [*zip(*row, strict=True)])


def _lines(
    columns: Sequence[_Column],
    widths: Mapping[str, int],
    cells: Sequence[tuple[str, str]],
    bold: bool = False,
) -> Iterator[str]:
    """Yield the lines of one row: the last column is wrapped by words, all others fit."""
    from rich.cells import cell_len

    *fixed, (last, color) = cells
    for part in _wrapped(last, widths[columns[-1].name]):
        line = ""
        for each, (text, style) in zip(columns, [*fixed, (part, color)], strict=True):
            blank = " " * (widths[each.name] - cell_len(text))
            shown = (
                click.style(text, fg=style or None, bold=bold or None) if style or bold else text
            )
            line += (blank + shown if each.is_figure else shown + blank) + " " * _GAP
        yield line.rstrip()
        fixed = [("", "")] * len(fixed)


def _wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text whose words fit."""
    from rich.cells import cell_len

    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _say_rest(dropped: Sequence[str], cut: Sequence[str]) -> None:
    """Say which columns are not shown or cut short, and the options that show them."""
    ctx = click.get_current_context(silent=True)
    known = {option for each in ctx.command.params for option in each.opts} if ctx else set()
    parts = [f"Not shown: {', '.join(dropped)}"] if dropped else []
    parts += [f"{'cut' if parts else 'Cut'} short: {', '.join(cut)}"] if cut else []
    if parts:
        ways = " or ".join(each for each in ("--wide", "--json") if each in known)
        say("; ".join(parts) + (f". In full: {ways}" if ways else ""))
