"""What the trainer costs beside its steps: `train` as a command against a bare loop of the same steps in one process.

    python benchmarks/trainer_overhead.py LATENTS [STEPS] [PASSES] [--in-process]

LATENTS is the output of `cache_latents` on sprites, such as out/demo/latents. Each pass runs the bare loop (batches
held in memory), `train` with one worker and `train` with two, one after the other, so that a machine that changes its
speed changes all three. Rates are of the second half of the steps: workers have started, caches are warm; two
checkpoints fall into it. Every process has one tensor thread, and memory in huge pages as the command's workers have.
Two workers share a batch; that they scale is told by their rate over twice that of one. With 80 steps and 3 passes it
takes about eight minutes on two cores.

With `--in-process` the bare loop alternates with the workers' loop in the same process, with its reading, curves and
checkpoints but without Ray, and CPU time is compared too: what the trainer itself costs, also on a machine with other
work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

import ray
import torch
from unet_cost import describe_hardware

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "pipelines")]

import train as command  # noqa: E402

from simda.config import load_config  # noqa: E402
from simda.data.store import OutputStore  # noqa: E402
from simda.training.checkpoint import Checkpoints  # noqa: E402
from simda.training.notices import Notices  # noqa: E402
from simda.training.training_plan import build_trainer  # noqa: E402
from simda.training.worker import train_to_the_end  # noqa: E402

BATCH_SIZE = 4
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""What `runtime.ray_session` gives to Ray's processes."""
CONFIG = str(ROOT / "pipelines" / "configs" / "train_sprites.yaml")


def settings(latents: str, output: str, num_steps: int, num_workers: int) -> list[str]:
    """Of one run; two workers share the same batch."""
    return [
        f"latents={latents}",
        f"output={output}",
        "precision=fp32",
        f"batch_size={BATCH_SIZE}",
        f"num_steps={num_steps}",
        f"checkpoint_every={num_steps // 4}",
        "log_every=5",
        f"workers.num_workers={num_workers}",
        "workers.threads_per_worker=1",
    ]


def bare_rate_of_process(latents: str, num_steps: int) -> float:
    """`bare_rate`, of a process of its own."""
    command_line = [sys.executable, __file__, latents, str(num_steps), "--bare"]
    done = subprocess.run(command_line, check=True, capture_output=True, text=True, env=os.environ | HUGE_PAGES)
    return float(done.stdout.splitlines()[-1])


def bare_rate(latents: str, num_steps: int) -> float:
    """Clips per second of `AdapterTrainer.step` alone, on batches that are in memory already."""
    torch.set_num_threads(1)
    config = load_config(command.TrainConfig, CONFIG, settings(latents, "unused", num_steps, 1))
    clips = command.open_latents(config)
    trainer = build_trainer(command.make_plan(config, clips), clips, torch.device("cpu"))
    batches = [clips.batch(step) for step in range(8)]
    half = num_steps // 2
    for step in range(num_steps):
        if step == half:
            started = time.perf_counter()
        trainer.step(batches[step % len(batches)])
    return (num_steps - half) * BATCH_SIZE / (time.perf_counter() - started)


def loop_seconds(latents: str, num_steps: int, is_bare: bool) -> tuple[float, float]:
    """Wall and CPU seconds of all steps, bare or as a worker takes them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(command.TrainConfig, CONFIG, settings(latents, f"{folder}/run", num_steps, 1))
        clips = command.open_latents(config)
        plan = command.make_plan(config, clips)
        trainer = build_trainer(plan, clips, torch.device("cpu"))
        batches = [clips.batch(step) for step in range(8)]
        trainer.step(batches[0])
        trainer.num_steps_done = 0
        wall, cpu = time.perf_counter(), time.process_time()
        if is_bare:
            for step in range(num_steps):
                trainer.step(batches[step % len(batches)])
        else:
            with Checkpoints(OutputStore(plan.output)) as checkpoints:
                train_to_the_end(trainer, plan, clips, checkpoints, 0, 1, Notices(None))
        return time.perf_counter() - wall, time.process_time() - cpu


def compare_loops(latents: str, num_steps: int, num_passes: int) -> None:
    """Measure, print."""
    rounds = [[loop_seconds(latents, num_steps, is_bare) for is_bare in (True, False)] for _ in range(num_passes)]
    print(
        "| loop, one process | wall s | CPU s | rate against bare, by wall time | by CPU time |\n|---|---|---|---|---|"
    )
    for number, name in enumerate(("bare", "with reading, curves, checkpoints")):
        wall, cpu = (median(one[number][kind] for one in rounds) for kind in (0, 1))
        ratios = [median(one[0][kind] / one[number][kind] for one in rounds) for kind in (0, 1)]
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {ratios[0]:.3f} | {ratios[1]:.3f} |")


def command_rate(latents: str, num_steps: int, num_workers: int) -> tuple[float, float]:
    """Clips per second of the command's steps, and the share of their time that was spent waiting for clips."""
    with tempfile.TemporaryDirectory() as folder:
        words = settings(latents, f"{folder}/run", num_steps, num_workers)
        subprocess.run(
            [sys.executable, str(ROOT / "pipelines" / "train.py"), "--config", CONFIG, *words],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    middle = next(line for line in lines if line["step"] >= num_steps // 2)
    num_clips = (last["step"] - middle["step"]) * BATCH_SIZE
    seconds = last["seconds"] - middle["seconds"]
    waited = last["data_wait"] * last["seconds"] - middle["data_wait"] * middle["seconds"]
    return num_clips / seconds, waited / seconds


def main(latents: str, num_steps: int, num_passes: int) -> None:
    """Measure, print."""
    bare, one, two, waits = [], [], [], []
    for _ in range(num_passes):
        bare.append(bare_rate_of_process(latents, num_steps))
        for rates, num_workers in ((one, 1), (two, 2)):
            rate, wait = command_rate(latents, num_steps, num_workers)
            rates.append(rate)
            waits.append(wait)
    hardware = describe_hardware(torch.device("cpu"))
    print(f"{date.today()} · {hardware} · torch {torch.__version__}, Ray {ray.__version__}\n")
    print("| what | clips/s | against the bare loop | in each pass |")
    print("|---|---|---|---|")
    for name, rates in (("bare loop, one process", bare), ("train, one worker", one), ("train, two workers", two)):
        ratios = [rate / alone for rate, alone in zip(rates, bare, strict=True)]
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {name} | {median(rates):.2f} | {median(ratios):.3f} | {each} |")
    scaling = median(both / (2 * alone) for both, alone in zip(two, one, strict=True))
    print(f"\nTwo workers make {scaling:.3f} of twice the clips per second of one.")
    print(f"Waiting for clips: {100 * max(waits):.2f} % of the time at most.")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[2:] if not word.startswith("--")]
    if "--bare" in sys.argv:
        print(bare_rate(sys.argv[1], *numbers))
    else:
        run = compare_loops if "--in-process" in sys.argv else main
        run(sys.argv[1], *numbers, *(80, 2)[len(numbers) :])
