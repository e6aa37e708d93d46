"""What jobs of the tests about models ask for."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Animal(BaseModel):
    """An answer that takes the fake provider two calls."""

    name: str
    legs: int


class Impossible(BaseModel):
    """An answer that it never gets right."""

    name: str
    legs: int = Field(ge=1)
