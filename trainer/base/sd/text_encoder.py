"""CLIP text encoders as Stable Diffusion uses them: frozen from a shell, trainable everywhere.

A trained text encoder has to see what ComfyUI's sampler will show it: the same chunks of 77 tokens, the same weights of
``(word:1.2)``, the same layer, the same final norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SubjectBoothError, require
from ..conditioning import Conditioning
from ..finite import check_weight
from .families import TextEncoderShape
from .tokenizer import END, START

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

LENGTH = 77
INNER = "text_model."


@dataclass(frozen=True)
class TokenChunks:
    """A prompt for one text encoder.

    Attributes:
        ids: int64 [chunks, 77], start and end tokens included.
        weights: float32 [chunks, 77]; 1 is plain.
    """

    ids: torch.Tensor
    weights: torch.Tensor


def build_text_encoder(
    weights: Mapping[str, torch.Tensor],
    shape: TextEncoderShape,
    dtype: torch.dtype,
    where: str,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A frozen transformers model on the CPU from weights with transformers' names (``text_model.encoder...``).

    Raises:
        SubjectBoothError: a weight is missing, has another shape or is not a number.
    """
    require("transformers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        hidden_act=shape.activation,
        projection_dim=shape.width,
        vocab_size=49408,
        max_position_embeddings=LENGTH,
        bos_token_id=START,
        eos_token_id=END,
    )
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):  # first weights that nobody uses would take 10 seconds for SDXL's second one
            model = (CLIPTextModelWithProjection if shape.projects else CLIPTextModel)(config)
        model = torch.nn.Module.to(model.to_empty(device="cpu"), dtype)
        for name, buffer in model.named_buffers():
            assert name.endswith("position_ids"), name
            buffer.copy_(torch.arange(LENGTH).expand(buffer.shape))
        for name, parameter in model.named_parameters():
            # Transformers 5.6 dropped "text_model." from CLIPTextModel's names, but checkpoints have it.
            found = weights.get(name, weights.get(INNER + name))
            if found is None or found.shape != parameter.shape:
                problem = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise SubjectBoothError(
                    f"a text encoder whose weight {name!r} is {problem}",
                    f"shape {tuple(parameter.shape)}",
                    "use an unmodified checkpoint of this family",
                    where,
                )
            parameter.copy_(found)
            check_weight(name, parameter, found, "text encoder", where)
        return model.requires_grad_(False).eval()


def transformers_name(name: str) -> str:
    """A weight's name with ``text_model.`` in front, which transformers 5.6 and NovelAI's checkpoints leave out."""
    return name if name.startswith((INNER, "text_projection.")) else INNER + name


def lacks_last_layer(names: Iterable[str], shape: TextEncoderShape) -> bool:
    """Whether the encoder was saved without its last layer, as SD 2.x's often is, whose UNet takes the one before.

    Args:
        names: transformers' names.
    """
    last = f"{INNER}encoder.layers.{shape.layers - 1}."
    # A pooled prompt comes from the last layer, so an encoder that gives one cannot do without.
    return shape.layer == -2 and not shape.projects and not any(name.startswith(last) for name in names)


def with_last_layer(weights: Mapping[str, torch.Tensor], shape: TextEncoderShape) -> dict[str, torch.Tensor]:
    """The weights with a last layer of zeros where it is missing: an exact identity, so that layers count as always."""
    if not lacks_last_layer(weights, shape):
        return dict(weights)
    last, before = (f"{INNER}encoder.layers.{shape.layers - number}." for number in (1, 2))
    zeros = {
        last + name.removeprefix(before): torch.zeros_like(tensor)
        for name, tensor in weights.items()
        if name.startswith(before)
    }
    return {**weights, **zeros}


def refuse_missing_last_layer(clip_layer: int | None, where: str) -> None:
    """For an encoder of which :func:`lacks_last_layer` is true.

    Raises:
        SubjectBoothError: the last layer is asked for.
    """
    if clip_layer == -1:
        raise SubjectBoothError(
            "clip_skip 1 with a text encoder that was saved without the last layer",
            "clip_skip 2",
            "leave clip_skip out, or use a checkpoint that has all layers",
            where,
        )


def lora_layer_name(layer: str) -> str:
    """A layer's name in LoRA files, in which ``text_model.`` always is."""
    return layer if layer.startswith(INNER) else INNER + layer


def used_layers(shape: TextEncoderShape, clip_layer: int | None) -> int:
    """How many of the encoder's layers, from the first, have a part in what :func:`encode` gives.

    Where the states of an earlier layer are taken, those behind it are computed for nothing, unless the pooled prompt
    comes from the last one.
    """
    layer = clip_layer if clip_layer is not None else shape.layer
    return shape.layers if shape.projects or _is_past(layer, shape) else shape.layers + 1 + layer


def _is_past(layer: int, shape: TextEncoderShape) -> bool:
    """Whether the encoder does not have that layer. ComfyUI then takes what comes out of it: the last one, with the
    final norm."""
    return abs(layer) > shape.layers


def encode(
    models: Sequence[Any],
    shapes: Sequence[TextEncoderShape],
    prompts: Sequence[Sequence[TokenChunks]],
    clip_layer: int | None,
) -> list[Conditioning]:
    """Encode prompts; differentiable where the models have trainable weights.

    Args:
        models: one a text encoder of the family, perhaps wrapped by accelerate.
        shapes: like ``models``.
        prompts: for each prompt the chunks for each text encoder.
        clip_layer: ComfyUI's count (-1 last, -2 the one before; past the first one the last); None for the family's
            own.

    Returns:
        One conditioning a prompt, float32, on the models' device; several encoders stand side by side.
    """
    encoded = []
    for chunks in prompts:
        outputs = [
            _encode_one(model, shape, part, clip_layer)
            for model, shape, part in zip(models, shapes, chunks, strict=True)
        ]
        length = min(hidden_states.shape[1] for hidden_states, _ in outputs)
        pooled = [vector for _, vector in outputs if vector is not None]
        encoded.append(
            Conditioning(
                torch.cat([hidden_states[:, :length] for hidden_states, _ in outputs], dim=-1),
                pooled[0] if pooled else None,
            )
        )
    return encoded


def _encode_one(
    model: Any,
    shape: TextEncoderShape,
    chunks: TokenChunks,
    clip_layer: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    device = next(model.parameters()).device
    weighted = bool((chunks.weights != 1.0).any())  # asked on the CPU: the host would wait for a GPU's answer
    ids, weights = chunks.ids.to(device), chunks.weights.to(device)
    if weighted:
        empty = torch.tensor([[START, END] + [shape.padding] * (LENGTH - 2)], device=device)
        ids = torch.cat([ids, empty])
    output = model(input_ids=ids, output_hidden_states=True)
    layer = clip_layer if clip_layer is not None else shape.layer
    is_past = _is_past(layer, shape)
    hidden_states = output.hidden_states[-1 if is_past else layer].float()
    if shape.norms_hidden_layer or is_past:
        # In float32 whatever the weights are: accelerate's wrapper, which would see to it, is not around this layer.
        norm = _final_layer_norm(model)
        hidden_states = torch.nn.functional.layer_norm(
            hidden_states, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
        )
    if weighted:
        # A weight moves a token's states away from what no text at all would have given.
        plain, nothing = hidden_states[:-1], hidden_states[-1:]
        hidden_states = nothing + weights[..., None] * (plain - nothing)
    pooled = output.text_embeds[:1].float() if shape.projects else None
    return hidden_states.reshape(1, -1, hidden_states.shape[-1]), pooled


def _final_layer_norm(model: Any) -> torch.nn.LayerNorm:
    for name, module in model.named_modules():
        if name.endswith("final_layer_norm"):
            assert isinstance(module, torch.nn.LayerNorm)
            return module
    raise AssertionError("every CLIP text model has a final_layer_norm")


def from_open_clip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenCLIP's names (SD 2.x and SDXL's second text encoder in single files) -> transformers' names."""
    renamed: dict[str, torch.Tensor] = {}
    simple = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    inside = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for name, tensor in weights.items():
        if name in simple:
            renamed[INNER + simple[name]] = tensor
        elif name in ("text_projection", "text_projection.weight"):
            # OpenCLIP multiplies by a matrix from the right, a Linear layer by its transpose.
            renamed["text_projection.weight"] = tensor.T if name == "text_projection" else tensor
        elif name.startswith("transformer.resblocks."):
            _, _, number, rest = name.split(".", 3)
            layer = f"{INNER}encoder.layers.{number}"
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{part}_proj.{kind}"] = piece
                continue
            module, kind = rest.rsplit(".", 1)
            renamed[f"{layer}.{inside[module]}.{kind}"] = tensor
    return renamed
