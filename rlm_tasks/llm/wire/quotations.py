"""Whether a provider's message quotes the question or the key of a call, so that it must be hidden.

`errors` asks `quotes` before it shows a message.  Escapes, case, spaces and punctuation do not
matter.  Phrases that providers use in their own messages are no quotation, also if a question has
them by chance.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from urllib.parse import unquote

QUOTED = 12
"""A text that a message and a question have in common is a quotation from this many letters and
digits on.
"""
KEY_PART, KEY_END = 6, 4
"""From this many characters on a common text is a part of the key; a word, its begin or end."""

PHRASES = """
this model's maximum context length is|maximum context length|however you requested
however your messages resulted in|your prompt contains|your request has|in the messages
in the completion|in the prompt|please reduce the length of the messages or completion
please reduce the length of the messages|please reduce the length of the input messages
please reduce your prompt|the prompt is too long|prompt is too long|the input is too long
input is too long|is too long for this model|the input token count|of input tokens
exceeds the maximum number of tokens allowed|maximum number of tokens|the number of tokens
exceeds the available context size|the request exceeds|exceeds the context length
the input length exceeds|the context window|exceed context window|input tokens|output tokens
the request was rejected|your request was rejected|as a result of our safety system
the response was filtered|content management policy|azure openai's content management policy
please modify your prompt and retry|violates our usage policies|content policy
internal server error|an error occurred|please try again|try again later|rate limit reached for
you exceeded your current quota|please check your plan and billing details
for more information on this error|read the docs|the model does not exist
does not exist or you do not have access to it|is not supported with this model
is not supported|unsupported parameter|unsupported value|only the default value is supported
invalid value for|invalid type for|expected a string|expected one of|is required|field required
extra inputs are not permitted|input should be a valid string|input should be a valid
must be greater than|must be less than or equal to|should be greater than or equal to
additional properties are not allowed|unrecognized request argument supplied|unknown parameter
invalid request|invalid parameter|response format|json schema|bad request|not found|not allowed
too many requests|service unavailable|the server is overloaded|is currently overloaded
country region or territory not supported|you are not allowed|does not have access to model
"""
"""Phrases of providers' own messages, which a question may contain by chance."""
_COMMON = """
a an and any api are as at be because but by can chat check code could data did do does each error
expected failed field fields for found from given got has have if in input inputs into invalid is it
its json key length limit line long longer many max maximum may message messages min minimum model
models more must name new no not null number object of off on one only or organization out output
param parameter part per please prompt prompts property reason request requested requests required
result role see server should size stream string system tell temperature text than that the their
them then there these
this time to token tokens too tool tools total type unknown until up upon use used user valid value
values was we were when which while with without word words would yes you your
"""
_ESCAPED = re.compile(
    r"\\+u\{?([0-9a-fA-F]{4,6})\}?|\\+x([0-9a-fA-F]{2})|(\\+[0-7]{3})|(\\+[nrtbfv0])"
)
_QUOTED_PIECE = re.compile(
    r"(?<!\w)(?:'([^']+)'|\"([^\"]+)\"|`([^`]+)`|\u201c([^\u201d]+)\u201d|\xab([^\xbb]+)\xbb)(?!\w)"
)
_MASKED = re.compile(
    r"\*{2,}|\u2022{2,}|(?<!\w)(?:sk|pk|gsk|xai|hf|aiza|bearer)[-_ ]?\w*\.{3}", re.IGNORECASE
)
"""A key that a provider shows in part."""
_NAMES = re.compile("litellm|openai|anthropic|openrouter|project|account|master|gateway")
"""Words of providers' own messages that a key may contain, as `sk-litellm-...` does."""


def quotes(message: str, private: Sequence[str]) -> bool:
    """Return whether a message has a part of a private text: of the key, which is the first, or of
    the question.
    """
    unescaped = _unescaped(message)
    if private and _has_key(unescaped, private[0].strip()):
        return True
    plain, words = _plain(unescaped), _words(unescaped)
    pieces = [" ".join(_words("".join(each))) for each in _QUOTED_PIECE.findall(unescaped)]
    wholes = {*pieces, " ".join(_words(unescaped.rpartition(": ")[2])), " ".join(words)}
    for text in private[1:]:
        own = _unescaped(text)
        if _has_piece(pieces, own) or _holds(own, words):
            return True
        if len(_plain(own)) < QUOTED and not _is_long_abroad(own):
            if _has_short(own, words, wholes):
                return True
        elif _has_run(plain, _plain(own)) or _has_run(_ascii(plain), _ascii(_plain(own))):
            return True
    return False


# --- the question -----------------------------------------------------------------------------


def _has_run(message: str, text: str) -> bool:
    """Return whether both have a run of letters and digits in common, beside known phrases."""
    known = [0]  # known[i]: characters before i that are not in a phrase
    covered = bytearray(len(message))
    for phrase in _PHRASES:
        at = message.find(phrase)
        while at >= 0:
            covered[at : at + len(phrase)] = b"\1" * len(phrase)
            at = message.find(phrase, at + 1)
    for each in covered:
        known.append(known[-1] + (not each))
    if text and len(text) >= QUOTED and text in message:
        at = message.find(text)
        return known[at + len(text)] > known[at]
    end = 0
    for start in range(len(message)):
        end = max(end, start)
        while end < len(message) and message[start : end + 1] in text:
            end += 1
        run = message[start:end]
        if known[end] - known[start] >= QUOTED or (_is_long_abroad(run) and not run.isascii()):
            return True
    return False


def _is_long_abroad(text: str) -> bool:
    """Return whether a text has four letters in a row that are not Latin: a phrase in Chinese."""
    return re.search(r"[\u2e80-\ud7ff\uf900-\ufaff]{4}", text) is not None


def _has_short(text: str, words: list[str], wholes: set[str]) -> bool:
    """Return whether a short text is in a message: as whole words, or quoted if it is common."""
    own = _words(text)
    if not own:
        return False
    if " ".join(own) in wholes:
        return True
    if all(each in _VOCABULARY or len(each) < 3 or _is_number(each) for each in own):
        return False
    if not text.isascii() and _plain(text) in "".join(words):
        return True
    return any(words[at : at + len(own)] == own for at in range(len(words)))


def _holds(text: str, words: list[str]) -> bool:
    """Return whether a text has all words of a message, in their order."""
    return bool(words) and f" {' '.join(words)} " in f" {' '.join(_words(text))} "


def _has_piece(pieces: list[str], text: str) -> bool:
    """Return whether the message sets a part of a text in quotation marks."""
    rare = [
        each
        for each in pieces
        if len(each) >= 4 and not all(word in _VOCABULARY for word in each.split())
    ]
    own = f" {' '.join(_words(text))} " if rare else ""
    return any(f" {each} " in own for each in rare)


def _is_number(word: str) -> bool:
    return word.isdigit() and len(word) < 7


# --- the key ----------------------------------------------------------------------------------


def _has_key(message: str, key: str) -> bool:
    """Return whether a message has a part of the key, or a text in which a key is masked."""
    if _MASKED.search(message):
        return True
    if len(key) < KEY_PART + 2:  # no secret, such as "none"
        return bool(key) and re.search(rf"(?<!\w){re.escape(key)}(?!\w)", message) is not None
    message, key = message.casefold(), key.casefold()
    if key in message:
        return True
    message = _NAMES.sub(" ", message)
    if any(message[at : at + KEY_PART] in key for at in range(len(message) - KEY_PART + 1)):
        return True
    words = re.findall(rf"[\w-]{{{KEY_END},}}", message)
    return any(key.startswith(each) or key.endswith(each) for each in words)


# --- texts ------------------------------------------------------------------------------------


def _unescaped(text: str) -> str:
    """Return a text without the escapes of JSON, Python, HTML and URLs, also doubled ones."""

    def one(match: re.Match[str]) -> str:
        code = int(match[1] or match[2] or "20", 16)
        return chr(code) if code < 0x110000 else " "

    for _ in range(3):
        before, text = text, html.unescape(unquote(_ESCAPED.sub(one, text)))
        if text == before:
            break
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFKC", joined)


def _plain(text: str) -> str:
    """Return the letters and digits of a text."""
    return re.sub(r"[\W_]+", "", text.casefold())


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


_PHRASES = sorted(
    {_plain(each) for line in PHRASES.splitlines() for each in line.split("|") if each}
)
_VOCABULARY = frozenset(_COMMON.split()) | {*_words(PHRASES)}
