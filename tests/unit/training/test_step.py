"""The same update however a batch is shared out, exact resume, and nothing but adapters trained."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from simda.errors import InputError, SimdaError
from simda.training.checkpoint import STATE_FILE, load_state, save_state
from simda.training.objective import ClipBatch, DenoisingObjective
from simda.training.optimisation import Optimisation
from simda.training.step import AdapterTrainer

LATENTS = torch.randn(4, 4, 2, 4, 6, generator=torch.Generator().manual_seed(1))
PROMPT_EMBEDS = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(2))


class TinyDenoiser(nn.Module):
    """Stands in for the video UNet: a frozen convolution and a trainable one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.base, self.adapter = nn.Conv3d(4, 8, 1), nn.Conv3d(8, 4, 3, padding=1)
        self.base.requires_grad_(False)

    def forward(self, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        level = timesteps.to(noisy).view(-1, 1, 1, 1, 1) / 1000
        return self.adapter(torch.tanh(self.base(noisy + level)) + prompt_embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1))


def make_trainer(**changes) -> AdapterTrainer:
    denoiser = TinyDenoiser()
    objective = DenoisingObjective(DDIMScheduler().config, torch.zeros(3, 4), seed=5)
    adapters = dict(denoiser.adapter.named_parameters())
    optimisation = Optimisation(
        list(adapters.values()), num_steps=4, learning_rate=1e-2, learning_rate_schedule="cosine", ema_decay=0.9
    )
    return AdapterTrainer(denoiser, adapters, objective, optimisation, **changes)


def batch_of(*places: int) -> ClipBatch:
    return ClipBatch(LATENTS[list(places)], PROMPT_EMBEDS[list(places)], places)


def train(trainer: AdapterTrainer, num_steps: int, batch: ClipBatch) -> list[float]:
    return [trainer.step(batch).loss for _ in range(num_steps)]


def assert_same_adapters(trainer: AdapterTrainer, expected: AdapterTrainer, tolerance: float = 0.0) -> None:
    for name, weight in expected.averaged_adapters().items():
        torch.testing.assert_close(trainer.averaged_adapters()[name], weight, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[AdapterTrainer, list[float]]:
    trainer = make_trainer()
    return trainer, train(trainer, 4, batch_of(0, 1, 2, 3))


def test_accumulating_clip_by_clip_is_the_same_update(undisturbed):
    trainer = make_trainer(clips_per_pass=1)
    assert train(trainer, 4, batch_of(0, 1, 2, 3)) == pytest.approx(undisturbed[1], rel=1e-5)
    assert_same_adapters(trainer, undisturbed[0], tolerance=1e-5)


def test_two_ranks_of_two_clips_are_one_rank_of_four(undisturbed):
    """Two threads stand in for ranks: each averages with the other's tensors at a barrier."""
    barrier, shared = threading.Barrier(2), {}

    def averaging_as(rank: int) -> Callable[[Sequence[Tensor]], None]:
        def average(tensors: Sequence[Tensor]) -> None:
            shared[rank] = [tensor.clone() for tensor in tensors]
            barrier.wait()
            for tensor, first, second in zip(tensors, shared[0], shared[1], strict=True):
                tensor.copy_((first + second) / 2)
            barrier.wait()

        return average

    trainers = [make_trainer(average=averaging_as(rank)) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as ranks:
        losses = list(ranks.map(train, trainers, (4, 4), (batch_of(0, 1), batch_of(2, 3))))
    assert losses[0] == losses[1] == pytest.approx(undisturbed[1], rel=1e-5)
    assert_same_adapters(trainers[0], trainers[1])
    assert_same_adapters(trainers[0], undisturbed[0], tolerance=1e-5)


def test_two_steps_and_two_resumed_are_four_to_the_last_bit(undisturbed, tmp_path: Path):
    first, second = make_trainer(), make_trainer()
    losses = train(first, 2, batch_of(0, 1, 2, 3))
    save_state(first.state_dict(), tmp_path)
    second.load_state_dict(load_state(tmp_path))
    assert losses + train(second, 2, batch_of(0, 1, 2, 3)) == undisturbed[1]
    assert_same_adapters(second, undisturbed[0])


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    (tmp_path / STATE_FILE).write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"trainer_state\.pt is not a readable checkpoint"):
        load_state(tmp_path)


def test_only_adapters_move_and_the_average_lags_behind():
    trainer = make_trainer()
    denoiser = trainer.denoiser
    base = {name: weight.clone() for name, weight in denoiser.base.state_dict().items()}
    start = {name: weight.clone() for name, weight in denoiser.adapter.state_dict().items()}
    metrics = [trainer.step(batch_of(0, 1, 2, 3)) for _ in range(2)]
    for name, weight in denoiser.base.state_dict().items():
        assert torch.equal(weight, base[name])
    for name, weight in denoiser.adapter.state_dict().items():
        assert (weight != start[name]).all()
        assert not torch.equal(weight, trainer.averaged_adapters()[name])
    assert metrics[0].learning_rate == 1e-2
    assert metrics[1].learning_rate < 1e-2
    assert metrics[0].grad_norm > 0


def test_bf16_keeps_parameters_in_float32_and_the_loss_close():
    exact, rounded = make_trainer(), make_trainer(precision="bf16")
    assert train(rounded, 2, batch_of(0, 1)) == pytest.approx(train(exact, 2, batch_of(0, 1)), rel=2e-2)
    assert {parameter.dtype for parameter in rounded.parameters} == {torch.float32}


def test_a_diverged_step_stops_with_its_number():
    trainer = make_trainer()
    trainer.step(batch_of(0, 1))
    broken = ClipBatch(LATENTS[:2] * float("inf"), PROMPT_EMBEDS[:2], (0, 1))
    with pytest.raises(SimdaError, match="diverged at step 2"):
        trainer.step(broken)
