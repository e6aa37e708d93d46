"""Requests: fields that are refused, and the forms that a request may have."""

from __future__ import annotations

import math
import os
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
    assert JobRequest(operation=requested, items=[]).operation == "requested"  # type: ignore[arg-type]


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
        ("zzz", "priority, timeout_ms, .*continue_on_error, .*, timeout, input"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest_one(name: str, advice: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}=1: unknown field; .*{advice}"):
        JobRequest.parse({"operation": "sum", "items": [], name: 1})


def test_a_field_of_options_is_not_one_of_the_record_itself() -> None:
    with pytest.raises(InvalidRequest, match=r"belongs into options; pass options=Options.timeout"):
        JobRequest(operation="sum", items=[], timeout=5)  # type: ignore[call-arg]


def test_options_in_camel_case_may_stand_beside_the_other_fields() -> None:
    fields = {"continueOnError": True, "errorThreshold": 0.5, "skipIfEmpty": True, "timeoutMs": 500}
    request = JobRequest.parse({"operation": "sum", "items": [1], **fields})
    assert (request.options.continue_on_error, request.options.error_threshold) == (True, 0.5)
    assert (request.options.timeout_ms, request.conditions.skip_if_empty) == (500, True)
    with pytest.raises(InvalidRequest, match=r"given beside options=...; keep one"):
        JobRequest.parse({"operation": "sum", "items": [], "options": fields, **fields})


def test_options_may_stand_beside_a_dict_of_others() -> None:
    fields = {"operation": "sum", "items": [], "continue_on_error": True}

    for options in ({"priority": "high"}, Options(priority="high")):  # type: ignore[arg-type]
        request = JobRequest.parse({**fields, "options": options})
        assert (request.options.priority, request.options.continue_on_error) == ("high", True)
    for options in ({"continueOnError": False}, Options(continue_on_error=True), 7):
        with pytest.raises(InvalidRequest, match=r"given beside options=\.\.\.; keep one"):
            JobRequest.parse({**fields, "options": options})


def test_a_name_alone_is_answered_with_the_two_ways_to_submit() -> None:
    with pytest.raises(InvalidRequest, match=r"request='sum': .* operation=..., items=..."):
        JobRequest.parse("sum")  # type: ignore[arg-type]


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
