"""Training the embedded base: stopped and resumed it ends the same, and its text encoder tells the words apart."""

from __future__ import annotations

from pathlib import Path

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

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop_at:
            raise Stopped
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - x[:, :2]).square().mean(), {}

    pretraining.optimise(
        [model], loss_of, NUM_STEPS, 1e-2, folder / "state.pt", folder / "metrics.jsonl", use_ema, save_every=2
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
