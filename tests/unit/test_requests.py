"""Requests: fields that are refused, and the forms that a request may have."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from typing import Any, get_args

import pytest
from celery import Celery
from pydantic import BaseModel

import rlm_tasks.llm.operations  # noqa: F401  # its params are checked records, too
from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate
from resilience.bulkhead import Aimd, Bulkhead, Elastic
from resilience.errors import InvalidValue
from resilience.retry import RetryPolicy
from resilience.single_flight import SingleFlight
from resilience.store import Store
from resilience.validation import Checked
from rlm_tasks import Adaptive, Budget, Conditions, JobRequest, NWay, Options
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs.splitting import Fork, plan
from rlm_tasks.metrics import Counter
from rlm_tasks.operations.registry import operation
from rlm_tasks.requests import (
    ConditionFields,
    JobFields,
    OperationFields,
    OptionFields,
    SubmitFields,
)
from rlm_tasks.settings.document import validate
from rlm_tasks.settings.model import Settings
from scheduler.allocation import AllocationFields, ResourceAllocationPolicy


@pytest.mark.parametrize(
    ("context", "field"),
    [
        ("00-xyz", "trace_context"),
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", "trace_id"),
        ({"traceId": "0"}, "trace_id"),
        ({"traceId": "abc", "parentSpanId": "span456"}, "parent_span_id"),
        ({"traceId": "a" * 33}, "trace_id"),
    ],
)
def test_a_wrong_trace_context_is_refused(context: Any, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        Options(trace_context=context)


# --- finite numbers ----------------------------------------------------------------------------

ODD = (math.nan, math.inf, -math.inf, 10**400)


@Celery(set_as_current=False).task(name="requested.task", shared=False)
def celery_task() -> None:
    """A task of an app."""


SALES = Counter("requested_sales_total", "Sales.")


def records() -> set[type[BaseModel]]:
    """Return every checked record and every section of the settings."""
    found: list[type[BaseModel]] = [Checked, Settings]
    for model in found:
        found += model.__subclasses__()
        for field in model.model_fields.values():
            kinds = (field.annotation, *get_args(field.annotation))
            found += [
                kind
                for kind in kinds
                if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in found
            ]
    return set(found)


def test_every_record_and_every_setting_refuses_nan_and_infinity() -> None:
    names = {model.__name__ for model in records()}
    assert {"Options", "Budget", "Map", "RetryPolicy", "BreakerConfig", "LedgerSettings"} <= names
    for model in records():
        assert model.model_config.get("allow_inf_nan") is False, model


@pytest.mark.parametrize("value", ODD, ids=["nan", "inf", "-inf", "huge"])
@pytest.mark.parametrize(
    ("make", "field"),
    [
        (Rate, "limit"),
        (lambda odd: Rate(1, per_s=odd), "per_s"),
        (lambda odd: Rate(9, burst=odd), "burst"),
        (lambda odd: Aimd(1, odd), "most"),
        (lambda odd: Aimd(odd, 9), "start"),
        (lambda odd: Elastic(1, 9, odd), "shrink_after_s"),
        (lambda odd: Bulkhead("b", Store("redis://x"), limit=odd), "limit"),
        (lambda odd: Bulkhead("b", Store("redis://x"), per_host=odd), "per_host"),
        (lambda odd: Bulkhead("b", Store("redis://x"), lease_s=odd), "lease_s"),
        (lambda odd: SingleFlight("s", Store("redis://x"), lease_s=odd), "lease_s"),
        (lambda odd: BreakerConfig(recovery_timeout=odd), "recovery_timeout_s"),
        (lambda odd: operation("odd", timeout_s=odd)(len), "timeout_s"),
        (lambda odd: operation("odd", per_host=odd)(len), "per_host"),
        (lambda odd: operation("odd", bulkhead=odd)(len), "bulkhead"),
        (SALES.inc, "amount"),
        (lambda odd: Options(timeout=odd), "timeout"),
        (lambda odd: Options(timeout_ms=odd), "timeout_ms"),
        (lambda odd: Options(queue_timeout=odd), "queue_timeout"),
        (lambda odd: Options(continue_on_error=True, error_threshold=odd), "error_threshold"),
        (lambda odd: Options(cache_ttl_seconds=odd), "cache_ttl_seconds"),
        (lambda odd: Budget(money=odd), "money"),
        (lambda odd: Conditions(early_termination_threshold=odd), "early_termination_threshold"),
        (lambda odd: Adaptive(target_execution_time_ms=odd), "target_execution_time_ms"),
        (lambda odd: RetryPolicy(max_delay_ms=odd), "max_delay_s"),
        (
            lambda odd: JobRequest(operation="sum", items=[], estimated_duration_s=odd),
            "estimated_duration_s",
        ),
        (lambda odd: Options(emit_metrics={"requested.sales": odd}), "emit_metrics"),
        (
            lambda odd: JobRequest.parse({"operation": "sum", "items": [], "timeout": odd}),
            "timeout",
        ),
    ],
)
def test_a_number_that_is_not_finite_is_refused_by_name(
    make: Callable[[float], Any], field: str, value: float
) -> None:
    with pytest.raises(InvalidValue) as raised:
        make(value)
    assert raised.value.field.startswith(field)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "timeout", [timedelta.max, timedelta.min, timedelta(0), 10**400, 1e300, -1, True, "5", None]
)
def test_a_timeout_is_a_time_of_at_most_ten_years(timeout: Any) -> None:
    with pytest.raises(InvalidRequest, match="timeout="):
        Options(timeout=timeout)
    assert Options(timeout=timedelta(days=3000)).timeout_ms == 3000 * 86_400_000


# --- values that come back ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": object()}, r"params.a=<object object at .*: an object cannot be stored; see"),
        ({"rows": [{"a": 1}, {"b": iter([])}]}, r"params.rows\[1\].b=.*; pass list"),
        ({"text": "\udce9"}, "params.text='.udce9': has a lone surrogate"),
        ([1], r"params=\[1\]: must be a dict"),
        ({1: 2}, "params.1"),
    ],
)
def test_params_that_would_not_come_back_are_refused(params: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        JobRequest(operation="sum", items=[], params=params).check_params()


def test_params_are_kept_as_they_are() -> None:
    params = {"prices": {1: Decimal("9.50")}, "day": date(2026, 1, 1), "all": {1}, "n": math.inf}
    assert JobRequest(operation="sum", items=[], params=params).params == params


# --- forms of a request ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"name": "Ada", "iban": "DE00"},
        {},
        {"operation": "credit", "amount": 5},
        {"operation": "credit"},
        {"priority": "high", "description": "a ticket"},
        {"splitFactor": 8},
        {1: 2},
    ],
)
def test_a_dict_as_input_is_one_item(record: dict[str, Any]) -> None:
    request = JobRequest.parse({"type": "recursive", "operation": "sum", "input": record})

    assert request.items == record
    assert request.operation == "sum"


def test_input_may_hold_fields_of_the_request() -> None:
    conditions = {"skipIfEmpty": True}
    inside = {"items": [1], "operation": "sum", "splitFactor": 4, "conditions": conditions}
    beside = {"items": [1], "input": {"operation": "sum", "splitFactor": 4}, "skip_if_empty": True}

    for request in (JobRequest.parse({"input": inside}), JobRequest.parse(beside)):
        assert (request.items, request.operation) == ([1], "sum")
        assert request.strategy == NWay(split_factor=4)
        assert request.conditions.skip_if_empty
    assert JobRequest.parse({"input": {"items": [1], "chunkSize": 5}}).chunk_size == 5


def test_a_record_that_has_items_is_told_apart_by_its_other_keys() -> None:
    with pytest.raises(InvalidRequest, match=r"input.id=7: is no field .* input=\[\{...\}\]"):
        JobRequest.parse({"input": {"id": 7, "items": ["pen"]}})


@operation("requested")
def requested(item: int) -> int:
    return item


def test_an_operation_may_be_given_in_place_of_its_name() -> None:
    assert JobRequest(operation=requested, items=[]).operation == "requested"


@pytest.mark.parametrize("wrong", [len, lambda: 1, 7, None, object(), celery_task])
def test_another_value_as_operation_is_refused_without_a_dump(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"operation=.*: is no operation; decorate") as raised:
        JobRequest(operation=wrong, items=[])
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("priorty", "did you mean 'priority'?"),
        ("continueOnErr", "did you mean 'continue_on_error'?"),
        ("timout", "did you mean 'timeout'?"),
        ("itemz", "did you mean 'items'?"),
        ("zzz", "priority, timeout, timeout_ms, .*continue_on_error, .*, input"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest_one(name: str, advice: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}=1: unknown field; .*{advice}"):
        JobRequest.parse({"operation": "sum", "items": [], name: 1})


def test_a_field_of_options_is_not_one_of_the_record_itself() -> None:
    with pytest.raises(InvalidRequest, match=r"belongs to options; write options=Options.timeout"):
        JobRequest(operation="sum", items=[], timeout=5)  # type: ignore[call-arg]


def test_options_in_camel_case_may_stand_beside_the_other_fields() -> None:
    fields = {"continueOnError": True, "errorThreshold": 0.5, "skipIfEmpty": True, "timeoutMs": 500}
    request = JobRequest.parse({"operation": "sum", "items": [1], **fields})
    assert (request.options.continue_on_error, request.options.error_threshold) == (True, 0.5)
    assert (request.options.timeout_ms, request.conditions.skip_if_empty) == (500, True)
    with pytest.raises(InvalidRequest, match=r"^continueOnError=True: is given twice, also in opt"):
        JobRequest.parse({"operation": "sum", "items": [], "options": fields, **fields})


def test_options_may_stand_beside_a_dict_of_others() -> None:
    fields = {"operation": "sum", "items": [], "continue_on_error": True}

    for options in ({"priority": "high"}, Options(priority="high")):
        request = JobRequest.parse({**fields, "options": options})
        assert (request.options.priority, request.options.continue_on_error) == ("high", True)
    for options in ({"continueOnError": False}, Options(continue_on_error=True)):
        with pytest.raises(InvalidRequest, match=r"^continue_on_error=True: is given twice, also"):
            JobRequest.parse({**fields, "options": options})
    with pytest.raises(InvalidRequest, match=r"^options=7: must be Options\(...\), or a dict"):
        JobRequest.parse({**fields, "options": 7})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"timeout": 1, "timeout_ms": 4},
            "timeout=1: is given twice, as timeout and as timeout_ms",
        ),
        ({"timeoutMs": 1, "timeout_ms": 4}, "timeout_ms=4: is given twice, as timeout_ms and as t"),
        (
            {"timeout": 1, "options": {"timeoutMs": 5}},
            "timeout=1: .*, also in options as timeoutMs",
        ),
        (
            {"timeoutMs": 1, "options": Options(timeout=2)},
            "timeoutMs=1: .* in options as timeout_ms",
        ),
        ({"options": {"timeout": 1, "timeoutMs": 4}}, "timeout=1: .*, as timeout and as timeoutMs"),
        ({"chunkSize": 1, "chunk_size": 2}, "chunk_size=2: .*, as chunk_size and as chunkSize"),
        ({"input": [1], "items": [2]}, r"input=\['items'\]: given twice"),
    ],
)
def test_a_field_that_is_given_twice_is_named(fields: dict[str, Any], said: str) -> None:
    own = {"operation": "sum"} if "items" in fields else {"operation": "sum", "items": []}

    with pytest.raises(InvalidRequest, match=f"^{said}"):
        JobRequest.parse({**own, **fields})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: RetryPolicy(max_delay=3, max_delay_s=4),
            "max_delay_s=4: is given twice, as max_d",
        ),
        (
            lambda: RetryPolicy(max_retries=3, max_attempts=3),
            "max_retries=4: .* and as max_attempts",
        ),
        (lambda: RetryPolicy(maxRetries=3, maxAttempts=3), "maxRetries=4: .* and as maxAttempts"),
        (
            lambda: BreakerConfig(timeout_seconds=3, recovery_timeout_s=4),
            "timeout_seconds=3: .*, as timeout_seconds and as recovery_timeout_s",
        ),
        (
            lambda: ResourceAllocationPolicy(operation="a", executorId="b"),
            "operation='a': .*, as operation and as executorId",
        ),
    ],
)
def test_a_field_of_a_policy_that_is_given_twice_is_named(
    make: Callable[[], Any], said: str
) -> None:
    with pytest.raises(InvalidValue, match=f"^{said}"):
        make()


ELSEWHERE = [
    ({"chunkSize": 4}, "options", "belongs to the request; write chunk_size=... beside options"),
    ({"items": []}, "options", "belongs to the request; write items=... beside options"),
    ({"skip_if_empty": True}, "options", "write conditions=Conditions.skip_if_empty=...."),
    ({"skipIfEmty": True}, "options", "did you mean 'skip_if_empty'. It belongs to conditions"),
    ({"tokens": 5}, "options", "write options=Options.budget=Budget.tokens=....."),
    ({"priority": "low"}, "conditions", "belongs to options; write options=Options.priority=...."),
    ({"priorty": "low"}, "conditions", "did you mean 'priority'. It belongs to options"),
    ({"timeout": 5}, "conditions", "belongs to options; write options=Options.timeout=...."),
    ({"tokens": 5}, "", "belongs to the budget; write options=Options.budget=Budget.tokens=....."),
    ({"splitFactor": 5}, "", "belongs to a strategy; write strategy=NWay.split_factor=...."),
    ({"min_chunk_size": 5}, "", "belongs to a strategy; write strategy=Binary.min_chunk_size=...."),
    ({"branching": 5}, "", "did you mean 'branching_factor'. It belongs to a strategy"),
    ({"trace_id": "a"}, "", "options=Options.trace_context=TraceContext.trace_id=....."),
    ({"prompt": "Sum up"}, "", "params has the parameters of an operation"),
]


@pytest.mark.parametrize(("fields", "part", "advice"), ELSEWHERE)
def test_a_field_at_the_wrong_level_is_told_its_place(
    fields: dict[str, Any], part: str, advice: str
) -> None:
    [name] = fields
    with pytest.raises(InvalidRequest, match=f"^{name}=.*: .*{advice}"):
        JobRequest.parse({"operation": "sum", "items": [], **({part: fields} if part else fields)})
    if part:
        model = Options if part == "options" else Conditions
        with pytest.raises(InvalidRequest, match=f"^{name}=.*: .*{advice}"):
            model(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "operation: is missing; JobRequest needs operation and items"),
        ({"items": ["secret"]}, "operation: is missing; JobRequest needs operation and items"),
        ({"operation": "sum"}, "items: is missing; JobRequest needs operation and items"),
        (
            {"opration": "sum", "items": []},
            "opration='sum': unknown field; did you mean 'operation'?",
        ),
        ({"operation": "sum", "itemz": []}, "itemz=[]: unknown field; did you mean 'items'?"),
        ({1: 2}, "request=1: is no name of a field; names are texts"),
    ],
)
def test_a_missing_field_is_named_without_the_others(fields: Any, said: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        JobRequest.parse(fields)

    assert str(raised.value) == said


@pytest.mark.parametrize("record", [JobRequest, Options, Budget, Adaptive, RetryPolicy])
def test_fields_by_position_are_refused_with_the_way_to_write_them(record: type[Checked]) -> None:
    name = record.__name__
    with pytest.raises(InvalidValue, match=f"{name} takes its fields by name, as in {name}\\(fie"):
        record({"operation": "sum", "items": []})


def test_a_name_alone_is_answered_with_the_two_ways_to_submit() -> None:
    for given, shown in (("sum", "sum"), (requested, "Operation")):
        with pytest.raises(InvalidRequest, match=f"request='{shown}': .* operation=..., items=..."):
            JobRequest.parse(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("concurency", "unknown option of operation 'x'; did you mean 'concurrency'?"),
        ("timeout", "unknown option of operation 'x'; did you mean 'timeout_s'?"),
        ("retries", "unknown option of operation 'x'; did you mean 'retry'?"),
        ("priority", "belongs to a request; write x.submit(items, priority=...)"),
        ("zzz", "unknown option of operation 'x'; it has allocation, batch, breaker, bulkhead"),
    ],
)
def test_an_unknown_option_of_an_operation_is_named(option: str, advice: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(f"{option}=3: {advice}")):
        operation("x", **{option: 3})(print)


def test_another_operation_is_no_field_of_an_operations_submit() -> None:
    with pytest.raises(InvalidRequest, match=r"^operation='sum': is 'requested' here"):
        requested.submit([1], operation="sum")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "known", ["", "simple", "medium", "complex", "very_complex", "linear", "quadratic"]
)
def test_a_complexity_is_one_of_the_documents(known: str) -> None:
    assert JobRequest(operation="sum", items=[], complexity=known).complexity == known


@pytest.mark.parametrize(
    ("wrong", "hint"), [("qudratic", "did you mean 'quadratic'"), ("Simple", "'simple'"), (3, "")]
)
def test_another_complexity_is_refused(wrong: Any, hint: str) -> None:
    with pytest.raises(InvalidRequest, match=f"complexity=.*{hint}.* one of simple, medium"):
        JobRequest(operation="sum", items=[], complexity=wrong)


@pytest.mark.parametrize("items", [8, 9, 300, 799, 800, 5000])
def test_a_split_factor_of_eight_gives_eight_parts(items: int) -> None:
    request = JobRequest.parse({"input": {"items": range(items), "splitFactor": 8}})

    planned = plan(request.shape(1000.0), 0, items, 0, slots=2)

    assert isinstance(planned, Fork)
    assert len(planned.parts) == 8
    assert not request.shape(1000.0).eager, "a job that ends in its first slice stays one message"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_setting_that_is_not_finite_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    for name in ("RLM_LEDGER__LEASE_S", "RLM_PRESSURE__STALE_S", "RLM_ADMISSION__WAIT_LOW_S"):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            [problem] = validate(os.environ)
            assert name in problem


# --- types -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "models"),
    [
        (OptionFields, [Options]),
        (ConditionFields, [Conditions]),
        (JobFields, [JobRequest]),
        (OperationFields, [JobRequest, Options, Conditions]),
        (SubmitFields, [JobRequest, Options, Conditions]),
        (AllocationFields, [ResourceAllocationPolicy]),
    ],
)
def test_type_checkers_are_told_the_fields_that_a_model_has(
    fields: type, models: list[type[BaseModel]]
) -> None:
    other = {"timeout", "operation", "items", "input"}  # aliases, and arguments of their own

    assert (
        set(fields.__annotations__) - other
        == {name for model in models for name in model.model_fields} - other
    )
