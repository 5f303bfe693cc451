"""Lists of records as people and programs write them: CSV, TSV, JSONL, JSON or Parquet, by the file's ending.

Every record knows where it stands. Values are text in CSV and TSV, and of any type in the others. What the columns mean
is the business of `video_table.py` and `prompts.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simda.data.csv_table import TAB, read_csv
from simda.data.uris import exists, open_uri, read_text
from simda.errors import InputError

CSV_DELIMITERS = {".csv": ",", ".tsv": TAB}
JSON_LINES = (".jsonl", ".ndjson")
RECORD_SUFFIXES = (*CSV_DELIMITERS, *JSON_LINES, ".json", ".parquet")

Record = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class RecordList:
    """The records of a file.

    Attributes:
        columns: all of the file, in order.
        records: where each stands ("line 3", "row 3", "record 3"), and its values; of a Parquet file they are read as
            they are asked for.
        faults: lines that hold no record, in the same words.
    """

    columns: tuple[str, ...]
    records: Iterator[Record]
    faults: tuple[str, ...] = ()


def suffix_of(uri: str) -> str:
    """The ending of a file's name, in small letters, with its dot; "" if it has none."""
    return "".join(uri.lower().rpartition("/")[2].rpartition(".")[1:])


def read_records(uri: str, wanted: Sequence[str], required: Sequence[str] = ()) -> RecordList:
    """Read a list by its ending, which is one of `RECORD_SUFFIXES`.

    Args:
        uri: local path, `file://` or `s3://`.
        wanted: columns to read where that saves reading the others, as in Parquet files; those that are not there are
            passed over.
        required: columns by which, of several lists in a JSON file, the right one is known; nothing else is done to
            check them.

    Raises:
        InputError: the file is missing, not of its format, or has no records.
    """
    suffix = suffix_of(uri)
    if suffix in CSV_DELIMITERS:
        table = read_csv(uri, (), CSV_DELIMITERS[suffix])
        return RecordList(table.columns, ((f"line {row.line}", dict(row.values)) for row in table.rows), table.faults)
    if suffix == ".parquet":
        return _read_parquet(uri, wanted)
    records, faults = _read_json_lines(uri) if suffix in JSON_LINES else (_read_json(uri, required), [])
    if not records and not faults:
        raise InputError(f"{uri} has no records; write one on each line, or a list of them in a .json")
    # A record may leave a column out; that the first one does says nothing of the others.
    columns = tuple(dict.fromkeys(name for _, record in records for name in record))
    return RecordList(columns, iter(records), tuple(faults))


def _read_parquet(uri: str, wanted: Sequence[str]) -> RecordList:
    if not exists(uri):
        raise InputError(f"{uri} does not exist; give the path of a file")
    filesystem, path = open_uri(uri)
    try:
        file = pq.ParquetFile(path, filesystem=filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{uri} is not a Parquet file: {str(error).splitlines()[0]}") from None
    columns = tuple(file.schema_arrow.names)
    return RecordList(columns, _parquet_rows(uri, file, [name for name in dict.fromkeys(wanted) if name in columns]))


def _parquet_rows(uri: str, file: pq.ParquetFile, columns: list[str]) -> Iterator[Record]:
    number = 0
    try:
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{uri} is damaged after row {number}: {str(error).splitlines()[0]}; copy it again") from None


def _read_json_lines(uri: str) -> tuple[list[Record], list[str]]:
    records, faults = [], []
    for number, line in enumerate(read_text(uri).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"line {number}: not JSON: {error.msg} at character {error.pos + 1}")
            continue
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number}: JSON that cannot be read: {error}")
            continue
        if isinstance(record, dict):
            records.append((f"line {number}", record))
        else:
            faults.append(f"line {number}: {type(record).__name__} instead of an object; write {{...}} on each line")
    return records, faults


def _read_json(uri: str, required: Sequence[str]) -> list[Record]:
    try:
        found = json.loads(read_text(uri))
    except json.JSONDecodeError as error:
        raise InputError(f"{uri}, line {error.lineno}: not JSON: {error.msg}; JSONL files end in .jsonl") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{uri} is JSON that cannot be read: {error}") from None
    lists = list(found.values()) if isinstance(found, dict) else [found]
    lists = [items for items in lists if isinstance(items, list) and all(isinstance(item, dict) for item in items)]
    if not lists:
        raise InputError(f"{uri} holds no list of records; write [{{...}}, {{...}}], or one record a line in a .jsonl")
    # Beside its captions, MSR-VTT's file has a list of the videos without any.
    fitting = [items for items in lists if items and set(required) <= set(items[0])]
    return [(f"record {number}", record) for number, record in enumerate((fitting or lists)[0], start=1)]


def as_text(value: Any) -> str:
    """A value of a list as it would stand in a CSV file.

    Raises:
        ValueError: it is neither text nor a number, or text that no file can hold.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        # A column of whole numbers with gaps comes out of pandas as 8.0.
        return str(int(value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is {type(value).__name__}, neither text nor a number")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half of a surrogate pair at character {error.start + 1}; write the whole character"
        ) from None
    return text
