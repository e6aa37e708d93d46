"""The operations `sum` and `aggregate`."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from rlm_tasks.operations.builtin import aggregate, sum_items


@given(st.lists(st.integers() | st.floats(-1e12, 1e12), min_size=1), st.data())
def test_sum_and_aggregate_are_exact_under_any_split(
    numbers: list[float], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(numbers)))
    parts = [part for part in (numbers[:cut], numbers[cut:]) if part]

    for each in (sum_items, aggregate):
        assert each.merge is not None
        whole, split = each(numbers), each.merge([each(part) for part in parts])
        assert each.shaped(each.merge([whole])) == each.shaped(split)
    assert math.isclose(
        sum_items.shaped(sum_items(numbers)), math.fsum(numbers), rel_tol=1e-12, abs_tol=1e-300
    )


def test_sums_with_infinite_values_follow_arithmetic() -> None:
    assert sum_items.shaped(sum_items([1.0, math.inf])) == math.inf
    assert math.isnan(sum_items.shaped(sum_items([math.inf, -math.inf])))
    assert sum_items.shaped(sum_items([0.1] * 10)) == 1.0
    assert sum_items.shaped(sum_items([2**80, 1])) == 2**80 + 1
