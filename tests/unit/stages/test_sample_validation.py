"""Videos that show an adapter in training: made once, and never a reason for the run to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from simda.data.schema import FAILURES
from simda.data.store import OutputStore
from simda.models.adapter_state import pack_adapter
from simda.models.base_models import load_unet, unet_identity
from simda.models.video_unet import AdapterConfig, adapter_parameters, inject_adapters
from simda.stages.sample_validation import watch_validation


@pytest.fixture
def settings(base_model: str, tmp_path: Path) -> dict[str, object]:
    return {
        "output": str(tmp_path / "run"),
        "base_model": base_model,
        "prompts": [{"prompt_id": "ball", "prompt": "a red ball", "seed": 3}],
        "clip_shape": (4, 2, 4, 4),
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "fps": 8.0,
        "device": "cpu",
        "threads": 1,
    }


@pytest.fixture
def adapter(base_model: str) -> bytes:
    unet = inject_adapters(load_unet(base_model))
    return pack_adapter(adapter_parameters(unet), AdapterConfig(), unet_identity(base_model), {})


def test_videos_are_made_once(settings: dict[str, object], adapter: bytes) -> None:
    watch_validation(40, adapter, **settings)
    folder = Path(str(settings["output"]), "validation", "step-00000040")
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert sorted(times) == ["ball.mp4", "grid.png"]
    watch_validation(40, b"not read again", **settings)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == times


def test_what_goes_wrong_is_a_row_of_the_failures(settings: dict[str, object]) -> None:
    watch_validation(40, b"no adapter", **settings)
    (failure,) = OutputStore(str(settings["output"])).read_table(FAILURES).to_pylist()
    assert (failure["id"], failure["stage"]) == ("step-00000040", "sample_validation")
    assert "not a whole safetensors file" in failure["message"]
