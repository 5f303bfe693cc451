"""The same update however a batch is shared out, exact resume, and nothing but adapters trained."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from simda.training.checkpoint import pack_state, unpack_state
from simda.training.objective import ClipBatch, DenoisingObjective
from simda.training.optimisation import Optimisation
from simda.training.ranks import Ranks
from simda.training.step import AdapterTrainer, DivergenceError, ValidationMetrics

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


def make_trainer(loss_scale_device: str | None = None, **changes) -> AdapterTrainer:
    denoiser = TinyDenoiser()
    objective = DenoisingObjective(DDIMScheduler().config, torch.zeros(3, 4), seed=5)
    adapters = dict(denoiser.adapter.named_parameters())
    optimisation = Optimisation(
        list(adapters.values()),
        num_steps=4,
        learning_rate=1e-2,
        learning_rate_schedule="cosine",
        ema_decay=0.9,
        loss_scale_device=loss_scale_device,
    )
    return AdapterTrainer(denoiser, adapters, objective, optimisation, **changes)


def batch_of(*places: int) -> ClipBatch:
    return ClipBatch(LATENTS[list(places)], PROMPT_EMBEDS[list(places)], places, [f"clip-{place}" for place in places])


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


class ThreadRanks(Ranks):
    """Threads stand in for ranks, and meet at a barrier."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier, self.shared = threading.Barrier(num_ranks), {}

    def of(self, rank: int) -> ThreadRanks:
        view = ThreadRanks.__new__(ThreadRanks)
        view.barrier, view.shared, view.rank = self.barrier, self.shared, rank
        return view

    def average(self, tensors: Sequence[Tensor]) -> None:
        self.shared[self.rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait()
        for tensor, *parts in zip(tensors, *(self.shared[rank] for rank in sorted(self.shared)), strict=True):
            tensor.copy_(sum(parts) / len(parts))
        self.barrier.wait()

    def gather(self, names: Sequence[str]) -> list[str]:
        self.shared[self.rank] = list(names)
        self.barrier.wait()
        return [name for rank in sorted(self.shared) for name in self.shared[rank]]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_that_share_a_batch_of_four_are_one_rank_of_four(undisturbed, num_ranks: int):
    ranks, share = ThreadRanks(num_ranks), 4 // num_ranks
    trainers = [make_trainer(ranks=ranks.of(rank)) for rank in range(num_ranks)]
    batches = [batch_of(*range(rank * share, (rank + 1) * share)) for rank in range(num_ranks)]
    with ThreadPoolExecutor(num_ranks) as pool:
        losses = list(pool.map(train, trainers, [4] * num_ranks, batches))
    assert all(series == losses[0] for series in losses)
    assert losses[0] == pytest.approx(undisturbed[1], rel=1e-5)
    for trainer in trainers[1:]:
        assert_same_adapters(trainer, trainers[0])
    assert_same_adapters(trainers[0], undisturbed[0], tolerance=1e-5)


def test_two_steps_and_two_resumed_are_four_to_the_last_bit(undisturbed):
    first, second = make_trainer(), make_trainer()
    losses = train(first, 2, batch_of(0, 1, 2, 3))
    second.load_state_dict(unpack_state(pack_state(first.state_dict()), "a checkpoint"))
    assert losses + train(second, 2, batch_of(0, 1, 2, 3)) == undisturbed[1]
    assert_same_adapters(second, undisturbed[0])


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


def test_fp16_scales_losses_and_leaves_out_an_update_that_overflows_on_one_rank_on_all():
    ranks = ThreadRanks(2)
    trainers = [make_trainer(ranks=ranks.of(rank), precision="fp16", loss_scale_device="cpu") for rank in (0, 1)]
    scale = trainers[0].optimisation.loss_scale
    assert scale > 1000
    handle = trainers[1].denoiser.adapter.weight.register_hook(lambda gradient: gradient * float("inf"))

    def run_rank(rank: int) -> list[float | None]:
        batch = batch_of(2 * rank, 2 * rank + 1)
        first = trainers[rank].step(batch)
        ranks.barrier.wait()
        handle.remove()
        ranks.barrier.wait()
        return [first.grad_norm, trainers[rank].step(batch).grad_norm]

    with ThreadPoolExecutor(2) as pool:
        norms = list(pool.map(run_rank, (0, 1)))
    assert norms[0] == norms[1]
    assert norms[0][0] is None
    assert trainers[0].optimisation.loss_scale == trainers[1].optimisation.loss_scale == scale / 2
    # The first update was left out: the second step is that of fresh weights, with the noise of its number.
    exact = make_trainer()
    exact.num_steps_done = 1
    assert norms[0][1] == pytest.approx(exact.step(batch_of(0, 1, 2, 3)).grad_norm, rel=2e-2)
    assert_same_adapters(trainers[0], trainers[1])


def test_in_fp16_a_loss_that_is_not_finite_or_a_scale_that_has_gone_down_all_the_way_stops():
    trainer = make_trainer(precision="fp16", loss_scale_device="cpu")
    trainer.denoiser.adapter.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DivergenceError, match="each loss is finite"):
        train(trainer, 40, batch_of(0, 1))
    assert 10 < trainer.num_steps_done < 30


def test_a_diverged_step_stops_with_its_number_and_the_clips_on_every_rank():
    ranks = ThreadRanks(2)
    trainers = [make_trainer(ranks=ranks.of(rank)) for rank in (0, 1)]
    spoilt = LATENTS.clone()
    spoilt[3, 0, 0, 0, 0] = float("nan")

    def run_rank(rank: int) -> str:
        places = (2 * rank, 2 * rank + 1)
        batch = ClipBatch(spoilt[list(places)], PROMPT_EMBEDS[:2], places, [f"clip-{place}" for place in places])
        trainers[rank].step(batch_of(*places))
        with pytest.raises(DivergenceError) as caught:
            trainers[rank].step(batch)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        messages = list(pool.map(run_rank, (0, 1)))
    assert messages[0] == messages[1]
    assert "diverged at step 2" in messages[0]
    assert "the loss of these clips is not finite: clip-3." in messages[0]
    for trainer in trainers:
        assert all(weight.isfinite().all() for weight in trainer.averaged_adapters().values())


def test_a_gradient_that_overflows_names_the_whole_batch():
    trainer = make_trainer()
    # The error is finite, its derivative with respect to the adapter is not.
    trainer.denoiser.base.weight.data *= 1e30
    trainer.denoiser.adapter.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DivergenceError, match="each loss is finite, of these clips: clip-0, clip-1"):
        trainer.step(batch_of(0, 1))


def test_errors_are_counted_by_quarter_of_the_schedule_and_weights_make_the_loss():
    trainer = make_trainer()
    trainer.objective.min_snr_gamma = 5.0
    batch = batch_of(0, 1, 2, 3)
    found = trainer.objective.clip_errors(trainer.denoiser, batch, step=0)
    metrics = trainer.step(batch)
    weighted = found.errors.detach() * trainer.objective.weights(found.timesteps)
    assert metrics.loss == pytest.approx(float(weighted.mean()))
    for quarter in range(4):
        inside = (found.timesteps >= 250 * quarter) & (found.timesteps < 250 * (quarter + 1))
        assert metrics.num_clips[quarter] == int(inside.sum())
        assert metrics.error_sums[quarter] == pytest.approx(float(found.errors.detach()[inside].sum()))


def test_validation_measures_the_averaged_adapters_over_all_ranks_and_changes_nothing(undisturbed):
    ranks = ThreadRanks(2)
    trainers = [make_trainer(ranks=ranks.of(rank)) for rank in (0, 1)]
    objective = DenoisingObjective(DDIMScheduler().config, torch.zeros(3, 4), seed=8, caption_dropout=0.0)

    def run_rank(rank: int) -> tuple[list[float], ValidationMetrics]:
        share = batch_of(2 * rank, 2 * rank + 1)
        losses = train(trainers[rank], 2, share)
        measured = trainers[rank].validate(objective, [batch_of(0), batch_of(1, 2)] if rank == 0 else [])
        return losses + train(trainers[rank], 2, share), measured

    with ThreadPoolExecutor(2) as pool:
        (losses, measured), other = pool.map(run_rank, (0, 1))
    assert losses == pytest.approx(undisturbed[1], rel=1e-5)
    assert measured == other[1]
    reference = make_trainer()
    train(reference, 2, batch_of(0, 1, 2, 3))
    denoiser = reference.denoiser
    denoiser.adapter.load_state_dict(reference.averaged_adapters())
    errors = objective.clip_errors(denoiser, batch_of(0, 1, 2), step=0).errors.detach()
    assert measured.loss == pytest.approx(float(errors.mean()), rel=1e-4)
    assert sum(measured.error_sums) / sum(measured.num_clips) == pytest.approx(measured.loss)
