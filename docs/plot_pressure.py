"""Draw docs/pressure.svg from docs/pressure.json, a recorded run of docs/examples/under_pressure.py: see ``make pressure``.

The same data gives the same picture, byte for byte, with one version of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resilience.degradation import Level

DATA = Path(__file__).with_name("pressure.json")
PICTURE = DATA.with_suffix(".svg")
LEVELS = {
    Level.NORMAL: "#e3e7eb",
    Level.ELEVATED: "#f5dfa0",
    Level.HIGH: "#f0b46e",
    Level.CRITICAL: "#dd7355",
    Level.EMERGENCY: "#a83246",
}
PRIORITIES = {"critical": "#a83246", "high": "#d9822b", "normal": "#3f78a8", "low": "#a9bccb"}
OPERATIONS = {"look_up": ("#3f78a8", "small items"), "digest": ("#d9822b", "large items")}
STYLE = {
    "svg.hashsalt": "pressure",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(data: dict[str, Any]) -> Figure:
    """Return the picture of a run: three panels over one time."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        panels: Sequence[Axes] = figure.subplots(3, sharex=True)
        for panel, draw_panel in zip(panels, (levels, queues, throughput), strict=True):
            panel.set_gid(draw_panel.__name__)
            draw_panel(panel, data["rows"])
            mark_overload(panel, data["rows"])
        panels[-1].set_xlabel("seconds")
        panels[-1].set_xlim(0, len(data["rows"]))
    return figure


def edges(values: Sequence[float]) -> dict[str, Any]:
    """Return a figure of each second as steps: what is seen at the end of a second is drawn over it."""
    return {"x": range(len(values) + 1), "y1": [*values, values[-1]], "step": "post", "linewidth": 0}


def levels(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw the level as steps, and memory, which mostly decides it here."""
    panel.set_title("pressure level", loc="left")
    reached = [Level[row["level"].upper()] for row in rows]
    for level, colour in LEVELS.items():
        panel.fill_between(**edges([each + 1 if each == level else 0 for each in reached]), color=colour)
    panel.set_yticks([level + 0.5 for level in Level], [level.label for level in Level])
    panel.set_ylim(0, len(Level))
    memory = panel.twinx()
    memory.plot([row["second"] + 0.5 for row in rows], [row["memory_pct"] for row in rows], color="#333333", linewidth=1)
    memory.set_ylim(0, 110)
    memory.set_ylabel("memory, %")


def queues(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw how many messages wait, by priority, one upon the other."""
    panel.set_title("messages that wait, by priority", loc="left")
    depths = [[row["queued"][priority] for row in rows] for priority in PRIORITIES]
    stack(panel, depths, list(PRIORITIES.values()), list(PRIORITIES))


def throughput(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw the items of each second by operation, and the jobs that were refused in it."""
    panel.set_title("items done and jobs refused, each second", loc="left")
    done = [[row["items"][name] for row in rows] for name in OPERATIONS]
    stack(panel, done, [colour for colour, _ in OPERATIONS.values()], [label for _, label in OPERATIONS.values()])
    refused = [sum(row["refused"].values()) for row in rows]
    each_second = [after - before for before, after in zip([0, *refused], refused, strict=False)]
    panel.plot([row["second"] + 0.5 for row in rows], each_second, color="#a83246", linewidth=1.2, label="refused jobs")
    panel.legend(loc="upper right", frameon=False)


def stack(panel: Axes, series: Sequence[Sequence[float]], colours: Sequence[str], labels: Sequence[str]) -> None:
    """Fill figures of each second one upon the other."""
    below = [0.0] * len(series[0])
    for values, colour, label in zip(series, colours, labels, strict=True):
        top = [low + value for low, value in zip(below, values, strict=True)]
        panel.fill_between(**edges(top), y2=[*below, below[-1]], color=colour, label=label)
        below = top
    panel.set_ylim(0, None)
    panel.legend(loc="upper right", frameon=False)


def mark_overload(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """Mark when more was asked than could be done."""
    seconds = [row["second"] for row in rows if row["phase"] == "overload"]
    for at in (seconds[0], seconds[-1] + 1) if seconds else ():
        panel.axvline(at, color="#555555", linewidth=0.8, linestyle=":")
    if seconds and panel.get_gid() == "levels":
        panel.annotate(
            "overload", (sum(seconds) / len(seconds) + 0.5, 0.985), xycoords=("data", "axes fraction"), ha="center", va="top"
        )


def digest(data: Path) -> str:
    """Return what the picture carries to say of which data it is."""
    return "sha256 of the data: " + hashlib.sha256(data.read_bytes()).hexdigest()


def main(data: Path = DATA, picture: Path = PICTURE) -> None:
    """Draw the picture of the data."""
    figure = draw(json.loads(data.read_text(encoding="utf-8")))
    with mpl.rc_context(STYLE):
        figure.savefig(picture, metadata={"Date": None, "Creator": None, "Description": digest(data)})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
