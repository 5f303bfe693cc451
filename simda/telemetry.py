"""What commands tell of themselves while they run: the names of their Prometheus metrics, and when each is recorded.

Rows pass through the driver once, in `runtime.with_progress`; there all of this is counted. Workers tell of each row
what only they know, in columns beside its id (`Effort`). How numbers get to Prometheus is `runtime.py`'s business, what
is drawn of them `cluster/grafana_dashboard.json`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A number that is recorded, with `command`, `job` and `stage` and these labels besides."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()


ROWS = Metric("simda_rows_total", "counter", "Rows that a stage is through with: done, failed, filtered", ("outcome",))
ROWS_LEFT = Metric("simda_rows_left", "gauge", "Rows that a stage has still to do, where their number is known")
ROW_RATE = Metric("simda_rows_per_second", "gauge", "Rows per second of a stage since it began")
QUEUE_WAIT = Metric(
    "simda_queue_wait_seconds", "histogram", "From when a stage was asked for until a worker began with a row of it"
)
DEVICE_TIME = Metric(
    "simda_device_seconds_total", "counter", "Time that models kept their devices busy; device=cuda: GPUs", ("device",)
)
BYTES = Metric("simda_bytes_total", "counter", "Bytes of latents, videos or checkpoints that a stage wrote")
LOSS = Metric("simda_loss", "gauge", "Training loss, as in metrics.jsonl")
STEP = Metric("simda_step", "gauge", "Optimiser steps done")
DATA_WAIT = Metric("simda_data_wait_ratio", "gauge", "Share of training time that was spent waiting for clips")
METRICS = (ROWS, ROWS_LEFT, ROW_RATE, QUEUE_WAIT, DEVICE_TIME, BYTES, LOSS, STEP, DATA_WAIT)

WAIT_BOUNDARIES_S = [1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 4 * 3600.0, 24 * 3600.0]
"""Upper ends of the histogram's bins; a machine takes minutes to come up, a long queue hours."""

Record = Callable[[Metric, float, Mapping[str, str]], None]
"""Takes a metric, a value (to add, to set, or to note, by its kind) and the labels beside command and job."""


@dataclass(frozen=True)
class Effort:
    """What a worker tells of a row: when it began, and what the row took. Columns of a stage's output."""

    started_s: float
    """Seconds since 1970 by the worker's clock."""
    device: str
    """Where its model runs, `cpu` or `cuda`."""
    device_s: float = 0.0
    """Seconds that the model was at work on it."""
    num_bytes: int = 0
    """Written of it."""

    def columns(self) -> dict[str, Any]:
        """As columns of a row."""
        return asdict(self)


class StageTelemetry:
    """Records a stage's rows as they come out.

    Args:
        stage: as in the failures table.
        num_rows: rows that it has to do, None if that is not known.
    """

    def __init__(self, stage: str, num_rows: int | None, record: Record) -> None:
        self._labels, self._num_rows, self._record = {"stage": stage}, num_rows, record
        self._asked_s, self._started, self._num_out = time.time(), time.monotonic(), 0
        self.tell_progress()

    def add(self, row: object, failed: bool) -> None:
        """Count a row; what a worker told of it is recorded, if it is there."""
        self._num_out += 1
        told: Row = row if isinstance(row, Mapping) else {}
        outcome = "failed" if failed else "filtered" if told.get("filter") else "done"
        self._record(ROWS, 1, {**self._labels, "outcome": outcome})
        if "started_s" in told:
            self._record(QUEUE_WAIT, max(0.0, told["started_s"] - self._asked_s), self._labels)
        if told.get("device_s"):
            self._record(DEVICE_TIME, told["device_s"], {**self._labels, "device": told["device"]})
        if told.get("num_bytes"):
            self._record(BYTES, told["num_bytes"], self._labels)

    def tell_progress(self) -> None:
        """Record the rate, and what is left."""
        seconds = time.monotonic() - self._started
        self._record(ROW_RATE, self._num_out / seconds if self._num_out else 0.0, self._labels)
        if self._num_rows is not None:
            self._record(ROWS_LEFT, self._num_rows - self._num_out, self._labels)

    def end(self) -> None:
        """The stage is at its end, or given up: nothing moves any more."""
        self._record(ROW_RATE, 0.0, self._labels)


class TrainingTelemetry:
    """Records the lines of a run's metrics.jsonl as they come.

    Args:
        batch_size: clips per step.
        num_workers: of the run.
        device: theirs.
        checkpoint_every: steps from one checkpoint to the next.
        checkpoint_bytes: of each.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        device: str,
        checkpoint_every: int,
        checkpoint_bytes: int,
        record: Record,
    ) -> None:
        self._labels, self._record = {"stage": "train"}, record
        self._checkpoint_every, self._checkpoint_bytes = checkpoint_every, checkpoint_bytes
        self._batch_size, self._num_workers, self._device = batch_size, num_workers, device
        self._asked_s = time.monotonic()
        self._last: Row | None = None

    def add(self, line: Row) -> None:
        """Record a line."""
        last = self._last
        if last is None:
            # What a run that goes on has done before is not this job's doing.
            self._record(QUEUE_WAIT, max(0.0, time.monotonic() - self._asked_s - line["seconds"]), self._labels)
        elif line["step"] > last["step"] and line["seconds"] > last["seconds"]:
            seconds = line["seconds"] - last["seconds"]
            waited = line["seconds"] * line["data_wait"] - last["seconds"] * last["data_wait"]
            self._record(ROWS, (line["step"] - last["step"]) * self._batch_size, {**self._labels, "outcome": "done"})
            busy_s = max(0.0, seconds - waited) * self._num_workers
            self._record(DEVICE_TIME, busy_s, {**self._labels, "device": self._device})
            num_checkpoints = line["step"] // self._checkpoint_every - last["step"] // self._checkpoint_every
            self._record(BYTES, num_checkpoints * self._checkpoint_bytes, self._labels)
        self._last = line
        self._record(ROW_RATE, line["clips_per_s"], self._labels)
        self._record(STEP, line["step"], self._labels)
        self._record(LOSS, line["loss"], self._labels)
        self._record(DATA_WAIT, line["data_wait"], self._labels)
