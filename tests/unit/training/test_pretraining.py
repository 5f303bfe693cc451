"""Training the embedded base: stopped and resumed it ends the same, and its text encoder tells the words apart."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase, digits

import pytest
import torch
from torch import Tensor, nn

from simda.training import pretraining

NUM_STEPS = 6


class Stopped(Exception):
    """Stands for a process that ends."""


def fit_line(folder: Path, use_ema: bool, stop_at: int | None = None) -> Tensor:
    """Weights of a small model after `NUM_STEPS` steps whose data is a function of the step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)

    def add_gradient(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop_at:
            raise Stopped
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :2]).square().mean()
        loss.backward()
        return loss.detach(), {}

    pretraining.optimise(
        [model], add_gradient, NUM_STEPS, 1e-2, folder / "state.pt", folder / "metrics.jsonl", use_ema, save_every=2
    )
    return model.weight.detach()


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_stopped_run_goes_on_to_the_same_weights(use_ema: bool, tmp_path: Path):
    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole").mkdir()
    with pytest.raises(Stopped):
        fit_line(tmp_path / "stopped", use_ema, stop_at=5)
    resumed = fit_line(tmp_path / "stopped", use_ema)
    assert torch.equal(resumed, fit_line(tmp_path / "whole", use_ema))


def fit_denoiser(folder: Path, num_threads: int) -> tuple[list[Tensor], list[float]]:
    """Mean gradients of a denoiser after two steps of three images, and its losses."""
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, unet = pretraining.build_autoencoder(), pretraining.build_unet()
        tokenizer = pretraining.build_tokenizer(["a red star"])
        text_encoder = pretraining.build_text_encoder(tokenizer)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    pretraining.pretrain_denoiser(
        unet,
        text_encoder,
        tokenizer,
        vae,
        pretraining.build_noise_scheduler(),
        lambda step: (images, ["a red star"] * 3, lambda strata: strata),
        num_steps=2,
        learning_rate=1e-3,
        caption_dropout=0.0,
        precision="fp32",
        num_threads=num_threads,
        state_path=folder / "state.pt",
        metrics_path=folder / "metrics.jsonl",
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    moments = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
    return [moment["exp_avg"] for moment in moments.values()], [row["loss"] for row in rows]


def test_parts_of_a_batch_on_threads_give_the_gradient_of_the_whole(tmp_path: Path):
    whole, losses = fit_denoiser(tmp_path / "1", 1)
    # Two rows on one thread and one on the other: the parts count by their size.
    parts, losses_of_parts = fit_denoiser(tmp_path / "2", 2)
    assert losses_of_parts == pytest.approx(losses, rel=1e-5)
    scale = max(float(each.abs().max()) for each in whole)
    assert max(float((one - other).abs().max()) for one, other in zip(whole, parts, strict=True)) < 1e-3 * scale


def test_words_are_tokens_with_the_same_numbers_each_time():
    letters = ascii_lowercase + digits
    one, other = (pretraining.build_tokenizer([*letters, "a red star, moving left"]) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    words = [token.removesuffix("</w>") for token in one.tokenize("A red star, moving left")]
    assert words == ["a", "red", "star", ",", "moving", "left"]
    assert one("a star").input_ids[1] == one.get_vocab()["a</w>"]


def test_the_text_encoder_tells_words_apart_and_paraphrases_not(tmp_path: Path):
    ways = ("left", "right", "up", "down")
    forms = ("a star moving {}", "moving {}, a star")
    tokenizer = pretraining.build_tokenizer([form.format(way) for form in forms for way in ways])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = pretraining.build_text_encoder(tokenizer)
        classes = torch.arange(len(ways))[:, None]
        pretraining.pretrain_text_encoder(
            text_encoder,
            tokenizer,
            lambda step: ([forms[step % 2].format(way) for way in ways], classes),
            [len(ways)],
            num_steps=40,
            learning_rate=1e-3,
            state_path=tmp_path / "state.pt",
            metrics_path=tmp_path / "metrics.jsonl",
        )
    with torch.no_grad():
        one, other = (
            text_encoder(pretraining.tokenize(tokenizer, [form.format(way) for way in ways])).pooler_output
            for form in forms
        )
    assert torch.cdist(one, other).argmin(dim=1).tolist() == list(range(len(ways)))
