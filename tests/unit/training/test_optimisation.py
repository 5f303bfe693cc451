"""What an update does to matrices and to all else, the schedules, the moving average, and going on exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simda.training.checkpoint import pack_state, unpack_state
from simda.training.optimisation import Optimisation

SHAPES = {"down.weight": (6, 24), "down.bias": (6,), "mix": (6, 1, 3), "up.weight": (24, 6)}


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def update(optimisation: Optimisation, parameters: dict[str, nn.Parameter], steps: range) -> None:
    """Updates by gradients that are the same for the same step."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimisation.update()


def optimise(num_steps: int, **settings) -> tuple[dict[str, nn.Parameter], Optimisation]:
    parameters = make_parameters()
    optimisation = Optimisation(list(parameters.values()), **{"num_steps": 8, "learning_rate": 1e-2, **settings})
    update(optimisation, parameters, range(num_steps))
    return parameters, optimisation


def test_muon_gives_matrices_orthogonal_updates_of_adamws_size_and_all_else_to_adamw():
    before = make_parameters()
    muon, adamw = (optimise(1, optimizer=name, weight_decay=0.0)[0] for name in ("muon", "adamw"))
    for name, start in before.items():
        change = (muon[name] - start).detach()
        if change.ndim != 2:
            assert torch.equal(muon[name], adamw[name])
            continue
        singular_values = torch.linalg.svdvals(change) / (1e-2 * 0.2 * 24**0.5)
        # Five rounds of Newton-Schulz bring them near 1, not to it.
        assert 0.5 < singular_values.min() <= singular_values.max() < 1.5
        # 0.2 is the size that AdamW's updates of a matrix come to in a long run.
        assert float(change.square().mean().sqrt()) == pytest.approx(0.2 * 1e-2, rel=0.25)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_three_updates_and_three_resumed_are_six_to_the_last_bit(optimizer: str):
    settings = {"optimizer": optimizer, "learning_rate_schedule": "cosine", "num_warmup_steps": 2, "ema_decay": 0.9}
    expected, undisturbed = optimise(6, **settings)
    halfway, first = optimise(3, **settings)
    resumed, second = optimise(0, **settings)
    for name, parameter in halfway.items():
        resumed[name].data.copy_(parameter.data)
    second.load_state_dict(unpack_state(pack_state(first.state_dict()), "a checkpoint"))
    update(second, resumed, range(3, 6))
    for name, parameter in expected.items():
        assert torch.equal(resumed[name], parameter), name
    for one, other in zip(undisturbed.averaged(), second.averaged(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_schedule_moves_every_parameter_and_ends_at_nothing(optimizer: str):
    parameters, optimisation = optimise(0, optimizer=optimizer, learning_rate_schedule="linear", num_warmup_steps=4)
    rates = []
    for step in range(8):
        rates.append(optimisation.learning_rate)
        update(optimisation, parameters, range(step, step + 1))
    assert rates == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01, 0.0075, 0.005, 0.0025])
    at_the_end = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    update(optimisation, parameters, range(8, 9))
    for name, parameter in parameters.items():
        assert torch.equal(parameter, at_the_end[name]), name


def test_gradients_of_scaled_losses_are_those_of_losses_and_an_update_may_be_left_out():
    parameters, optimisation = optimise(0, optimizer="muon", loss_scale_device="cpu")
    start, scale = make_parameters(), optimisation.loss_scale

    def back() -> None:
        optimisation.scaled(sum(parameter.square().sum() for parameter in parameters.values())).backward()
        optimisation.unscale()

    back()
    optimisation.update(left_out=True)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, start[name]), name
    back()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, 2 * start[name].detach())
    optimisation.update()
    assert all(not torch.equal(parameter, start[name]) for name, parameter in parameters.items())
    state = unpack_state(pack_state(optimisation.state_dict()), "a checkpoint")
    resumed = optimise(0, optimizer="muon", loss_scale_device="cpu")[1]
    resumed.load_state_dict(state)
    assert resumed.loss_scale == optimisation.loss_scale == scale


def test_the_moving_average_follows_with_its_decay():
    parameters, optimisation = optimise(0, ema_decay=0.6)
    expected = [parameter.detach().clone() for parameter in parameters.values()]
    for step in range(20):
        update(optimisation, parameters, range(step, step + 1))
        # diffusers begins with a shorter memory: (1 + n) / (10 + n) for its n-th update, until the decay is reached.
        decay = 0.0 if step == 0 else min(0.6, (1 + step) / (10 + step))
        expected = [
            decay * old + (1 - decay) * parameter.detach()
            for old, parameter in zip(expected, parameters.values(), strict=True)
        ]
    for average, value in zip(optimisation.averaged(), expected, strict=True):
        torch.testing.assert_close(average, value)
