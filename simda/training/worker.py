"""How a plan is trained by Ray Train workers, and what each of them runs: steps, checkpoints, curves. Glue only.

The loop can begin at any step: all that a step does follows from its number and the state before it (`objective.py`,
`clip_order.py`), so a worker that was lost, or a whole run, is replaced by one that looks for the last checkpoint.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from simda.config import Workers, on_role
from simda.data.store import OutputStore
from simda.data.uris import open_uri
from simda.errors import ConfigError, SimdaError
from simda.models.adapter_state import ADAPTER_FILE
from simda.training.checkpoint import CHECKPOINTS_FOLDER, Checkpoints, checkpoint_name
from simda.training.curves import Curves
from simda.training.latent_clips import LatentClips
from simda.training.model_flops import known_peak_tflops
from simda.training.notices import (
    LOOK_EVERY_S,
    Ending,
    NoticedTorchConfig,
    Notices,
    StopRequest,
    WorkerLeavesError,
    stoppable,
)
from simda.training.objective import ClipBatch
from simda.training.step import AdapterTrainer, DivergenceError
from simda.training.training_plan import (
    ADAPTER_FOLDER,
    TrainingPlan,
    build_trainer,
    build_validation_objective,
    count_flops_of_shapes,
    open_clips,
    trained_adapter_files,
)

ADAPTER_PATH = f"{ADAPTER_FOLDER}/{ADAPTER_FILE}"


@dataclass(frozen=True)
class Watch:
    """What looks at adapters while they are trained, on other processes than the training's.

    Attributes:
        task: a Ray remote function of (steps done, content of the adapter's file, **settings).
        settings: its further arguments.
        every: steps between two looks; a multiple of those between checkpoints.
        resources: CPUs and GPUs that it asks for, beside the workers'.
    """

    task: Any
    settings: dict[str, Any]
    every: int
    resources: dict[str, float]


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
        KeyboardInterrupt: this process was told to stop (SIGTERM, SIGINT); there is a checkpoint of the last step.
        ConfigError: a Ray of this machine alone lacks what the workers ask for.
        SimdaError: the training diverged, or workers failed too often for a reason that a person can mend.
        TrainingFailedError: workers failed too often.
    """
    check_resources(workers, min_workers or workers.num_workers, watch.resources if watch else {})
    store = OutputStore(plan.output)
    filesystem, path = open_uri(store.uri)
    # Beside the driver, with which it may be lost: elsewhere it would be with any machine that happens to be there.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    stop = ray.remote(num_cpus=0, scheduling_strategy=here)(StopRequest).remote()
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"plan": plan.to_settings(), "watch": watch, "stop": stop},
        torch_config=NoticedTorchConfig(backend="nccl" if workers.gpus_per_worker else "gloo"),
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
        ending = stoppable(lambda: trainer.fit().return_value, stop)
    except ray.train.WorkerGroupError as error:
        reason = explain_failure(error)
        if reason is None:
            raise
        if isinstance(reason, WorkerLeavesError):
            print(f"{reason}; max_worker_failures={max_failures} are used up", file=sys.stderr)
            raise KeyboardInterrupt from None
        raise reason from error
    if ending.divergence:
        raise DivergenceError(ending.divergence)
    if ending.stopped:
        raise KeyboardInterrupt
    return store.uri_of(f"{CHECKPOINTS_FOLDER}/{checkpoint_name(plan.num_steps)}")


def explain_failure(error: ray.train.WorkerGroupError) -> SimdaError | None:
    """The reason for people among the workers' failures, if there is one; the others' are often its consequences."""
    for failure in error.worker_failures.values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, SimdaError):
            return cause
        if isinstance(cause, torch.OutOfMemoryError):
            return ConfigError(
                f"a worker's device ran out of memory: {str(cause).splitlines()[0]} Set gradient_checkpointing=true, "
                "raise num_accumulated, use precision=bf16, or lower batch_size, and run it again"
            )
    return None


def check_shares(workers: Workers, min_workers: int | None, batch_size: int, num_accumulated: int) -> None:
    """Every number of workers that there may be shares a batch equally, and each has a GPU of its own.

    Raises:
        ConfigError: one does not.
    """
    most = workers.num_workers
    if most > 1 and workers.gpus_per_worker % 1:
        raise ConfigError(
            f"workers.gpus_per_worker={workers.gpus_per_worker}: workers that share a GPU cannot train together "
            "(NCCL refuses it); give each a whole one, or use workers.num_workers=1"
        )
    if min_workers and min_workers > most:
        raise ConfigError(f"min_workers={min_workers} is above workers.num_workers={most}")
    each = [number * num_accumulated for number in range(min_workers or most, most + 1)]
    if any(batch_size % passes for passes in each):
        numbers = f"min_workers={min_workers} to " if min_workers else ""
        raise ConfigError(
            f"batch_size={batch_size} cannot be shared equally by {numbers}workers.num_workers={most} with "
            f"num_accumulated={num_accumulated}; use a multiple of {math.lcm(*each)}"
        )


def check_resources(workers: Workers, num_workers: int, beside: Mapping[str, float]) -> None:
    """Refuse what can never start; a cluster may still grow, one machine does not.

    Args:
        beside: CPUs and GPUs for what looks at the adapter meanwhile.

    Raises:
        ConfigError: with what is asked for and what there is.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    there = ray.cluster_resources()
    asked = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    for name, each in asked.items():
        more = beside.get(name, 0)
        if each * num_workers + more > there.get(name, 0):
            videos = f" and validation videos with {more:g}" if more else ""
            raise ConfigError(
                f"{num_workers} worker(s) with {name}s {each:g} each{videos} need more than the "
                f"{there.get(name, 0):g} that Ray has on this machine; use fewer, or run on a cluster"
            )


def train_loop_per_worker(settings: dict[str, Any]) -> Ending:
    """Train from the last checkpoint, or from fresh adapters, to the end of the plan."""
    plan, watch = TrainingPlan.from_settings(settings["plan"]), settings["watch"]
    torch.set_num_threads(plan.num_threads)
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    notices = Notices(settings["stop"] if rank == 0 else None)
    clips = open_clips(plan)
    trainer = build_trainer(plan, clips, get_device(), world_size)
    with Checkpoints(OutputStore(plan.output), plan.num_checkpoints_kept) as checkpoints:
        # One rank looks, so that all go on from the same one.
        found = trainer.ranks.gather([checkpoints.find().name or "" if rank == 0 else ""])[0]
        if found:
            trainer.load_state_dict(checkpoints.load(found))
        if trainer.ranks.gather(["stop"] if notices.stops else []):
            return Ending(stopped=True)
        try:
            is_done = train_to_the_end(trainer, plan, clips, checkpoints, rank, world_size, notices, watch)
        except DivergenceError as error:
            return Ending(divergence=str(error))
    return Ending(stopped=not is_done)


def train_to_the_end(
    trainer: AdapterTrainer,
    plan: TrainingPlan,
    clips: LatentClips,
    checkpoints: Checkpoints,
    rank: int,
    world_size: int,
    notices: Notices,
    watch: Watch | None = None,
) -> bool:
    """All steps that are left; rank 0 writes the curves and the checkpoints, and has the adapter looked at.

    Returns:
        Whether all is done; told to stop, it ends after the step with a checkpoint of it.

    Raises:
        WorkerLeavesError: a worker is told to end; after such a checkpoint too.
    """
    videos = look_again(watch, checkpoints, trainer.num_steps_done) if watch and rank == 0 else []
    device = trainer.parameters[0].device
    held_out, validation_objective = clips.held_out(rank, world_size), build_validation_objective(plan, clips)
    peak_tflops = plan.peak_tflops or known_peak_tflops(device, plan.precision)
    flops = count_flops_of_shapes(plan, clips) if rank == 0 and peak_tflops else {}
    peak_flops = peak_tflops and 1e12 * peak_tflops * world_size
    with open_curves(plan, trainer.num_steps_done, peak_flops) if rank == 0 else nullcontext() as curves:
        for batch, waited_s in read_ahead(clips, plan, trainer.num_steps_done, rank, world_size):
            metrics, validation = trainer.step(batch.to(device), notices.give()), None
            done = trainer.num_steps_done
            is_last = done == plan.num_steps
            stops, leaves, looks = metrics.notices
            saves_now = stops or leaves or (looks and notices.finds_preemption())
            if clips.num_held_out and (done % plan.validate_every == 0 or is_last):
                validation = trainer.validate(validation_objective, [alike.to(device) for alike in held_out])
            if curves is not None:
                num_flops = flops.get(batch.clip_shape, 0) * plan.batch_size
                curves.add(done, metrics, waited_s, validation, num_flops)
            if curves is not None and (done % plan.checkpoint_every == 0 or is_last or saves_now):
                curves.write()
                adapter = trained_adapter_files(trainer, plan)
                checkpoints.save(done, trainer.state_dict(), adapter)
                if watch and (done % watch.every == 0 or is_last):
                    videos.append(watch.task.remote(done, adapter[ADAPTER_PATH], **watch.settings))
            if (stops or leaves) and not is_last:
                checkpoints.wait()
                # No rank ends before it is written: Ray Train would end the others.
                trainer.ranks.gather([])
                if leaves:
                    raise WorkerLeavesError(f"a worker was told to end (SIGTERM); step {done} has a checkpoint")
                return False
    # They belong to this process, and would end with it.
    while videos:
        _, videos = ray.wait(videos, num_returns=len(videos), timeout=LOOK_EVERY_S)
        if videos and notices.stops:
            return False
    return True


def look_again(watch: Watch, checkpoints: Checkpoints, num_steps_done: int) -> list[ray.ObjectRef]:
    """Have the adapters of a run that goes on looked at where that may have been cut short; what is done stays."""
    steps = [step for step in checkpoints.steps() if step <= num_steps_done and step % watch.every == 0]
    return [watch.task.remote(step, checkpoints.read_file(step, ADAPTER_PATH), **watch.settings) for step in steps]


def open_curves(plan: TrainingPlan, num_steps_done: int, peak_flops: float | None) -> Curves:
    """The curves of a run that goes on after some steps."""
    return Curves(
        OutputStore(plan.output),
        num_steps=plan.num_steps,
        num_steps_done=num_steps_done,
        batch_size=plan.batch_size,
        log_every=plan.log_every,
        peak_flops=peak_flops,
    )


def read_ahead(
    clips: LatentClips, plan: TrainingPlan, first: int, rank: int, world_size: int
) -> Iterator[tuple[ClipBatch, float]]:
    """This rank's share of every batch from step `first` on, and the seconds that it was waited for.

    The next one is read while the current one is used.
    """
    with ThreadPoolExecutor(1) as reader:
        steps = range(first, plan.num_steps)
        coming = [reader.submit(clips.batch, step, rank, world_size) for step in steps[:1]]
        for step in steps:
            started = time.monotonic()
            batch = coming.pop().result()
            waited_s = time.monotonic() - started
            if step + 1 < plan.num_steps:
                coming.append(reader.submit(clips.batch, step + 1, rank, world_size))
            yield batch, waited_s
