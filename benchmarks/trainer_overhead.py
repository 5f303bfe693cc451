"""What the trainer costs beside its steps: `train` as a command against a bare loop of the same steps in one process.

    python benchmarks/trainer_overhead.py LATENTS [STEPS] [PASSES]

LATENTS is the output of `cache_latents` on sprites, such as out/demo/latents. Each pass runs the bare loop (batches
held in memory), `train` with one worker and `train` with two, one after the other, so that a machine that changes its
speed changes all three. Rates are of the second half of the steps: workers have started, caches are warm. Every process
has one tensor thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "pipelines")]

import train as command  # noqa: E402

from simda.config import load_config  # noqa: E402
from simda.training.training_plan import build_trainer  # noqa: E402

BATCH_SIZE = 4
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


def bare_rate(latents: str, num_steps: int) -> float:
    """Clips per second of `AdapterTrainer.step` alone, on batches that are in memory already."""
    torch.set_num_threads(1)
    config = load_config(command.TrainConfig, CONFIG, settings(latents, "unused", num_steps, 1))
    clips = command.open_latents(config)
    trainer = build_trainer(command.make_plan(config, clips), clips, torch.device("cpu"))
    batches = [clips.batch(step, BATCH_SIZE) for step in range(8)]
    half = num_steps // 2
    for step in range(num_steps):
        if step == half:
            started = time.perf_counter()
        trainer.step(batches[step % len(batches)])
    return (num_steps - half) * BATCH_SIZE / (time.perf_counter() - started)


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
        bare.append(bare_rate(latents, num_steps))
        for rates, num_workers in ((one, 1), (two, 2)):
            rate, wait = command_rate(latents, num_steps, num_workers)
            rates.append(rate)
            waits.append(wait)
    print("| what | clips/s | against the bare loop |")
    print("|---|---|---|")
    for name, rates in (("bare loop, one process", bare), ("train, one worker", one), ("train, two workers", two)):
        ratio = median(rate / alone for rate, alone in zip(rates, bare, strict=True))
        print(f"| {name} | {median(rates):.2f} | {ratio:.3f} |")
    print(f"waiting for clips: {100 * max(waits):.2f} % of the time at most")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[2:]]
    main(sys.argv[1], *numbers, *(80, 2)[len(numbers) :])
