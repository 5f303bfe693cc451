"""Random access to the tensors of a table: by row number, through the row groups that were read last.

A table's light columns (ids, captions, shapes) are held in memory; its tensors are not, since there may be terabytes.
What the rows mean is `latent_clips.py`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch

from simda.data.schema import TableKind
from simda.data.store import OutputStore
from simda.data.tensors import BFLOAT16, bfloat16_to_float32, read_tensor
from simda.data.uris import patiently
from simda.errors import InputError

NUM_READERS = 8
"""Threads that read the light columns at the start; more than cores, since object stores answer slowly."""
NUM_OPEN_SHARDS = 64


class TensorTable:
    """A table with a tensor in each row.

    Args:
        kind: the table, which lies in `store`.
        tensor_column: the tensor's bytes; `<tensor_column>_shape` and `_dtype` stand beside it.
        light_columns: the columns to hold in memory, as `light`.
        cache_bytes: memory for row groups.
        layout_of: another tensor column, whose shape and dtype are this one's too.

    Attributes:
        light: the light columns, one row per row of the table.
        groups: number of the row group of each row, [num_rows].

    Raises:
        InputError: the table has no rows.
    """

    def __init__(
        self,
        store: OutputStore,
        kind: TableKind,
        tensor_column: str,
        light_columns: Sequence[str],
        cache_bytes: int,
        layout_of: str | None = None,
    ) -> None:
        self._store, self._tensor_column, self._cache_bytes = store, tensor_column, cache_bytes
        layout = layout_of or tensor_column
        self._shape_column, self._dtype_column = f"{layout}_shape", f"{layout}_dtype"
        self._open_shard = lru_cache(NUM_OPEN_SHARDS)(lambda shard: store.open_shard(kind, shard))

        def read_light(shard: str) -> tuple[pa.Table, list[int]]:
            file = store.open_shard(kind, shard)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            return file.read(columns=list(light_columns)).replace_schema_metadata(None), sizes

        shards = store.shard_names(kind)
        with ThreadPoolExecutor(NUM_READERS) as pool:
            parts = list(pool.map(read_light, shards))
        sizes = [size for _, group_sizes in parts for size in group_sizes]
        if not sum(sizes):
            raise InputError(f"the {kind.name} table in {store.uri} has no rows; see the failures table beside it")
        self.light = pa.concat_tables(light for light, _ in parts)
        self.groups = np.repeat(np.arange(len(sizes)), sizes)
        self._first_rows = np.cumsum([0, *sizes])
        self._group_places = [
            (shard, group)
            for shard, (_, group_sizes) in zip(shards, parts, strict=True)
            for group in range(len(group_sizes))
        ]
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = 0

    def tensor(self, row: int) -> np.ndarray:
        """The tensor of a row, float32.

        Raises:
            InputError: its bytes do not fit its shape, or its file is no longer there.
        """
        group = int(self.groups[row])
        offset = row - int(self._first_rows[group])
        record = self._read_group(group).slice(offset, 1).to_pylist()[0]
        dtype = record[self._dtype_column]
        layout = {
            f"{self._tensor_column}_shape": record[self._shape_column],
            f"{self._tensor_column}_dtype": dtype,
        }
        array = read_tensor(record | layout, self._tensor_column)
        if dtype == BFLOAT16:
            return bfloat16_to_float32(array)
        # torch, which takes no read-only arrays, widens float16 ten times as fast as numpy: most of what a read cost.
        return torch.from_numpy(array.copy()).float().numpy()

    def _read_group(self, group: int) -> pa.Table:
        if group not in self._cache:
            shard, number = self._group_places[group]
            columns = [self._tensor_column, self._shape_column, self._dtype_column]
            try:
                table = patiently(
                    self._store.uri, lambda: self._open_shard(shard).read_row_group(number, columns=columns)
                )
            except OSError as error:
                raise InputError(
                    f"{self._store.uri_of(shard)} can no longer be read: {error}; bring it back, then run the same "
                    "command again"
                ) from None
            self._cache[group] = table
            self._cached_bytes += table.nbytes
        self._cache.move_to_end(group)
        while len(self._cache) > 1 and self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return self._cache[group]
