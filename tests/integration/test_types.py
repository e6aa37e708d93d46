"""Values on their way through a real worker: as items, params, outputs and partials."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any

import pytest

from rlm_tasks import Client, InvalidRequest, JobFailed, NWay
from tests.unit.jobs.values import BERLIN, EXAMPLES, same

DEEP = NWay(split_factor=3, min_chunk_size=1)
VALUES = list(EXAMPLES.values())


def test_each_type_comes_back_as_item_param_and_output(client: Client) -> None:
    params = {"value": Decimal("9.50"), "all": VALUES, "by": {1: {2}, (1, 2): math.inf}}

    result = client.execute(
        operation="typed_echo", items=VALUES, params=params, strategy=DEEP, timeout=60
    )

    assert [output["types"] for output in result.output] == [
        (type(value).__name__, "Decimal") for value in VALUES
    ]
    assert all(
        same(output["item"], value) for output, value in zip(result.output, VALUES, strict=True)
    )
    assert all(same(output["params"], params) for output in result.output)


@pytest.mark.parametrize(
    "make",
    [
        lambda at: Decimal(at * 7 % 1000).scaleb(-2),
        lambda at: Fraction(at - 30, 7),
        lambda at: timedelta(seconds=at * 37 % 3000),
        lambda at: at * 2**66,
        lambda at: at / 4,
        lambda at: (at, str(at)),
    ],
    ids=["Decimal", "Fraction", "timedelta", "large int", "float", "tuple"],
)
def test_merges_compare_and_add_values_of_their_own_type(
    client: Client, make: Callable[[int], Any]
) -> None:
    items = [make(at) for at in range(60)]
    Random(1).shuffle(items)
    right = {
        "typed_max": max(items),
        "typed_sum": functools.reduce(operator.add, items),
        "typed_sorted": sorted(items),
    }

    jobs = client.batch_submit(
        {"operation": name, "items": items, "strategy": DEEP} for name in right
    )

    for job, value in zip(jobs, right.values(), strict=True):
        result = job.result(timeout=60)
        assert same(result.output, value)
        assert result.metrics.nodes > 20


def test_a_maximum_of_datetimes_of_a_zone_keeps_the_zone(client: Client) -> None:
    times = [
        datetime(2026, 10, 25, hour, fold=fold, tzinfo=BERLIN)
        for hour, fold in itertools.product(range(6), (0, 1))
    ]

    output = client.execute(operation="typed_max", items=times, strategy=DEEP, timeout=60).output

    assert same(output, max(times))


def test_a_repeated_key_with_the_same_odd_params_opens_one_job(client: Client) -> None:
    fields = {"operation": "typed_echo", "items": [1], "idempotency_key": "odd-params"}

    first, again = (
        client.submit(params={"value": math.nan, "of": {1: {2, 3}}}, **fields) for _ in range(2)
    )

    assert first.id == again.id
    with pytest.raises(InvalidRequest, match="differs in params"):
        client.submit(params={"value": math.nan, "of": {1: {2, 4}}}, **fields)
    retried = client.submit(params={"value": {1: "a"}}, operation="fail_odd", items=[1, 3])
    with pytest.raises(JobFailed):
        retried.result(timeout=30)
    again = retried.retry_failed()
    spec = client.ledger.spec(again.id)
    assert spec is not None
    assert same(spec.params, {"value": {1: "a"}})


def test_a_record_is_one_item(client: Client) -> None:
    record = {"name": "Ada", "iban": "DE00"}

    for request in ({"input": record}, {"items": record}):
        fields = {"operation": "echo", **request}
        assert client.execute(fields, timeout=30).output == [record]
