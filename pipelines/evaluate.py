#!/usr/bin/env python
"""A generated table in, a metrics table and a page to look at out.

    rows of the generated table (and of others beside it) -> judge each video against its prompt
    -> OUTPUT/data (metrics), OUTPUT/report.html, OUTPUT/contact_sheet.png

The judge knows the sprites world: shape, colour, background and motion of each video, right or wrong. Videos of another
world are not judged but measured from frame to frame (`judge=frames`), and shown.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import ray
from pydantic import Field
from pydantic.dataclasses import dataclass

from simda.config import CONFIG_RULES, Role, Uri, Workers, config_to_yaml, on_role
from simda.data.schema import FAILURES, GENERATED, METRICS, build_table
from simda.data.store import OutputStore
from simda.data.uris import is_local, open_uri
from simda.data.video_io import read_all_frames
from simda.errors import ConfigError, InputError
from simda.evaluation.contact_sheet import write_contact_sheet
from simda.evaluation.report import ReportCard, ReportVideo, write_report
from simda.runtime import library_versions, ray_session, run_command, with_progress
from simda.sprites.world import MOTIONS
from simda.stages.failures import failure_row
from simda.stages.judge_videos import STAGE, judge_video, measure_video

Row = dict[str, Any]

ATTRIBUTES = ("motion", "colour", "background", "shape")
LABELS = ("generated", "reference", "baseline")
"""Settings that name an output of `generate`, in the order in which their videos are shown."""
JUDGES = {"sprites": judge_video, "frames": measure_video}
FIGURES = {"sprites": (*ATTRIBUTES, "all_right", "consistency"), "frames": ("frame_psnr_db",)}
"""What is averaged, by judge."""
PROTOCOLS = {"sprites": "sprites_judge", "frames": "frame_to_frame"}
JUDGE_CPUS = 0.5
NUM_PROBED = 3
"""Videos that a dry run judges."""


@dataclass(frozen=True, config=CONFIG_RULES)
class EvaluateConfig:
    """Settings of `evaluate`."""

    generated: Uri
    """Output directory of `generate`, local or s3://."""
    output: Uri
    """Directory of the result, local or s3://."""
    judge: Literal["sprites", "frames"] = "sprites"
    """`sprites` compares videos with their prompts, in the sprites world; `frames` measures any videos from frame to
    frame, whatever their prompts."""
    baseline: Uri | None = None
    """Another output of `generate` with the same prompts, to stand beside it: what it should be better than."""
    reference: Uri | None = None
    """Another output of `generate` with the same prompts, to stand beside it: what it is held against."""
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
    store.claim(run_key(config), config_to_yaml(config))
    store.invalidate_manifest()
    with ray_session(config.role):
        # one row per video -> one row per video, judged
        judged = list(
            with_progress(
                ray.data.from_items(rows, override_num_blocks=num_blocks(rows))
                .map(JUDGES[config.judge], num_cpus=JUDGE_CPUS, resources=on_role(config.role))
                .iter_rows(),
                "videos judged",
                len(rows),
                lambda row: bool(row["error_type"]),
                STAGE,
            )
        )
    judged.sort(key=lambda row: (row["prompt_id"], LABELS.index(row["label"])))
    good = [row for row in judged if not row["error_type"]]
    failed = [row for row in judged if row["error_type"]]
    write_tables(store, config.judge, good, failed)
    figures = summarise(config.judge, good)
    ids = sorted({row["prompt_id"] for row in good})[: config.num_shown]
    shown = [row | {"path": path_from(config.output, row["video_uri"])} for row in good if row["prompt_id"] in ids]
    cards = make_cards(shown)
    write_report(
        store.uri_of("report.html"), "SimDA on sprites" if config.judge == "sprites" else "SimDA", figures, cards
    )
    write_contact_sheet(
        store.uri_of("contact_sheet.png"),
        cards,
        {row["path"]: thumbnails(read_all_frames(row["video_uri"])) for row in shown},
    )
    print_figures(config.judge, figures)
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
    """Count the videos that would be judged, and judge a few of them to see how long it takes."""
    check_storage(config)
    rows = read_rows(config)
    some = rows[:NUM_PROBED]
    started = time.monotonic()
    problems = [JUDGES[config.judge](row)["error_type"] for row in some]
    each_s = (time.monotonic() - started) / len(some)
    num_at_once = min(num_blocks(rows), os.cpu_count() or 1)
    return {
        "num_rows": len(rows),
        "num_probed": len(some),
        "num_probed_failed": sum(map(bool, problems)),
        "workers": asdict(Workers(num_workers=num_at_once, cpus_per_worker=JUDGE_CPUS, role=config.role)),
        "seconds_left": round(each_s * len(rows) / num_at_once),
        "estimated_from": f"{len(some)} videos judged by one process of this machine",
    }


def num_blocks(rows: list[Row]) -> int:
    """Into how many parts the rows are divided: at most so many are judged at once."""
    return min(len(rows), 16)


def read_rows(config: EvaluateConfig) -> list[Row]:
    """The videos to judge, with the label of the table that they come from.

    Raises:
        InputError: a table is missing or empty.
    """
    rows = []
    for label, uri in tables_of(config):
        store = OutputStore(uri)
        table = store.read_table(GENERATED, ["prompt_id", "prompt", "video_uri"]).to_pylist()
        if not table:
            raise InputError(f"{label}={uri} has no generated table; give an output directory of generate")
        rows += [row | {"label": label, "video_uri": store.uri_of(row["video_uri"])} for row in table]
    return rows


def tables_of(config: EvaluateConfig) -> list[tuple[str, str]]:
    """Labels and output directories of the tables to judge, in the order in which they are shown."""
    return [(label, uri) for label in LABELS if (uri := getattr(config, label)) is not None]


def run_key(config: EvaluateConfig) -> Row:
    """What decides the content of the output."""
    key = {"command": "evaluate"} | dict(tables_of(config))
    return key if config.judge == "sprites" else key | {"judge": config.judge}


def write_tables(store: OutputStore, judge: str, good: list[Row], failed: list[Row]) -> None:
    """The metrics and the failures table, in the place of what an earlier run wrote."""
    metrics = [
        {
            "id": row["prompt_id"],
            "metric": f"{row['label']}/{name}",
            "value": float(row[name]),
            "protocol": PROTOCOLS[judge],
        }
        for row in good
        for name in FIGURES[judge]
    ]
    failures = [failure_row(row["video_uri"], STAGE, row["error_type"], row["message"]) for row in failed]
    for kind, rows in ((METRICS, metrics), (FAILURES, failures)):
        table = build_table(kind, rows, {"libraries": library_versions()})
        written = store.write_shard(kind, table) if rows else []
        for name in set(store.shard_names(kind)) - set(written):
            store.delete_file(name)


def summarise(judge: str, judged: list[Row]) -> dict[str, dict[str, float]]:
    """Means: of the sprites world, all, those of held-out and of seen triples apart, and those of each motion."""
    figures: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(row["label"] for row in judged):
        of_label = [row for row in judged if row["label"] == label]
        groups = {label: of_label}
        if judge == "sprites":
            for name, held_out in (("held-out triples", True), ("seen triples", False)):
                groups[f"{label}, {name}"] = [row for row in of_label if row["held_out"] == held_out]
            for motion in MOTIONS if label == LABELS[0] else ():
                groups[f"{label}, {motion}"] = [row for row in of_label if row["asked_motion"] == motion]
        for group, rows in groups.items():
            if rows:
                figures[group] = {"videos": len(rows)} | {
                    name: round(float(np.mean([row[name] for row in rows])), 3) for name in FIGURES[judge]
                }
    return figures


def print_figures(judge: str, figures: dict[str, dict[str, float]]) -> None:
    """The figures for people, above the summary."""
    if judge == "frames":
        for label, figure in figures.items():
            print(f"{label:30}{figure['videos']:13d} videos, {figure['frame_psnr_db']:.2f} dB from frame to frame")
        return
    shown = (*ATTRIBUTES, "all_right")
    print(f"{'right, in %':30}" + "".join(f"{name.replace('_', ' '):>13}" for name in ("videos", *shown)))
    for label, figure in figures.items():
        shares = "".join(f"{100 * figure[name]:13.0f}" for name in shown)
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
                    marks={name: row[name] for name in ATTRIBUTES if name in row},
                    note=f"measured: {row['measured']}",
                )
                for row in rows
            ],
            is_held_out=rows[0].get("held_out", False),
        )
        for rows in by_prompt.values()
    ]


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """Frames for the contact sheet; of large ones, some of the pixels."""
    step = max(1, frames.shape[1] // 128)
    # A copy: a view would keep all pixels in memory.
    return frames[:, ::step, ::step].copy()


def check_storage(config: EvaluateConfig) -> None:
    """The page names videos relative to itself, so they must lie on one storage.

    Raises:
        ConfigError: one is local and one is not.
    """
    for _, uri in tables_of(config):
        if is_local(uri) != is_local(config.output):
            raise ConfigError(
                f"output={config.output} and {uri} must both be local or both on S3, for the page's links"
            )


def path_from(output: str, video_uri: str) -> str:
    """A video's path relative to the page."""
    return os.path.relpath(open_uri(video_uri)[1], open_uri(output)[1])


if __name__ == "__main__":
    sys.exit(run_command(EvaluateConfig, run, dry_run))
