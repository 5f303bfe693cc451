"""One optimiser step of the adapters: accumulate, average over ranks, clip, update; the base stays frozen.

Plain torch, on one process or on one of many; no Ray, no files. The loss is `objective.py`'s, the update
`optimisation.py`'s, the order of the clips `latent_clips.py`'s, and `checkpoint.py` writes what
`AdapterTrainer.state_dict` returns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simda.errors import SimdaError
from simda.training.objective import NUM_QUARTERS, ClipBatch, ClipErrors, Denoiser, DenoisingObjective
from simda.training.optimisation import Optimisation
from simda.training.ranks import Ranks

Precision = Literal["fp32", "bf16", "fp16"]
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LEAST_LOSS_SCALE = 1.0
"""A gradient that overflows without being scaled up is no matter of scale."""


def native_precision(device_type: str) -> Precision:
    """The fastest precision that a kind of device multiplies without emulating it, as this machine has it.

    Args:
        device_type: "cpu" or "cuda".
    """
    if device_type == "cuda":
        # A machine without a GPU may ask for one that has: then it is taken for one of the last years.
        return "bf16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured, over the whole batch of all ranks.

    Attributes:
        loss: mean over the clips, before the update.
        grad_norm: Euclidean norm of the adapters' gradient, before clipping; None where a scaled one overflowed and the
            update was left out.
        learning_rate: the one that this step used.
        error_sums: sums of the clips' unweighted errors in each quarter of the noise schedule, from clean to noise; a
            mean over the ranks, as `num_clips` is.
        num_clips: clips in each quarter.
        notices: which of the notices that ranks may give any of them gave.
    """

    loss: float
    grad_norm: float | None
    learning_rate: float
    error_sums: list[float]
    num_clips: list[float]
    notices: tuple[bool, ...] = ()


@dataclass(frozen=True)
class ValidationMetrics:
    """What clips that are not trained on measured.

    Attributes:
        loss: mean of their unweighted errors.
        error_sums: as in `StepMetrics`.
        num_clips: as in `StepMetrics`.
    """

    loss: float
    error_sums: list[float]
    num_clips: list[float]


class DivergenceError(SimdaError):
    """The loss or its gradient is no longer finite, on all ranks at the same step; trying again would not help."""


@dataclass
class _Totals:
    """Of a rank's share of a batch, as it goes through in parts."""

    loss: Tensor
    error_sums: Tensor
    num_clips: Tensor
    broken_clips: list[str]

    @classmethod
    def zero(cls, device: torch.device) -> _Totals:
        loss, sums, counts = (torch.zeros(shape, device=device) for shape in ((), NUM_QUARTERS, NUM_QUARTERS))
        return cls(loss, sums, counts, [])

    def count(self, objective: DenoisingObjective, found: ClipErrors) -> None:
        quarters, errors = objective.quarters(found.timesteps), found.errors.detach()
        self.error_sums.index_add_(0, quarters, errors)
        self.num_clips.index_add_(0, quarters, torch.ones_like(errors))


class AdapterTrainer:
    """The adapters' parameters with all that their updates need.

    Args:
        denoiser: calls the video UNet that the adapters are part of.
        adapters: their trainable parameters by name; float32.
        objective: turns a batch into a loss per clip.
        optimisation: of these parameters.
        max_grad_norm: gradients are scaled down to at most this norm.
        precision: "bf16" and "fp16" run the network under autocast; parameters and loss stay float32. With "fp16" the
            optimisation should scale losses.
        clips_per_pass: clips per forward and backward pass; None takes a rank's whole share at once.
        ranks: that share each step's batch.
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
        ranks: Ranks | None = None,
    ) -> None:
        self.denoiser, self.adapters, self.objective = denoiser, dict(adapters), objective
        self.optimisation = optimisation
        self.max_grad_norm, self.precision, self.clips_per_pass = max_grad_norm, precision, clips_per_pass
        self.ranks = ranks or Ranks()
        self.num_steps_done = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        return list(self.adapters.values())

    def step(self, batch: ClipBatch, notices: Sequence[bool] = ()) -> StepMetrics:
        """Update the adapters once.

        Args:
            batch: this rank's share of the step's batch; equally large on every rank.
            notices: what this rank has to tell the others, yes or no; equally many on every rank. They travel with the
                gradients, so that all ranks know of them after the same step and at no cost.

        Raises:
            DivergenceError: the loss or its gradient is no longer finite; with the step and the clips.
        """
        totals = self._accumulate_gradients(batch)
        given = torch.tensor([float(notice) for notice in notices], device=totals.loss.device)
        self.ranks.average([totals.loss, totals.error_sums, totals.num_clips, given, *self._gradients()])
        # Averaged before they are unscaled, so that an overflow on one rank is one on all.
        self.optimisation.unscale()
        grad_norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        overflows = not math.isfinite(grad_norm)
        may_overflow = (self.optimisation.loss_scale or 0.0) > LEAST_LOSS_SCALE
        if not torch.isfinite(totals.loss) or (overflows and not may_overflow):
            raise self._divergence(totals, grad_norm, batch)
        learning_rate = self.optimisation.learning_rate
        self.optimisation.update(left_out=overflows)
        self.num_steps_done += 1
        return StepMetrics(
            float(totals.loss),
            None if overflows else grad_norm,
            learning_rate,
            error_sums=totals.error_sums.tolist(),
            num_clips=totals.num_clips.tolist(),
            notices=tuple(share > 0 for share in given.tolist()),
        )

    @torch.no_grad()
    def validate(self, objective: DenoisingObjective, batches: Sequence[ClipBatch]) -> ValidationMetrics:
        """Errors of the adapters to use on clips of all ranks, with the noise of step 0 of `objective`.

        Args:
            batches: this rank's share, each of one shape; the shares may differ in size.
        """
        totals = _Totals.zero(self.parameters[0].device)
        with self.optimisation.averaged_in_place():
            for part in (part for batch in batches for part in batch.split(self.clips_per_pass or len(batch.places))):
                with self.autocast(totals.loss.device.type):
                    totals.count(objective, objective.clip_errors(self.denoiser, part, step=0))
        self.ranks.average([totals.error_sums, totals.num_clips])
        loss = float(totals.error_sums.sum() / totals.num_clips.sum())
        return ValidationMetrics(loss, totals.error_sums.tolist(), totals.num_clips.tolist())

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

    def _accumulate_gradients(self, batch: ClipBatch) -> _Totals:
        device, num_clips = batch.latents.device, len(batch.places)
        totals = _Totals.zero(device)
        for part in batch.split(self.clips_per_pass or num_clips):
            with self.autocast(device.type):
                found = self.objective.clip_errors(self.denoiser, part, self.num_steps_done)
            loss = (found.errors * self.objective.weights(found.timesteps)).sum() / num_clips
            self.optimisation.scaled(loss).backward()
            totals.loss += loss.detach()
            totals.count(self.objective, found)
            totals.broken_clips.extend(
                name
                for name, error in zip(part.clip_ids, found.errors.tolist(), strict=True)
                if not math.isfinite(error)
            )
        return totals

    def _divergence(self, totals: _Totals, grad_norm: float, batch: ClipBatch) -> DivergenceError:
        broken = self.ranks.gather(totals.broken_clips)
        clips = broken or self.ranks.gather(batch.clip_ids)
        whose = "the loss of these clips is not finite" if broken else "each loss is finite, of these clips"
        return DivergenceError(
            f"training diverged at step {self.num_steps_done + 1}: loss {float(totals.loss):.3g}, gradient norm "
            f"{grad_norm:.3g}; {whose}: {', '.join(clips)}. Look at these rows of the latents table; if they are in "
            "order, lower optimizer.lr or use precision=fp32"
        )

    def _gradients(self) -> list[Tensor]:
        untouched = [name for name, parameter in self.adapters.items() if parameter.grad is None]
        assert not untouched, f"no gradient reached {untouched}"
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """In which the network runs, by its precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(device_type, COMPUTE_DTYPES[self.precision])
