"""How items, partials and answers are packed: MessagePack, compressed where that saves space.

The engine, the ledger and clients call `pack` and `unpack`.  Both know plain data only: None,
booleans, numbers, strings, bytes, lists and dictionaries.  A tuple comes back as a list.  Pickle
is never used.
"""

from __future__ import annotations

from typing import Any

import msgspec
import zstandard

_PLAIN, _ZSTD = b"\x00", b"\x01"
_WORTH_COMPRESSING = 512
"""Bytes; shorter data is stored as it is."""
MOST_UNPACKED_BYTES = 1 << 31
"""Larger data is never unpacked."""
_BIG_INTEGER = 1
"""MessagePack's extension type for integers of more than 64 bits."""


def _unpack_extension(code: int, data: memoryview) -> Any:
    if code == _BIG_INTEGER:
        return int.from_bytes(data, "big", signed=True)
    raise ValueError(f"unknown extension type {code}")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ext_hook=_unpack_extension)


def encode(value: Any) -> bytes:
    """Return the value as MessagePack.  Raises TypeError for values that are not plain data."""
    try:
        return _encoder.encode(value)
    except OverflowError:
        return _encoder.encode(_with_big_integers(value))
    except (UnicodeEncodeError, msgspec.ValidationError, RecursionError) as error:
        raise TypeError(f"{type(error).__name__}: {error}") from None


def decode(data: bytes) -> Any:
    """Return the value that `encode` packed."""
    return _decoder.decode(data)


def compress(data: bytes) -> bytes:
    """Return the data with one byte in front that says how it is stored."""
    if len(data) >= _WORTH_COMPRESSING:
        packed = zstandard.compress(data, 1)
        if len(packed) < len(data):
            return _ZSTD + packed
    return _PLAIN + data


def unpacked_bytes(data: bytes) -> int:
    """Return the bytes of the data that `compress` received, without unpacking them."""
    if data[:1] != _ZSTD:
        return len(data) - 1
    size: int = zstandard.frame_content_size(data[1:33])
    return size if size >= 0 else MOST_UNPACKED_BYTES + 1  # -1: the frame does not say


def decompress(data: bytes) -> bytes:
    """Return the data that `compress` received.

    Raises ValueError when it has more than MOST_UNPACKED_BYTES: `compress` never wrote it.
    """
    if data[:1] != _ZSTD:
        return data[1:]
    if (size := unpacked_bytes(data)) > MOST_UNPACKED_BYTES:
        raise ValueError(f"stored data of {size} bytes, more than {MOST_UNPACKED_BYTES}")
    return zstandard.decompress(data[1:])


def pack(value: Any) -> bytes:
    """Return the value as compressed MessagePack.  Raises TypeError as `encode` does."""
    return compress(encode(value))


def unpack(data: bytes) -> Any:
    """Return the value that `pack` received."""
    return decode(decompress(data))


def _with_big_integers(value: Any) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(
            _BIG_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
        )
    if isinstance(value, dict):
        return {_with_big_integers(key): _with_big_integers(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_with_big_integers(item) for item in value]
    return value
