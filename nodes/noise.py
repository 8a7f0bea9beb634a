"""The noise schedule and prediction type of a connected MODEL."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher

from ..trainer.errors import SubjectBoothError
from .weights import dynamic_vram


def noise_schedule(model: ModelPatcher) -> tuple[torch.Tensor, str]:
    """``alphas_cumprod`` (float32 [timesteps]) and prediction type of the model, ModelSamplingDiscrete included.

    Raises:
        SubjectBoothError: the model predicts neither epsilon nor v, or has no discrete noise schedule.
    """
    sampling = _sampling(model)
    kinds = type(sampling).__mro__
    is_discrete = comfy.model_sampling.ModelSamplingDiscrete in type(sampling).__bases__
    known = {comfy.model_sampling.EPS: "epsilon", comfy.model_sampling.V_PREDICTION: "v_prediction"}
    prediction = next((known[kind] for kind in type(sampling).__bases__ if kind in known), None)
    if not is_discrete or prediction is None:
        names = ", ".join(kind.__name__ for kind in kinds[1:3])
        raise SubjectBoothError(
            f"the model samples with {names}",
            "a model that predicts epsilon or v on a discrete noise schedule",
            "connect a Stable Diffusion checkpoint, or set ModelSamplingDiscrete to eps or v_prediction",
            "MODEL",
        )
    sigmas = sigmas_of(model)
    return (1.0 / (1.0 + sigmas.cpu().double() ** 2)).float(), prediction


def sigmas_of(model: ModelPatcher) -> torch.Tensor:
    """The noise levels, float32 [timesteps]; empty if the model has no such table."""
    sigmas = getattr(_sampling(model), "sigmas", None)
    return sigmas if isinstance(sigmas, torch.Tensor) else torch.zeros(0)


def type_name(model: ModelPatcher) -> str:
    """Names of the sampling object's base classes, which identify the prediction type."""
    return ",".join(kind.__name__ for kind in type(_sampling(model)).__bases__)


def restore_schedule(model: ModelPatcher) -> None:
    """Restore the model's own noise schedule before ComfyUI samples with it.

    With dynamic VRAM, ComfyUI saves the tables of a model's sampling object by path and writes them back at the next
    load, when another ModelSamplingDiscrete may have that path (https://github.com/Comfy-Org/ComfyUI/issues/16490).
    Without dynamic VRAM, this does nothing.
    """
    wrong, right = model.get_model_object("model_sampling"), _sampling(model)
    if right is wrong or not isinstance(wrong, comfy.model_sampling.ModelSamplingDiscrete):
        return
    wrong.set_sigmas(right.sigmas)
    for name in ("sigmas", "log_sigmas"):
        if f"model_sampling.{name}" in model.backup_buffers:  # what the next load would write back
            model.backup_buffers[f"model_sampling.{name}"] = getattr(right, name)


def _sampling(model: ModelPatcher) -> Any:
    """The model's sampling object. With dynamic VRAM it is rebuilt, as its tables may belong to another one (see
    :func:`restore_schedule`): from the model's config, or the way ComfyUI's ModelSamplingDiscrete node builds it. An
    object that another pack has put on the model is used as it is."""
    sampling = model.get_model_object("model_sampling")
    if not dynamic_vram():
        return sampling
    config = model.model.model_config
    if "model_sampling" not in model.object_patches:
        rebuilt = comfy.model_base.model_sampling(config, model.model.model_type)
        return rebuilt if type(rebuilt).__bases__ == type(sampling).__bases__ else sampling
    from_the_node = "nodes_model_advanced" in type(sampling).__module__
    if from_the_node and comfy.model_sampling.ModelSamplingDiscrete in type(sampling).__bases__:
        return type(sampling)(config, zsnr=sampling.zsnr)
    return sampling
