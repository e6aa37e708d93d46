"""An estimate of the memory that values hold, from a few of them, which costs almost nothing.

A running node asks it so that its outputs stay within a bound.  Begin with `estimated_bytes`.
`largest_value` is the bound that Redis sets for one value.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from redis.exceptions import RedisError

from resilience.store import Store

LARGEST_VALUE = 512 << 20
"""Bytes of the largest value that Redis takes, unless its `proto-max-bulk-len` says otherwise."""
ALWAYS_TAKEN = 1 << 20
"""Redis takes a value of so many bytes, whatever its settings are."""
SAMPLED = 8
"""Values that are looked at, spread evenly, at each level."""
DEEPEST = 4


def estimated_bytes(values: Sequence[Any], lo: int = 0) -> int:
    """Return about how many bytes the values from index `lo` on hold in memory."""
    count = len(values) - lo
    if count <= 0:
        return 0
    sampled = min(count, SAMPLED)
    chosen = (values[lo + at * count // sampled] for at in range(sampled))
    return sum(_held(value, 0) for value in chosen) * count // sampled


def _held(value: Any, depth: int) -> int:
    size = sys.getsizeof(value, 64)
    if depth == DEEPEST or isinstance(value, str | bytes | int | float):
        return size
    if isinstance(value, Mapping):
        parts: Iterable[Any] = itertools.chain.from_iterable(value.items())
        count, most = 2 * len(value), 2 * SAMPLED
    elif isinstance(value, list | tuple | set | frozenset):
        parts, count, most = value, len(value), SAMPLED
    else:
        parts = getattr(value, "__dict__", {}).values()
        count, most = len(getattr(value, "__dict__", {})), SAMPLED
    held = [_held(part, depth + 1) for part in itertools.islice(parts, most)]
    return size + (sum(held) * count // len(held) if held else 0)


def largest_value(store: Store) -> int:
    """Return the bytes of the largest value that Redis takes; one call to the server."""
    try:
        found = cast(dict[str, str], store.client.config_get("proto-max-bulk-len"))
        return int(found["proto-max-bulk-len"])
    except (RedisError, KeyError):  # a managed server may refuse CONFIG
        return LARGEST_VALUE
