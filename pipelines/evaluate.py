#!/usr/bin/env python
"""A generated table in, a metrics table and a page to look at out.

    rows of the generated table (and of a baseline's) -> judge each video against its prompt
    -> OUTPUT/data (metrics), OUTPUT/report.html, OUTPUT/contact_sheet.png

The judge knows the sprites world: shape, colour, background and motion of each video, right or wrong.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import ray
from pydantic import Field
from pydantic.dataclasses import dataclass

from simda.config import CONFIG_RULES, Role, Uri, config_to_yaml, on_role
from simda.data.schema import FAILURES, GENERATED, METRICS, build_table
from simda.data.store import OutputStore
from simda.data.uris import is_local, open_uri
from simda.data.video_io import read_all_frames
from simda.errors import ConfigError, InputError
from simda.evaluation.contact_sheet import write_contact_sheet
from simda.evaluation.report import ReportCard, ReportVideo, write_report
from simda.runtime import library_versions, ray_session, run_command, with_progress
from simda.stages.failures import failure_row
from simda.stages.judge_videos import STAGE, judge_video

Row = dict[str, Any]

ATTRIBUTES = ("motion", "colour", "background", "shape")
PROTOCOL = "sprites_judge"
OWN, BASELINE = "generated", "baseline"


@dataclass(frozen=True, config=CONFIG_RULES)
class EvaluateConfig:
    """Settings of `evaluate`."""

    generated: Uri
    """Output directory of `generate`, local or s3://."""
    output: Uri
    """Directory of the result, local or s3://."""
    baseline: Uri | None = None
    """Another output of `generate` with the same prompts, to stand beside it."""
    num_shown: int = Field(default=64, ge=1)
    """Prompts on the page and the contact sheet."""
    role: Role | None = None
    """Kind of machine that judges, such as `cpu-decode`, on a cluster that has roles; by default any."""
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of videos that cannot be judged above which the command ends with exit code 3."""


def run(config: EvaluateConfig) -> Row:
    """Judge all videos, then write the metrics and the page."""
    check_storage(config)
    rows = read_rows(config)
    store = OutputStore(config.output)
    store.claim(
        {"command": "evaluate", "generated": config.generated, "baseline": config.baseline}, config_to_yaml(config)
    )
    store.invalidate_manifest()
    with ray_session(config.role):
        # one row per video -> one row per video, judged
        judged = list(
            with_progress(
                ray.data.from_items(rows, override_num_blocks=min(len(rows), 16))
                .map(judge_video, num_cpus=0.5, resources=on_role(config.role))
                .iter_rows(),
                "videos judged",
                len(rows),
                lambda row: bool(row["error_type"]),
                STAGE,
            )
        )
    judged.sort(key=lambda row: (row["prompt_id"], row["label"] != OWN))
    good = [row for row in judged if not row["error_type"]]
    failed = [row for row in judged if row["error_type"]]
    write_tables(store, good, failed)
    figures = summarise(good)
    ids = sorted({row["prompt_id"] for row in good})[: config.num_shown]
    shown = [row | {"path": path_from(config.output, row["video_uri"])} for row in good if row["prompt_id"] in ids]
    cards = make_cards(shown)
    write_report(store.uri_of("report.html"), "SimDA on sprites", figures, cards)
    write_contact_sheet(
        store.uri_of("contact_sheet.png"), cards, {row["path"]: read_all_frames(row["video_uri"]) for row in shown}
    )
    print_figures(figures)
    summary = {
        "num_rows": len(judged),
        "num_failed": len(failed),
        "max_failure_rate": config.max_failure_rate,
        "figures": figures,
        "videos": OutputStore(config.generated).uri_of("videos"),
        "report": store.uri_of("report.html"),
        "contact_sheet": store.uri_of("contact_sheet.png"),
    }
    store.write_manifest(summary)
    return summary


def dry_run(config: EvaluateConfig) -> Row:
    """Count the videos that would be judged."""
    check_storage(config)
    return {"num_rows": len(read_rows(config))}


def read_rows(config: EvaluateConfig) -> list[Row]:
    """The videos to judge, with the label of the table that they come from.

    Raises:
        InputError: a table is missing or empty.
    """
    rows = []
    for label, uri in ((OWN, config.generated), (BASELINE, config.baseline)):
        if uri is None:
            continue
        store = OutputStore(uri)
        table = store.read_table(GENERATED, ["prompt_id", "prompt", "video_uri"]).to_pylist()
        if not table:
            raise InputError(f"{label}={uri} has no generated table; give an output directory of generate")
        rows += [row | {"label": label, "video_uri": store.uri_of(row["video_uri"])} for row in table]
    return rows


def write_tables(store: OutputStore, good: list[Row], failed: list[Row]) -> None:
    """The metrics and the failures table."""
    metrics = [
        {"id": row["prompt_id"], "metric": f"{row['label']}/{name}", "value": float(row[name]), "protocol": PROTOCOL}
        for row in good
        for name in (*ATTRIBUTES, "consistency")
    ]
    failures = [failure_row(row["video_uri"], STAGE, row["error_type"], row["message"]) for row in failed]
    for kind, rows in ((METRICS, metrics), (FAILURES, failures)):
        if rows:
            store.write_shard(kind, build_table(kind, rows, {"libraries": library_versions()}))


def summarise(judged: list[Row]) -> dict[str, dict[str, float]]:
    """Share of right videos per attribute: all, and those of held-out and of seen triples apart."""
    figures: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(row["label"] for row in judged):
        for group, wanted in (("", (False, True)), (", held-out triples", (True,)), (", seen triples", (False,))):
            rows = [row for row in judged if row["label"] == label and row["held_out"] in wanted]
            if rows:
                figures[f"{label}{group}"] = {"videos": len(rows)} | {
                    name: round(float(np.mean([row[name] for row in rows])), 3) for name in (*ATTRIBUTES, "consistency")
                }
    return figures


def print_figures(figures: dict[str, dict[str, float]]) -> None:
    """The figures for people, above the summary."""
    print(f"{'right, in %':30}" + "".join(f"{name:>13}" for name in ("videos", *ATTRIBUTES)))
    for label, figure in figures.items():
        shares = "".join(f"{100 * figure[name]:13.0f}" for name in ATTRIBUTES)
        print(f"{label:30}{figure['videos']:13d}{shares}")


def make_cards(judged: list[Row]) -> list[ReportCard]:
    """A card per prompt, its videos side by side."""
    by_prompt: dict[str, list[Row]] = {}
    for row in judged:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    return [
        ReportCard(
            prompt=rows[0]["prompt"],
            videos=[
                ReportVideo(
                    path=row["path"],
                    label=row["label"],
                    marks={name: row[name] for name in ATTRIBUTES},
                    note=f"measured: {row['measured']}",
                )
                for row in rows
            ],
            is_held_out=rows[0]["held_out"],
        )
        for rows in by_prompt.values()
    ]


def check_storage(config: EvaluateConfig) -> None:
    """The page names videos relative to itself, so they must lie on one storage.

    Raises:
        ConfigError: one is local and one is not.
    """
    for uri in (config.generated, config.baseline):
        if uri is not None and is_local(uri) != is_local(config.output):
            raise ConfigError(
                f"output={config.output} and {uri} must both be local or both on S3, for the page's links"
            )


def path_from(output: str, video_uri: str) -> str:
    """A video's path relative to the page."""
    return os.path.relpath(open_uri(video_uri)[1], open_uri(output)[1])


if __name__ == "__main__":
    sys.exit(run_command(EvaluateConfig, run, dry_run))
