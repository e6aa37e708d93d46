"""Draw docs/pressure.svg from docs/pressure.json, a recorded run of an example.

``make pressure`` runs docs/examples/under_pressure.py and then this module.  With the same version
of matplotlib the same data gives the same bytes.  Begin with `draw`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resilience.degradation import Level

DATA = Path(__file__).with_name("pressure.json")
PICTURE = DATA.with_suffix(".svg")
LEVELS = ("#e3e7eb", "#f5dfa0", "#f0b46e", "#dd7355", "#a83246")
PRIORITIES = {"critical": "#a83246", "high": "#d9822b", "normal": "#3f78a8", "low": "#a9bccb"}
OPERATIONS = {"look_up": ("small items", "#3f78a8"), "digest": ("large items", "#d9822b")}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "pressure",  # ids are random without it
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.loc": "upper right",
}

Rows = Sequence[Mapping[str, Any]]  # one for each second


def draw(rows: Rows) -> Figure:
    """Return the picture of a run: three panels with one time axis."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        panels: Sequence[Axes] = figure.subplots(3, sharex=True)
        for panel, fill in zip(panels, (levels, queues, throughput), strict=True):
            panel.set_gid(fill.__name__)
            fill(panel, rows)
            for edge in overload(rows):
                panel.axvline(edge, color="#555555", linewidth=0.8, linestyle=":")
        panels[0].annotate(
            "overload",
            (sum(overload(rows)) / 2, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
        )
        panels[-1].set_xlabel("seconds")
        panels[-1].set_xlim(0, len(rows))
    return figure


def overload(rows: Rows) -> tuple[int, int]:
    """Return the first second of the overload, and the second after its last."""
    seconds = [row["second"] for row in rows if row["phase"] == "overload"]
    return seconds[0], seconds[-1] + 1


def levels(panel: Axes, rows: Rows) -> None:
    """Draw the level, and the memory, which mostly decides the level in this run."""
    panel.set_title("pressure level", loc="left")
    reached = [Level[row["level"].upper()] for row in rows]
    for level, colour in enumerate(LEVELS):
        steps(panel, [each + 1 if each == level else 0 for each in reached], colour)
    panel.set_yticks([level + 0.5 for level in Level], [level.label for level in Level])
    panel.set_ylim(0, len(Level))
    memory = panel.twinx()
    line(memory, [row["memory_pct"] for row in rows], "#333333")
    memory.set_ylim(0, 110)
    memory.set_ylabel("memory, %")


def queues(panel: Axes, rows: Rows) -> None:
    """Draw the number of waiting messages as a stack of priorities."""
    panel.set_title("messages that wait, by priority", loc="left")
    stack(
        panel,
        {
            name: (colour, [row["queued"][name] for row in rows])
            for name, colour in PRIORITIES.items()
        },
    )


def throughput(panel: Axes, rows: Rows) -> None:
    """Draw the items done in each second by operation, and the jobs refused in it."""
    panel.set_title("items done and jobs refused, each second", loc="left")
    stack(
        panel,
        {
            label: (colour, [row["items"][name] for row in rows])
            for name, (label, colour) in OPERATIONS.items()
        },
    )
    refused = [sum(row["refused"].values()) for row in rows]
    line(
        panel,
        [after - before for before, after in zip([0, *refused], refused, strict=False)],
        "#a83246",
        "refused jobs",
    )
    panel.legend()


def stack(panel: Axes, series: Mapping[str, tuple[str, Sequence[float]]]) -> None:
    """Draw series as a stack of areas: name -> colour, and a figure for each second."""
    below: Sequence[float] = ()
    for name, (colour, values) in series.items():
        top = [sum(each) for each in zip(below, values, strict=True)] if below else values
        steps(panel, top, colour, below or [0.0] * len(values), name)
        below = top
    panel.set_ylim(0)
    panel.legend()


def steps(
    panel: Axes, top: Sequence[float], colour: str, below: Sequence[float] = (), label: str = ""
) -> None:
    """Fill the area between two series, in steps of one second; without `below`, down to 0."""
    edges = range(len(top) + 1)
    floor = [*below, below[-1]] if below else 0
    panel.fill_between(
        edges, [*top, top[-1]], floor, step="post", color=colour, linewidth=0, label=label
    )


def line(panel: Axes, values: Sequence[float], colour: str, label: str = "") -> None:
    """Draw a line through the figures, each in the middle of its second."""
    panel.plot(
        [second + 0.5 for second in range(len(values))],
        values,
        color=colour,
        linewidth=1.2,
        label=label,
    )


def origin(data: Path) -> str:
    """Return the hash of the data as a text, for the picture's metadata."""
    return "sha256 of its data: " + hashlib.sha256(data.read_bytes()).hexdigest()


def main(data: Path = DATA, picture: Path = PICTURE) -> None:
    """Write the picture of a recorded run to a file."""
    figure = draw(json.loads(data.read_text(encoding="utf-8"))["rows"])
    with mpl.rc_context(STYLE):
        figure.savefig(
            picture, metadata={"Date": None, "Creator": None, "Description": origin(data)}
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
