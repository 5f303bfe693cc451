"""The tables of this project: their columns, and the provenance that travels in every file's metadata.

Each table is plain Parquet, readable by pandas, DuckDB or `datasets` without this code. Here live the columns, how rows
become a table and how a reader checks that a file is what it takes it for; where files lie is `store.py`'s business.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from simda.errors import InputError, ModelMismatchError

SCHEMA_VERSION = 1
ID_NAMESPACE = uuid.UUID("6f1c6f3e-5d0b-5b0f-9a55-0c1b8a7d9c11")
NULL_PROMPT = ""
"""Caption of the row of `text_embeddings` that stands for "no text"."""
LIBRARIES = "libraries"
"""Key of the provenance that may differ between the files of one table: versions of the software that wrote them."""

_KIND, _VERSION, _PROVENANCE = b"simda.table", b"simda.schema_version", b"simda.provenance"


@dataclass(frozen=True)
class TableKind:
    """A kind of table.

    Attributes:
        folder: where its files lie under an output.
        key: the columns that make a row unique; the first is the id.
        columns: names, types and nullability, in order.
        row_group_rows: rows per Parquet row group; small where a row carries a tensor, so that a reader can skip.
        compression: Parquet codec; "none" where the bytes do not shrink and are read at random.
    """

    name: str
    folder: str
    key: tuple[str, ...]
    columns: pa.Schema
    row_group_rows: int = 65536
    compression: str = "zstd"

    @property
    def id_column(self) -> str:
        """Name of the id column."""
        return self.key[0]


def _columns(**types: pa.DataType) -> pa.Schema:
    """Required columns; a trailing underscore marks one that may be empty."""
    return pa.schema([pa.field(name.rstrip("_"), kind, name.endswith("_")) for name, kind in types.items()])


_TEXT, _REAL, _COUNT, _BYTES = pa.string(), pa.float64(), pa.int32(), pa.binary()
_SHAPE = pa.list_(pa.int32())

LATENTS = TableKind(
    "latents",
    "data",
    ("clip_id",),
    _columns(
        clip_id=_TEXT,
        video_uri=_TEXT,
        start_s=_REAL,  # of the span, from the video's first frame
        end_s=_REAL,
        fps=_REAL,  # at which the frames were sampled
        num_frames=_COUNT,  # pixel frames
        height_px=_COUNT,
        width_px=_COUNT,
        caption=_TEXT,
        latents=_BYTES,  # scaled; [channels, frames, height, width]
        latents_shape=_SHAPE,
        latents_dtype=_TEXT,
        latents_std_=_BYTES,  # the posterior's spread, scaled, same shape and dtype; empty where not kept
        decoder=_TEXT,  # decord | pyav
        variant_=_COUNT,  # 0: the middle of the frames; from 1: a crop by chance of the same span
        low_res_=_BYTES,  # for an upscaler: uint8 RGB of low resolution, [frames, height, width, 3]; else empty
        low_res_shape_=_SHAPE,
        low_res_dtype_=_TEXT,
    ),
    row_group_rows=32,
    compression="none",
)
CLIP_COLUMNS = (
    "clip_id",
    "video_uri",
    "start_s",
    "end_s",
    "fps",
    "num_frames",
    "caption",
    "height_px",
    "width_px",
    "variant",
)
"""Columns that a clip has from its plan on."""
TEXT_EMBEDDINGS = TableKind(
    "text_embeddings",
    "text_embeddings",
    ("caption_id",),
    _columns(
        caption_id=_TEXT,  # caption_id(caption)
        caption=_TEXT,  # joins with latents.caption
        prompt_embeds=_BYTES,  # [tokens, channels]
        prompt_embeds_shape=_SHAPE,
        prompt_embeds_dtype=_TEXT,
    ),
    row_group_rows=32,
)
TEXT_TOKENS = TableKind(
    "text_tokens",
    "text_tokens",
    ("caption_id",),
    _columns(
        caption_id=_TEXT,  # caption_id(caption)
        caption=_TEXT,  # joins with latents.caption
        token_ids=_BYTES,  # [tokens], padded to the tokenizer's length
        token_ids_shape=_SHAPE,
        token_ids_dtype=_TEXT,
    ),
)
GENERATED = TableKind(
    "generated",
    "data",
    ("prompt_id",),
    _columns(
        prompt_id=_TEXT,
        prompt=_TEXT,
        negative_prompt_=_TEXT,
        seed=pa.int64(),
        num_inference_steps=_COUNT,
        guidance_scale=_REAL,
        noise_correlation=_REAL,
        scheduler=_TEXT,
        settings_=_TEXT,  # JSON: whatever else decided the video
        source_video_uri_=_TEXT,  # of an edit or an upscale
        source_prompt_=_TEXT,  # of an edit
        video_uri=_TEXT,  # relative to the output, or absolute
        width_px=_COUNT,
        height_px=_COUNT,
        num_frames=_COUNT,
        fps=_REAL,
        base=_TEXT,  # identity of the base model
        adapter_=_TEXT,  # identity of the adapter; empty for the base alone
        seconds=_REAL,  # wall time of this row
    ),
)
FAILURES = TableKind(
    "failures",
    "failures",
    ("id",),
    _columns(id=_TEXT, stage=_TEXT, error_type=_TEXT, message=_TEXT, attempt=_COUNT),
)
FILTERED = TableKind(
    "filtered",
    "filtered",
    ("id",),
    _columns(
        id=_TEXT,  # clip_id, or the id of a span that gave no clips
        video_uri=_TEXT,
        start_s=_REAL,
        end_s_=_REAL,  # empty for the video's end
        stage=_TEXT,
        filter=_TEXT,  # the setting that left it out
        message=_TEXT,
    ),
)
PLANNED = TableKind(
    "planned",
    "plan",
    ("clip_id",),
    _columns(
        video_key=_TEXT,  # of the video as it was listed: its uri, size, version, spans and captions
        content_hash=_TEXT,  # of the file; empty unless duplicates are filtered
        size_bytes=pa.int64(),  # of the file
        version=_TEXT,  # of the file
        **{name: LATENTS.columns.field(name).type for name in CLIP_COLUMNS},
    ),
)
METRICS = TableKind(
    "metrics",
    "data",
    ("id", "metric", "protocol"),
    _columns(id=_TEXT, metric=_TEXT, value=_REAL, protocol=_TEXT),
)

TABLES = {
    kind.name: kind for kind in (LATENTS, TEXT_EMBEDDINGS, TEXT_TOKENS, GENERATED, FAILURES, FILTERED, PLANNED, METRICS)
}


def build_table(kind: TableKind, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> pa.Table:
    """Rows as a table of this kind, its provenance in the metadata.

    Args:
        rows: dictionaries with every required column; columns that may be empty can be left out.
        provenance: JSON-like facts that hold for all rows (models and their hashes, preprocessing; versions under
            `"libraries"`).

    Raises:
        InputError: a row lacks a required column, has an unknown one, or a value of the wrong type.
    """
    for number, row in enumerate(rows):
        unknown = set(row) - set(kind.columns.names)
        missing = [f.name for f in kind.columns if not f.nullable and row.get(f.name) is None]
        if unknown or missing:
            raise InputError(
                f"row {number} for the {kind.name} table: "
                + "; ".join(
                    f"{what} column(s) {', '.join(sorted(names))}"
                    for what, names in (("unknown", unknown), ("missing", missing))
                    if names
                )
                + f"; its columns are {', '.join(kind.columns.names)}"
            )
    try:
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=kind.columns)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"rows for the {kind.name} table have a value of the wrong type: {error}") from None
    return table.replace_schema_metadata(
        {
            _KIND: kind.name,
            _VERSION: str(SCHEMA_VERSION),
            _PROVENANCE: json.dumps(provenance, sort_keys=True, ensure_ascii=False),
        }
    )


def read_provenance(schema: pa.Schema, kind: TableKind, source: str) -> dict[str, Any]:
    """The provenance in a file's metadata, after checking that the file holds this kind of table in this version.

    Args:
        source: name of the file or directory, for the message.

    Raises:
        InputError: not one of this project's tables, another kind of table, or a column is missing.
        ModelMismatchError: written with another version of the schema.
    """
    metadata = schema.metadata or {}
    found = metadata.get(_KIND, b"").decode()
    if found != kind.name:
        what = f"a {found} table" if found else "a Parquet file without this project's metadata"
        raise InputError(f"{source} is {what}; a {kind.name} table is needed here")
    version = metadata.get(_VERSION, b"").decode()
    if version != str(SCHEMA_VERSION):
        raise ModelMismatchError(
            f"{source} has schema version {version or 'none'}, this version of the code reads {SCHEMA_VERSION}; "
            f"write the {kind.name} table again to a new output"
        )
    # Columns that may be empty may be absent: tables stay readable when there are more of them.
    missing = [field.name for field in kind.columns if not field.nullable and field.name not in schema.names]
    if missing:
        raise InputError(f"{source}: the {kind.name} table lacks column(s) {', '.join(missing)}; write it again")
    return json.loads(metadata[_PROVENANCE])


def check_provenance(found: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
    """Compare the facts that a reader depends on (a VAE's hash, a scaling factor) with those of a table.

    Args:
        expected: the keys that must agree; other keys of `found` are not looked at.

    Raises:
        ModelMismatchError: names every fact that differs, with both values.
    """
    differences = describe_differences({key: found.get(key) for key in expected}, expected)
    if differences:
        raise ModelMismatchError(
            f"{source} does not belong to what is used here:\n  "
            + "\n  ".join(differences)
            + "\nUse the same models and settings as for the table, or write the table again with these."
        )


def describe_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line `dotted.name: old -> new` for every value that differs, nested dictionaries included."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += describe_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {_show(before)} -> {_show(after)}")
    return lines


def derived_id(*parts: Any) -> str:
    """A UUID that depends on the JSON of `parts` and nothing else, the same on every machine."""
    return str(uuid.uuid5(ID_NAMESPACE, json.dumps(parts, sort_keys=True, ensure_ascii=False)))


def caption_id(caption: str) -> str:
    """Id of a caption's row in `text_embeddings`."""
    return derived_id("caption", caption)


def _show(value: Any) -> str:
    return "(not set)" if value is None else json.dumps(value, ensure_ascii=False, default=str)
