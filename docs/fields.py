"""Add the fields of records and enumerations to the Python reference: an extension of griffe.

mkdocs.yml names it.  A field's text is its model's description with its bounds, or else the comment
at the end of its line.  Begin with `Fields.on_class`.
"""

from __future__ import annotations

import ast
import io
import tokenize
from textwrap import dedent
from typing import Any

import griffe

BOUNDS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "max_length": "at most {} characters",
}
SHORT = 4
"""A record with more fields than this has no signature on its page: the table replaces it."""


class Fields(griffe.Extension):
    """Adds the fields of a model, record, enumeration or error below the docstring of its class."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the fields of one class; griffe calls this when a package is loaded."""
        fields = [
            each
            for each in cls.members.values()
            if isinstance(each, griffe.Attribute) and _is_field(each)
        ]
        if cls.docstring is None or not fields:
            return
        sections: list[griffe.DocstringSection] = [griffe.DocstringSectionText(cls.docstring.value)]
        if any(_declaration(each) for each in fields):
            parameters = [_parameter(each) for each in fields if each.annotation is not None]
            sections.append(griffe.DocstringSectionParameters(parameters))
            cls.bases = []  # pydantic's base class does not help to fill in the fields
            cls.members.pop("__init__", None)  # the same fields, for type checkers
        elif _is_record(cls) and any(map(_comment, fields)):
            sections.append(
                griffe.DocstringSectionAttributes([_attribute(each) for each in fields])
            )
            if len(fields) > SHORT:
                cls.members.pop("__init__", None)
        elif any(str(base).endswith("Enum") for base in cls.bases):
            sections.append(griffe.DocstringSectionText("\n".join(map(_member, fields))))
        elif "code" in cls.members:
            constants = [
                each
                for each in fields
                if "class-attribute" in each.labels and each.name not in ("when", "remedy")
            ]
            sections.append(
                griffe.DocstringSectionText(
                    ", ".join(f"`{each.name} = {each.value}`" for each in constants)
                )
            )
        cls.docstring.parsed = sections


def _is_field(attribute: griffe.Attribute) -> bool:
    """Return whether it is a public attribute without a docstring, and not a property."""
    return not (
        attribute.name.startswith("_") or attribute.docstring or "property" in attribute.labels
    )


def _is_record(cls: griffe.Class) -> bool:
    makers = [str(each.value) for each in cls.decorators] + [str(each) for each in cls.bases]
    return any("dataclass" in each or each == "msgspec.Struct" for each in makers)


def _parameter(field: griffe.Attribute) -> griffe.DocstringParameter:
    default, declared = field.value, _declaration(field)
    if declared is not None:
        given = {each.arg: ast.unparse(each.value) for each in declared.keywords}
        factory = given.get("default_factory")
        default = given.get("default", None if factory is None else f"{factory}()")
    return griffe.DocstringParameter(
        field.name, annotation=field.annotation, description=_about(field), value=default
    )


def _attribute(field: griffe.Attribute) -> griffe.DocstringAttribute:
    return griffe.DocstringAttribute(
        field.name, annotation=field.annotation, description=_comment(field)
    )


def _member(field: griffe.Attribute) -> str:
    return f"- `{field.name} = {field.value}`" + (
        f": {comment}" if (comment := _comment(field)) else ""
    )


def _about(field: griffe.Attribute) -> str:
    declared = _declaration(field)
    if declared is None:
        return _comment(field)
    given = {
        each.arg: ast.literal_eval(each.value)
        for each in declared.keywords
        if each.arg in {"description", *BOUNDS} and not _is_far(each.value)
    }
    bounds = ", ".join(words.format(given[name]) for name, words in BOUNDS.items() if name in given)
    return " ".join(
        filter(None, [given.get("description", ""), f"{bounds.capitalize()}." if bounds else ""])
    )


def _is_far(bound: ast.expr) -> bool:
    """Whether a bound is a named constant: such a bound is far from every useful value."""
    return any(isinstance(each, ast.Name) for each in ast.walk(bound))


def _declaration(field: griffe.Attribute) -> ast.Call | None:
    """Return the call of pydantic's `Field` that declares a field, or None."""
    [statement] = ast.parse(dedent(field.source)).body
    value = getattr(statement, "value", None)
    is_call = (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id == "Field"
    )
    return value if is_call else None


def _comment(field: griffe.Attribute) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(dedent(field.source)).readline)
    return next(
        (each.string.removeprefix("#").strip() for each in tokens if each.type == tokenize.COMMENT),
        "",
    )
