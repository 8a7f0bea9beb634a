"""The order of a UNet's layers without building one, beside diffusers' own."""

from __future__ import annotations

import pytest
import torch

from subjectbooth.scripts import full_size
from subjectbooth.trainer.base.sd.layer_order import diffusers_order


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_layers_are_in_the_order_of_diffusers(family: str) -> None:
    with torch.device("meta"):
        unet = full_size.unet(family)
    names = [name for name, layer in unet.named_modules() if hasattr(layer, "weight")]
    assert len(names) > 300
    assert sorted(reversed(names), key=diffusers_order) == names
