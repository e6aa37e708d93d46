"""Base classes of settings and requests that are checked when they are made, and `readable`.

Settings and requests of all three packages extend them.  Begin with `Checked`.  Readers of many
stored records use `readable`, so that one bad record hides no other.  A wrong value
raises one sentence that names the field, the value and what to do.  Names of other orchestrators
are accepted as well: camelCase, and milliseconds where a field counts seconds.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.alias_generators import to_camel, to_snake

from resilience.errors import InvalidValue

T = TypeVar("T")
logger = logging.getLogger(__name__)


def readable(what: str, records: Iterable[Any], decode: Callable[[Any], T]) -> list[T]:
    """Return the decoded records.

    A record that cannot be decoded is left out, and `what` it is, is logged once in this process.
    """
    return [each for record in records for each in _decoded(what, record, decode)]


def _decoded(what: str, record: Any, decode: Callable[[Any], T]) -> list[T]:
    try:
        return [decode(record)]
    except Exception as error:  # the record may be anything
        tell_unreadable(what, type(error).__name__)
        return []


@functools.lru_cache(maxsize=256)  # the cache makes it tell each kind once
def tell_unreadable(what: str, why: str) -> None:
    """Log that a record is left out, once for each kind and reason."""
    logger.warning(
        "%s cannot be read and is left out (%s): another release wrote it, or it is damaged",
        what,
        why,
    )


class Checked(BaseModel):
    """A frozen record.  Its construction raises InvalidValue for a wrong field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
    )
    invalid: ClassVar[type[InvalidValue]] = InvalidValue

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise self._first(error) from None

    @classmethod
    def _first(cls, error: ValidationError) -> InvalidValue:
        """Return pydantic's first problem as one sentence about one field."""
        problem = error.errors()[0]
        if isinstance(problem.get("ctx", {}).get("error"), InvalidValue):
            return problem["ctx"]["error"]  # type: ignore[no-any-return]  # pydantic types ctx as Any
        field = ".".join(str(part) for part in problem["loc"]) or cls.__name__
        if problem["type"] == "extra_forbidden":
            return cls.invalid(field, problem["input"], cls._unknown(str(problem["loc"][-1])))
        return cls.invalid(field, problem["input"], problem["msg"].removeprefix("Value error, "))

    @classmethod
    def _unknown(cls, name: str) -> str:
        """Return the advice for an unknown field: the nearest known one, or all."""
        known = cls.known_fields()
        if near := difflib.get_close_matches(to_snake(name), known, n=1):
            return f"unknown field; did you mean {near[0]!r}?"
        return f"unknown field; {cls.__name__} has {', '.join(known)}"

    @classmethod
    def known_fields(cls) -> list[str]:
        """Return the names of the fields, as an error lists them."""
        return list(cls.model_fields)


class Seconds(Checked):
    """A record whose fields ending in ``_s`` are accepted with other units in their names.

    They may end in ``_ms``, in ``_seconds``, or in no unit, which stands for seconds.
    """

    @model_validator(mode="before")
    @classmethod
    def _in_seconds(cls, fields: Any) -> Any:
        return (
            {name: value for each in fields.items() for name, value in [cls._second(*each)]}
            if isinstance(fields, dict)
            else fields
        )

    @classmethod
    def _second(cls, name: str, value: Any) -> tuple[str, Any]:
        snake = to_snake(name)
        for suffix, factor in (("_ms", 0.001), ("_seconds", 1), ("", 1)):
            field = snake.removesuffix(suffix) + "_s"
            if (
                field in cls.model_fields
                and snake.endswith(suffix)
                and snake not in cls.model_fields
            ):
                return field, _times(value, factor)
        return name, value


def _times(value: Any, factor: float) -> Any:
    if not isinstance(value, int | float) or factor == 1:
        return value
    try:
        return value * factor
    except OverflowError:
        return math.inf  # which no field takes
