"""How gradients become new weights: optimisers, their learning-rate schedule, and the moving average.

Torch's and diffusers' own parts, held together so that they step, are saved and go on as one. Whose gradients, and
whether they are usable, is `step.py`'s business.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

OptimizerName = Literal["adamw", "muon"]
LearningRateSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]

BETAS = (0.9, 0.999)


def checkpoint_bytes(optimizer: OptimizerName, ema_decay: float, num_parameters: int) -> int:
    """Of weights, the optimiser's moments, a moving average, and the adapter for use; four bytes each."""
    num_moments = 1 if optimizer == "muon" else 2
    return 4 * num_parameters * (2 + num_moments + bool(ema_decay))


class Optimisation:
    """The updates of some parameters over a run of known length.

    Args:
        parameters: float32, in a fixed order.
        num_steps: length of the run, for the schedule.
        optimizer: "adamw", or "muon": orthogonalised momentum for the matrices and AdamW for all else (biases and the
            depth-wise kernels), as Muon is meant to be used.
        learning_rate: peak of the schedule, for both; Muon's updates are scaled to the size of AdamW's.
        learning_rate_schedule: the shape of the schedule, by diffusers' names.
        num_warmup_steps: steps of linear warm-up (not with "constant").
        weight_decay: decoupled.
        ema_decay: decay of the moving average; 0 keeps none.
        loss_scale_device: kind of device on which losses are scaled up, so that gradients in float16 do not vanish;
            an update whose gradient overflows is left out, and the scale lowered. None scales nothing.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"; Liu et al., arXiv 2502.16982,
    section 2.2, for the scale.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        num_steps: int,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 5e-5,
        learning_rate_schedule: LearningRateSchedule = "constant",
        num_warmup_steps: int = 0,
        weight_decay: float = 1e-2,
        ema_decay: float = 0.0,
        loss_scale_device: str | None = None,
    ) -> None:
        self._parameters = list(parameters)
        matrices = [parameter for parameter in parameters if optimizer == "muon" and parameter.ndim == 2]
        others = [parameter for parameter in parameters if optimizer != "muon" or parameter.ndim != 2]
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self._optimizers.append(
                torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            self._optimizers.append(torch.optim.AdamW(others, lr=learning_rate, betas=BETAS, weight_decay=weight_decay))
        self._schedules = [
            get_scheduler(learning_rate_schedule, each, num_warmup_steps=num_warmup_steps, num_training_steps=num_steps)
            for each in self._optimizers
        ]
        self._ema = EMAModel(self._parameters, decay=ema_decay) if ema_decay else None
        self._scaler = torch.amp.GradScaler(loss_scale_device or "cpu", enabled=loss_scale_device is not None)

    @property
    def learning_rate(self) -> float:
        """The one that the next update uses."""
        return self._optimizers[0].param_groups[0]["lr"]

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied by; None where they are not scaled."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    def scaled(self, loss: Tensor) -> Tensor:
        """What to take the gradient of."""
        return self._scaler.scale(loss)

    def unscale(self) -> None:
        """Turn the gradients of scaled losses into gradients; once for each update."""
        for optimizer in self._optimizers:
            self._scaler.unscale_(optimizer)

    def update(self, left_out: bool = False) -> None:
        """Change the parameters by their gradients, and forget the gradients.

        Args:
            left_out: the scaled gradients overflowed: forget them only, and lower the scale.
        """
        with warnings.catch_warnings():
            # An update that is left out takes its turn of the schedule all the same: both go by the number of the step.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
                if not left_out:
                    self._scaler.step(optimizer)
                schedule.step()
                optimizer.zero_grad()
        self._scaler.update()
        if self._ema:
            self._ema.step(self._parameters)

    def averaged(self) -> list[Tensor]:
        """The weights to use: the moving average if there is one, else the current ones; detached."""
        weights = self._ema.shadow_params if self._ema else self._parameters
        return [weight.detach() for weight in weights]

    @contextmanager
    def averaged_in_place(self) -> Iterator[None]:
        """For the length of the block, the parameters are `averaged`."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters)
        self._ema.copy_to(self._parameters)
        try:
            yield
        finally:
            self._ema.restore(self._parameters)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text only."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "schedules": [schedule.state_dict() for schedule in self._schedules],
            "ema": self._ema.state_dict() if self._ema else None,
            "loss_scale": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which `state_dict` returned for the same settings."""
        for optimizer, part in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)
        for schedule, part in zip(self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(part)
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["loss_scale"])
        if self._ema:
            self._ema.load_state_dict(state["ema"])
            self._ema.to(self._parameters[0].device)
