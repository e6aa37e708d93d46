"""The fields of records and enumerations, as tables in the Python reference: an extension of
griffe, named in mkdocs.yml.

Decides what is said of a field: a model's own description and bounds, else the comment at the end
of its line.  Refuses to know how a page looks."""

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
"""Of a record with more fields than this the table stands for the signature, which would take as
many lines.
"""


class Fields(griffe.Extension):
    """Tell below the docstring of a model, record, enumeration or error what stands in its
    class.
    """

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Hear of a class; griffe calls this once a package is loaded."""
        fields = [
            each
            for each in cls.members.values()
            if isinstance(each, griffe.Attribute) and _is_field(each)
        ]
        if cls.docstring is None or not fields:
            return
        sections: list[griffe.DocstringSection] = [griffe.DocstringSectionText(cls.docstring.value)]
        if any(_declaration(each) for each in fields):
            told = [_parameter(each) for each in fields if each.annotation is not None]
            sections.append(griffe.DocstringSectionParameters(told))
            cls.bases = []  # what all models have in common is no business of who fills in the fields
        elif _is_record(cls) and any(map(_comment, fields)):
            sections.append(
                griffe.DocstringSectionAttributes([_attribute(each) for each in fields])
            )
            if len(fields) > SHORT:
                cls.members.pop("__init__", None)
        elif any(str(base).endswith("Enum") for base in cls.bases):
            sections.append(griffe.DocstringSectionText("\n".join(map(_member, fields))))
        elif "code" in cls.members:
            constants = [each for each in fields if "class-attribute" in each.labels]
            sections.append(
                griffe.DocstringSectionText(
                    ", ".join(f"`{each.name} = {each.value}`" for each in constants)
                )
            )
        cls.docstring.parsed = sections


def _is_field(attribute: griffe.Attribute) -> bool:
    """Whether nothing else describes it."""
    return not (
        attribute.name.startswith("_") or attribute.docstring or "property" in attribute.labels
    )


def _is_record(cls: griffe.Class) -> bool:
    makers = [str(each.value) for each in cls.decorators] + [str(each) for each in cls.bases]
    return any("dataclass" in each or each == "msgspec.Struct" for each in makers)


def _parameter(field: griffe.Attribute) -> griffe.DocstringParameter:
    default, told = field.value, _declaration(field)
    if told is not None:
        factory = next(
            (each.value for each in told.keywords if each.arg == "default_factory"), None
        )
        default = (
            ast.unparse(told.args[0])
            if told.args
            else f"{ast.unparse(factory)}()"
            if factory is not None
            else None
        )
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
    told = _declaration(field)
    if told is None:
        return _comment(field)
    said = {
        each.arg: ast.literal_eval(each.value)
        for each in told.keywords
        if each.arg in {"description", *BOUNDS}
    }
    bounds = ", ".join(words.format(said[name]) for name, words in BOUNDS.items() if name in said)
    return " ".join(
        filter(None, [said.get("description", ""), f"{bounds.capitalize()}." if bounds else ""])
    )


def _declaration(field: griffe.Attribute) -> ast.Call | None:
    """Return the call of pydantic's Field that declares a field, if one does."""
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
