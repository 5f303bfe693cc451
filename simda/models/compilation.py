"""Compiling the network: faster steps after a slow first batch of each shape, the same clips within rounding.

How a compiled network computes is torch.compile's business; here lives what of ours is compiled, and that a machine
without a compiler says so before it loads a model.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from simda.errors import ConfigError


def compile_network(unet: nn.Module) -> None:
    """Compile a UNet in place, adapted or not; names, weights and results stay.

    Raises:
        ConfigError: this machine cannot compile.
    """
    check_compiler(next(unet.parameters()).device)
    unet.compile()


def check_compiler(device: torch.device | str) -> None:
    """Compile something small, to see that it can be done for this device.

    Raises:
        ConfigError: it cannot; with the reason.
    """
    probe = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: x.sin() + 1)(probe)
    except (TorchDynamoException, InductorError, RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"compiled=true: torch.compile does not work on this machine for {device}: {reason}; install a C++ "
            "compiler (on a GPU also Triton), or leave the setting out"
        ) from None
