"""The picture of docs/pressure.md is drawn from its data, and the data support the page."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex

from docs.plot_pressure import DATA, LEVELS, PICTURE, PRIORITIES, draw, main, origin
from resilience.degradation import Level

SVG = "{http://www.w3.org/2000/svg}"
PANELS = ("levels", "queues", "throughput")


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


def levels_of(rows: list[dict[str, Any]]) -> list[Level]:
    return [Level[row["level"].upper()] for row in rows]


# --- the data ---------------------------------------------------------------------------------


def test_the_level_rose_to_critical_or_more_and_returned_to_normal(data: dict[str, Any]) -> None:
    rows = data["rows"]

    assert {
        level for row, level in zip(rows, levels_of(rows), strict=True) if row["phase"] == "calm"
    } == {Level.NORMAL}
    assert max(levels_of(rows)) >= Level.CRITICAL
    assert levels_of(rows)[-5:] == [Level.NORMAL] * 5
    assert [row["second"] for row in rows] == list(range(60))


def test_levels_fell_one_step_at_a_time(data: dict[str, Any]) -> None:
    levels = levels_of(data["rows"])
    assert min(after - before for before, after in pairwise(levels)) == -1


def test_receipts_are_empty_when_calm_and_have_every_strategy_in_the_overload(
    data: dict[str, Any],
) -> None:
    assert data["receipts"]["calm"] == {}
    strategies = {what.partition(" at ")[0] for what in data["receipts"]["overload"]}
    assert strategies == {
        "reduce_entity_limits",
        "disable_expensive_computations",
        "use_simplified_methods",
    }


def test_queues_grew_and_emptied_and_less_urgent_jobs_were_refused(data: dict[str, Any]) -> None:
    waiting = {row["second"]: sum(row["queued"].values()) for row in data["rows"]}
    assert max(waiting.values()) > 20
    assert waiting[59] <= 1

    refused = data["rows"][-1]["refused"]
    assert refused["OVERLOADED low"] > 0
    assert refused["OVERLOADED normal"] > 0
    assert not any("critical" in what for what in refused)


def test_critical_items_never_waited_for_long(data: dict[str, Any]) -> None:
    assert len(data["critical_waits_s"]) == 30
    assert max(data["critical_waits_s"]) < 1.0


# --- the picture ------------------------------------------------------------------------------


def test_the_picture_has_three_panels_with_one_time_axis(data: dict[str, Any]) -> None:
    panels = [axes for axes in draw(data["rows"]).axes if axes.get_gid()]

    assert tuple(panel.get_gid() for panel in panels) == PANELS
    assert {panel.get_xlim() for panel in panels} == {(0.0, 60.0)}
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [
        level.label for level in Level
    ]
    assert [text.get_text() for text in panels[1].get_legend().get_texts()] == list(PRIORITIES)


def test_each_level_is_drawn_while_it_lasts(data: dict[str, Any]) -> None:
    levels = draw(data["rows"]).axes[0]

    for level, area in zip(Level, levels.collections, strict=True):
        assert to_hex(area.get_facecolor()[0]) == LEVELS[level]
        drawn = {x for path in area.get_paths() for x, y in path.vertices if y == level + 1}
        lasted = [second for second, each in enumerate(levels_of(data["rows"])) if each == level]
        assert drawn >= set(lasted)
        assert not drawn & ({*range(60)} - {*lasted, *(second + 1 for second in lasted)})


def test_the_page_shows_the_picture_of_this_data() -> None:
    picture = ElementTree.parse(PICTURE).getroot()  # noqa: S314  # our own file

    assert origin(DATA) in "".join(picture.itertext())
    assert {group.get("id") for group in picture.iter(f"{SVG}g")} >= set(PANELS)
    words = {text.text for text in picture.iter(f"{SVG}text")}
    assert words >= {
        "pressure level",
        "overload",
        "emergency",
        "messages that wait, by priority",
        "refused jobs",
    }
    assert PICTURE.stat().st_size < 300_000
    assert "](pressure.svg)" in PICTURE.with_suffix(".md").read_text(encoding="utf-8")


def test_the_same_data_gives_the_same_picture(tmp_path: Path) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"

    for picture in (first, second):
        main(DATA, picture)

    assert first.read_bytes() == second.read_bytes()
