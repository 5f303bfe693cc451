"""Lines of the curves, the same numbers for TensorBoard, and a picture of them."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from simda.data.store import OutputStore
from simda.training.curves import Curves
from simda.training.curves_plot import plot_curves
from simda.training.metrics_log import read_metrics
from simda.training.step import StepMetrics, ValidationMetrics


def metrics(loss: float) -> StepMetrics:
    """Two clips in the first quarter with the errors `loss` and 0, one in the last with 10 times as much."""
    return StepMetrics(loss, 0.5, 1e-3, error_sums=[loss, 0.0, 0.0, 10 * loss], num_clips=[2.0, 0.0, 0.0, 1.0])


def write_curves(folder: Path, steps: range, log_every: int = 2) -> OutputStore:
    store = OutputStore(str(folder))
    validation = ValidationMetrics(0.25, [0.5, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0])
    with Curves(store, num_steps=6, num_steps_done=steps.start, batch_size=3, log_every=log_every) as curves:
        for step in steps:
            curves.add(step + 1, metrics(float(step + 1)), 0.0, validation if step + 1 == 3 else None)
    return store


def events(file: Path) -> list[Event]:
    """The records of an event file: length, its checksum, content, its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[12 + length + 4 :]
    return found


def test_lines_hold_means_since_the_last_one_and_come_with_each_validation(tmp_path: Path):
    rows = read_metrics(write_curves(tmp_path, range(6)))
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["loss"] for row in rows] == [1.5, 3.0, 4.0, 5.5]
    assert [row["loss/cleanest"] for row in rows] == [0.75, 1.5, 2.0, 2.75]
    assert rows[0]["loss/noisiest"] == 15.0
    assert "loss/cleaner" not in rows[0]
    assert [row.get("validation_loss") for row in rows] == [None, 0.25, None, None]
    assert rows[1]["validation_loss/cleanest"] == 0.25
    assert rows[0]["clips_per_s"] > 0
    assert rows[-1]["seconds_left"] == 0


def test_tensorboard_has_the_same_numbers_and_takes_back_what_is_repeated(tmp_path: Path):
    write_curves(tmp_path, range(6))
    store = write_curves(tmp_path, range(4, 6))
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert [file.name for file in files] == [
        "events.out.tfevents.0000000000.simda",
        "events.out.tfevents.0000000004.simda",
    ]
    starts = [event.step for event in events(files[1]) if event.session_log.status == SessionLog.START]
    assert starts == [5]
    shown = {
        (event.step, value.tag): value.simple_value
        for file in files
        for event in events(file)
        for value in event.summary.value
    }
    assert [row["step"] for row in read_metrics(store)] == [2, 3, 4, 6]
    for row in read_metrics(store):
        for name in ("loss", "loss/noisiest", "validation_loss", "learning_rate"):
            assert shown.get((row["step"], name)) == (pytest.approx(row[name]) if name in row else None)


def test_the_picture_shows_what_there_is(tmp_path: Path):
    rows = read_metrics(write_curves(tmp_path, range(6)))
    with_curves, empty = (np.array(Image.open(io.BytesIO(plot_curves(part)))) for part in (rows, []))
    assert with_curves.shape == (800, 1200, 4)
    assert (with_curves != empty).any(axis=-1).sum() > 2000


def test_the_share_of_the_devices_that_is_used_is_told_where_it_is_known(tmp_path: Path):
    for name, peak_flops in (("known", 1e7), ("unknown", None)):
        store = OutputStore(str(tmp_path / name))
        with Curves(store, num_steps=2, num_steps_done=0, batch_size=3, log_every=1, peak_flops=peak_flops) as curves:
            curves.add(1, metrics(1.0), num_flops=1_000_000)
            curves.add(2, replace(metrics(1.0), grad_norm=None), num_flops=3_000_000)
    rows = read_metrics(OutputStore(str(tmp_path / "known")))
    # Six clips took 4e6 operations.
    assert rows[1]["mfu"] == pytest.approx(rows[1]["clips_per_s"] / 6 * 4e6 / 1e7, rel=1e-2)
    assert rows[1]["grad_norm"] is None
    assert "mfu" not in read_metrics(OutputStore(str(tmp_path / "unknown")))[0]
    plot_curves(rows)
