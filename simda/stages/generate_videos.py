"""Stage: rows of a prompt table become video files and rows of the generated table."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from simda.data.prompts import PromptRow
from simda.data.store import OutputStore
from simda.data.video_io import write_video
from simda.generation.text_to_video import TextToVideoPipeline
from simda.stages.failures import attempt_row

STAGE = "generate_videos"


class GenerateVideos:
    """Generate the videos of a group of rows that share shape, steps and guidance, and write them.

    A group that fails is tried again row by row, so that one bad row costs only itself.

    Reads: prompts (list of prompt rows with all settings resolved), attempt.
    Writes: per row of the group, prompt_id and either a row of the generated table or one of the failures table.
    """

    def __init__(
        self,
        base_model: str,
        adapter: str | None,
        output: str,
        device: str,
        dtype: str,
        threads: int,
        provenance: dict[str, str],
    ) -> None:
        torch.set_num_threads(threads)
        self.pipeline = TextToVideoPipeline.from_pretrained(base_model, torch_dtype=getattr(torch, dtype)).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        if adapter:
            self.pipeline.load_adapter(adapter)
        self.store = OutputStore(output)
        self.provenance = provenance
