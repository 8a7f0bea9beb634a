"""What is wired on a MODEL or CLIP besides its weights: what stands in the way of training, and what does not count."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..trainer.errors import SubjectBoothError

UNET_PREFIX = "diffusion_model."
ATTENTION_OVERRIDE = "optimized_attention_override"


def refuse_unlearnable_patches(patcher: ModelPatcher, where: str) -> None:
    """Training on a base that is not what the sampler will use would silently train the wrong thing.

    Raises:
        SubjectBoothError: the model carries something that changes its forward pass but is no weight (IP-Adapter,
            FreeU, hooks, attention replacements, a LoRA in bypass mode, functions on its weights).
    """
    injections = {name for name, those in patcher.injections.items() if those}
    if "bypass_lora" in injections:
        raise SubjectBoothError(
            f"a {where} with a LoRA in bypass mode, which is added to the forward pass and not to the weights",
            "a LoRA that is merged into the weights",
            "load it with the ordinary LoRA loader, or turn its bypass off",
            where,
        )
    if patcher.weight_wrapper_patches:
        raise SubjectBoothError(
            f"a {where} with functions on its weights ({next(iter(patcher.weight_wrapper_patches))} and others), as a "
            "LoRA that is being trained by another node has",
            f"a {where} that only LoRAs have changed",
            f"wire the {where} from before that node to the trainer",
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
            f"a {where} with patches that are not weights ({', '.join(found)}), as IP-Adapter, FreeU or hooks add",
            f"a {where} that only LoRAs have changed",
            f"wire the {where} from before that node to the trainer, and apply the node after ApplySubjectLoRA",
            where,
        )


def ignored_on(model: ModelPatcher) -> list[str]:
    """Sentences about what is wired on MODEL and not used for training, as it changes no weight and no result by more
    than rounding."""
    notes = []
    if model.model_options.get("transformer_options", {}).get(ATTENTION_OVERRIDE) is not None:
        notes.append(
            "MODEL has an attention function of its own (optimized_attention_override). It is not used for training."
        )
    if model.additional_models.get("multigpu"):
        notes.append("MODEL is spread over several GPUs. Training uses one.")
    return notes
