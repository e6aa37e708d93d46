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


def nearest(name: str, known: Iterable[str], cutoff: float = 0.65) -> str:
    """Return the known name that is most like a name in snake_case or camelCase; '' if none is."""
    near = difflib.get_close_matches(to_snake(name), list(known), n=1, cutoff=cutoff)
    return near[0] if near else ""


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

    def __init__(self, *values: Any, **fields: Any) -> None:
        if values:
            name = type(self).__name__
            advice = f"{name} takes its fields by name, as in {name}(field=...) or {name}(**fields)"
            raise self.invalid("fields", values[0], advice)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise self._first(error) from None

    @classmethod
    def _first(cls, error: ValidationError) -> InvalidValue:
        """Return pydantic's first problem as one sentence about one field.

        A missing field comes last: it may be there under a misspelt name.
        """
        problem = min(error.errors(), key=lambda each: each["type"] == "missing")
        if isinstance(problem.get("ctx", {}).get("error"), InvalidValue):
            return problem["ctx"]["error"]  # type: ignore[no-any-return]  # pydantic types ctx as Any
        *_, last = path = [str(part) for part in problem["loc"]] or [cls.__name__]
        if problem["type"] == "missing":
            *needed, final = (name for name, each in cls.model_fields.items() if each.is_required())
            needs = f"{', '.join(needed)} and {final}" if needed else final
            advice = f"is missing; {cls.__name__.lstrip('_')} needs {needs}"
            return cls.invalid.missing(to_snake(last), advice)
        if problem["type"] == "extra_forbidden":
            twice = cls._twice(last, to_camel(last))
            advice = twice if last in cls.model_fields else cls._unknown(last)
        else:
            advice = problem["msg"].removeprefix("Value error, ")
        return cls.invalid(".".join(path), problem["input"], advice)

    @classmethod
    def _unknown(cls, name: str) -> str:
        """Return the advice for an unknown field: the nearest known one, or all."""
        if near := nearest(name, cls.known_fields()):
            return f"unknown field; did you mean {near!r}?"
        return f"unknown field; {cls.__name__} has {', '.join(cls.known_fields())}"

    @staticmethod
    def _twice(name: str, other: str) -> str:
        return f"is given twice, as {name} and as {other}; keep one of the two"

    @classmethod
    def renamed(cls, fields: dict[str, Any], alias: str, name: str) -> dict[str, Any]:
        """Return the fields with another name of a field replaced by its name, if it is there.

        Raises InvalidValue, or the error of the record, for a field that has both names.
        """
        if alias not in fields:
            return fields
        if given := {name, to_camel(name)} & fields.keys():
            raise cls.invalid(alias, fields[alias], cls._twice(alias, given.pop()))
        return {(name if each == alias else each): value for each, value in fields.items()}

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
        if not isinstance(fields, dict):
            return fields
        seconds: dict[str, Any] = {}
        given: dict[str, str] = {}
        for name, value in fields.items():
            field, amount = cls._second(name, value)
            if field in seconds:
                raise cls.invalid(name, value, cls._twice(name, given[field]))
            seconds[field], given[field] = amount, name
        return seconds

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
