"""Arrays as table columns: raw C-order bytes, a shape and the name of a dtype.

Any reader of Parquet can turn the three back into a tensor. bfloat16, which numpy does not have, is carried as the raw
16 bits in `uint16` under the name "bfloat16". Which tables have such columns is `schema.py`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simda.errors import InputError

BFLOAT16 = "bfloat16"
DTYPES = ("float16", BFLOAT16, "float32", "float64", "uint8", "int32", "int64")


def tensor_columns(name: str, array: np.ndarray, dtype: str | None = None) -> dict[str, Any]:
    """The columns `name`, `name_shape` and `name_dtype` of one row.

    Args:
        array: any shape; for bfloat16 the raw bits as uint16.
        dtype: name to record, needed for bfloat16 only (`dtype="bfloat16"`); otherwise the array's own.

    Raises:
        InputError: the dtype is not one of `DTYPES`, or does not fit the array.
    """
    recorded = dtype or array.dtype.name
    if recorded not in DTYPES or storage_dtype(recorded) != array.dtype:
        raise InputError(
            f"{name}: an array of {array.dtype} cannot be stored as {recorded!r}; dtypes are {', '.join(DTYPES)}, "
            "bfloat16 as its raw bits in uint16"
        )
    # astype makes the bytes little-endian on every machine.
    data = np.ascontiguousarray(array).astype(storage_dtype(recorded).newbyteorder("<"), copy=False).tobytes()
    return {name: data, f"{name}_shape": list(array.shape), f"{name}_dtype": recorded}


def read_tensor(row: Mapping[str, Any], name: str) -> np.ndarray:
    """The array in a row's columns `name`, `name_shape`, `name_dtype`.

    Returns:
        A read-only view of the row's bytes; bfloat16 comes as its raw bits in uint16.

    Raises:
        InputError: a column is missing or empty, or the bytes do not have the length that shape and dtype ask for.
    """
    try:
        data, shape, dtype = row[name], row[f"{name}_shape"], row[f"{name}_dtype"]
    except KeyError as missing:
        raise InputError(f"tensor {name!r}: the row has no column {missing}; it has {', '.join(row)}") from None
    if data is None:
        raise InputError(f"tensor {name!r} is empty in this row; it was not kept when the table was written")
    return tensor_from_bytes(data, shape, dtype)


def tensor_from_bytes(data: bytes | memoryview, shape: Sequence[int], dtype: str) -> np.ndarray:
    """A read-only array over `data`, without a copy; bfloat16 comes as its raw bits in uint16.

    Raises:
        InputError: unknown dtype, or the length of `data` is not that of `shape`.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown tensor dtype {dtype!r}; known: {', '.join(DTYPES)}")
    stored = storage_dtype(dtype).newbyteorder("<")
    expected_bytes = int(np.prod(shape, dtype=np.int64)) * stored.itemsize
    if len(data) != expected_bytes:
        raise InputError(
            f"a tensor of shape {list(shape)} and dtype {dtype} has {expected_bytes} bytes, the row holds {len(data)}; "
            "the table is damaged, write it again"
        )
    array = np.frombuffer(data, dtype=stored).reshape(tuple(shape))
    array.flags.writeable = False
    return array


def storage_dtype(dtype: str) -> np.dtype:
    """The numpy dtype that carries `dtype`."""
    return np.dtype(np.uint16 if dtype == BFLOAT16 else dtype)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of raw bfloat16 bits (uint16, any shape), exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
