"""Answers of a given form: JSON that a pydantic model accepts.

`gate` reads answers with `parse` and sends one of the wrong form back; `params` stores the model's
path in a request.
"""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings

from resilience.errors import Category, RlmError
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.operations import registry

_FENCED = re.compile(r"\s*```\w*\n(.*?)```\s*", re.DOTALL)
MOST_ISSUES = 5
"""Mistakes of an answer that its error names."""


class Misformed(RlmError):
    """An answer that does not have the required form, after all repairs.

    Has `why`, without a text of the answer.
    """

    code = "MISFORMED_ANSWER"
    category = Category.VALIDATION
    http_status = 502
    when = "The model did not keep to the form, in spite of repairs."
    remedy = "Make the form simpler, or use a larger model."

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(
            f"the answer does not have the required form: {why}; make the form simpler, or use a "
            "larger model"
        )


def path_of(form: type[BaseModel]) -> str:
    """Return the path by which workers find a model: ``module:Name``."""
    return f"{form.__module__}:{form.__qualname__}"


def form_of(path: str) -> type[BaseModel]:
    """Return the model of a path.

    The model must be defined in a module of RLM_OPERATIONS, or in one that registered an operation
    in this process.  A request must not import modules, nor read what they hold: a BaseSettings
    fills itself from the environment, also as a field of the model.  Raises InvalidRequest for any
    other path.
    """
    module, _, name = path.partition(":")
    known = registry.modules()
    model: Any = sys.modules.get(module) if module in known else None
    for part in name.split("."):
        model = getattr(model, part, None)
        if not isinstance(model, type):
            break
    if not (
        isinstance(model, type)
        and issubclass(model, BaseModel)
        and model.__module__ in known
        and not _holds_settings(model)
    ):
        raise InvalidRequest(
            "output",
            path,
            "must be a pydantic model without a BaseSettings in it, as module:Name, and its own "
            "module must be in RLM_OPERATIONS or define an operation",
        )
    return model


@functools.lru_cache(maxsize=256)
def _holds_settings(model: type[BaseModel]) -> bool:
    """Whether a model, its fields and their defaults may contain a BaseSettings."""
    model.model_rebuild()
    parts: list[Any] = [model, model.__pydantic_core_schema__]
    while parts:
        part = parts.pop()
        if issubclass(part if isinstance(part, type) else type(part), BaseSettings):
            return True
        if isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part
    return False


def parse(text: str, form: type[BaseModel]) -> BaseModel:
    """Return an answer as the model's data; a code fence around it is allowed.

    Raises Misformed.
    """
    fenced = _FENCED.fullmatch(text)
    try:
        return form.model_validate_json(fenced[1] if fenced else text)
    except ValidationError as error:
        issues = [
            f"{'.'.join(map(str, each['loc'])) or 'the answer'}: {each['msg']}"
            for each in error.errors(include_input=False)
        ]
        raise Misformed("; ".join(issues[:MOST_ISSUES])) from None
