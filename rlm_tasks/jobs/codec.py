"""How items, params, outputs, partials and answers are packed: MessagePack, compressed.

The engine, the ledger and clients call `pack` and `unpack`.  A value comes back as it went, equal
and of the same type, or `pack` refuses it by name; `storable` has the types.  Types that
MessagePack lacks are its extensions, in `_EXTENSIONS`.  Pickle is never used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from typing import Any, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import zstandard
from msgspec.msgpack import Ext

from rlm_tasks.jobs.storable import (
    MOST_LEVELS,
    PLAIN,
    SCALARS,
    is_portable,
    refusal,
    types_in,
)

_PLAIN, _ZSTD = b"\x00", b"\x01"
_WORTH_COMPRESSING = 512
"""Bytes; shorter data is stored as it is."""
MOST_UNPACKED_BYTES = 1 << 31
"""Larger data is never unpacked."""


def encode(value: Any) -> bytes:
    """Return the value as MessagePack.  Raises NotStorable, a TypeError, naming what is wrong."""
    return _encode(value, MOST_LEVELS)


def encode_all(values: list[Any]) -> bytes:
    """Return a list of values as MessagePack, each of which may be as deep as `encode` allows.

    Raises NotStorable.
    """
    return _encode(values, MOST_LEVELS + 1)


def decode(data: bytes | memoryview) -> Any:
    """Return the value that `encode` packed."""
    return _decoder.decode(data)


def parts(data: bytes) -> tuple[bytes, list[int], Callable[[bytes, int], list[Any]]]:
    """Return a packed list in parts, so that some of its values can be decoded alone.

    The result is the packed values one after another, the size of each, and the function that
    decodes neighbours from their bytes and their number.
    """
    unpack: Callable[[bytes], list[Any]] = decode
    if data[0] in _EXTENSION_BYTES:
        data, unpack = bytes(_ext_decoder.decode(data).data), _rows_decoder.decode
    sizes = list(map(len, cast(list[bytes], _raw_decoder.decode(data))))

    def decode_some(some: bytes, count: int) -> list[Any]:
        return unpack(_LIST_32 + count.to_bytes(4, "big") + some)

    return data[len(data) - sum(sizes) :], sizes, decode_some


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
    """Return the value as compressed MessagePack.  Raises NotStorable as `encode` does."""
    return compress(encode(value))


def unpack(data: bytes) -> Any:
    """Return the value that `pack` received."""
    return decode(decompress(data))


# --- encoding ----------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_AS_IS = SCALARS - {int}


def _encode(value: Any, levels: int) -> bytes:
    try:
        kinds = types_in(value, levels)
        with suppress(OverflowError):  # an integer of more than 64 bits
            if set().union(*kinds) <= PLAIN:
                return _encoder.encode(value)
            if kinds[:2] == [{list}, {tuple}] and set().union(*kinds[2:]) <= SCALARS:
                return _encoder.encode(Ext(_ROWS, _encoder.encode(value)))
        return _encoder.encode(_extended(value))
    except (UnicodeEncodeError, _NoZone, RecursionError):
        raise refusal(value, levels) from None


class _NoZone(Exception):
    """A time has a zone that cannot be stored."""


def _extended(value: Any) -> Any:
    """Return the value in the types of MessagePack and in extensions."""
    kind = type(value)
    if kind in _AS_IS:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else Ext(_BIG_INTEGER, _of_integer(value))
    if kind is dict:
        return _extended_dict(value)
    if kind is not list:
        code, packed = _EXTENSIONS[kind]
        return Ext(code, packed(value))
    if value and set(map(type, value)) == {tuple}:
        return Ext(_ROWS, _of_rows(value))
    return [each if type(each) in _AS_IS else _extended(each) for each in value]


def _extended_dict(value: dict[Any, Any]) -> Any:
    if set(map(type, value)) == {str}:
        return {
            key: each if type(each) in _AS_IS else _extended(each) for key, each in value.items()
        }
    extended = {key: (_extended(key), _extended(each)) for key, each in value.items()}
    if any(type(key) is Ext for key, _ in extended.values()):  # an Ext cannot be a key
        return Ext(_PAIRS, _encoder.encode(list(chain.from_iterable(extended.values()))))
    return dict(extended.values())


def _of_integer(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)


def _of_rows(rows: list[tuple[Any, ...]]) -> bytes:
    """Return a list of tuples as an array of arrays, without an extension for each tuple."""
    return _encoder.encode([[_extended(each) for each in row] for row in rows])


def _of_contents(values: Any) -> bytes:
    return _encoder.encode(_extended(list(values)))


def _of_zone(zone: tzinfo | None) -> Any:
    """Return the name of a ZoneInfo, or the microseconds and the name of a fixed offset."""
    if not is_portable(zone):
        raise _NoZone
    if isinstance(zone, timezone):
        offset, name = zone.utcoffset(None), zone.tzname(None)
        given = name if name != timezone(offset).tzname(None) else None
        return [offset // timedelta(microseconds=1), given]
    return zone.key if isinstance(zone, ZoneInfo) else None


def _of_time(value: datetime | time) -> bytes:
    """Return the text of a naive time, and with a zone or a fold a list of three."""
    if value.tzinfo is None and not value.fold:
        return value.isoformat().encode()
    naive = value.replace(tzinfo=None, fold=0).isoformat()
    return _encoder.encode([naive, value.fold, _of_zone(value.tzinfo)])


# --- decoding ----------------------------------------------------------------------------------


def _to_zone(zone: Any) -> tzinfo | None:
    if isinstance(zone, list):
        offset, name = timedelta(microseconds=zone[0]), zone[1]
        return timezone(offset) if name is None else timezone(offset, name)
    return ZoneInfo(zone) if zone is not None else None


def _to_time(kind: type[datetime] | type[time], data: memoryview) -> datetime | time:
    if data[0] != _LIST_OF_THREE:
        return kind.fromisoformat(str(data, "ascii"))
    text, fold, zone = decode(data)
    return kind.fromisoformat(text).replace(tzinfo=_to_zone(zone), fold=fold)


def _to_rows(data: memoryview) -> list[tuple[Any, ...]]:
    return _rows_decoder.decode(data)


def _to_pairs(data: memoryview) -> dict[Any, Any]:
    flat = iter(decode(data))
    return dict(zip(flat, flat, strict=True))


_LIST_OF_THREE = 0x93
"""The first byte of such a list in MessagePack; a time in text begins with a digit."""
# The numbers are stored: a number keeps its meaning for ever.
_BIG_INTEGER, _ROWS, _PAIRS = 1, 14, 15
_EXTENSIONS: dict[type, tuple[int, Callable[[Any], bytes]]] = {
    tuple: (2, _of_contents),
    set: (3, _of_contents),
    frozenset: (4, _of_contents),
    date: (5, lambda value: value.isoformat().encode()),
    datetime: (6, _of_time),
    time: (7, _of_time),
    timedelta: (8, lambda value: _encoder.encode([value.days, value.seconds, value.microseconds])),
    Decimal: (9, lambda value: str(value).encode()),
    Fraction: (10, lambda value: _of_contents([value.numerator, value.denominator])),
    UUID: (11, lambda value: value.bytes),
    complex: (12, lambda value: _encoder.encode([value.real, value.imag])),
    bytearray: (13, bytes),
    Counter: (16, lambda value: _encoder.encode(_extended_dict(value))),
}
_DECODERS: dict[int, Callable[[memoryview], Any]] = {
    _BIG_INTEGER: lambda data: int.from_bytes(data, "big", signed=True),
    2: lambda data: tuple(decode(data)),
    3: lambda data: set(decode(data)),
    4: lambda data: frozenset(decode(data)),
    5: lambda data: date.fromisoformat(str(data, "ascii")),
    6: lambda data: _to_time(datetime, data),
    7: lambda data: _to_time(time, data),
    8: lambda data: timedelta(*decode(data)),
    9: lambda data: Decimal(str(data, "ascii")),
    10: lambda data: Fraction(*decode(data)),
    11: lambda data: UUID(int=int.from_bytes(data, "big")),
    12: lambda data: complex(*decode(data)),
    13: bytearray,
    _ROWS: _to_rows,
    _PAIRS: _to_pairs,
    16: lambda data: Counter(decode(data)),
}


def _unpack_extension(code: int, data: memoryview) -> Any:
    if (decoder := _DECODERS.get(code)) is None:
        raise ValueError(f"unknown extension type {code}: a later release has written it")
    return decoder(data)


_decoder = msgspec.msgpack.Decoder(ext_hook=_unpack_extension)
_Rows = list[tuple[Any, ...]]
_rows_decoder: msgspec.msgpack.Decoder[_Rows] = msgspec.msgpack.Decoder(
    _Rows, ext_hook=_unpack_extension
)
_raw_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
_ext_decoder = msgspec.msgpack.Decoder(Ext)
_EXTENSION_BYTES = frozenset((0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8))
_LIST_32 = b"\xdd"
"""The first byte of a list whose number of values follows in four bytes."""
