"""DreamBoothOptions: advanced settings, kept apart so that the trainer node stays small."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .graph_terms import graph_messages
from .presentation import presented
from .settings import config_from, setting_input
from .types import CATEGORY, DreamBoothOptionsType

SHOWN = ("lora_targets", "optimizer", "snr_gamma", "masked_loss", "flip", "ema_decay", "train_text_encoder", "keep")
"""Inputs in sight; the others are under the editor's "advanced inputs"."""


class DreamBoothOptions(io.ComfyNode):
    """Advanced settings for DreamBoothLoRATrain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as ComfyUI shows it. Inputs are appended, never inserted."""
        schema = io.Schema(
            node_id="DreamBoothOptions",
            display_name="DreamBooth Options",
            category=CATEGORY,
            description="Advanced settings for DreamBooth LoRA Training. Leave this node out to use the defaults.",
            inputs=[
                setting_input("lora_targets"),
                setting_input("lora_dropout", step=0.05, round=0.001),
                setting_input("use_rslora"),
                setting_input("optimizer"),
                setting_input("weight_decay", step=0.01, round=0.0001),
                setting_input("max_grad_norm", step=0.1, round=0.001),
                setting_input("snr_gamma", step=0.5, round=0.01),
                setting_input("noise_offset", step=0.01, round=0.0001),
                setting_input("masked_loss"),
                setting_input("caption_dropout", step=0.05, round=0.001),
                setting_input("flip"),
                setting_input("ema_decay", step=0.01, round=0.00001),
                setting_input("validation_steps"),
                setting_input("validation_guidance_scale", step=0.5, round=0.01),
                setting_input("checkpoint_seconds", step=10, round=0.1),
                setting_input("train_text_encoder"),
                setting_input("text_encoder_lr", step=1e-6, round=1e-8),
                setting_input("text_encoder_share", step=0.05, round=0.001),
                setting_input("attention"),
                setting_input("enable_bucket"),
                setting_input("pictures_per_forward"),
                setting_input("keep", optional=True),
                setting_input("compile", optional=True),
                setting_input("timestep_sampling", optional=True),
                setting_input("timestep_shift", step=0.1, round=0.001, optional=True),
            ],
            outputs=[DreamBoothOptionsType.Output(display_name="options", tooltip="For DreamBooth LoRA Training.")],
        )
        return presented(schema, SHOWN)

    @classmethod
    @graph_messages()
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Check the settings, so that a wrong one is reported before class images are made, and pass them on."""
        config_from(values, resolution=512)
        return io.NodeOutput(values)
