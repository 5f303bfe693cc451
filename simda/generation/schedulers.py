"""Which diffusers scheduler samples, by a short name, with the noise schedule of the base model.

A scheduler takes over everything that says what the base was trained on: betas, kind of prediction, zero terminal SNR,
spacing of the timesteps. The mathematics are diffusers' own.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from simda.config import MAX_STEPS, SchedulerName
from simda.errors import ConfigError
from simda.training.objective import shift_timesteps

SCHEDULERS: dict[SchedulerName, type] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "lcm": LCMScheduler,
}
SHIFTED = ("ddpm", "dpm++", "euler")
"""Those that take timesteps of a caller's choice."""
MAX_LCM_STEPS = 50
"""LCM picks its timesteps among as many as its models were distilled on."""


def make_scheduler(name: str, base_scheduler: Any) -> Any:
    """A scheduler for a base model.

    Args:
        name: one of `SCHEDULERS`.
        base_scheduler: the one that the base model came with; it is left as it is.

    Raises:
        ConfigError: an unknown name.
    """
    check_scheduler(name)
    return SCHEDULERS[name].from_config(base_scheduler.config)  # type: ignore[index,attr-defined]


def shifted_timesteps(base_scheduler: Any, num_inference_steps: int, shift: float) -> list[int]:
    """Timesteps from pure noise down that lie closer together where it is noisier, for a `timestep_shift` above 1.

    At 2.5, thirty of forty lie in the noisier half of the schedule, where layout and motion are decided; at 1 they are
    spread evenly, as `timestep_spacing="trailing"` does it. Source: as `shift_timesteps`.
    """
    return _shifted(base_scheduler.config.num_train_timesteps, num_inference_steps, shift)


def _shifted(num_timesteps: int, num_inference_steps: int, shift: float) -> list[int]:
    levels = [shift_timesteps(1 - step / num_inference_steps, shift) for step in range(num_inference_steps)]
    return [max(0, round(level * num_timesteps) - 1) for level in levels]


@cache
def _most_shifted_steps(shift: float, at_most: int) -> int:
    """Up to how many steps, shifted ones are all at timesteps of their own."""
    counts = range(1, at_most + 1)
    return next((n - 1 for n in counts if len(set(_shifted(MAX_STEPS, n, shift))) < n), at_most)


def check_scheduler(name: str, num_inference_steps: int = 1, eta: float = 0.0, timestep_shift: float = 1.0) -> None:
    """Refuse what a scheduler cannot do.

    Raises:
        ConfigError: an unknown name, more steps than it has, or an eta or a shift that it does not know.
    """
    if name not in SCHEDULERS:
        raise ConfigError(f"scheduler={name!r}; known are {', '.join(get_args(SchedulerName))}")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta}; it goes from 0 (no noise at each step) to 1 (as DDPM)")
    if eta and name != "ddim":
        raise ConfigError(f"eta={eta}: {SCHEDULERS[name].__name__} does not know it; use scheduler=ddim or eta=0")
    if timestep_shift != 1 and name not in SHIFTED:
        raise ConfigError(
            f"timestep_shift={timestep_shift}: {SCHEDULERS[name].__name__} chooses its own timesteps; use "
            f"scheduler={', '.join(SHIFTED)}, or timestep_shift=1"
        )
    if num_inference_steps > MAX_STEPS:
        raise ConfigError(f"num_inference_steps={num_inference_steps}; the noise schedule has {MAX_STEPS} timesteps")
    if timestep_shift != 1 and num_inference_steps > (most := _most_shifted_steps(timestep_shift, num_inference_steps)):
        raise ConfigError(
            f"num_inference_steps={num_inference_steps}, timestep_shift={timestep_shift}: some steps would be at one "
            f"timestep; at most {most} steps can be shifted so far"
        )
    if name == "lcm" and num_inference_steps > MAX_LCM_STEPS:
        raise ConfigError(
            f"num_inference_steps={num_inference_steps}: lcm has at most {MAX_LCM_STEPS}; its models need 4 to 8"
        )
