from __future__ import annotations

import numpy as np
import pytest

from simda.data.tensors import bfloat16_to_float32, read_tensor, tensor_columns, tensor_from_bytes
from simda.errors import InputError


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int32", "int64"])
def test_round_trip(dtype: str) -> None:
    array = np.arange(24).astype(dtype).reshape(2, 3, 4)[:, ::-1]
    row = tensor_columns("latents", array)
    assert (row["latents_shape"], row["latents_dtype"]) == ([2, 3, 4], dtype)
    again = read_tensor(row, "latents")
    np.testing.assert_array_equal(again, array)
    assert again.dtype == array.dtype
    assert not again.flags.writeable


def test_bfloat16_is_its_raw_bits() -> None:
    bits = np.array([0x3F80, 0xC000, 0x0000, 0x7F80], dtype=np.uint16)
    row = tensor_columns("x", bits, dtype="bfloat16")
    assert row == {"x": b"\x80\x3f\x00\xc0\x00\x00\x80\x7f", "x_shape": [4], "x_dtype": "bfloat16"}
    assert bfloat16_to_float32(read_tensor(row, "x")).tolist() == [1.0, -2.0, 0.0, float("inf")]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="complex64"):
        tensor_columns("x", np.zeros(2, dtype=np.complex64))
    with pytest.raises(InputError, match="float32 cannot be stored as 'bfloat16'"):
        tensor_columns("x", np.zeros(2, dtype=np.float32), dtype="bfloat16")
    with pytest.raises(InputError, match="has 8 bytes, the row holds 6"):
        tensor_from_bytes(bytes(6), [2, 2], "float16")
    with pytest.raises(InputError, match="unknown tensor dtype 'float8'"):
        tensor_from_bytes(bytes(4), [4], "float8")
    with pytest.raises(InputError, match="no column 'x_shape'"):
        read_tensor({"x": b""}, "x")
    with pytest.raises(InputError, match="'x' is empty"):
        read_tensor({"x": None, "x_shape": [1], "x_dtype": "uint8"}, "x")
