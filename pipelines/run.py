#!/usr/bin/env python
"""A plan in, the outputs of all its steps out: a chain of commands as one job.

    plan -> settings of all steps checked -> step 1 -> step 2 -> ... -> the last step, or the first one that fails

A step is a command of this folder with its configuration. It is skipped when its output is complete, was made with the
same settings, and no step before it had anything to do; else the command runs, and as it alone knows what decides its
output, it goes on where it was stopped, or finds nothing to do. So a chain that was stopped or failed is run again with
the same line. A step that fails ends the chain with its own exit code.

What came to the inputs of a finished chain (videos, prompts) is found with `skip_finished=false`.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from simda.config import CONFIG_RULES
from simda.data.store import CONFIG_FILE, OutputStore
from simda.data.uris import exists, read_text
from simda.errors import ConfigError
from simda.runtime import has_too_many_failures, run_command

FOLDER = Path(__file__).resolve().parent
EXPECTED = "expected_"
"""How the names of settings begin that change nothing but an estimate."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Step:
    """One command of the plan."""

    pipeline: str
    """Name of the command: a file beside this one, without `.py`."""
    config: str | None = None
    """Its YAML file, as after `--config`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Its `key=value` words, as a mapping; they override the file."""
    expected_seconds: float | None = Field(default=None, ge=0)
    """Seconds that it is expected to take with its workers, for the estimate of `--dry-run` while its inputs are not
    there yet; changes nothing else."""

    @field_validator("pipeline")
    @classmethod
    def _is_a_command(cls, name: str) -> str:
        known = sorted({path.stem for path in FOLDER.glob("*.py")} - {Path(__file__).stem})
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError("no such command; " + (f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"))
        return name


@dataclass(frozen=True, config=CONFIG_RULES)
class RunConfig:
    """Settings of `run`."""

    steps: list[Step] = Field(min_length=1)
    """What to run, in this order: a list of `{pipeline: NAME, config: FILE, settings: {KEY: VALUE}}`."""
    skip_finished: bool = True
    """Pass over steps whose outputs are complete; false lets each command look for new rows in its inputs."""


def run(config: RunConfig) -> dict[str, Any]:
    """Run the steps one after the other."""
    resolved = check_settings(config)
    done: list[dict[str, Any]] = []
    # Whether inputs may have changed: by a step of this very run.
    changed = not config.skip_finished
    for number, (step, settings) in enumerate(zip(config.steps, resolved, strict=True), start=1):
        announce(config, number, shlex.join(command_of(step)))
        finished = None if changed else finished_summary(settings)
        if finished is not None:
            print(f"{settings['output']} is complete, made with these settings: skipped", file=sys.stderr, flush=True)
            done.append({"pipeline": step.pipeline, "exit_code": 0, "seconds": 0.0, "skipped": True})
            done[-1] |= {"summary": finished}
            continue
        changed = True
        started = time.monotonic()
        code, summary = run_step(step)
        done.append({"pipeline": step.pipeline, "exit_code": code, "seconds": round(time.monotonic() - started, 1)})
        done[-1] |= {"summary": summary}
        if code:
            stop(config, code, done)
    num_skipped = sum(step.get("skipped", False) for step in done)
    return {"num_steps": len(config.steps), "num_done": len(done), "num_skipped": num_skipped, "steps": done}


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Dry-run every step; the inputs of a step can be checked once the steps before it have written them."""
    checked: list[dict[str, Any]] = []
    unfinished: list[str] = []
    for number, (step, settings) in enumerate(zip(config.steps, check_settings(config), strict=True), start=1):
        finished = is_finished(settings["output"])
        announce(config, number, shlex.join([*command_of(step), "--dry-run"]))
        found = ask(step, "--dry-run")
        entry: dict[str, Any] = {"pipeline": step.pipeline, "checked": not found.returncode}
        if not found.returncode:
            entry |= {"finished": finished, "summary": last_json(found.stdout)}
        elif unfinished:
            entry |= {"waits_for": list(unfinished), "reason": reason_of(found.stderr)}
            entry |= {"summary": expectation(step, settings)}
            print(f"not checked before {', '.join(unfinished)} ran: {reason_of(found.stderr)}", file=sys.stderr)
        else:
            print(found.stderr, end="", file=sys.stderr)
            stop(config, found.returncode, [*checked, entry | {"exit_code": found.returncode}])
        checked.append(entry)
        if not finished:
            unfinished.append(step.pipeline)
    return {"num_steps": len(config.steps), "num_checked": sum(e["checked"] for e in checked), "steps": checked}


def expectation(step: Step, settings: dict[str, Any]) -> dict[str, Any]:
    """What can be said of a step whose inputs are not there yet, in the words of its own dry run."""
    if step.expected_seconds is None:
        return {"seconds_left": None, "estimated_from": "nothing: expected_seconds of this step is not set"}
    workers = settings.get("workers") or {"role": settings.get("role")}
    return {"seconds_left": step.expected_seconds, "estimated_from": "expected_seconds", "workers": workers}


def check_settings(config: RunConfig) -> list[dict[str, Any]]:
    """The resolved settings of all steps; a typo in the last one should not show after hours of the first.

    Raises:
        ConfigError: settings that their command refuses, all steps together.
    """
    resolved, faults = [], []
    print(f"checking the settings of {len(config.steps)} steps", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as commands:
        answers = list(commands.map(lambda step: ask(step, "--print-config"), config.steps))
    for number, (step, shown) in enumerate(zip(config.steps, answers, strict=True), start=1):
        if shown.returncode:
            faults.append(f"step {number} ({step.pipeline}): {reason_of(shown.stderr)}")
        else:
            resolved.append(yaml.safe_load(shown.stdout))
    if faults:
        raise ConfigError(f"{len(faults)} step(s) of the plan cannot run:\n" + "\n".join(faults))
    return resolved


def command_of(step: Step) -> list[str]:
    """The step as one would type it."""
    config = ["--config", step.config] if step.config is not None else []
    return [sys.executable, str(FOLDER / f"{step.pipeline}.py"), *config, *words_of(step.settings)]


def words_of(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings as `dotted.key=value` words."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from words_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"


def ask(step: Step, flag: str) -> subprocess.CompletedProcess[str]:
    """What the step's command prints with a flag that does no work."""
    return subprocess.run([*command_of(step), flag], capture_output=True, encoding="utf-8", check=False)


def run_step(step: Step) -> tuple[int, Any]:
    """Run the step in a process of its own, and pass on what it prints as it prints it.

    Returns:
        Its exit code (128 + N after signal N, as in shells), and its summary, None if it printed none.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command_of(step), stdout=subprocess.PIPE, env=environment, encoding="utf-8", preexec_fn=hear_interrupts
    ) as process:
        # A terminal's Ctrl-C reaches the step by itself; what `kill` sends to this process does not.
        before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
        last = ""
        try:
            assert process.stdout is not None
            for last in process.stdout:
                print(last, end="", flush=True)
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code, last_json(last)


def hear_interrupts() -> None:
    """Let the step be stopped: shells make background processes deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(config: RunConfig, code: int, steps: list[dict[str, Any]]) -> NoReturn:
    """End the chain at the step that was last, with its exit code and with a summary all the same."""
    print(
        f"error: step {len(steps)}/{len(config.steps)} ({steps[-1]['pipeline']}) ended with exit code {code}, for the "
        "reason above; the steps after it were not run. Run the same command again to go on from there.",
        file=sys.stderr,
    )
    num_done = len(steps) - 1
    print(json.dumps({"num_steps": len(config.steps), "num_done": num_done, "exit_code": code, "steps": steps}))
    raise SystemExit(code)


def announce(config: RunConfig, number: int, command: str) -> None:
    """Say which step begins, by the line that would run it alone."""
    print(f"step {number}/{len(config.steps)}: {command}", file=sys.stderr, flush=True)


def is_finished(output: str) -> bool:
    """Whether the directory is a finished output, of whichever settings."""
    return OutputStore(output).read_manifest() is not None


def finished_summary(settings: dict[str, Any]) -> Any:
    """The summary of a step's output if it is complete and was made with exactly these settings, else None."""
    store = OutputStore(settings["output"])
    summary = store.read_manifest()
    if summary is None or not exists(store.uri_of(CONFIG_FILE)):
        return None
    # What was decided by itself is recorded as what it came to.
    decided = {name: value for name, value in settings.items() if value == "auto"}
    if deciding(yaml.safe_load(read_text(store.uri_of(CONFIG_FILE))) | decided) != deciding(settings):
        return None
    # A command that ended with too many failures has a complete output all the same; it is to say so again.
    return None if has_too_many_failures(summary) else summary


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that only estimates of dry runs look at."""
    return {name: value for name, value in settings.items() if not name.startswith(EXPECTED)}


def last_json(text: str) -> Any:
    """The last line as JSON, or None."""
    try:
        return json.loads(text.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return None


def reason_of(stderr: str) -> str:
    """What a command said when it refused, without the word `error`."""
    return f"\n{stderr.strip()}".rpartition("\nerror: ")[2]


if __name__ == "__main__":
    sys.exit(run_command(RunConfig, run, dry_run))
