"""Tokenizers of the fake provider: how it counts the tokens of messages, and cuts an answer.

The one named `bytes` counts as the platform estimates: one token for four bytes.  So estimates are
exact.  The one named `pieces` counts about as real models do, so estimates have to be learned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from rlm_tasks.llm.wire.answers import estimated_prompt, estimated_tokens

MESSAGE_TOKENS = 4
"""Tokens that `pieces` counts for the role of a message and its frame."""
REPLY_TOKENS = 3
"""Tokens that `pieces` counts for the start of an answer."""
_PIECES = re.compile(r" ?[^\W\d_]+|\d{1,3}|\s*\n\s*|\s{2,}| ?([^\w\s]|_){1,3}|\s")


class Tokenizer(Protocol):
    """Counts tokens as one kind of model does."""

    def count(self, text: str) -> int:
        """Return the tokens of a text."""

    def cut(self, text: str, most: int) -> str:
        """Return the first `most` tokens of a text."""

    def prompt(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None
    ) -> int:
        """Return the tokens of messages and of the schema of their answer."""


class Bytes:
    """One token for each four bytes of the messages; a schema is free."""

    def count(self, text: str) -> int:
        """Return the tokens of a text."""
        return estimated_tokens(text)

    def cut(self, text: str, most: int) -> str:
        """Return the first `most` tokens of a text."""
        return text.encode()[: 4 * most].decode(errors="ignore")

    def prompt(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None
    ) -> int:
        """Return the tokens of messages."""
        return estimated_prompt(messages)


class Pieces:
    """Words, numbers and punctuation in pieces, with a few tokens for each message.

    - A word has a token for its first seven letters, and one for every further four.
    - Outside ASCII three letters are a token; each Chinese, Japanese or Korean sign is one.
    - Three digits, three signs of punctuation, and a line break with its indent are a token each.
    """

    def count(self, text: str) -> int:
        """Return the tokens of a text."""
        return sum(cost for _, cost in _split(text))

    def cut(self, text: str, most: int) -> str:
        """Return the first `most` tokens of a text."""
        end = 0
        for piece, cost in _split(text):
            most -= cost
            if most < 0:
                return text[:end]
            end += len(piece)
        return text

    def prompt(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any] | None
    ) -> int:
        """Return the tokens of messages, their frames, and the schema of their answer."""
        formed = 0 if schema is None else self.count(msgspec.json.encode(schema).decode())
        contents = sum(self.count(each["content"]) + MESSAGE_TOKENS for each in messages)
        return REPLY_TOKENS + contents + formed


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"bytes": Bytes, "pieces": Pieces}


def _split(text: str) -> Iterator[tuple[str, int]]:
    """Yield the pieces of a text and the tokens of each."""
    for found in _PIECES.finditer(text):
        piece = found[0]
        letters = piece.strip()
        if not letters[:1].isalpha():
            yield piece, 1
        elif letters.isascii():
            yield piece, 1 + max(0, -(-(len(letters) - 7) // 4))
        else:
            signs = sum(each >= "\u2e80" for each in letters)
            yield piece, signs - (signs - len(letters)) // 3
