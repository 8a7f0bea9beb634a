"""The values that a run's ``auto`` settings resolved to on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ResolvedSettings:
    """What a run uses. A resumed run keeps its first values, except for device, attention kernels and compiling.

    Attributes:
        optimizer: one of those in :class:`trainer.config.TrainConfig`.
        device: in torch's notation.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        gradient_checkpointing: whether it is on.
        micro_batch: images per forward pass; the setting is called ``pictures_per_forward``.
        attention: ``sdpa`` or ``xformers``.
        compile: whether blocks are compiled.
    """

    optimizer: str
    device: str = ""
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    micro_batch: int = 1
    attention: str = "sdpa"
    compile: bool = False

    def as_settings(self) -> dict[str, str]:
        """The names and values of the settings, for logs, display and checkpoints."""
        return {
            "optimizer": self.optimizer,
            "device": self.device,
            "precision": self.precision,
            "gradient_checkpointing": "on" if self.gradient_checkpointing else "off",
            "pictures_per_forward": str(self.micro_batch),
            "attention": self.attention,
            "compile": "on" if self.compile else "off",
        }

    @classmethod
    def from_settings(cls, values: Mapping[str, str]) -> ResolvedSettings:
        """The inverse of :meth:`as_settings`; what is missing gets its default."""
        values = {**cls("adamw").as_settings(), **values}
        return cls(
            values["optimizer"],
            values["device"],
            values["precision"],
            values["gradient_checkpointing"] == "on",
            int(values["pictures_per_forward"]),
            values["attention"],
            values["compile"] == "on",
        )
