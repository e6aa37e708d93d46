"""Answer models of the tests with language models."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Animal(BaseModel):
    """An answer for which the fake provider needs two calls."""

    name: str
    legs: int


class Impossible(BaseModel):
    """An answer that the fake provider never gives correctly."""

    name: str
    legs: int = Field(ge=1)
