"""Operations: their names, their context, and the options that are refused."""

from __future__ import annotations

import pytest

from rlm_tasks import InvalidRequest, operation
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.registry import get


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


@pytest.mark.parametrize("about", [{"concurrency": 0}, {"concurrency": 5}])
def test_wrong_options_are_refused(about: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="concurrency"):
        operation("unit_wrong", **about)(lambda item: item)
