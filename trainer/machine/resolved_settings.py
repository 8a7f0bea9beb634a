"""What every ``auto`` of a run became on the machine that it found itself on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ResolvedSettings:
    """What a run uses. A resumed run keeps its first choice, but for the device and the kernels of attention.

    Attributes:
        optimizer: one of those of :class:`trainer.config.TrainConfig`.
        device: as torch writes it.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        gradient_checkpointing: whether it is on.
        micro_batch: pictures in a forward pass; the setting is called ``pictures_per_forward``.
        attention: ``sdpa`` or ``xformers``.
    """

    optimizer: str
    device: str = ""
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    micro_batch: int = 1
    attention: str = "sdpa"

    def as_settings(self) -> dict[str, str]:
        """By the names and in the words of the settings: what is logged, shown and kept in a checkpoint."""
        return {
            "optimizer": self.optimizer,
            "device": self.device,
            "precision": self.precision,
            "gradient_checkpointing": "on" if self.gradient_checkpointing else "off",
            "pictures_per_forward": str(self.micro_batch),
            "attention": self.attention,
        }

    @classmethod
    def from_settings(cls, values: Mapping[str, str]) -> ResolvedSettings:
        """What :meth:`as_settings` gave."""
        return cls(
            values["optimizer"],
            values["device"],
            values["precision"],
            values["gradient_checkpointing"] == "on",
            int(values["pictures_per_forward"]),
            values["attention"],
        )
