"""What is recorded of rows and of training, and when."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

import pytest

from simda.telemetry import (
    BYTES,
    DEVICE_TIME,
    METRICS,
    QUEUE_WAIT,
    ROW_RATE,
    ROWS,
    ROWS_LEFT,
    Effort,
    Metric,
    StageTelemetry,
    TrainingTelemetry,
)


class Recorded:
    """Sums of counters, and all values of the rest, by metric and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset], list[float]] = defaultdict(list)

    def __call__(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        assert labels.keys() == {"stage", *metric.labels}
        self.values[metric.name, frozenset(labels.items())].append(value)

    def of(self, metric: Metric, **labels: str) -> list[float]:
        return self.values[metric.name, frozenset(labels.items())]


def test_rows_are_counted_by_what_became_of_them():
    record = Recorded()
    telemetry = StageTelemetry("encode_clips", 5, record)
    for row, failed in (({"filter": ""}, False), ({"filter": "black"}, False), ({"filter": ""}, True), (7, False)):
        telemetry.add(row, failed)
    telemetry.tell_progress()
    counted = {outcome: sum(record.of(ROWS, stage="encode_clips", outcome=outcome)) for outcome in
               ("done", "filtered", "failed")}  # fmt: skip
    assert counted == {"done": 2, "filtered": 1, "failed": 1}
    assert record.of(ROWS_LEFT, stage="encode_clips") == [5, 1]
    assert record.of(ROW_RATE, stage="encode_clips")[-1] > 0
    telemetry.end()
    assert record.of(ROW_RATE, stage="encode_clips")[-1] == 0


def test_what_workers_tell_of_a_row_is_recorded():
    record = Recorded()
    telemetry = StageTelemetry("encode_clips", None, record)
    began = time.time() + 40
    telemetry.add({"clip_id": "a", **Effort(began, "cuda", device_s=1.5, num_bytes=131072).columns()}, False)
    telemetry.add({"clip_id": "b", **Effort(began, "cuda").columns()}, True)
    assert record.of(QUEUE_WAIT, stage="encode_clips") == pytest.approx([40, 40], abs=1)
    assert record.of(DEVICE_TIME, stage="encode_clips", device="cuda") == [1.5]
    assert record.of(BYTES, stage="encode_clips") == [131072]
    assert not record.of(ROWS_LEFT, stage="encode_clips")


def test_training_counts_clips_between_lines_and_nothing_twice_after_a_restart():
    record = Recorded()
    telemetry = TrainingTelemetry(
        batch_size=4, num_workers=2, device="cpu", checkpoint_every=20, checkpoint_bytes=1000, record=record
    )

    def line(step: int, seconds: float, data_wait: float) -> dict[str, float]:
        return {"step": step, "seconds": seconds, "data_wait": data_wait, "loss": 0.5, "clips_per_s": 1.0}

    # 10 s to step 20, of them 5 waiting; then a worker is lost, and the run goes on from step 10 with a new clock.
    for row in (line(10, 5.0, 0.0), line(20, 15.0, 5 / 15), line(10, 3.0, 0.0), line(20, 8.0, 0.0)):
        telemetry.add(row)
    assert record.of(ROWS, stage="train", outcome="done") == [40, 40]
    assert record.of(DEVICE_TIME, stage="train", device="cpu") == pytest.approx([10.0, 10.0])
    assert sum(record.of(BYTES, stage="train")) == 2000


def test_names_are_prometheus_names_of_this_project():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("simda_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
