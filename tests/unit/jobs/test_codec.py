"""The codec of values: plain data comes back as it was, and long data is compressed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_tasks.jobs import codec

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(codec="utf-8")) | st.integers(0, 9), inner)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_data_survives_packing(value: Any) -> None:
    assert codec.unpack(codec.pack(value)) == value


def test_a_value_that_is_no_plain_data_raises_a_type_error() -> None:
    for value in (1j, object(), {"a": {1j}}, "\ud800"):
        with pytest.raises(TypeError):
            codec.pack(value)


def test_long_data_is_compressed() -> None:
    assert len(codec.pack(["the same"] * 1000)) < 200


@given(st.binary(max_size=3000), st.integers(1, 2000))
def test_the_unpacked_size_is_known_before_unpacking(data: bytes, times: int) -> None:
    assert codec.unpacked_bytes(codec.compress(data * times)) == len(data) * times


def test_data_that_grows_beyond_all_bounds_is_not_unpacked() -> None:
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little")

    with pytest.raises(ValueError, match="more than"):
        codec.decompress(b"\x01" + frame)
