"""The context of an item."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from resilience.degradation import (
    CONSTRAINTS,
    Degradation,
    Level,
)
from rlm_tasks.operations.context import Context, copied
from tests.unit.jobs.values import EXAMPLES, same


def test_the_quality_of_an_item_is_the_fingerprint_of_its_level() -> None:
    assert Context("job", {}).quality == ""
    assert (
        Context("job", {}, degradation=Degradation(Level.HIGH)).quality
        == CONSTRAINTS[Level.HIGH].fingerprint
    )


SHARED = {"n": 1, "limits": {"max": [1, 2]}, "names": ["a", "b"], "pair": (1, [2]), "tags": {"x"}}


def test_an_item_that_changes_its_params_changes_those_of_no_other_item() -> None:
    before = copy.deepcopy(SHARED)
    context = Context("job", {}, shared_params=SHARED)
    context.params["limits"]["max"].append(3)
    context.params["names"].clear()
    context.params["pair"][1].append("new")
    context.params["tags"].add("y")
    del context.params["n"]
    assert context.params["names"] == [], "the item sees what it has written"

    context.begin(1)

    assert context.params == before == SHARED


def test_params_are_a_dict_like_any_other() -> None:
    context = Context("job", {}, shared_params={"n": 1, "nested": {"a": [1]}})
    assert type(context.params) is dict
    assert json.loads(json.dumps(context.params)) == {**context.params} == dict(**context.params)
    assert context.params is context.params


def test_an_item_that_reads_no_params_makes_no_copy() -> None:
    context = Context("job", {}, shared_params=SHARED)
    for index in range(3):
        context.begin(index)
        assert context.has_params is False


def test_an_unknown_attribute_of_a_context_is_named() -> None:
    with pytest.raises(AttributeError, match="'Context' object has no attribute 'parms'"):
        Context("job", {}, shared_params={}).parms  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("value", EXAMPLES.values(), ids=EXAMPLES)
def test_a_copy_of_params_is_the_same_for_every_type_that_can_be_stored(value: Any) -> None:
    params = {"value": value, "more": [value, {"of": (value,)}]}

    own = copied(params)

    assert same(own, params)
    if type(value).__hash__ is None:
        assert own["value"] is not value
