"""The results of a job."""

from __future__ import annotations

import copy
import json

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from rlm_tasks.results import ItemFailure, Outputs, SuccessfulItems


@given(st.sets(st.integers(0, 60)), st.integers(0, 60), st.integers(0, 60))
def test_successful_items_behave_as_a_list_of_their_indexes(
    failed: set[int], middle: int, hi: int
) -> None:
    ranges = [(0, middle), (middle, max(middle, hi))]
    wanted = [index for index in range(max(middle, hi)) if index not in failed]

    found = SuccessfulItems(ranges, sorted(failed))

    assert list(found) == wanted
    assert len(found) == len(wanted)
    assert found[1:3] == wanted[1:3]
    assert not wanted or found[-1] == wanted[-1]
    assert all((index in found) == (index in wanted) for index in range(62))


def test_outputs_are_a_list_that_json_and_copies_keep() -> None:
    outputs = Outputs(iter([1, "b"]), failed=[ItemFailure(1, "ValueError", "no")], failure_rate=0.5)

    assert outputs == [1, "b"]
    assert json.loads(json.dumps(outputs)) == [1, "b"]
    assert msgspec.json.decode(msgspec.json.encode(outputs)) == [1, "b"]
    again = copy.deepcopy(outputs)
    assert (again, again.failed, again.failureRate) == ([1, "b"], outputs.failed, 0.5)
    assert outputs.successful == [1, "b"]
