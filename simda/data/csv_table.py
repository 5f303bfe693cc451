"""CSV files as people write them: every value stays text, every row knows its line.

A byte order mark, CRLF, commas, quotes and newlines inside quotes are all fine; "007" stays "007" and "NA" stays "NA".
A blank before a quoted value does not count. A TSV file whose quotes do not pair is one without quoting.
What the columns mean is the business of `captions.py`, `prompts.py` and whoever else reads a table of their own.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from simda.data.uris import read_text
from simda.errors import InputError

MAX_VALUE_CHARS = 10_000_000
TAB = "\t"


@dataclass(frozen=True)
class CsvRow:
    """One record.

    Attributes:
        line: the line of the file on which it starts, from 1.
        values: by column, surrounding blanks removed; a column that the row leaves empty is "".
    """

    line: int
    values: dict[str, str]


@dataclass(frozen=True)
class CsvTable:
    """A CSV file's columns and records, and what was wrong with single lines."""

    uri: str
    columns: tuple[str, ...]
    rows: tuple[CsvRow, ...]
    faults: tuple[str, ...]


def read_csv(uri: str, required: Sequence[str], delimiter: str = ",") -> CsvTable:
    """Read a CSV file with a header line; blank lines are passed over.

    Args:
        uri: local path, `file://` or `s3://`.
        required: columns that must be there.
        delimiter: between values; a tab for TSV.

    Returns:
        The table; lines with too many or too few values are in `faults`, not in `rows`.

    Raises:
        InputError: the file is missing, not UTF-8, not CSV, empty, or lacks a required column.
    """
    rows: list[CsvRow] = []
    faults: list[str] = []
    columns: tuple[str, ...] = ()
    for start, record in _split(uri, read_text(uri), delimiter):
        values = [value.strip() for value in record]
        if not any(values):
            continue
        if not columns:
            columns = tuple(values)
            _check_header(uri, columns, required)
        elif len(values) != len(columns):
            faults.append(
                f"line {start}: {len(values)} values for {len(columns)} columns; "
                f"put values that contain a {'tab' if delimiter == TAB else 'comma'} in double quotes"
            )
        else:
            rows.append(CsvRow(start, dict(zip(columns, values, strict=True))))
    if not columns:
        raise InputError(
            f"{uri} is empty; its first line must name the columns{': ' * bool(required)}{', '.join(required)}"
        )
    return CsvTable(uri, columns, tuple(rows), tuple(faults))


def _split(uri: str, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The values of each record, with the line on which it starts."""

    def split(quoting: int, skips_blanks: bool) -> list[tuple[int, list[str]]]:
        # Text is split by the csv module alone: it alone knows which newlines stand inside quotes.
        records = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            strict=True,
            quoting=quoting,  # type: ignore[arg-type]
            skipinitialspace=skips_blanks,
        )
        found, start = [], 1
        try:
            for record in records:
                found.append((start, record))
                start = records.line_num + 1
        except csv.Error as error:
            raise InputError(f"{uri}, line {records.line_num}: not CSV: {error}") from None
        return found

    csv.field_size_limit(MAX_VALUE_CHARS)
    if delimiter == TAB:
        try:
            return split(csv.QUOTE_MINIMAL, False)
        except InputError:
            # Many a TSV file knows no quoting: a quote in it is a quote.
            return split(csv.QUOTE_NONE, False)
    try:
        # People write a blank between a comma and a quoted value.
        return split(csv.QUOTE_MINIMAL, True)
    except InputError:
        # Or a value that starts with a quoted word: after a blank, a quote is a quote then.
        return split(csv.QUOTE_MINIMAL, False)


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` is probably meant to be, if any comes close; case and separators do not count."""
    plain = {"".join(filter(str.isalnum, other)).casefold(): other for other in known}
    near = difflib.get_close_matches("".join(filter(str.isalnum, name)).casefold(), plain, n=1, cutoff=0.7)
    return plain[near[0]] if near else None


def _check_header(uri: str, columns: tuple[str, ...], required: Sequence[str]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise InputError(f"{uri}: column(s) {', '.join(map(repr, twice))} appear twice in the first line")
    for name in required:
        if name in columns:
            continue
        if len(columns) == 1 and any(separator in columns[0] for separator in ";\t|"):
            raise InputError(f"{uri}: the first line has no comma ({columns[0]!r}); separate values by commas")
        near = nearest_name(name, columns)
        hint = f"; rename {near!r} to {name!r}" if near else ""
        raise InputError(
            f"{uri} has no column {name!r}; its first line names {', '.join(map(repr, columns))}{hint}. "
            f"Required: {', '.join(required)}"
        )
