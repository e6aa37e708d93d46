"""The models that a request may name for its answers."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from rlm_tasks.errors import InvalidRequest
from rlm_tasks.llm.structured_output import form_of, path_of
from rlm_tasks.operations import registry

SHOP = """
from dataclasses import dataclass
from hidden import Secret
from pydantic import BaseModel, Field
from pydantic_settings import BaseSettings

import hidden
import rlm_tasks.settings.model as config
from rlm_tasks import operation
from rlm_tasks.settings.model import Settings

class Invoice(BaseModel):
    number: int
    class Line(BaseModel):
        text: str

class Config(BaseSettings):
    password: str = "unit-secret"

class Below(Config):
    pass

class Nested(BaseModel):
    config: Config

class InAList(BaseModel):
    found: "list[tuple[int, Later]] | None" = None

class Later(BaseModel):
    config: dict[str, Config]

class ByFactory(BaseModel):
    config: object = Field(default_factory=Config)

class ByDefault(BaseModel):
    config: object = Config()

@dataclass
class Plain:
    config: Config

class InADataclass(BaseModel):
    plain: Plain

class Tree(BaseModel):
    branches: "list[Tree]" = []

@operation("shop.count")
def count(item):
    return 1
"""
HIDDEN = """
from pydantic import BaseModel

class Secret(BaseModel):
    a: int = 1
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module with an operation, beside one that is only imported."""
    (tmp_path / "shop.py").write_text(SHOP, encoding="utf-8")
    (tmp_path / "hidden.py").write_text(HIDDEN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    registry.import_operations([])  # so that the patched copy has the operations of all tests
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    for name in ("shop", "hidden"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module("shop")


def test_a_model_of_a_module_with_an_operation_is_found(shop: Any) -> None:
    assert form_of("shop:Invoice") is shop.Invoice
    assert form_of(path_of(shop.Invoice.Line)) is shop.Invoice.Line
    assert form_of("shop:Tree") is shop.Tree


def test_a_model_of_a_module_of_rlm_operations_is_found(
    shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_imported", set())
    with pytest.raises(InvalidRequest, match="RLM_OPERATIONS"):
        form_of("hidden:Secret")

    registry.import_operations(["hidden"])

    assert form_of("hidden:Secret") is sys.modules["hidden"].Secret


@pytest.mark.parametrize(
    "path",
    [
        "rlm_tasks.settings.model:Settings",
        "rlm_tasks.settings:Settings",
        "rlm_tasks.settings.llm:Tier",
        "shop:Settings",  # imported there
        "shop:config.Settings",
        "shop:Config",  # reads the environment
        "shop:Below",
        *("shop:Nested", "shop:InAList", "shop:Later", "shop:InADataclass"),
        *("shop:ByFactory", "shop:ByDefault"),
        "shop:BaseSettings",
        "shop:Secret",  # another module's
        "shop:hidden.Secret",
        "hidden:Secret",
        "shop:count",
        "shop:Missing",
        "shop:Invoice.__class__",
        "shop:Invoice.model_config",
        "shop:",
        "shop",
        "os:path",
        "pydantic:BaseModel",
        ":Invoice",
        "",
    ],
)
def test_any_other_path_is_refused(shop: Any, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        form_of(path)

    assert caught.value.field == "output"
