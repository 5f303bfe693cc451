"""From the metrics of steps to the curves of a run, on the rank that writes them: `metrics.jsonl` and TensorBoard.

How lines get to a terminal and a picture is `metrics_log.py`'s and `curves_plot.py`'s.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter

from simda.data.store import OutputStore
from simda.data.uris import write_bytes
from simda.training.metrics_log import MetricsLog
from simda.training.step import StepMetrics, ValidationMetrics

TENSORBOARD_FOLDER = "tensorboard"
QUARTERS = ("cleanest", "cleaner", "noisier", "noisiest")


class Curves:
    """The curves of a run; leaving the context writes them.

    A line holds the mean loss since the last one (after a restart, since the checkpoint).

    Args:
        store: the output of the run.
        num_steps: length of the run.
        num_steps_done: where it goes on.
        batch_size: clips per step, over all ranks.
        log_every: steps between lines.
        peak_flops: operations per second that all workers' devices can do, to tell the share that is used; None where
            that is not known.
    """

    def __init__(
        self,
        store: OutputStore,
        *,
        num_steps: int,
        num_steps_done: int,
        batch_size: int,
        log_every: int,
        peak_flops: float | None = None,
    ) -> None:
        self._num_steps, self._first, self._batch_size = num_steps, num_steps_done, batch_size
        self._log_every, self._started = log_every, time.monotonic()
        self._log = MetricsLog(store, num_steps_done)
        self._board = TensorBoardLog(store, num_steps_done)
        self._steps: list[StepMetrics] = []
        self._waited_s, self._num_flops = 0.0, 0
        self._peak_flops = peak_flops

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.write()

    def add(
        self,
        done: int,
        metrics: StepMetrics,
        waited_s: float = 0.0,
        validation: ValidationMetrics | None = None,
        num_flops: int = 0,
    ) -> None:
        """Note the metrics of step `done` (from 1).

        Args:
            waited_s: seconds that it waited for its clips.
            validation: measured after it.
            num_flops: operations of the model that it took, over all ranks.
        """
        self._steps.append(metrics)
        self._num_flops += num_flops
        self._waited_s += waited_s
        if validation is None and done % self._log_every and done != self._num_steps:
            return
        seconds = time.monotonic() - self._started
        steps_per_s = (done - self._first) / seconds
        row = {
            "step": done,
            "loss": sum(step.loss for step in self._steps) / len(self._steps),
            **by_quarter("loss", self._steps),
            "grad_norm": metrics.grad_norm,
            "learning_rate": metrics.learning_rate,
            "clips_per_s": round(steps_per_s * self._batch_size, 3),
            "data_wait": round(self._waited_s / seconds, 4),
            "seconds": round(seconds, 2),
            "seconds_left": round((self._num_steps - done) / steps_per_s, 1),
        }
        if self._peak_flops:
            row["mfu"] = round(self._num_flops / seconds / self._peak_flops, 4)
        if validation:
            row |= {"validation_loss": validation.loss, **by_quarter("validation_loss", [validation])}
        self._log.append(row)
        self._board.append(row)
        self._steps.clear()

    def write(self) -> None:
        """Write all lines so far."""
        self._log.write()
        self._board.write()


class TensorBoardLog:
    """The same numbers as an event file, `OUTPUT/tensorboard`.

    It grows in a temporary directory and is copied whole, so that an output on S3 has one as well. A run that goes on
    writes another file, whose beginning takes back the steps that are repeated.
    """

    def __init__(self, store: OutputStore, num_steps_done: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="simda-tensorboard-")
        self._writer = SummaryWriter(logdir=self._folder.name, purge_step=num_steps_done + 1)
        self._uri = store.uri_of(f"{TENSORBOARD_FOLDER}/events.out.tfevents.{num_steps_done:010d}.simda")

    def append(self, row: dict[str, Any]) -> None:
        """Add the numbers of a line."""
        for name, value in row.items():
            if name not in ("step", "seconds", "seconds_left") and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def write(self) -> None:
        """Copy what there is."""
        self._writer.flush()
        (file,) = Path(self._folder.name).iterdir()
        write_bytes(self._uri, file.read_bytes())


def by_quarter(name: str, parts: list[StepMetrics] | list[ValidationMetrics]) -> dict[str, float]:
    """Mean unweighted error in each quarter of the noise schedule that has any clip, as `name/noisiest` and so on."""
    means = {}
    for number, quarter in enumerate(QUARTERS):
        num_clips = sum(part.num_clips[number] for part in parts)
        if num_clips:
            means[f"{name}/{quarter}"] = sum(part.error_sums[number] for part in parts) / num_clips
    return means
