#!/usr/bin/env python
"""A dataset of cached latents in, what is in it out.

    latents, failures and filtered tables -> counts, sizes, statistics of the values
    some of the clips, decoded            -> OUTPUT/contact_sheet.png

Runs in this process and changes nothing of the dataset, which may still be in the making.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from simda.config import CONFIG_RULES, ModelName, Uri
from simda.data.clip_plan import spread
from simda.data.schema import FILTERED, LATENTS, TEXT_EMBEDDINGS, TEXT_TOKENS, check_provenance
from simda.data.store import OutputStore
from simda.errors import InputError
from simda.evaluation.contact_sheet import write_contact_sheet
from simda.evaluation.latent_statistics import LatentStatistics, gather
from simda.evaluation.report import ReportCard, ReportVideo
from simda.models.autoencoder import decode_latents
from simda.models.base_models import autoencoder_identity, load_autoencoder
from simda.runtime import run_command
from simda.training.tensor_table import TensorTable

Row = dict[str, Any]

COLUMNS = ("clip_id", "caption", "start_s", "end_s", "fps", "num_frames", "height_px", "width_px", "decoder")
CACHE_BYTES = 2**26
MAX_NAMED, MAX_COUNTED = 5, 20


@dataclass(frozen=True, config=CONFIG_RULES)
class InspectLatentsConfig:
    """Settings of `inspect_latents`."""

    data: Uri
    """Output directory of `cache_latents`, local or s3://."""
    output: Uri | None = None
    """Directory of the contact sheet, local or s3://; by default `inspected` in the dataset."""
    base_model: ModelName = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """The model whose autoencoder made the latents; it decodes the contact sheet."""
    autoencoder: Uri | None = None
    """Directory of the autoencoder that made the latents, if it was not the base model's."""
    num_shown: int = Field(default=16, ge=0)
    """Clips on the contact sheet, spread over the dataset; 0 makes none, and needs no model."""
    num_measured: int = Field(default=1024, ge=1)
    """Clips whose values are measured, spread over the dataset."""


def run(config: InspectLatentsConfig) -> Row:
    """Describe the dataset and draw the contact sheet."""
    store = OutputStore(config.data)
    summary, table = describe(config, store)
    places = spread(range(len(table.light)), config.num_measured)
    ids = table.light["clip_id"]
    statistics = gather((ids[place].as_py(), table.tensor(place)) for place in places)
    summary["values"] = describe_values(statistics)
    print_figures(summary)
    if config.num_shown:
        output = OutputStore(config.output or store.uri_of("inspected"))
        summary["contact_sheet"] = output.uri_of("contact_sheet.png")
        draw(config, table, summary["contact_sheet"])
    return summary


def dry_run(config: InspectLatentsConfig) -> Row:
    """The counts alone, without the values."""
    return describe(config, OutputStore(config.data))[0]


def describe(config: InspectLatentsConfig, store: OutputStore) -> tuple[Row, TensorTable]:
    """Counts of the dataset's tables.

    Raises:
        InputError: no dataset there, or an empty one.
        ModelMismatchError: the contact sheet's model is not the dataset's.
    """
    if not store.shard_names(LATENTS):
        raise InputError(f"data={store.uri} has no latents table; give an output directory of cache_latents")
    provenance = store.provenance(LATENTS)
    if config.num_shown:
        check_provenance(
            provenance["vae"], {"identity": autoencoder_identity(config.base_model, config.autoencoder)}, store.uri
        )
    table = TensorTable(store, LATENTS, "latents", (*COLUMNS, "latents_shape", "latents_dtype"), CACHE_BYTES)
    clips = table.light
    seconds = pc.sum(pc.subtract(clips["end_s"], clips["start_s"])).as_py()
    num_failed = len(store.failures(LATENTS))
    filtered = Counter(store.read_table(FILTERED, ["filter"])["filter"].to_pylist())
    summary = {
        "latents": store.uri,
        "is_complete": store.read_manifest() is not None,
        "num_rows": len(clips) + num_failed,
        "num_clips": len(clips),
        "num_files": len(store.shard_names(LATENTS)),
        "hours": round(seconds / 3600, 4),
        "num_failed": num_failed,
        "num_filtered": filtered.total(),
        "filtered_by": dict(sorted(filtered.items())),
        "num_captions": pc.count_distinct(clips["caption"]).as_py(),
        "num_texts": {kind.name: store.num_rows(kind) for kind in (TEXT_EMBEDDINGS, TEXT_TOKENS)},
        "rows_per_bucket": counts(clips, ("height_px", "width_px", "num_frames")),
        "fps": counts(clips, ("fps",)),
        "dtypes": counts(clips, ("latents_dtype",)),
        "decoders": counts(clips, ("decoder",)),
        "columns": {field.name: str(field.type) for field in LATENTS.columns},
        "provenance": provenance,
        # The dataset's failures are told; they are no failures of this command.
        "max_failure_rate": 1.0,
    }
    return summary, table


def counts(clips: pa.Table, names: Sequence[str]) -> dict[str, int]:
    """Clips by the values of some columns, such as `256x256x16`, the most frequent first; the rest as `others`."""
    found = clips.select(list(names)).group_by(list(names)).aggregate([([], "count_all")]).to_pylist()
    found.sort(key=lambda row: -row["count_all"])
    counted = {"x".join(str(row[name]) for name in names): row["count_all"] for row in found[:MAX_COUNTED]}
    others = sum(row["count_all"] for row in found[MAX_COUNTED:])
    return counted | ({"others": others} if others else {})


def describe_values(statistics: LatentStatistics) -> Row:
    """The statistics as plain, short numbers."""
    return {
        "num_measured": statistics.num_clips,
        "channel_mean": [round(value, 4) for value in statistics.means()],
        "channel_std": [round(value, 4) for value in statistics.spreads()],
        "lowest": round(statistics.lowest, 4),
        "highest": round(statistics.highest, 4),
        "num_not_finite": len(statistics.not_finite),
        "not_finite": statistics.not_finite[:MAX_NAMED],
        "num_still": len(statistics.still),
        "still": statistics.still[:MAX_NAMED],
    }


def print_figures(summary: Row) -> None:
    """The figures for people, above the summary."""
    state = "complete" if summary["is_complete"] else "not complete"
    print(f"{summary['latents']}: {summary['num_clips']} clips, {summary['hours']:.2f} hours, {state}")
    print(f"failed {summary['num_failed']}, filtered {summary['num_filtered']} {summary['filtered_by'] or ''}")
    for name in ("rows_per_bucket", "fps", "dtypes", "decoders"):
        shown = ", ".join(f"{value}: {number}" for value, number in summary[name].items())
        print(f"{name:15} {shown}")
    values = summary["values"]
    print(f"values of {values['num_measured']} clips, by channel")
    for name in ("mean", "std"):
        print(f"  {name:5}" + "".join(f"{value:9.3f}" for value in values[f"channel_{name}"]))
    print(f"  lowest {values['lowest']}, highest {values['highest']}")
    for name, words in (("not_finite", "hold NaN or infinity"), ("still", "have frames that are all equal")):
        if values[f"num_{name}"]:
            print(f"  {values[f'num_{name}']} clips {words}: {', '.join(values[name])} ...")


def draw(config: InspectLatentsConfig, table: TensorTable, uri: str) -> None:
    """Decode some clips, spread over the dataset, onto one picture."""
    vae = load_autoencoder(config.base_model, autoencoder=config.autoencoder)
    cards, frames = [], {}
    for place in spread(range(len(table.light)), config.num_shown):
        row = table.light.slice(place, 1).to_pylist()[0]
        latents = torch.from_numpy(np.nan_to_num(table.tensor(place)))[None]
        frames[row["clip_id"]] = (decode_latents(vae, latents)[0] * 255).round().to(torch.uint8).numpy()
        note = f"{row['height_px']}x{row['width_px']}x{row['num_frames']} from {row['start_s']:g} s"
        cards.append(ReportCard(row["caption"], [ReportVideo(row["clip_id"], label="", marks={}, note=note)]))
    largest = max(max(clip.shape[1:3]) for clip in frames.values())
    write_contact_sheet(uri, cards, frames, scale=max(1, 128 // largest))


if __name__ == "__main__":
    sys.exit(run_command(InspectLatentsConfig, run, dry_run))
