"""Operations of a step: what is frozen pays no weight gradients; what a GPU can do is known by its name."""

from __future__ import annotations

import pytest
import torch

from simda.models.video_unet import AdapterConfig
from simda.training.model_flops import count_clip_flops, known_peak_tflops


def test_the_backward_pass_of_a_frozen_model_has_half_the_operations_of_a_trained_one(make_unet):
    config = {**make_unet().config, "block_out_channels": (128, 256)}
    shape = (4, 3, 16, 16)
    forwards, backwards = count_clip_flops(config, AdapterConfig(), shape, 6)
    stock_forwards, stock_backwards = count_clip_flops(config, None, shape, 6)
    assert 1.0 < forwards / stock_forwards < 1.3
    # With weight gradients a product costs twice its operations backwards, without them once.
    assert stock_backwards / stock_forwards > 1.9
    assert backwards / forwards < 1.2
    assert [2 * part for part in (forwards, backwards)] == pytest.approx(
        count_clip_flops(config, AdapterConfig(), (4, 6, 16, 16), 6), rel=0.02
    )


def test_an_upscaler_is_counted_with_its_further_inputs(make_upscaler_unet):
    assert min(count_clip_flops(make_upscaler_unet().config, AdapterConfig(), (4, 2, 8, 8), 6)) > 0


def test_devices_without_a_known_peak_have_none(monkeypatch: pytest.MonkeyPatch):
    assert known_peak_tflops(torch.device("cpu"), "bf16") is None
    names = {
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA L40S": 362.0,
        "NVIDIA L40": 181.0,
        "NVIDIA L4": 121.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "Unheard-of": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert known_peak_tflops(torch.device("cuda"), "bf16") == peak
        assert known_peak_tflops(torch.device("cuda"), "fp32") is None
