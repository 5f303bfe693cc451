"""An adapter for the tests' base model."""

from __future__ import annotations

import pytest

from simda.models.adapter_state import save_adapter
from simda.models.base_models import unet_identity
from simda.models.video_unet import AdapterConfig, adapter_parameters, inject_adapters


@pytest.fixture(scope="module")
def adapter(make_unet, randomise_adapters, base_model, tmp_path_factory) -> str:
    """Fits the base model of the tests, whose UNet is `make_unet()`."""
    unet = randomise_adapters(inject_adapters(make_unet()))
    directory = str(tmp_path_factory.mktemp("adapter"))
    save_adapter(adapter_parameters(unet), AdapterConfig(), unet_identity(base_model), {}, directory)
    return directory
