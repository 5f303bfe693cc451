"""Configuration: defaults, file and words in that order; every fault named, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from simda.config import (
    CONFIG_RULES,
    EMBEDDED_MODELS,
    Adapter,
    Workers,
    absolute_model,
    config_to_dict,
    config_to_yaml,
    describe_settings,
    load_config,
)
from simda.errors import ConfigError
from simda.models import base_models


@dataclass(frozen=True, config=CONFIG_RULES)
class Optimizer:
    lr: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""


@dataclass(frozen=True, config=CONFIG_RULES)
class Settings:
    output: str
    """Where the result goes."""
    num_frames: int = Field(default=16, ge=1)
    """Frames of a clip."""
    optimizer: Optimizer = Optimizer()
    workers: Workers = Workers()
    PRESETS: ClassVar = {"tiny": {"num_frames": 2, "optimizer": {"lr": 0.1}}}


def test_words_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: a\nnum_frames: 8\noptimizer:\n  lr: 1e-4\n")
    config = load_config(Settings, str(file), ["num_frames=4", "workers.num_workers=3"])
    assert config == Settings(output="a", num_frames=4, optimizer=Optimizer(lr=1e-4), workers=Workers(num_workers=3))


def test_a_preset_outranks_what_is_before_it_and_not_what_is_after(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("output: a\nnum_frames: 8\nworkers: {num_workers: 3}\n")
    tiny, workers = Optimizer(lr=0.1), Workers(num_workers=3)
    assert load_config(Settings, str(file), ["preset=tiny"]) == Settings("a", 2, tiny, workers)
    assert load_config(Settings, str(file), ["preset=tiny", "num_frames=4"]) == Settings("a", 4, tiny, workers)
    assert load_config(Settings, str(file), ["num_frames=4", "preset=tiny"]) == Settings("a", 2, tiny, workers)
    file.write_text("output: a\npreset: tiny\nnum_frames: 8\n")
    assert load_config(Settings, str(file), []) == Settings("a", 8, tiny)
    # A class's presets are not changed by what is laid over them.
    assert load_config(Settings, None, ["output=a", "preset=tiny"]) == Settings("a", 2, tiny)


def test_an_unknown_preset_is_refused_and_so_is_any_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="preset=tinny: unknown; known are tiny"):
        load_config(Settings, None, ["output=a", "preset=tinny"])
    with pytest.raises(ConfigError, match="preset: unknown setting"):
        load_config(Optimizer, None, ["preset=tiny"])


def test_scientific_notation_and_numeric_names_keep_their_type() -> None:
    config = load_config(Settings, None, ["output=007", "optimizer.lr=1e-3"])
    assert config.optimizer.lr == 0.001
    assert config.output == "007"


def test_all_faults_are_reported_together_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Settings, None, ["num_frame=4", "optimizer.lr=fast", "workers.num_workers=0"])
    message = str(caught.value)
    assert "4 bad setting(s)" in message
    assert "output: required" in message
    assert "did you mean num_frames?" in message
    assert "optimizer.lr=fast" in message
    assert "workers.num_workers=0" in message


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [("absent.yaml", None, "No such file"), ("list.yaml", "- a\n- b\n", "list"), ("bad.yaml", "a: [", "not YAML")],
)
def test_unusable_config_files_are_named(tmp_path: Path, path: str, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / path).write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(Settings, str(tmp_path / path), [])
    assert path in str(caught.value)


def test_a_word_that_is_no_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="key=value"):
        load_config(Settings, None, ["output"])


def test_the_printed_config_loads_back_to_the_same(tmp_path: Path) -> None:
    config = load_config(Settings, None, ["output=a: b", "optimizer.lr=3e-7"])
    (tmp_path / "printed.yaml").write_text(config_to_yaml(config))
    assert load_config(Settings, str(tmp_path / "printed.yaml"), []) == config
    assert config_to_dict(config)["optimizer"] == {"lr": 3e-7}


def test_help_lists_every_setting_with_its_docstring() -> None:
    lines = "\n".join(describe_settings(Settings))
    assert "optimizer.lr=5e-05" in lines
    assert "Frames of a clip." in lines
    assert "output=required" in lines
    assert "preset=tiny\n      {num_frames: 2, optimizer: {lr: 0.1}}" in lines


def test_workers_ask_for_a_share_of_a_machine_of_their_role() -> None:
    anywhere, trainers = Workers(gpus_per_worker=1), Workers(role="gpu-train", num_workers=64)
    assert anywhere.ray_options == {"num_cpus": 0.5, "num_gpus": 1, "resources": {}}
    # A machine offers one unit of its role, and all of a machine's workers must fit into it.
    (share,) = trainers.ray_options["resources"].values()
    assert trainers.ray_options["resources"].keys() == {"gpu-train"}
    assert 0 < trainers.num_workers * share < 1


def test_a_temporal_kernel_reaches_over_the_clips_that_it_is_trained_on_unless_told_otherwise() -> None:
    def kernel(num_frames: int, **settings: Any) -> tuple[int, int | None]:
        adapter = Adapter(**settings).for_clips(num_frames)
        return adapter["temporal_kernel"], adapter["stretch_from"]

    assert kernel(16) == (31, 16)
    assert kernel(16, temporal_kernel=5) == (5, None)
    assert kernel(16, temporal_kernel=5, stretch_from=8) == (5, 8)
    # Without frames to reach, or nothing that reaches, there is no clip to stretch from.
    assert kernel(1) == kernel(16, temporal=False) == (3, None)


def test_an_embedded_model_is_not_a_directory_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in EMBEDDED_MODELS:
        (tmp_path / name).mkdir()
        assert absolute_model(name) == name
        assert absolute_model(f"./{name}") == str(tmp_path / name)
    assert set(EMBEDDED_MODELS) == set(base_models.EMBEDDED_MODELS)
