"""How the nodes appear in the graph editor: short labels, folded inputs, other words to find a node by.

Nothing here changes what a node does, or what a workflow or an API prompt calls its inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from comfy_api.latest import io

NOTHING: Mapping[str, Mapping[str, Any]] = MappingProxyType({})

LABELS = {
    "network_alpha": "alpha",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "prior_loss_weight": "prior_weight",
    "lr_warmup_steps": "lr_warmup",
    "gradient_checkpointing": "checkpointing",
    "validation_interval": "sample_every",
    "max_grad_norm": "clip_norm",
    "caption_dropout": "no_caption",
    "validation_steps": "sample_steps",
    "validation_guidance_scale": "sample_cfg",
    "checkpoint_seconds": "save_every",
    "train_text_encoder": "train_clip",
    "text_encoder_lr": "clip_lr",
    "text_encoder_share": "clip_share",
    "enable_bucket": "buckets",
    "pictures_per_forward": "micro_batch",
    "timestep_sampling": "times",
    "timestep_shift": "time_shift",
    "prompt_template": "template",
    "strength_model": "strength",
    "strength_clip": "clip_strength",
}
"""Labels of inputs whose names Nodes 2.0 would cut off; it gives a label about 12 letters."""

ALIASES = {
    "LoadSubjectImages": ["photos", "face", "training", "training images", "dreambooth photos", "dataset", "fine-tune"],
    "GenerateClassPriors": ["dreambooth class images", "regularization images", "prior preservation"],
    "DreamBoothLoRATrain": [
        "training",
        "fine-tune",
        "finetune",
        "dreambooth",
        "train lora",
        "trainer",
        "face",
        "photos",
    ],
    "ApplySubjectLoRA": [
        "dreambooth lora",
        "use a trained lora",
        "load lora",
        "trained face",
        "fine-tuned lora",
        "after training",
        "photos of the subject",
    ],
    "DreamBoothOptions": ["advanced training settings", "optimizer"],
    "EvaluateSubjectLoRA": ["test a lora", "compare", "overfitting", "drift"],
    "LoadDemoBase": ["small model", "example model"],
}
"""What people type into the editor's search for a node.

Front end 1.32 compares only names, and only their first 30 letters.
"""


def presented(
    schema: io.Schema, shown: Collection[str] = (), details: Mapping[str, Mapping[str, Any]] = NOTHING
) -> io.Schema:
    """Give a node its search words and its inputs their labels, and fold away all widgets that are not in `shown`.

    Args:
        details: what the panels need to know about an input, by its name.
    """
    aliases = ALIASES[schema.node_id]
    if hasattr(schema, "search_aliases"):  # an unknown field would keep an older ComfyUI from loading the pack
        schema.search_aliases = aliases
    elif schema.inputs:  # js/search.js gives them to a front end that is newer than its ComfyUI
        schema.inputs[0].extra_dict = {**(schema.inputs[0].extra_dict or {}), "search_aliases": aliases}
    for given in schema.inputs or []:
        if given.id in LABELS:
            given.display_name = LABELS[given.id]
        if isinstance(given, io.WidgetInput) and given.id not in shown:
            # As an extra entry of the definition, because an older ComfyUI has no argument for it.
            given.extra_dict = {**(given.extra_dict or {}), "advanced": True}
        if given.id in details:
            given.extra_dict = {**(given.extra_dict or {}), **details[given.id]}
    return schema
