"""Patches on a MODEL or CLIP that are not weights: those that prevent training, and those that are ignored."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..trainer.errors import SubjectBoothError

UNET_PREFIX = "diffusion_model."
ATTENTION_OVERRIDE = "optimized_attention_override"


def refuse_unlearnable_patches(patcher: ModelPatcher, where: str) -> None:
    """Reject patches that training cannot see: it would silently train on another base than the sampler uses.

    Raises:
        SubjectBoothError: the model has patches that change its forward pass but not its weights (IP-Adapter, FreeU,
            hooks, attention replacements, a LoRA in bypass mode, functions on its weights).
    """
    injections = {name for name, those in patcher.injections.items() if those}
    if "bypass_lora" in injections:
        raise SubjectBoothError(
            f"the {where} has a LoRA in bypass mode, which is added to the forward pass and not to the weights",
            "a LoRA that is merged into the weights",
            "load it with the ordinary LoRA loader, or turn bypass off",
            where,
        )
    if patcher.weight_wrapper_patches:
        raise SubjectBoothError(
            f"the {where} has functions on its weights ({next(iter(patcher.weight_wrapper_patches))} and others), such "
            "as a LoRA that another node is training",
            f"a {where} with no patches other than LoRAs",
            f"connect the {where} from before that node to the trainer",
            where,
        )
    options = patcher.model_options
    inside = options.get("transformer_options", {})
    found = [name for name in ("patches", "patches_replace") if inside.get(name)]
    found += ["model_function_wrapper"] if options.get("model_function_wrapper") else []
    found += [f"object patch {name}" for name in patcher.object_patches if name.startswith(UNET_PREFIX)]
    found += ["injections"] if injections else []
    found += ["hooks"] if patcher.hook_patches or patcher.forced_hooks is not None else []
    found += ["wrappers"] if any(calls for kinds in patcher.wrappers.values() for calls in kinds.values()) else []
    if found:
        raise SubjectBoothError(
            f"the {where} has patches that are not weights ({', '.join(found)}), such as IP-Adapter, FreeU or hooks",
            f"a {where} with no patches other than LoRAs",
            f"connect the {where} from before that node to the trainer, and apply the node after Apply Subject LoRA",
            where,
        )


def ignored_patches(model: ModelPatcher) -> list[str]:
    """Notes on patches of MODEL that training ignores, as they change no weight, and results only by rounding."""
    notes = []
    if model.model_options.get("transformer_options", {}).get(ATTENTION_OVERRIDE) is not None:
        notes.append("The attention override on MODEL (optimized_attention_override) is not used for training.")
    if model.additional_models.get("multigpu"):
        notes.append("MODEL is spread over several GPUs. Training uses one.")
    return notes
