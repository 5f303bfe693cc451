"""The directory that a command writes, local or on S3: whose run it is, its tables and files, whether it is complete.

    OUTPUT/data/*.parquet      the main table      OUTPUT/videos/...       files that rows point to
    OUTPUT/failures/*.parquet  rows that failed    OUTPUT/config.yaml      the resolved configuration
    OUTPUT/filtered/*.parquet  rows left out, why  OUTPUT/_lock.json       while a run is at work here
    OUTPUT/_run.json           what the run is     OUTPUT/_manifest.json   written last: complete

Any number of processes may write shards at once: a shard's name is a hash of its rows' ids and its provenance, so work
that is done twice lands on one name, and readers drop what is still there twice. Columns are `schema.py`'s business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from simda.data import run_lock
from simda.data.schema import FAILURES, LIBRARIES, TableKind, describe_differences, read_provenance
from simda.data.uris import TEMPORARY_PREFIX, get_info, is_local, join_uri, open_uri, patiently, read_bytes, write_bytes
from simda.errors import ConfigError, InputError, ModelMismatchError

RUN_FILE, MANIFEST_FILE, CONFIG_FILE = "_run.json", "_manifest.json", "config.yaml"
ABANDONED_AFTER_S = 3600.0
READERS = 16
MAX_FILE_BYTES = 250 * 10**6
"""Of a table in memory; its file is hardly larger, and so stays under 256 MB."""
ROW_GROUP_BYTES = 16 * 2**20
"""What a reader of one row reads at most, unless that row alone is larger."""


class OutputStore:
    """An output directory. Constructing one touches nothing; workers construct their own from the same `uri`."""

    def __init__(self, uri: str) -> None:
        open_uri(uri)
        self.uri = uri.rstrip("/") or uri

    # Whose directory it is

    def check_claim(self, run_key: Mapping[str, Any]) -> bool:
        """Whether this directory already belongs to the run; writes nothing.

        Returns:
            True to go on with earlier work, False to start.

        Raises:
            ConfigError: the directory belongs to a run with other settings, or holds something else.
        """
        filesystem, path = open_uri(self.uri)
        found = get_info(filesystem, path, self.uri).type
        if found == fs.FileType.File:
            raise ConfigError(f"output={self.uri} is a file; give a directory")
        if found == fs.FileType.NotFound:
            return False
        if get_info(filesystem, f"{path}/{RUN_FILE}", self.uri).type == fs.FileType.NotFound:
            entries = sorted(info.base_name for info in filesystem.get_file_info(fs.FileSelector(path)))
            ours = (TEMPORARY_PREFIX, run_lock.LOCK_FILE)
            foreign = [name for name in entries if name and not name.startswith(ours)]
            if foreign:
                raise ConfigError(
                    f"output={self.uri} holds files that are not a run's ({', '.join(foreign[:5])}"
                    f"{', ...' if len(foreign) > 5 else ''}); give an empty or new directory"
                )
            return False
        differences = describe_differences(self.run_key(), json.loads(json.dumps(run_key)))
        if differences:
            raise ConfigError(
                f"output={self.uri} belongs to a run with other settings:\n  "
                + "\n  ".join(differences)
                + "\nGive another output, go back to the old settings, or delete the directory to start over."
            )
        return True

    def claim(self, run_key: Mapping[str, Any], config_yaml: str) -> bool:
        """Make this directory the run's, or find that it already is; writes `config.yaml` either way.

        It is locked from here on, until the command ends (`run_lock.release_all`).

        Args:
            run_key: everything that decides the content (JSON-like; nested dictionaries may be used). The same key
                later goes on with the work, another is refused.
            config_yaml: the resolved configuration, for people.

        Returns:
            True to go on with earlier work, False to start.

        Raises:
            ConfigError: as `check_claim`, or another run is at work here, or nothing can be written here.
        """
        self.check_claim(run_key)
        run_lock.hold(self.uri, str(run_key.get("command", "a run")))
        resumes = self.check_claim(run_key)
        if resumes:
            self._remove_abandoned()
        else:
            self._write_file(RUN_FILE, json.dumps(run_key, indent=2, ensure_ascii=False))
        self._write_file(CONFIG_FILE, config_yaml)
        return resumes

    def run_key(self) -> dict[str, Any]:
        """The key of the run that this directory belongs to.

        Raises:
            InputError: it belongs to none.
        """
        return json.loads(read_bytes(self.uri_of(RUN_FILE)))

    # Tables

    def write_shard(self, kind: TableKind, table: pa.Table) -> list[str]:
        """Write a table made by `schema.build_table` as a file that appears whole or not at all.

        A table of more than `MAX_FILE_BYTES` becomes several files, and row groups hold less than the kind's
        `row_group_rows` where its rows are large.

        Returns:
            Its name under the output, such as `data/latents-1f0c....parquet`; the same rows give the same names.
        """
        if table.nbytes > MAX_FILE_BYTES and len(table) > 1:
            half = len(table) // 2
            return [*self.write_shard(kind, table.slice(0, half)), *self.write_shard(kind, table.slice(half))]
        provenance = read_provenance(table.schema, kind, "the table to write")
        keys = sorted(zip(*(table[column].to_pylist() for column in kind.key), strict=True))
        digest = hashlib.sha256(json.dumps([provenance, keys], sort_keys=True).encode()).hexdigest()
        name = f"{kind.folder}/{kind.name}-{digest[:24]}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            compression=kind.compression,
            row_group_size=max(1, min(kind.row_group_rows, ROW_GROUP_BYTES * len(table) // max(1, table.nbytes))),
            # Dictionaries and statistics only cost time on tensors, and gain little on texts that seldom repeat.
            use_dictionary=False,
            write_statistics=[field.name for field in kind.columns if field.type != pa.binary()],
        )
        write_bytes(self.uri_of(name), sink.getvalue())
        return [name]

    def shard_names(self, kind: TableKind) -> list[str]:
        """Names of the table's files under the output, sorted; unfinished files are left out."""
        filesystem, path = open_uri(self.uri_of(kind.folder))
        get_info(filesystem, path, self.uri)
        selector = fs.FileSelector(path, allow_not_found=True)
        infos = patiently(self.uri, lambda: filesystem.get_file_info(selector))
        names = sorted(info.base_name for info in infos if info.type == fs.FileType.File)
        return [
            f"{kind.folder}/{name}" for name in names if name.startswith(f"{kind.name}-") and name.endswith(".parquet")
        ]

    def open_shard(self, kind: TableKind, name: str) -> pq.ParquetFile:
        """A shard for reading by row groups and columns.

        Raises:
            InputError: not a Parquet file of this kind.
            ModelMismatchError: written with another version of the schema.
        """
        shard = self._open_parquet(name)
        if shard is None:
            raise InputError(f"{self.uri_of(name)} is not a whole Parquet file; delete it and run the command again")
        read_provenance(shard.schema_arrow, kind, self.uri_of(name))
        return shard

    def provenance(self, kind: TableKind) -> dict[str, Any]:
        """What holds for all rows of the table.

        Raises:
            InputError: there is no such table here.
            ModelMismatchError: its files differ in more than the versions of libraries.
        """
        first: dict[str, Any] | None = None
        for name, shard in self._shards(kind):
            found = read_provenance(shard.schema_arrow, kind, name)
            first = found if first is None else first
            differences = describe_differences({**first, LIBRARIES: 0}, {**found, LIBRARIES: 0})
            if differences:
                raise ModelMismatchError(
                    f"the files of the {kind.name} table in {self.uri} do not belong together; {name} differs:\n  "
                    + "\n  ".join(differences)
                )
        if first is None:
            raise InputError(f"no {kind.name} table in {self.uri}; has the command that writes it run?")
        return first

    def ids(self, kind: TableKind, column: str | None = None) -> set[str]:
        """All values of the id column (or another), reading nothing else; empty when there is no table yet."""
        name = column or kind.id_column
        return {value for table in self._read_shards(kind, [name]) for value in table[name].to_pylist()}

    def num_rows(self, kind: TableKind) -> int:
        """Rows of the table, each counted once."""
        return len(self.ids(kind))

    def without_written(
        self, kind: TableKind, plan: pa.Table, plan_column: str | None = None, column: str | None = None
    ) -> pa.Table:
        """The rows of `plan` whose id the table does not have; ids stay in Arrow memory, so millions are no trouble.

        Args:
            plan_column: the column of `plan` with the ids, if it is not named as in the table.
            column: of the table, to compare by another one than its id.
        """
        column = column or kind.id_column
        if not len(plan):
            return plan
        chunks = [chunk for table in self._read_shards(kind, [column]) for chunk in table[column].chunks]
        written = pa.chunked_array(chunks, type=pa.string())
        return plan.filter(pc.invert(pc.is_in(plan[plan_column or column], value_set=written)))

    def read_table(self, kind: TableKind, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole table, each row once, in the order of its key; of a failure the last attempt.

        Raises:
            InputError: an unknown column is asked for.
        """
        wanted = list(columns or kind.columns.names)
        unknown = sorted(set(wanted) - set(kind.columns.names))
        if unknown:
            known = ", ".join(kind.columns.names)
            raise InputError(f"the {kind.name} table has no column {', '.join(unknown)}; it has {known}")
        order = ["attempt"] if kind is FAILURES else []
        read = list(dict.fromkeys([*wanted, *kind.key, *order]))
        shards = [table.replace_schema_metadata(None) for table in self._read_shards(kind, read)]
        if not shards:
            return pa.schema([kind.columns.field(name) for name in wanted]).empty_table()
        return _each_once(pa.concat_tables(shards), kind.key, order).select(wanted)

    def failures(self, kind: TableKind) -> pa.Table:
        """The failures that still stand: the last attempt of each, without those whose id now has a row in `kind`."""
        return self.without_written(kind, self.read_table(FAILURES), FAILURES.id_column)

    def clear_failures(self) -> pa.Table:
        """Forget all failures, so that their rows are tried again.

        Returns:
            What was forgotten, so that the next attempt knows its number.
        """
        forgotten = self.read_table(FAILURES)
        for name in self.shard_names(FAILURES):
            self.delete_file(name)
        return forgotten

    def forget(self, kind: TableKind, ids: pa.Array) -> None:
        """Take rows out of a table. Killed at it, some of them may still be there, and all others are."""
        for name, shard in list(self._shards(kind)):
            is_kept = pc.invert(pc.is_in(shard.read([kind.id_column])[kind.id_column], value_set=ids))
            if pc.all(is_kept).as_py():
                continue
            kept = shard.read().filter(is_kept)
            written = self.write_shard(kind, kept) if len(kept) else []
            if name not in written:
                self.delete_file(name)

    # Files

    def uri_of(self, relative: str) -> str:
        """The URI of a file of this output; an absolute path or URI comes back as it is."""
        return join_uri(self.uri, relative)

    def put_file(self, relative: str, local_path: str) -> str:
        """Copy a finished local file into the output, whole or not at all.

        Returns:
            `relative`, as rows should name it.
        """
        with open(local_path, "rb") as file:
            write_bytes(self.uri_of(relative), file.read())
        return relative

    def size_of(self, relative: str) -> int:
        """Bytes of a file of this output, 0 if it is not there."""
        filesystem, path = open_uri(self.uri_of(relative))
        return get_info(filesystem, path, self.uri).size or 0

    def delete_file(self, relative: str) -> None:
        """Delete a file if it is there."""
        filesystem, path = open_uri(self.uri_of(relative))
        if get_info(filesystem, path, self.uri).type == fs.FileType.File:
            filesystem.delete_file(path)

    def write_manifest(self, summary: Mapping[str, Any]) -> None:
        """Publish: everything is written. To be called last."""
        self._write_file(MANIFEST_FILE, json.dumps({"complete": True, **summary}, indent=2, ensure_ascii=False))

    def read_manifest(self) -> dict[str, Any] | None:
        """The summary of the finished run, or None while it is not finished."""
        filesystem, path = open_uri(self.uri_of(MANIFEST_FILE))
        if get_info(filesystem, path, self.uri).type == fs.FileType.NotFound:
            return None
        return json.loads(read_bytes(self.uri_of(MANIFEST_FILE)))

    def invalidate_manifest(self) -> None:
        """No longer complete: to be called before the first new row of a run that goes on."""
        self.delete_file(MANIFEST_FILE)

    def _write_file(self, relative: str, text: str) -> None:
        write_bytes(self.uri_of(relative), text.encode())

    def _shards(self, kind: TableKind) -> Iterator[tuple[str, pq.ParquetFile]]:
        opened = ((name, self._open_whole(kind, name)) for name in self.shard_names(kind))
        return ((name, shard) for name, shard in opened if shard is not None)

    def _read_shards(self, kind: TableKind, columns: Sequence[str]) -> Iterator[pa.Table]:
        """These columns of each file."""

        def read_once(name: str) -> pa.Table | None:
            shard = self._open_whole(kind, name)
            return None if shard is None else shard.read(list(columns), use_threads=False)

        def read(name: str) -> pa.Table | None:
            return patiently(self.uri, lambda: read_once(name))

        names = self.shard_names(kind)
        if is_local(self.uri):
            yield from (table for table in map(read, names) if table is not None)
            return
        # On S3 each takes as long as a few answers of the server.
        with ThreadPoolExecutor(max_workers=READERS) as readers:
            yield from (table for table in readers.map(read, names) if table is not None)

    def _open_whole(self, kind: TableKind, name: str) -> pq.ParquetFile | None:
        shard = self._open_parquet(name)
        if shard is None:
            # A disk that lost power can leave such a file; its rows count as not written and will be again.
            logging.getLogger(__name__).warning("%s is not a whole Parquet file; left out", self.uri_of(name))
            return None
        read_provenance(shard.schema_arrow, kind, self.uri_of(name))
        return shard

    def _open_parquet(self, name: str) -> pq.ParquetFile | None:
        filesystem, path = open_uri(self.uri_of(name))
        try:
            return patiently(self.uri, lambda: pq.ParquetFile(path, filesystem=filesystem))
        except pa.ArrowInvalid:
            return None

    def _remove_abandoned(self) -> None:
        if not is_local(self.uri):
            return
        root = open_uri(self.uri)[1]
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                if name.startswith(TEMPORARY_PREFIX) and time.time() - os.path.getmtime(path) > ABANDONED_AFTER_S:
                    os.remove(path)


def _each_once(table: pa.Table, key: Sequence[str], last_by: Sequence[str]) -> pa.Table:
    """Rows in the order of `key`, the last one of each by `last_by`; of equal ones the first that was read."""
    numbered = table.select([*key, *last_by]).append_column("row", pa.array(np.arange(len(table))))
    ordered = numbered.sort_by([(name, "ascending") for name in [*key, *last_by]] + [("row", "descending")])
    last_rows = ordered.group_by(list(key), use_threads=False).aggregate([("row", "last")])["row_last"]
    return table.take(last_rows)
