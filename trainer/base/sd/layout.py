"""What the names and shapes of a UNet's weights say about it, found once and passed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .families import Family, family_of
from .ldm_unet import diffusers_config, diffusers_names, unet_shape
from .unsupported import refuse_quantised


@dataclass(frozen=True)
class LdmLayout:
    """A UNet in the layout of single-file checkpoints (LDM).

    Attributes:
        family: which it is of.
        shapes: of every weight by name, without the ``model.diffusion_model.`` in front.
        names: LDM weight name -> diffusers weight name.
        config: arguments of diffusers' ``UNet2DConditionModel``.
        where: what the weights came from, for messages.
    """

    family: Family
    shapes: Mapping[str, torch.Size] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    where: str

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size], where: str, dtypes: Mapping[str, str] | None = None) -> LdmLayout:
        """The layout of these weights; none of them is read.

        Args:
            dtypes: what every weight is stored as, by torch's or safetensors' names.

        Raises:
            SubjectBoothError: they are of no family, quantised, or of a layout that diffusers cannot build; see
                :func:`trainer.base.sd.families.family_of` and :func:`trainer.base.sd.unsupported.refuse_quantised`.
        """
        refuse_quantised(dtypes or {}, where)
        family = family_of(unet_shape(shapes, where), where)
        return cls(family, shapes, diffusers_names(shapes), diffusers_config(shapes, family, where), where)

    def file_layer(self, layer: str) -> str:
        """What LoRA files of the family call a layer of the diffusers UNet."""
        return self._ldm_layers[layer] if self.family.kohya_ldm_names else layer

    @cached_property
    def _ldm_layers(self) -> dict[str, str]:
        return {ours.rsplit(".", 1)[0]: ldm.rsplit(".", 1)[0] for ldm, ours in self.names.items()}
