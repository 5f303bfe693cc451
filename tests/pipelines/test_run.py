"""`run`: a chain of commands, each judged by its own exit code; the cheap steps are real commands or small scripts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from pydantic.dataclasses import dataclass

from simda.config import CONFIG_RULES, load_config

ROOT = Path(__file__).parents[2]
RUN = ROOT / "pipelines" / "run.py"


def write_plan(folder: Path, *steps: dict[str, Any]) -> str:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"steps": list(steps)}))
    return str(path)


def run_plan(plan: str, *flags: str, script: Path = RUN) -> tuple[int, dict[str, Any], list[str], str]:
    """Exit code, the last line as JSON, the lines before it, stderr."""
    command = [sys.executable, str(script), "--config", plan, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = ended.stdout.splitlines()
    return ended.returncode, json.loads(lines[-1]) if lines else {}, lines[:-1], ended.stderr


def sprites_step(output: Path, **settings: Any) -> dict[str, Any]:
    return {
        "pipeline": "make_sprites",
        "settings": {"output": str(output), "num_videos": 2, "num_prompts": 1} | settings,
    }


@pytest.fixture
def other_commands(tmp_path) -> Path:
    """`run.py` among commands of the test's own; returns its path."""
    folder = tmp_path / "commands"
    folder.mkdir()
    shutil.copy(RUN, folder)
    checked = f"import sys\nif '--print-config' in sys.argv:\n    sys.exit(print('output: {tmp_path}/out'))\n"
    (folder / "too_many.py").write_text(checked + "print('working')\nprint('{\"num_failed\": 7}')\nsys.exit(3)\n")
    (folder / "crash.py").write_text(checked + "import os\nos.kill(os.getpid(), 9)\n")
    (folder / "wait.py").write_text(
        checked
        + "import os, signal\ntry:\n    print(os.getpid())\n    signal.pause()\n"
        + 'except KeyboardInterrupt:\n    print(\'{"was": "stopped"}\')\n    sys.exit(1)\n'
    )
    return folder / "run.py"


def test_steps_run_in_order_and_a_second_run_finds_their_work_done(tmp_path):
    plan = write_plan(tmp_path, sprites_step(tmp_path / "a"), sprites_step(tmp_path / "b", num_videos=3))
    code, summary, lines, err = run_plan(plan)
    assert (code, summary["num_steps"], summary["num_done"]) == (0, 2, 2), err
    assert [json.loads(line)["num_rendered"] for line in lines] == [2, 3]
    assert [step["summary"]["num_rendered"] for step in summary["steps"]] == [2, 3]
    assert len(list((tmp_path / "b" / "videos").iterdir())) == 3

    code, summary, lines, err = run_plan(plan)
    assert (code, summary["num_skipped"], lines) == (0, 2, []), err
    assert [step["summary"]["num_rendered"] for step in summary["steps"]] == [2, 3]
    assert f"{tmp_path / 'a'} is complete, made with these settings: skipped" in err

    code, summary, _, err = run_plan(plan, "skip_finished=false")
    assert (code, summary["num_skipped"]) == (0, 0), err
    assert [step["summary"]["num_rendered"] for step in summary["steps"]] == [0, 0]


def test_no_step_is_skipped_after_one_that_worked_nor_one_that_is_incomplete(tmp_path):
    steps = [sprites_step(tmp_path / name) for name in "abc"]
    plan = write_plan(tmp_path, *steps)
    assert run_plan(plan)[0] == 0
    (tmp_path / "b" / "_manifest.json").unlink()
    (tmp_path / "b" / "videos" / "sprite-000001.mp4").unlink()
    code, summary, _, err = run_plan(plan)
    assert code == 0, err
    assert [step.get("skipped", False) for step in summary["steps"]] == [True, False, False]
    assert [step["summary"]["num_rendered"] for step in summary["steps"]] == [2, 1, 0]


def test_a_complete_output_of_other_settings_is_no_reason_to_skip(tmp_path):
    assert run_plan(write_plan(tmp_path, sprites_step(tmp_path / "a")))[0] == 0
    code, summary, _, err = run_plan(write_plan(tmp_path, sprites_step(tmp_path / "a", seed=1)))
    assert code == 2, summary
    assert "seed: 0 -> 1" in err


def test_the_first_failing_step_ends_the_chain_with_its_exit_code(tmp_path):
    steps = (sprites_step(tmp_path / "a"), sprites_step(tmp_path / "a", seed=1), sprites_step(tmp_path / "c"))
    code, summary, _, err = run_plan(write_plan(tmp_path, *steps))
    assert code == 2
    assert "seed: 0 -> 1" in err
    assert "step 2/3 (make_sprites) ended with exit code 2" in err
    assert (summary["num_done"], [step["exit_code"] for step in summary["steps"]]) == (1, [0, 2])
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("command", "expected", "said"), [("too_many", 3, {"num_failed": 7}), ("crash", 137, None)])
def test_exit_codes_and_signals_come_through(other_commands, tmp_path, command, expected, said):
    plan = write_plan(tmp_path, {"pipeline": command}, {"pipeline": "wait"})
    code, summary, _, err = run_plan(plan, script=other_commands)
    assert (code, summary["num_done"], summary["steps"][0]["summary"]) == (expected, 0, said), err


def test_a_terminated_chain_takes_its_step_along(other_commands, tmp_path):
    command = [sys.executable, str(other_commands), "--config", write_plan(tmp_path, *[{"pipeline": "wait"}] * 2)]
    chain = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    # The step's line is here while the step still runs: output is passed on as it comes.
    step = int(chain.stdout.readline())
    assert psutil.Process(step).ppid() == chain.pid
    chain.send_signal(signal.SIGTERM)
    rest, _ = chain.communicate(timeout=60)
    assert chain.returncode == 1
    assert not psutil.pid_exists(step)
    assert json.loads(rest.splitlines()[-1])["steps"][0]["summary"] == {"was": "stopped"}


def test_settings_of_all_steps_are_checked_before_the_first_one_runs(tmp_path):
    steps = (
        sprites_step(tmp_path / "a"),
        sprites_step(tmp_path / "b", num_videos=0),
        sprites_step(tmp_path / "c", num_video=1),
        {"pipeline": "make_sprites", "config": str(tmp_path / "missing.yaml")},
    )
    code, _, lines, err = run_plan(write_plan(tmp_path, *steps))
    assert (code, lines) == (2, [])
    assert "3 step(s) of the plan cannot run" in err
    assert "step 2 (make_sprites)" in err
    assert "num_videos=0" in err
    assert "num_video: unknown setting; did you mean num_videos?" in err
    assert "missing.yaml" in err
    assert not (tmp_path / "a").exists()


def test_an_unknown_command_is_refused_with_the_nearest_name(tmp_path):
    code, _, _, err = run_plan(write_plan(tmp_path, {"pipeline": "make_sprite"}, {"pipeline": "run"}))
    assert code == 2
    assert "steps.0.pipeline=make_sprite" in err
    assert "did you mean make_sprites?" in err
    assert "steps.1.pipeline=run" in err


def test_a_dry_run_tells_what_it_cannot_check_yet_from_what_is_wrong(tmp_path):
    judge = {
        "pipeline": "evaluate",
        "settings": {"generated": str(tmp_path / "no"), "output": str(tmp_path / "judged")},
    }
    plan = write_plan(tmp_path, sprites_step(tmp_path / "a"), judge)
    code, summary, _, err = run_plan(plan, "--dry-run")
    assert (code, summary["num_checked"]) == (0, 1), err
    assert summary["steps"][0]["finished"] is False
    assert summary["steps"][1]["waits_for"] == ["make_sprites"]
    assert str(tmp_path / "no") in summary["steps"][1]["reason"]
    assert not (tmp_path / "a").exists()

    assert run_plan(write_plan(tmp_path, sprites_step(tmp_path / "a")))[0] == 0
    code, summary, _, err = run_plan(write_plan(tmp_path, sprites_step(tmp_path / "a"), judge), "--dry-run")
    assert code == 2
    assert (summary["num_done"], summary["steps"][0]["finished"]) == (1, True)
    assert str(tmp_path / "no") in err


def test_a_step_whose_inputs_are_not_there_costs_what_its_plan_expects(other_commands, tmp_path):
    workers = {"num_workers": 4, "cpus_per_worker": 1.0, "gpus_per_worker": 1.0, "role": "gpu-train"}
    for name, settings in (("tune", {"workers": workers}), ("judge", {"role": "cpu-decode"}), ("make", {})):
        shown = yaml.safe_dump({"output": str(tmp_path / name)} | settings)
        told = "sys.exit(2)" if settings else "print('{}')"
        lines = ("import sys", f"if '--print-config' in sys.argv:\n    sys.exit(print({shown!r}))", told)
        other_commands.with_name(f"{name}.py").write_text("\n".join(lines))
    machines = {"gpu-train": {"per_hour": 10, "cpus": 16, "gpus": 2}, "cpu-decode": {"per_hour": 1, "cpus": 8}}
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump({"currency": "EUR", "machines": machines}))
    expected = ({"pipeline": "tune", "expected_seconds": 7200}, {"pipeline": "judge", "expected_seconds": 1800})
    plan = write_plan(tmp_path, {"pipeline": "make"}, *expected, {"pipeline": "judge"})
    words = ("--dry-run", "--prices", str(tmp_path / "prices.yaml"))
    code, summary, _, err = run_plan(plan, *words, script=other_commands)
    assert code == 0, err
    cost = summary["cost"]
    # Two machines for two hours, one for half an hour.
    assert [step and step["price"] for step in cost["steps"]] == [None, 40, 0.5, None]
    assert (cost["machine_hours"], cost["price"]) == (4.5, 40.5)
    assert cost["without_estimate"] == ["make", "judge"]
    assert "expected_seconds" in summary["steps"][3]["summary"]["estimated_from"]


def test_neither_what_only_estimates_look_at_nor_what_auto_came_to_makes_a_step_run_again(pipeline, tmp_path):
    (tmp_path / "config.yaml").write_text(f"output: {tmp_path}\nseed: 1\nexpected_clips_per_s: null\nprecision: bf16\n")
    (tmp_path / "_manifest.json").write_text('{"complete": true, "num_rows": 2}')
    settings = {"output": str(tmp_path), "seed": 1, "expected_clips_per_s": 3.5, "precision": "auto"}
    assert pipeline("run").finished_summary(settings)["num_rows"] == 2
    assert pipeline("run").finished_summary(settings | {"seed": 2}) is None
    assert pipeline("run").finished_summary(settings | {"precision": "fp32"}) is None


@dataclass(frozen=True, config=CONFIG_RULES)
class Inner:
    """Settings of several kinds."""

    rate: float = 0.0
    flag: bool = False


@dataclass(frozen=True, config=CONFIG_RULES)
class Outer:
    """As `Inner`, one level up."""

    inner: Inner = Inner()
    names: tuple[str, ...] = ()
    baseline: str | None = "x"
    text: str = ""


def test_settings_of_every_kind_reach_the_command(pipeline):
    settings = yaml.safe_load("{inner: {rate: 1e-4, flag: true}, names: [a, b c], baseline: null, text: 'a=b {c} 007'}")
    words = list(pipeline("run").words_of(settings))
    assert load_config(Outer, None, words) == Outer(Inner(1e-4, True), ("a", "b c"), None, "a=b {c} 007")


def config_of(pipeline: Any, name: str, config: str, words: list[str]) -> Any:
    module = pipeline(name)
    config_class = next(v for k, v in vars(module).items() if k.lower() == name.replace("_", "") + "config")
    return name, load_config(config_class, str(ROOT / config), words)


def test_the_plan_for_the_laptop_is_the_demo(pipeline):
    # `make test OUT=...` would hand its own words down.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "demo", "OUT=out/demo"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    lines = [line.split() for line in made.stdout.splitlines() if " pipelines/" in line]
    demo = [config_of(pipeline, Path(line[1]).stem, line[3], line[4:]) for line in lines]
    run = pipeline("run")
    plan = load_config(run.RunConfig, str(ROOT / "pipelines/configs/run_sprites.yaml"), [])
    assert [config_of(pipeline, s.pipeline, s.config, list(run.words_of(s.settings))) for s in plan.steps] == demo


def test_the_plan_for_the_cluster_hands_each_output_to_the_next_step(pipeline):
    plan = load_config(pipeline("run").RunConfig, str(ROOT / "pipelines/configs/run.yaml"), [])
    configs = dict(
        config_of(pipeline, step.pipeline, step.config, list(pipeline("run").words_of(step.settings)))
        for step in plan.steps
    )
    assert configs["train"].latents == configs["cache_latents"].output
    assert configs["generate"].adapter == f"{configs['train'].output}/adapter"
    assert configs["upscale"].videos == configs["evaluate"].baseline == configs["generate"].output
    assert configs["evaluate"].generated == configs["upscale"].output
    assert list(configs) == ["cache_latents", "train", "generate", "upscale", "evaluate"]
    assert len({configs[name].base_model for name in ("cache_latents", "train", "generate")}) == 1
