"""How a plan is trained by Ray Train workers, and what each of them runs: steps, checkpoints, curves. Glue only.

The loop can begin at any step: all that a step does follows from its number and the state before it (`objective.py`,
`clip_order.py`), so a worker that was lost, or a whole run, is replaced by one that looks for the last checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from simda.config import Workers, on_role
from simda.data.store import OutputStore
from simda.data.uris import open_uri
from simda.errors import ConfigError, SimdaError
from simda.models.adapter_state import ADAPTER_FILE
from simda.training.checkpoint import CHECKPOINTS_FOLDER, Checkpoints, checkpoint_name
from simda.training.curves import Curves
from simda.training.latent_clips import LatentClips
from simda.training.objective import ClipBatch
from simda.training.step import AdapterTrainer, DivergenceError
from simda.training.training_plan import (
    ADAPTER_FOLDER,
    TrainingPlan,
    build_trainer,
    build_validation_objective,
    open_clips,
    trained_adapter_files,
)


@dataclass(frozen=True)
class Watch:
    """What looks at adapters while they are trained, on other processes than the training's.

    Attributes:
        task: a Ray remote function of (steps done, content of the adapter's file, **settings).
        settings: its further arguments.
        every: steps between two looks; a multiple of those between checkpoints.
    """

    task: Any
    settings: dict[str, Any]
    every: int


def run_workers(
    plan: TrainingPlan,
    workers: Workers,
    max_failures: int,
    watch: Watch | None = None,
    min_workers: int | None = None,
) -> str:
    """Train a plan to its last step, from its last checkpoint if there is one; needs a Ray session.

    Args:
        max_failures: times that lost workers are replaced.
        min_workers: fewest that it goes on with while there is no room for all; None waits for room. Each change of
            their number goes on from the last checkpoint.
        watch: what looks at the adapter as it is trained; the run ends when it has.

    Returns:
        URI of the last checkpoint.

    Raises:
        ConfigError: a Ray of this machine alone lacks what the workers ask for.
        SimdaError: the training diverged, or workers failed too often for a reason that a person can mend.
        TrainingFailedError: workers failed too often.
    """
    check_resources(workers, min_workers or workers.num_workers)
    store = OutputStore(plan.output)
    filesystem, path = open_uri(store.uri)
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"plan": plan.to_settings(), "watch": watch},
        torch_config=TorchConfig(backend="nccl" if workers.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(min_workers, workers.num_workers) if min_workers else workers.num_workers,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": workers.cpus_per_worker,
                "GPU": workers.gpus_per_worker,
                **on_role(workers.role),
            },
        ),
        # Ray Train finds out with it whether every worker reaches the output.
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        divergence = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        raise explain_failure(error) from error
    if divergence:
        raise DivergenceError(divergence)
    return store.uri_of(f"{CHECKPOINTS_FOLDER}/{checkpoint_name(plan.num_steps)}")


def explain_failure(error: ray.train.WorkerGroupError) -> Exception:
    """The reason for people among the workers' failures, if there is one; the others' are often its consequences."""
    for failure in error.worker_failures.values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, SimdaError):
            return cause
    return error


def check_resources(workers: Workers, num_workers: int) -> None:
    """Refuse what can never start; a cluster may still grow, one machine does not.

    Raises:
        ConfigError: with what is asked for and what there is.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    there = ray.cluster_resources()
    asked = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    for name, each in asked.items():
        if each * num_workers > there.get(name, 0):
            raise ConfigError(
                f"{num_workers} worker(s) with {name}s {each} each need more than the "
                f"{there.get(name, 0):g} that Ray has on this machine; use fewer, or run on a cluster"
            )


def train_loop_per_worker(settings: dict[str, Any]) -> str | None:
    """Train from the last checkpoint, or from fresh adapters, to the end of the plan.

    Returns:
        Why it diverged, if it did: the next attempt would again, so this is no failure for Ray Train to retry.
    """
    plan, watch = TrainingPlan.from_settings(settings["plan"]), settings["watch"]
    torch.set_num_threads(plan.num_threads)
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    clips = open_clips(plan)
    trainer = build_trainer(plan, clips, get_device(), world_size)
    with Checkpoints(OutputStore(plan.output), plan.num_checkpoints_kept) as checkpoints:
        # One rank looks, so that all go on from the same one.
        found = trainer.ranks.gather([checkpoints.find().name or "" if rank == 0 else ""])[0]
        if found:
            trainer.load_state_dict(checkpoints.load(found))
        try:
            train_to_the_end(trainer, plan, clips, checkpoints, rank, world_size, watch)
        except DivergenceError as error:
            return str(error)
    return None


def train_to_the_end(
    trainer: AdapterTrainer,
    plan: TrainingPlan,
    clips: LatentClips,
    checkpoints: Checkpoints,
    rank: int,
    world_size: int,
    watch: Watch | None = None,
) -> None:
    """All steps that are left; rank 0 writes the curves and the checkpoints, and has the adapter looked at."""
    looks: list[ray.ObjectRef] = []
    device = get_device()
    held_out, validation_objective = clips.held_out(rank, world_size), build_validation_objective(plan, clips)
    with open_curves(plan, trainer.num_steps_done) if rank == 0 else nullcontext() as curves:
        for batch, waited_s in read_ahead(clips, plan, trainer.num_steps_done, rank, world_size):
            metrics, done, validation = trainer.step(batch.to(device)), trainer.num_steps_done, None
            is_last = done == plan.num_steps
            if clips.num_held_out and (done % plan.validate_every == 0 or is_last):
                validation = trainer.validate(validation_objective, held_out and held_out.to(device))
            if curves is None:
                continue
            curves.add(done, metrics, waited_s, validation)
            if done % plan.checkpoint_every == 0 or is_last:
                curves.write()
                adapter = trained_adapter_files(trainer, plan)
                checkpoints.save(done, trainer.state_dict(), adapter)
                if watch and (done % watch.every == 0 or is_last):
                    weights = adapter[f"{ADAPTER_FOLDER}/{ADAPTER_FILE}"]
                    looks.append(watch.task.remote(done, weights, **watch.settings))
    # They belong to this process, and would end with it.
    if looks:
        ray.wait(looks, num_returns=len(looks))


def open_curves(plan: TrainingPlan, num_steps_done: int) -> Curves:
    """The curves of a run that goes on after some steps."""
    return Curves(
        OutputStore(plan.output),
        num_steps=plan.num_steps,
        num_steps_done=num_steps_done,
        batch_size=plan.batch_size,
        log_every=plan.log_every,
    )


def read_ahead(
    clips: LatentClips, plan: TrainingPlan, first: int, rank: int, world_size: int
) -> Iterator[tuple[ClipBatch, float]]:
    """This rank's share of every batch from step `first` on, and the seconds that it was waited for.

    The next one is read while the current one is used.
    """
    with ThreadPoolExecutor(1) as reader:
        steps = range(first, plan.num_steps)
        coming = [reader.submit(clips.batch, step, plan.batch_size, rank, world_size) for step in steps[:1]]
        for step in steps:
            started = time.monotonic()
            batch = coming.pop().result()
            waited_s = time.monotonic() - started
            if step + 1 < plan.num_steps:
                coming.append(reader.submit(clips.batch, step + 1, plan.batch_size, rank, world_size))
            yield batch, waited_s
