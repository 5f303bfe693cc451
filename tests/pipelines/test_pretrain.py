"""`pretrain`: settings of the model that is not trained are refused, and the upscaler's work is counted."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (("model=upscaler", "denoiser.num_steps=30"), "denoiser"),
        (("upscaler.num_steps=30",), "upscaler"),
    ],
)
def test_settings_without_effect_are_refused(run, tmp_path, words, idle):
    code, _, err = run("pretrain", f"output={tmp_path / 'out'}", *words)
    assert (code, f"the settings of {idle} have no effect" in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts(run, tmp_path):
    code, summary, err = run("pretrain", f"output={tmp_path / 'out'}", "model=upscaler", "--dry-run")
    assert code == 0, err
    assert summary["num_stills"] == 400
    assert summary["num_parameters"]["denoiser"] < 2_000_000


def test_quarters_take_their_share_of_the_steps(run, tmp_path):
    """Four of them in the place of one still; the last three tenths of the steps have none."""
    words = ("autoencoder.num_steps=20", "autoencoder.batch_size=1", "denoiser.num_steps=100", "denoiser.batch_size=1")
    numbers = []
    for share in ("0", "0.3", "0.7"):
        code, summary, err = run("pretrain", f"output={tmp_path}", *words, f"denoiser.crop_share={share}", "--dry-run")
        assert code == 0, err
        numbers.append(summary["num_stills"] - 120)
    assert numbers == [0, 90, 210]
    code, _, err = run("pretrain", f"output={tmp_path}", "denoiser.crop_share=0.9", "--dry-run")
    assert (code, "denoiser.crop_share" in err) == (2, True), err


def test_an_output_goes_on_with_its_own_settings_only(run, tmp_path):
    tiny = ("autoencoder.num_steps=20", "text_encoder.num_steps=20", "denoiser.num_steps=20", "denoiser.batch_size=1")
    words = (f"output={tmp_path / 'out'}", *tiny, "autoencoder.batch_size=1", "text_encoder.batch_size=8")
    code, summary, err = run("pretrain", *words)
    assert code == 0, err
    unet = Path(summary["base"]) / "unet" / "diffusion_pytorch_model.safetensors"
    before = unet.read_bytes()
    code, _, err = run("pretrain", *words, "seed=7")
    assert (code, "belongs to a run with other settings" in err) == (2, True), err
    code, _, err = run("pretrain", *words, "num_threads=2")
    assert (code, unet.read_bytes() == before) == (0, True), err
    code, _, err = run("pretrain", "output=s3://bucket/out")
    assert (code, "trained to a local directory" in err) == (2, True), err
