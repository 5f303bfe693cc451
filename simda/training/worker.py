"""What each Ray Train worker runs: the loop over steps, checkpoints and curves. Ray Train glue, nothing else.

The loop can begin at any step: all that a step does follows from its number and the state before it (`objective.py`,
`clip_order.py`), so a worker that was lost, or a whole run, is replaced by one that asks for the last checkpoint.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from simda.data.store import OutputStore
from simda.training.checkpoint import load_state, save_state
from simda.training.latent_clips import LatentClips
from simda.training.metrics_log import MetricsLog
from simda.training.objective import ClipBatch
from simda.training.step import AdapterTrainer, StepMetrics
from simda.training.training_plan import TrainingPlan, build_trainer, save_trained_adapter

PLAN = "plan"
"""Key of the `TrainingPlan` in the dictionary that Ray Train hands to every worker."""


def train_loop_per_worker(settings: dict[str, Any]) -> int:
    """Train from the last checkpoint, or from fresh adapters, to the end of the plan.

    Returns:
        Steps that this group of workers made.
    """
    plan: TrainingPlan = settings[PLAN]
    torch.set_num_threads(plan.num_threads)
    clips = LatentClips(plan.latents, plan.num_frames, plan.seed)
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device()
    trainer = build_trainer(plan, clips, device, world_size)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            trainer.load_state_dict(load_state(Path(folder)))
    first = trainer.num_steps_done
    curves = Curves(plan, first) if rank == 0 else None
    for batch in read_ahead(clips, plan, first, rank, world_size):
        metrics = trainer.step(batch.to(device))
        done = trainer.num_steps_done
        if curves:
            curves.add(done, metrics)
        if done % plan.checkpoint_every == 0 or done == plan.num_steps:
            if curves:
                curves.write()
            report_checkpoint(trainer, plan, metrics, rank)
    return trainer.num_steps_done - first


def read_ahead(clips: LatentClips, plan: TrainingPlan, first: int, rank: int, world_size: int) -> Iterator[ClipBatch]:
    """This rank's share of every batch from step `first` on; the next one is read while the current one is used."""
    with ThreadPoolExecutor(1) as reader:
        steps = range(first, plan.num_steps)
        coming = [reader.submit(clips.batch, step, plan.batch_size, rank, world_size) for step in steps[:1]]
        for step in steps:
            batch = coming.pop().result()
            if step + 1 < plan.num_steps:
                coming.append(reader.submit(clips.batch, step + 1, plan.batch_size, rank, world_size))
            yield batch


def report_checkpoint(trainer: AdapterTrainer, plan: TrainingPlan, metrics: StepMetrics, rank: int) -> None:
    """Hand Ray Train the state, and the adapter as it would be used now; a barrier for all ranks."""
    done = trainer.num_steps_done
    with tempfile.TemporaryDirectory(prefix="simda-checkpoint-") as folder:
        if rank == 0:
            save_state(trainer.state_dict(), Path(folder))
            save_trained_adapter(trainer, plan, Path(folder))
        ray.train.report(
            {"step": done, "loss": metrics.loss},
            checkpoint=ray.train.Checkpoint.from_directory(folder) if rank == 0 else None,
            checkpoint_dir_name=f"step-{done:08d}",
        )


class Curves:
    """Turns the metrics of steps into lines of `metrics.jsonl`, on rank 0.

    A line holds the mean loss since the last one (after a restart, since the checkpoint).
    """

    def __init__(self, plan: TrainingPlan, first: int) -> None:
        self._plan, self._first, self._started = plan, first, time.monotonic()
        self._log = MetricsLog(OutputStore(plan.output), first)
        self._losses: list[float] = []

    def add(self, done: int, metrics: StepMetrics) -> None:
        """Note the metrics of step `done` (from 1)."""
        self._losses.append(metrics.loss)
        if done % self._plan.log_every and done != self._plan.num_steps:
            return
        seconds = time.monotonic() - self._started
        steps_per_s = (done - self._first) / seconds
        self._log.append(
            {
                "step": done,
                "loss": sum(self._losses) / len(self._losses),
                "grad_norm": metrics.grad_norm,
                "learning_rate": metrics.learning_rate,
                "clips_per_s": round(steps_per_s * self._plan.batch_size, 3),
                "seconds": round(seconds, 2),
                "seconds_left": round((self._plan.num_steps - done) / steps_per_s, 1),
            }
        )
        self._losses.clear()

    def write(self) -> None:
        """Write all lines so far."""
        self._log.write()
