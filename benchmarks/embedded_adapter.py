"""How well the embedded adapter makes sprites move: prompts, half of them of held-out triples, generated and judged.

    python benchmarks/embedded_adapter.py OUTPUT [NUM_PROMPTS [SEED]] [KEY=VALUE ...]

By the commands themselves: `generate` with pipelines/configs/generate_sprites.yaml, `adapter=sprites` and the settings
that are given (`sampling.num_frames=16`, another `adapter=`), then `evaluate`. The prompts, 400 by default, are drawn
by a seed, 2026 by default, every second one of a triple that no training video showed. Prints a Markdown table;
OUTPUT/evaluated/report.html shows the videos.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from simda.sprites.world import draw_scene

DEFAULTS = (400, 2026)
SHOWN = ("motion", "colour", "background", "shape", "all_right", "consistency")


def main(output: Path, num_prompts: int, seed: int, settings: list[str]) -> None:
    """Draw prompts, run both commands, print."""
    rng = np.random.default_rng(seed)
    captions = [draw_scene(rng, held_out=number % 2 == 1).caption() for number in range(num_prompts)]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "prompts.csv").open("w", newline="") as file:
        rows = [(f"prompt-{number:04d}", caption) for number, caption in enumerate(captions)]
        csv.writer(file).writerows([("prompt_id", "prompt"), *rows])
    words = [f"prompts={output}/prompts.csv", f"output={output}/made", "adapter=sprites", *settings]
    run("generate", "--config", "pipelines/configs/generate_sprites.yaml", *words)
    run("evaluate", f"generated={output}/made", f"output={output}/evaluated")
    figures = json.loads((output / "evaluated" / "_manifest.json").read_text())["figures"]
    print("| prompts | number | " + " | ".join(name.replace("_", " ") for name in SHOWN) + " |")
    print("|---|---|" + "---|" * len(SHOWN))
    for group, figure in figures.items():
        print(f"| {group} | {figure['videos']} | " + " | ".join(f"{figure[name]:.1%}" for name in SHOWN) + " |")


def run(command: str, *words: str) -> None:
    """One of the project's commands, as from the shell."""
    subprocess.run([sys.executable, f"pipelines/{command}.py", *words], check=True)


if __name__ == "__main__":
    settings = [word for word in sys.argv[1:] if "=" in word]
    plain = [word for word in sys.argv[1:] if "=" not in word]
    if len(plain) not in (1, 2, 3):
        sys.exit(__doc__)
    num_prompts, seed = (*map(int, plain[1:]), *DEFAULTS[len(plain) - 1 :])
    main(Path(plain[0]), num_prompts, seed, settings)
