"""Which diffusers scheduler samples, by a short name, with the noise schedule of the base model.

A scheduler takes over everything that says what the base was trained on: betas, kind of prediction, zero terminal SNR,
spacing of the timesteps. The mathematics are diffusers' own.
"""

from __future__ import annotations

from typing import Any, get_args

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from simda.config import SchedulerName
from simda.errors import ConfigError

SCHEDULERS: dict[SchedulerName, type] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "lcm": LCMScheduler,
}
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


def check_scheduler(name: str, num_inference_steps: int = 1, eta: float = 0.0) -> None:
    """Refuse what a scheduler cannot do.

    Raises:
        ConfigError: an unknown name, more steps than it has, or an eta that it does not know.
    """
    if name not in SCHEDULERS:
        raise ConfigError(f"scheduler={name!r}; known are {', '.join(get_args(SchedulerName))}")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta={eta}; it goes from 0 (no noise at each step) to 1 (as DDPM)")
    if eta and name != "ddim":
        raise ConfigError(f"eta={eta}: {SCHEDULERS[name].__name__} does not know it; use scheduler=ddim or eta=0")
    if name == "lcm" and num_inference_steps > MAX_LCM_STEPS:
        raise ConfigError(
            f"num_inference_steps={num_inference_steps}: lcm has at most {MAX_LCM_STEPS}; its models need 4 to 8"
        )
