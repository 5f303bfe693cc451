"""Commands as modules, and a small dataset of sprites videos."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from simda import runtime
from simda.runtime import run_command

PIPELINES = Path(__file__).parents[2] / "pipelines"


@pytest.fixture(scope="session")
def pipeline() -> Callable[[str], ModuleType]:
    """A command of `pipelines/` by name, as a module."""

    def load(name: str) -> ModuleType:
        if f"pipelines_{name}" not in sys.modules:
            spec = importlib.util.spec_from_file_location(f"pipelines_{name}", PIPELINES / f"{name}.py")
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[f"pipelines_{name}"] = module
            spec.loader.exec_module(module)
        return sys.modules[f"pipelines_{name}"]

    return load


@pytest.fixture
def run(pipeline, capsys) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs a command in this process: (exit code, summary, stderr)."""

    def run_it(name: str, *words: str) -> tuple[int, dict[str, Any], str]:
        module = pipeline(name)
        config_class = next(v for k, v in vars(module).items() if k.lower() == name.replace("_", "") + "config")
        capsys.readouterr()
        code = run_command(config_class, module.run, module.dry_run, list(words))
        shown = capsys.readouterr()
        lines = shown.out.strip().splitlines()
        return code, json.loads(lines[-1]) if lines else {}, shown.err

    return run_it


@pytest.fixture
def without_ray(monkeypatch) -> None:
    """Fails the test if the command gets as far as starting Ray."""

    def refuse() -> None:
        pytest.fail("the command started Ray before it found the fault")

    for module in [runtime, *(m for n, m in sys.modules.items() if n.startswith("pipelines_"))]:
        if hasattr(module, "ray_session"):
            monkeypatch.setattr(module, "ray_session", refuse)


@pytest.fixture(scope="session")
def sprites(tmp_path_factory, pipeline) -> Path:
    """Six sprites videos with captions and four prompts, as `make_sprites` writes them."""
    folder = tmp_path_factory.mktemp("sprites")
    make_sprites = pipeline("make_sprites")
    make_sprites.run(make_sprites.MakeSpritesConfig(output=str(folder), num_videos=6, num_prompts=4))
    return folder
