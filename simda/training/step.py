"""One optimiser step of the adapters: accumulate, average over ranks, clip, update; the base stays frozen.

Plain torch, on one process or on one of many; no Ray, no files. The loss is `objective.py`'s, the update
`optimisation.py`'s, the order of the clips `latent_clips.py`'s, and `checkpoint.py` writes what
`AdapterTrainer.state_dict` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simda.errors import SimdaError
from simda.training.objective import ClipBatch, Denoiser, DenoisingObjective
from simda.training.optimisation import Optimisation

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured, over the whole batch of all ranks.

    Attributes:
        loss: mean over the clips, before the update.
        grad_norm: Euclidean norm of the adapters' gradient, before clipping.
        learning_rate: the one that this step used.
    """

    loss: float
    grad_norm: float
    learning_rate: float


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the process group; nothing without one.

    The adapters' gradients are few, so one flat all-reduce after the last backward pass does what
    DistributedDataParallel would do, with a summing order that does not depend on when the process was started.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class AdapterTrainer:
    """The adapters' parameters with all that their updates need.

    Args:
        denoiser: calls the video UNet that the adapters are part of.
        adapters: their trainable parameters by name; float32.
        objective: turns a batch into a loss per clip.
        optimisation: of these parameters.
        max_grad_norm: gradients are scaled down to at most this norm.
        precision: "bf16" runs the network under autocast; parameters and loss stay float32.
        clips_per_pass: clips per forward and backward pass; None takes a rank's whole share at once.
        average: averages tensors over ranks, in place.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        adapters: Mapping[str, nn.Parameter],
        objective: DenoisingObjective,
        optimisation: Optimisation,
        *,
        max_grad_norm: float = 1.0,
        precision: Precision = "fp32",
        clips_per_pass: int | None = None,
        average: Callable[[Sequence[Tensor]], None] = average_over_ranks,
    ) -> None:
        self.denoiser, self.adapters, self.objective = denoiser, dict(adapters), objective
        self.optimisation = optimisation
        self.max_grad_norm, self.precision, self.clips_per_pass = max_grad_norm, precision, clips_per_pass
        self.average = average
        self.num_steps_done = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        return list(self.adapters.values())

    def step(self, batch: ClipBatch) -> StepMetrics:
        """Update the adapters once.

        Args:
            batch: this rank's share of the step's batch; equally large on every rank.

        Raises:
            SimdaError: the loss or its gradient is no longer finite.
        """
        loss = self._accumulate_gradients(batch)
        self.average([loss, *self._gradients()])
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not torch.isfinite(loss + grad_norm):
            raise SimdaError(
                f"training diverged at step {self.num_steps_done + 1}: loss {float(loss):.3g}, gradient norm "
                f"{float(grad_norm):.3g}; lower optimizer.lr or use precision=fp32"
            )
        learning_rate = self.optimisation.learning_rate
        self.optimisation.update()
        self.num_steps_done += 1
        return StepMetrics(float(loss), float(grad_norm), learning_rate)

    def averaged_adapters(self) -> dict[str, Tensor]:
        """The weights to use: the moving average if there is one, else the current ones; by name, detached."""
        return dict(zip(self.adapters, self.optimisation.averaged(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on exactly: tensors, numbers and text only."""
        return {
            "num_steps_done": self.num_steps_done,
            "adapters": {name: parameter.detach() for name, parameter in self.adapters.items()},
            "optimisation": self.optimisation.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which `state_dict` returned for the same settings."""
        assert state["adapters"].keys() == self.adapters.keys(), "claiming the output has checked the settings"
        for name, parameter in self.adapters.items():
            parameter.copy_(state["adapters"][name])
        self.optimisation.load_state_dict(state["optimisation"])
        self.num_steps_done = state["num_steps_done"]

    def _accumulate_gradients(self, batch: ClipBatch) -> Tensor:
        num_clips = len(batch.places)
        total = torch.zeros((), device=batch.latents.device)
        for part in batch.split(self.clips_per_pass or num_clips):
            with self._autocast(batch.latents.device.type):
                losses = self.objective.loss_per_clip(self.denoiser, part, self.num_steps_done)
            loss = losses.sum() / num_clips
            loss.backward()
            total += loss.detach()
        return total

    def _gradients(self) -> list[Tensor]:
        untouched = [name for name, parameter in self.adapters.items() if parameter.grad is None]
        assert not untouched, f"no gradient reached {untouched}"
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        return torch.autocast(device_type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
