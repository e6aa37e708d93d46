"""The specification of a job as Redis keeps it: params come back, errors name the job."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rlm_tasks.errors import JobUnreadable
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.spec import SCHEMA, JobSpec, dump, load
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import RangeSource
from tests.unit.jobs.values import EXAMPLES, same


def spec_of(**fields: Any) -> JobSpec:
    return JobSpec(
        "job", "sum", RangeSource(0, 1), 3, Shape("flat"), "queue", **{"schema": SCHEMA, **fields}
    )


@pytest.mark.parametrize("value", EXAMPLES.values(), ids=EXAMPLES)
def test_params_come_back_equal_and_of_the_same_type(value: Any) -> None:
    params = {"value": value, "of": {1: [value], None: float("inf")}}

    read = load(dump(spec_of(params=params)))

    assert same(read.params, params)
    assert same(codec.decode(read.packed_params), params)


def test_changed_params_replace_the_packed_ones() -> None:
    read = load(dump(spec_of(params={"round": 1})))

    again = load(dump(msgspec.structs.replace(read, params={"round": {2}})))

    assert again.params == codec.decode(again.packed_params) == {"round": {2}}
    assert load(dump(msgspec.structs.replace(read, params={}))).params == {}


def test_a_spec_of_schema_1_is_read_with_its_params() -> None:
    text = (
        b'{"job":"j","operation":"sum","source":{"type":"range","start":0,"step":1},"n":3,'
        b'"shape":{"mode":"flat"},"queue":"q","params":{"1":null,"of":["a"]}}'
    )
    read = load(text)
    assert (read.schema, SCHEMA) == (1, 2)
    assert read.params == {"1": None, "of": ["a"]}
    # A round of such a job is written in the same form, for workers of the release before.
    written = msgspec.json.decode(dump(read))
    assert written["params"] == {"1": None, "of": ["a"]}
    assert not {"schema", "packed_params"} & set(written)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"\xff",
        dump(spec_of(emits={"shop.a": 1.0})).replace(b":1.0", b":null"),
        dump(spec_of()).replace(b'"n":3', b'"n":"many"'),
        msgspec.json.encode(msgspec.structs.replace(spec_of(), packed_params=b"\x00\x81")),
        msgspec.json.encode(
            msgspec.structs.replace(spec_of(), packed_params=b"\x00\x81\xa1a\xd4\x63x")
        ),
        msgspec.json.encode(msgspec.structs.replace(spec_of(), packed_params=b"\x01oops")),
    ],
)
def test_a_spec_that_cannot_be_read_raises_an_error_that_names_the_job(text: bytes) -> None:
    with pytest.raises(JobUnreadable, match="specification of job j7 cannot be read") as raised:
        load(text, "j7")
    assert raised.value.job_id == "j7"


def test_params_of_a_job_are_small_in_redis() -> None:
    spec = spec_of(params={"text": "the same " * 1000})
    assert len(dump(spec)) < 600
    assert codec.decode(load(dump(spec)).packed_params) == spec.params
