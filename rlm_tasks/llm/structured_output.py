"""Answers of a form: JSON that a pydantic model accepts.

Decides how an answer is read and what is said of one that does not fit; refuses to know who asks
again."""

from __future__ import annotations

import re
import sys
from typing import Any

from pydantic import BaseModel, ValidationError

from resilience.errors import Category, RlmError
from rlm_tasks.errors import InvalidRequest

_FENCED = re.compile(r"\s*```\w*\n(.*?)```\s*", re.DOTALL)
MOST_TOLD = 5


class Misformed(RlmError):
    """An answer that is not of the form asked for, after all repairs.  Has `why`, without what was
    answered.
    """

    code = "MISFORMED_ANSWER"
    category = Category.VALIDATION

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"the answer is not of the form asked for: {why}")


def path_of(form: type[BaseModel]) -> str:
    """Return by which name workers find a model: ``module:Name``."""
    return f"{form.__module__}:{form.__qualname__}"


def form_of(path: str) -> type[BaseModel]:
    """Return the model of a path, of a module that this process has imported already.

    Raises InvalidRequest: a request names models of RLM_OPERATIONS, it does not choose what is
    imported."""
    module, _, name = path.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise InvalidRequest(
            "output",
            path,
            "must be a pydantic model, as module:Name, of a module that RLM_OPERATIONS names",
        )
    return found


def read(text: str, form: type[BaseModel]) -> BaseModel:
    """Return an answer as the model has it; a fence around it is no fault.  Raises Misformed."""
    fenced = _FENCED.fullmatch(text)
    try:
        return form.model_validate_json(fenced[1] if fenced else text)
    except ValidationError as error:
        told = [
            f"{'.'.join(map(str, each['loc'])) or 'the answer'}: {each['msg']}"
            for each in error.errors(include_input=False)
        ]
        raise Misformed("; ".join(told[:MOST_TOLD])) from None
