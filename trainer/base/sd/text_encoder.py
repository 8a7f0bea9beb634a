"""Stable Diffusion's CLIP text encoders: trainable ones, and frozen ones for runs from a shell.

Training must match ComfyUI's sampling: the same chunks of 77 tokens, the same weights for ``(word:1.2)``, the same
layer and the same final norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SubjectBoothError, require
from ..conditioning import Conditioning, EncodedText
from ..finite import check_weight
from .families import TextEncoderShape
from .tokenizer import END, START

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

LENGTH = 77
INNER = "text_model."


@dataclass(frozen=True)
class TokenChunks:
    """A tokenized prompt for one text encoder.

    Attributes:
        ids: int64 [chunks, 77], start and end tokens included.
        weights: float32 [chunks, 77]; 1 by default.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    _there: dict[torch.device, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``ids`` and ``weights`` on a device, copied there once; no weights if all are 1."""
        if device not in self._there:
            # Checked on the CPU, to avoid a synchronisation with the GPU.
            weights = self.weights.to(device) if bool((self.weights != 1.0).any()) else None
            self._there[device] = self.ids.to(device), weights
        return self._there[device]


def build_text_encoder(
    weights: Mapping[str, torch.Tensor],
    shape: TextEncoderShape,
    dtype: torch.dtype,
    where: str,
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A frozen transformers model on the CPU. The weights have transformers' names (``text_model.encoder...``).

    Raises:
        SubjectBoothError: a weight is missing, has a wrong shape or is not finite.
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
        with torch.device("meta"):  # unused initial weights would take 10 seconds for SDXL's second encoder
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
                    f"the text encoder's weight {name!r} is {problem}",
                    f"shape {tuple(parameter.shape)}",
                    "use an unmodified checkpoint of this family",
                    where,
                )
            parameter.copy_(found)
            check_weight(name, parameter, found, "text encoder", where)
        return model.requires_grad_(False).eval()


def transformers_name(name: str) -> str:
    """Add the prefix ``text_model.``, which transformers 5.6 and NovelAI's checkpoints leave out."""
    return name if name.startswith((INNER, "text_projection.")) else INNER + name


def lacks_last_layer(names: Iterable[str], shape: TextEncoderShape) -> bool:
    """Whether the last layer is missing, as often in SD 2.x, whose UNet takes the one before.

    Args:
        names: transformers' names.
    """
    last = f"{INNER}encoder.layers.{shape.layers - 1}."
    # An encoder with a pooled prompt needs its last layer.
    return shape.layer == -2 and not shape.projects and not any(name.startswith(last) for name in names)


def with_last_layer(weights: Mapping[str, torch.Tensor], shape: TextEncoderShape) -> dict[str, torch.Tensor]:
    """Add a missing last layer as zeros, which is the identity, so that layers are counted as usual."""
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
    """Check the requested layer of an encoder for which :func:`lacks_last_layer` is true.

    Raises:
        SubjectBoothError: the last layer is requested.
    """
    if clip_layer == -1:
        raise SubjectBoothError(
            "clip_skip is 1, but the text encoder was saved without its last layer",
            "clip_skip 2",
            "leave clip_skip out, or use a checkpoint with all layers",
            where,
        )


def lora_layer_name(layer: str) -> str:
    """A layer's name in LoRA files, always with ``text_model.``."""
    return layer if layer.startswith(INNER) else INNER + layer


def used_layers(shape: TextEncoderShape, clip_layer: int | None) -> int:
    """The number of layers, from the first, that affect the result of :func:`encode`.

    Layers after the one whose hidden states are taken have no effect, unless the pooled prompt comes from the last one.
    """
    layer = clip_layer if clip_layer is not None else shape.layer
    return shape.layers if shape.projects or _is_past(layer, shape) else shape.layers + 1 + layer


def _is_past(layer: int, shape: TextEncoderShape) -> bool:
    """Whether the layer number exceeds the encoder's depth. ComfyUI then takes the last layer with the final norm."""
    return abs(layer) > shape.layers


def encode(
    models: Sequence[Any],
    shapes: Sequence[TextEncoderShape],
    prompts: Sequence[Sequence[TokenChunks]],
    clip_layer: int | None,
) -> list[Conditioning]:
    """Encode prompts; differentiable in trainable weights.

    Args:
        models: one per text encoder of the family, possibly wrapped by accelerate.
        shapes: like ``models``.
        prompts: for each prompt, the chunks for each text encoder.
        clip_layer: in ComfyUI's counting (-1 is the last, -2 the one before; beyond the first layer, the last); None
            for the family's default.

    Returns:
        one conditioning per prompt, float32, on the models' device; several encoders are concatenated.
    """
    encoded: list[Conditioning] = []
    for chunks in prompts:
        outputs = [
            _encode_one(model, shape, part, clip_layer)
            for model, shape, part in zip(models, shapes, chunks, strict=True)
        ]
        length = min(hidden_states.shape[1] for hidden_states, _ in outputs)
        pooled = [vector for _, vector in outputs if vector is not None]
        encoded.append(
            EncodedText(
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
    ids, weights = chunks.on(device)
    if weights is not None:
        empty = torch.tensor([[START, END] + [shape.padding] * (LENGTH - 2)], device=device)
        ids = torch.cat([ids, empty])
    output = model(input_ids=ids, output_hidden_states=True)
    layer = clip_layer if clip_layer is not None else shape.layer
    is_past = _is_past(layer, shape)
    hidden_states = output.hidden_states[-1 if is_past else layer].float()
    if shape.norms_hidden_layer or is_past:
        norm = _final_layer_norm(model)
        hidden_states = torch.nn.functional.layer_norm(
            hidden_states, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
        )
    if weights is not None:
        # A weight scales a token's difference from the empty prompt.
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
    """From OpenCLIP's names (in single files of SD 2.x and SDXL) to transformers'."""
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
            # OpenCLIP multiplies by the matrix, a Linear layer by its transpose.
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
