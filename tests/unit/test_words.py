"""Numbers, times and lists as people read them."""

from __future__ import annotations

import pytest

from rlm_tasks.words import age, clock, count, duration, figure, instant, listed


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 nodes"), (1, "1 node"), (2, "2 nodes"), (1200, "1,200 nodes"), (0.5, "0.5 nodes")],
)
def test_a_number_has_its_noun_in_the_right_form(number: float, text: str) -> None:
    assert count(number, "node") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-1, "0 s"),
        (0.0004, "0 ms"),
        (0.25, "250 ms"),
        (1, "1 s"),
        (3.24, "3.2 s"),
        (9.96, "10 s"),
        (74, "74 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (720, "12 min"),
        (7200, "2 h"),
        (86_400, "24 h"),
        (172_800, "2 d"),
        (864_000, "10 d"),
    ],
)
def test_a_duration_has_the_largest_fitting_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert age(seconds) == f"{text} ago"


def test_a_time_of_day_names_its_zone() -> None:
    assert clock(51_131) == "14:12:11 UTC"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (1_234_567.8, "1,234,568"),
        (1234.4, "1,234"),
        (12.5, "12.50"),
        (0.02, "0.02"),
        (0.0012, "0.0012"),
        (0.00007, "0.00007"),
        (0.0000721, "0.000072"),
        (2.0, "2"),
    ],
)
def test_a_number_keeps_the_digits_that_matter(number: float, text: str) -> None:
    assert figure(number) == text


def test_a_count_of_another_plural_agrees_with_its_verb() -> None:
    counts = [count(each, "message waits", "messages wait") for each in (1, 12_000)]

    assert counts == ["1 message waits", "12,000 messages wait"]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a and b"),
        (["a", "b", "c"], "a, b and c"),
        (["a", "b", "c", "d"], "a, b, c and 1 more"),
        (list("abcdefg"), "a, b, c and 4 more"),
    ],
)
def test_a_list_names_the_first_and_counts_the_others(names: list[str], text: str) -> None:
    assert listed(names) == text
    noun = "worker " if len(names) == 1 else "workers " if names else ""
    if names:
        assert listed(names, noun="worker") == noun + text


def test_a_time_is_shown_by_its_age_and_clock_and_an_old_one_with_its_date() -> None:
    at = 1_764_597_731.0

    assert instant(at, at + 180) == "3 min ago (14:02:11 UTC)"
    assert instant(at, at + 3 * 86_400) == "3 d ago (2025-12-01 14:02:11 UTC)"
    assert instant(at) == "at 2025-12-01 14:02:11 UTC"
