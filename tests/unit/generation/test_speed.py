"""What makes sampling faster leaves the clips as they are, within the rounding that each test states."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from simda.generation.text_to_video import TextToVideoPipeline

PROMPTS = ["a red ball", "a blue box", "a red ball"]
SETTINGS = {"num_frames": 3, "num_inference_steps": 4, "guidance_scale": 6.0, "output_type": "pt"}


@pytest.fixture
def load(base_model, adapter):
    def load_it(**changes: Any) -> TextToVideoPipeline:
        pipeline = TextToVideoPipeline.from_pretrained(base_model, adapter, **changes)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load_it


def sample(pipeline: TextToVideoPipeline, **changes: Any) -> Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return pipeline(PROMPTS, **{**SETTINGS, "negative_prompt": "box", "generator": generator, **changes}).frames


@pytest.mark.parametrize(
    ("switch", "others"),
    [
        ({"guidance_in_one_pass": False}, {}),
        ({"guidance_in_one_pass": False}, {"guidance_interval": (0.25, 0.75)}),
        ({"guidance_in_one_pass": False}, {"reuse_interval": 2, "window_frames": 2, "window_overlap": 1}),
        ({"text_cache": False}, {}),
        ({"text_cache": False, "guidance_in_one_pass": False}, {"guidance_interval": (0.0, 0.5)}),
        ({"frames_per_decode": 2}, {}),
    ],
    ids=str,
)
def test_a_switch_changes_nothing_but_the_last_bits(load, switch, others):
    """Pixels in 0..1, to 1e-4: a fortieth of the step between two of their 256 values."""
    pipeline = load()
    expected = sample(pipeline, **others)
    torch.testing.assert_close(sample(pipeline, **others, **switch), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01


def test_halves_of_guidance_go_through_the_network_one_after_the_other(load):
    pipeline, sizes = load(), []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    sample(pipeline, guidance_in_one_pass=False, guidance_interval=(0.0, 0.5))
    assert sizes == [9, 9, 9, 9, 9, 9]
    sizes.clear()
    sample(pipeline, guidance_interval=(0.0, 0.5))
    assert sizes == [18, 18, 9, 9]


def test_texts_are_projected_once_with_the_cache_and_in_every_step_without(load):
    pipeline, calls = load(), []
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_k.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    sample(pipeline)
    assert calls == [6]
    calls.clear()
    sample(pipeline, text_cache=False)
    assert calls == [6] * 4


def test_the_memory_format_changes_nothing_but_the_last_bits(load):
    pipeline = load()
    expected = sample(pipeline)
    assert pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=torch.contiguous_format)
    assert pipeline.unet.conv_in.weight.is_contiguous()
    torch.testing.assert_close(sample(pipeline), expected, rtol=0, atol=1e-4)


def test_bfloat16_is_near(load):
    """Eight bits of mantissa: pixels within 0.02 of 0..1 on average, five of their 256 values."""
    expected, half = sample(load()), sample(load(torch_dtype=torch.bfloat16))
    assert (half - expected).abs().mean() < 0.02
    assert torch.nn.functional.cosine_similarity(half.flatten(), expected.flatten(), dim=0) > 0.99


# In a process of its own: the type checks of the test run do not go through the compiler, and it keeps what it found.
COMPILING = """
import os
import torch
from diffusers import UNet2DConditionModel
from simda.errors import ConfigError
from simda.models.compilation import compile_network
from simda.models.video_unet import adapter_parameters, inject_adapters, predict

torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(8,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
    mid_block_type=None, up_block_types=("UpBlock2D",), cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
)
inject_adapters(unet.eval())
for parameter in adapter_parameters(unet).values():
    parameter.data.add_(torch.randn(parameter.shape) * 0.2)

def run():
    with torch.no_grad():
        return predict(unet, torch.ones(1, 4, 3, 8, 8), torch.tensor([5]), torch.ones(1, 4, 8), {})

path, expected = os.environ.pop("PATH"), run()
try:
    compile_network(unet)
    print("compiled without a compiler")
except ConfigError as error:
    print(error)
os.environ["PATH"] = path
compile_network(unet)
torch.testing.assert_close(run(), expected, rtol=0, atol=1e-5)
print(expected.std() > 0.01, len(torch._dynamo.utils.counters["graph_break"]))
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler on this machine")
def test_a_compiled_network_changes_nothing_but_the_last_bits_and_a_machine_without_a_compiler_says_so(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    without, compiled = done.stdout.splitlines()
    assert without.startswith("compiled=true: torch.compile does not work on this machine for cpu")
    assert compiled == "tensor(True) 0"
