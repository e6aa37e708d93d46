"""Operations: their names, their context, and the options that are refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from resilience.bucket import Rate
from resilience.errors import InvalidValue
from rlm_tasks import operation
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.registry import get, names


def test_an_operation_without_a_name_has_that_of_its_function() -> None:
    @operation
    def unit_bare(item: int) -> int:
        return item + 1

    assert get("unit_bare") is unit_bare
    assert unit_bare(2) == 3
    assert unit_bare.apply(2, Context("j", {})) == 3


def test_an_operation_takes_the_context_when_it_has_a_second_parameter() -> None:
    @operation("unit_context")
    def with_context(item: int, ctx: Context, factor: int = 3) -> int:
        return item * factor + ctx.index

    @operation("unit_default")
    def with_default(item: int, factor: int = 2) -> int:
        return item * factor

    assert with_context.apply(2, Context("j", {}, index=1)) == 7
    assert with_default.apply(2, Context("j", {})) == 4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("concurrency", value) for value in (0, 5, "5", 1.5, True)),
        *(("version", value) for value in (0, "2", None)),
        *(("rate_limit", value) for value in (100, "5/m", {}, [], {"requests": 5}, {1: Rate(5)})),
        *(("bulkhead", value) for value in (0, -1, True, "much", [], {}, object(), float("nan"))),
        *(("service", value) for value in (5, "a\nb", "\ud800", "x" * 201, ["a"])),
        *(("breaker", {1: 2}), ("retry", {1: 2})),
        *(("batch", value) for value in ("yes", 1, None)),
        *(
            (option, 3)
            for option in (
                "merge",
                "finalize",
                "validate",
                "simplified",
                "then",
                "fallback",
                "cost",
            )
        ),
    ],
)
def test_wrong_options_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(InvalidValue) as raised:
        operation("unit_wrong", **{option: value})(lambda item: item)  # type: ignore[call-overload]
    assert raised.value.field == option
    assert "unit_wrong" not in names()


async def _later(_value: object) -> object:
    return _value


class _Later:
    async def __call__(self, value: object) -> object:
        return await _later(value)


@pytest.mark.parametrize("function", [_later, _Later(), functools.partial(_later)])
@pytest.mark.parametrize(
    "option", ["merge", "finalize", "validate", "then", "cost", "weight", "fallback"]
)
def test_a_coroutine_function_is_refused_where_nothing_awaits_it(
    option: str, function: Any
) -> None:
    guards = {"cost": {"rate_limit": Rate(5)}, "weight": {"bulkhead": 5}}.get(option, {})
    with pytest.raises(InvalidValue, match="async def") as raised:
        operation("unit_wrong", **guards, **{option: function})(lambda item: item)
    assert raised.value.field == option


def test_two_modules_with_one_name_are_told(caplog: pytest.LogCaptureFixture) -> None:
    def first(item: int) -> int:
        return item

    def second(item: int) -> int:
        return -item

    operation("unit_twice")(first)
    operation("unit_twice")(first)  # the same module again, as a notebook does
    assert not caplog.messages
    second.__module__ = "another"
    operation("unit_twice")(second)
    assert caplog.messages == [
        "Operation 'unit_twice' of module another replaces that of module "
        f"{__name__}; give one of them another name"
    ]


def test_an_object_with_an_async_call_is_an_async_operation() -> None:
    assert operation("unit_async_object", concurrency=5)(_Later()).is_async


@pytest.mark.parametrize("name", ["", "a\nb", "\ud800", "\x1b[2J", "x" * 201, 3])
def test_a_name_that_no_table_can_show_is_refused(name: object) -> None:
    with pytest.raises(InvalidValue) as raised:
        operation(name)(lambda item: item)  # type: ignore[call-overload]
    assert raised.value.field == "name"


def test_a_decorator_that_is_used_twice_guards_both_functions() -> None:
    guarded = operation(service="unit", rate_limit=Rate(5), allocation={"min_memory_mb": 2})

    def unit_first(item: int) -> int:
        return item

    def unit_second(item: int) -> int:
        return item

    first, second = guarded(unit_first), guarded(unit_second)
    assert first.protection == second.protection
    assert second.protection.rate_limit == {"requests": Rate(5)}
    assert [each.allocation.executor_id for each in (first, second) if each.allocation] == [
        "unit_first",
        "unit_second",
    ]


def test_only_a_function_is_registered() -> None:
    with pytest.raises(InvalidValue, match=r"function=3: must be a function"):
        operation("unit_wrong")(3)  # type: ignore[arg-type]
