"""A training run's state on disk: one file that holds everything a run needs to go on exactly as if never stopped.

The state is `AdapterTrainer.state_dict`'s; where checkpoints are kept and which is the latest is Ray Train's business
(`worker.py`), and the adapter that a checkpoint carries for use is written by `models/adapter_state.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from simda.errors import InputError

STATE_FILE = "trainer_state.pt"
FORMAT_VERSION = 2


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write `state` into `folder`; the file appears whole or not at all."""
    partial = folder / f".{STATE_FILE}.partial"
    torch.save({"format_version": FORMAT_VERSION, **state}, partial)
    os.replace(partial, folder / STATE_FILE)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU; tensors, numbers and text only, so no code can run.

    Raises:
        InputError: the file is missing, damaged, or of another format version.
    """
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint: {error}; delete its directory to start over") from None
    version = state.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, this version reads {FORMAT_VERSION}; train to a new output"
        )
    return state
