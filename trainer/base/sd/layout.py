"""A UNet's structure, derived once from the names and shapes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .families import Family, family_of
from .layer_order import diffusers_order
from .ldm_unet import diffusers_config, diffusers_names, unet_shape
from .unsupported import refuse_quantised

LORA_PREFIX = "lora_unet"


@dataclass(frozen=True)
class LdmLayout:
    """A UNet in the layout of single-file checkpoints (LDM).

    Attributes:
        family: its family.
        shapes: shapes by weight name, without the prefix ``model.diffusion_model.``.
        names: LDM weight name -> diffusers weight name.
        config: arguments of diffusers' ``UNet2DConditionModel``.
        where: source of the weights, for messages.
    """

    family: Family
    shapes: Mapping[str, torch.Size] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    where: str

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size], where: str, dtypes: Mapping[str, str] | None = None) -> LdmLayout:
        """Derive the layout from names and shapes; no weight is read.

        Args:
            dtypes: stored type of every weight, as named by torch or safetensors.

        Raises:
            SubjectBoothError: no family has such a UNet, it is quantised, or diffusers cannot build it; see
                :func:`trainer.base.sd.families.family_of` and :func:`trainer.base.sd.unsupported.refuse_quantised`.
        """
        refuse_quantised(dtypes or {}, where)
        family = family_of(unet_shape(shapes, where), where)
        return cls(family, shapes, diffusers_names(shapes), diffusers_config(shapes, family, where), where)

    def file_layer(self, layer: str) -> str:
        """The name in the family's LoRA files of a layer of the diffusers UNet."""
        return self._ldm_layers[layer] if self.family.kohya_ldm_names else layer

    def kohya_key(self, ldm_layer: str) -> str:
        """The key in LoRA files of a layer by its name in single files: ``lora_unet_..._to_q``."""
        return f"{LORA_PREFIX}_{self.file_layer(self._diffusers_layers[ldm_layer])}".replace(".", "_")

    def order_of(self, ldm_layer: str) -> tuple[int, ...]:
        """A sort key of a layer by its name in single files: the order of the diffusers UNet."""
        return diffusers_order(self._diffusers_layers[ldm_layer])

    @cached_property
    def _diffusers_layers(self) -> dict[str, str]:
        return {ldm: ours for ours, ldm in self._ldm_layers.items()}

    @cached_property
    def _ldm_layers(self) -> dict[str, str]:
        return {ours.rsplit(".", 1)[0]: ldm.rsplit(".", 1)[0] for ldm, ours in self.names.items()}
