"""The model card of an adapter: what people read beside `adapter.safetensors`, and what model hubs index.

Text only; how a card gets to a hub is `adapter_hub.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from simda.models.adapter_state import AdapterHeader
from simda.models.video_unet import AdapterConfig

CARD_FILE = "README.md"
SHOWN_SETTINGS = (
    "num_steps", "batch_size", "num_frames", "seed", "precision", "caption_dropout", "timestep_shift",
    "noise_correlation", "noise_offset", "min_snr_gamma", "optimizer",
)  # fmt: skip


def model_card(
    header: AdapterHeader, num_parameters: int, figures: Mapping[str, Any], licence: str | None = None
) -> str:
    """The card of a trained adapter, Markdown behind YAML as model hubs read it.

    Args:
        header: of the adapter file; its provenance is what `train` wrote there.
        num_parameters: trained ones.
        figures: by name, what was measured in training.
        licence: SPDX identifier; None leaves it to be filled in, since it depends on the base model and the data.
    """
    config = header.provenance.get("config", {})
    data, base_model = header.provenance.get("data", {}), str(config.get("base_model", "unknown"))
    meta: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["simda", "text-to-video", "adapter"],
        "license": licence or "other",
    }
    # A path of the machine that it was trained on tells a hub nothing.
    if not Path(base_model).is_absolute():
        meta["base_model"] = base_model
    settings = {name: config[name] for name in SHOWN_SETTINGS if name in config}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(meta, sort_keys=False).strip(),
            "---",
            "",
            f"# SimDA adapter for {Path(base_model).name}",
            "",
            f"Adapters of {num_parameters:,} parameters that make the frozen text-to-image model `{base_model}` a "
            "text-to-video model ([SimDA](https://arxiv.org/abs/2308.09710)).",
            "",
            "```python",
            "from simda.generation.text_to_video import TextToVideoPipeline",
            "",
            f'pipeline = TextToVideoPipeline.from_pretrained("{base_model}", adapter="DIRECTORY OR HUB NAME OF THIS")',
            "```",
            "",
            *_table("What it is", {"base model's identity": header.base, **_adapter_words(header.config)}),
            *_table("Data", data),
            *_table("Training", settings),
            *_table("Measured in training", figures),
            "## Licence",
            "",
            licence or "Not stated. It depends on those of the base model and of the training videos: fill it in.",
            "",
        ]
    )


def _adapter_words(config: AdapterConfig) -> dict[str, Any]:
    """How the adapters are built, and where that is not the paper's."""
    paper = AdapterConfig.of_the_paper()
    return {
        field.name: f"{getattr(config, field.name)}"
        + ("" if getattr(config, field.name) == getattr(paper, field.name) else " (not the paper's)")
        for field in fields(config)
    }


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    """A heading and a table of names and values; nothing where there are none."""
    if not rows:
        return []
    cells = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items() if value is not None]
    return [f"## {title}", "", "| | |", "|---|---|", *cells, ""]
