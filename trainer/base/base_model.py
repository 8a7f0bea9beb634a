"""The frozen base that an adapter is trained on: UNet, noise schedule, prompt encoder and latent codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SubjectBoothError, require
from .conditioning import Conditioning, LatentCodec, PromptEncoder
from .finite import check_weight
from .sd.families import Family, family_of, native_resolution
from .sd.ldm_unet import diffusers_config, diffusers_names, ldm_layer_names, unet_shape
from .sd.text_encoder import TokenChunks
from .sd.unsupported import refuse_quantised

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass
class BaseModel:
    """A base model in pieces that diffusers understands.

    Attributes:
        family: which family it is of.
        noise_scheduler: the model's own noise schedule and prediction type.
        prompts: encodes prompts with the model's own text encoder(s).
        codec: encodes and decodes pictures with the model's own VAE.
        digest: SHA-256 over all of the above, part of a run's key.
        build_unet: makes the UNet, frozen, on the CPU, in the dtype it is given. Called once, when training starts:
            before that the memory is the host's.
        layer_names: diffusers name -> name in LoRA files, for families whose files do not use diffusers' names.
        clip_layer: which layer of the text encoders, by ComfyUI's count (-1 is the last); None for the family's own.
        tokenize: a prompt's chunks for each text encoder, as the sampler would see them.
        build_text_encoders: makes the text encoders, frozen, on the CPU. For training them only.
        prompt_of: a caption as a prompt of the encoder's own syntax that means the caption's text, letter by letter.
        outline_unet: makes the UNet without its weights (on the meta device), to see its layers early and cheaply.
        sampling_digest: like ``digest``, over what class images are drawn by; empty where that is the same.
    """

    family: Family
    noise_scheduler: DDPMScheduler
    prompts: PromptEncoder
    codec: LatentCodec
    digest: str
    build_unet: Callable[[torch.dtype], UNet2DConditionModel]
    layer_names: Mapping[str, str] | None = None
    clip_layer: int | None = None
    tokenize: Callable[[str], tuple[TokenChunks, ...]] | None = None
    build_text_encoders: Callable[[torch.dtype], list[Any]] | None = None
    prompt_of: Callable[[str], str] = str
    outline_unet: Callable[[], UNet2DConditionModel] | None = None
    sampling_digest: str = ""

    @property
    def native_resolution(self) -> int:
        """Pixels a side that the base was trained at, as far as its family says."""
        return native_resolution(self.family, str(self.noise_scheduler.config["prediction_type"]))


def make_noise_scheduler(alphas_cumprod: torch.Tensor, prediction_type: str) -> DDPMScheduler:
    """A diffusers scheduler with exactly this schedule.

    Args:
        alphas_cumprod: float32 [timesteps], the cumulative product of 1 - beta, as in DDPM (arXiv 2006.11239).
        prediction_type: ``epsilon`` or ``v_prediction``.

    Raises:
        SubjectBoothError: another prediction type (flow matching, EDM, x0).
    """
    require("diffusers")
    from diffusers import DDPMScheduler

    if prediction_type not in PREDICTION_TYPES:
        raise SubjectBoothError(
            f"a model that predicts {prediction_type!r}",
            "epsilon or v_prediction",
            "wire a Stable Diffusion checkpoint, or set ModelSamplingDiscrete to eps or v_prediction",
            "MODEL",
        )
    scheduler = DDPMScheduler(
        num_train_timesteps=len(alphas_cumprod), prediction_type=prediction_type, clip_sample=False
    )
    alphas = alphas_cumprod.detach().to("cpu", torch.float32).clone()
    # The product is the truth here (a zero-terminal-SNR schedule is defined on it); betas and alphas follow from it.
    scheduler.alphas_cumprod = alphas
    previous = torch.cat([torch.ones(1, dtype=torch.float32), alphas[:-1]])
    scheduler.alphas = alphas / previous
    scheduler.betas = 1.0 - scheduler.alphas
    return scheduler


def outline_unet(shapes: Mapping[str, torch.Size], family: Family, where: str) -> UNet2DConditionModel:
    """The diffusers UNet of these shapes on the meta device, without weights. See :func:`build_unet`."""
    require("diffusers")
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**diffusers_config(shapes, family, where))


def build_unet(
    shapes: Mapping[str, torch.Size],
    weights: Callable[[], Mapping[str, torch.Tensor]],
    family: Family,
    dtype: torch.dtype,
    where: str,
) -> UNet2DConditionModel:
    """A frozen diffusers UNet from weights in the LDM layout.

    Args:
        shapes: name -> shape of every weight, without the ``model.diffusion_model.`` in front.
        weights: gives the weights when called; they are copied, never kept.
        family: as :func:`trainer.base.sd.families.family_of` found it.
        dtype: what the weights are kept in.
        where: what the weights came from, for messages.

    Returns:
        The UNet on the CPU, in eval mode, with ``requires_grad`` off everywhere.

    Raises:
        SubjectBoothError: weights are missing or left over, have other shapes than the layout says, or are not numbers.
    """
    # Inside ComfyUI everything runs in inference mode, and tensors made there can never take part in training.
    with torch.inference_mode(False), torch.no_grad():
        unet = outline_unet(shapes, family, where)
        names = diffusers_names(shapes)
        expected = unet.state_dict()
        missing = sorted(set(expected) - set(names.values()))
        left_over = sorted(set(names.values()) - set(expected))
        if missing or left_over:
            raise SubjectBoothError(
                f"a UNet with {len(missing)} weights missing and {len(left_over)} unknown "
                f"(such as {(missing or left_over)[0]!r})",
                f"the layout of {family.name}",
                "wire an unmodified checkpoint",
                where,
            )
        # torch's own .to(): diffusers' warns about casting although nothing is to stay in fp32 here.
        torch.nn.Module.to(unet.to_empty(device="cpu"), dtype)
        parameters = dict(unet.named_parameters()) | dict(unet.named_buffers())
        for name, weight in weights().items():
            target = parameters[names[name]]
            if target.shape != weight.shape:
                raise SubjectBoothError(
                    f"the weight {name!r} of shape {tuple(weight.shape)}",
                    f"shape {tuple(target.shape)}",
                    "wire an unmodified checkpoint",
                    where,
                )
            target.copy_(weight)
            check_weight(name, target, weight, "UNet", where)
        return unet.requires_grad_(False).eval()


def inspect_unet(
    shapes: Mapping[str, torch.Size],
    where: str,
    dtypes: Mapping[str, str] | None = None,
) -> Family:
    """The family of a UNet in the LDM layout, found before any weight is read.

    Args:
        shapes: of every weight by name.
        where: what the weights came from, for messages.
        dtypes: what every weight is stored as, by torch's or safetensors' names.

    Raises:
        SubjectBoothError: it is of no family, quantised, or of a layout that cannot be built; see
            :func:`trainer.base.sd.families.family_of` and :func:`trainer.base.sd.unsupported.refuse_quantised`.
    """
    refuse_quantised(dtypes or {}, where)
    family = family_of(unet_shape(shapes, where), where)
    diffusers_names(shapes)
    return family


def lora_layer_names(shapes: Mapping[str, torch.Size], family: Family) -> dict[str, str] | None:
    """:attr:`BaseModel.layer_names` for a UNet in the LDM layout."""
    return ldm_layer_names(shapes) if family.kohya_ldm_names else None


def predict(
    unet: Any,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """The UNet's raw output (epsilon or v), float32 [b, 4, h/8, w/8].

    Args:
        unet: a ``UNet2DConditionModel``, perhaps wrapped by accelerate.
        noisy_latents: [b, 4, h/8, w/8], in the training space.
        timesteps: int64 [b].
        conditioning: batch of b prompts; with ``pooled`` for families that take it (SDXL), whose size and crop ids are
            then those that the sampler uses: the picture's own size, uncropped.
    """
    dtype = next(unet.parameters()).dtype
    added = None
    if conditioning.pooled is not None:
        height, width = (8 * side for side in noisy_latents.shape[2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=noisy_latents.device)
        added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": ids.repeat(len(noisy_latents), 1)}
    output = unet(
        noisy_latents.to(dtype),
        timesteps,
        encoder_hidden_states=conditioning.hidden_states.to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output.float()
