"""Small settings of the families that are trained as they are connected, and what their CLIPs give for a prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import comfy.ldm.chroma.model
import comfy.ldm.chroma_radiance.model
import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import comfy.ldm.lumina.model
import comfy.model_base
import comfy.ops
import comfy.supported_models
import torch

Settings = dict[str, Any]


def _known(of: Any, **settings: Any) -> Settings:
    """Those settings that this ComfyUI's dataclass or constructor has."""
    names = (
        {f.name for f in dataclasses.fields(of)} if dataclasses.is_dataclass(of) else inspect.signature(of).parameters
    )
    return {name: value for name, value in settings.items() if name in names}


def _flux(**changes: Any) -> Settings:
    settings = {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64, "hidden_size": 128,
        "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56],
        "theta": 10000, "qkv_bias": True, "guidance_embed": True, "patch_size": 2,
    }  # fmt: skip
    return {**settings, **_known(comfy.ldm.flux.model.FluxParams, txt_ids_dims=[]), **changes}


def _flux2() -> Settings:
    newer = _known(
        comfy.ldm.flux.model.FluxParams, global_modulation=True, mlp_silu_act=True, ops_bias=False, txt_ids_dims=[3],
        default_ref_method="index", ref_index_scale=10.0,
    )  # fmt: skip
    return _flux(
        in_channels=128, out_channels=128, patch_size=1, axes_dim=[32] * 4, theta=2000, vec_in_dim=None,
        qkv_bias=False, guidance_embed=False, **newer,
    )  # fmt: skip


def _longcat() -> Settings:
    return _flux(vec_in_dim=None, guidance_embed=False, txt_ids_dims=[1, 2])


def _lumina(**changes: Any) -> Settings:
    settings = {
        "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "cap_feat_dim": 64, "qk_norm": True, "axes_dims": [32, 48, 48], "axes_lens": [64, 64, 64],
        "rope_theta": 256.0, "ffn_dim_multiplier": 2.0,
    }  # fmt: skip
    return {**settings, **changes}


def _z_image() -> Settings:
    newer = _known(comfy.ldm.lumina.model.NextDiT.__init__, pad_tokens_multiple=32)
    return _lumina(z_image_modulation=True, time_scale=1000.0, **newer)


def _lumina2() -> Settings:
    return _lumina(n_kv_heads=1, rope_theta=10000.0, ffn_dim_multiplier=4.0)


def _qwen() -> Settings:
    return {
        "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
        "joint_attention_dim": 64, "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip


def _sd3() -> Settings:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}
    return {
        "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 32,
        "context_embedder_config": embedder, "pos_embed_max_size": 32, "qk_norm": "rms",
        "x_block_self_attn_layers": [0],  # as medium has
    }  # fmt: skip


def _chroma(**changes: Any) -> Settings:
    return {
        "in_channels": 64, "out_channels": 64, "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0,
        "num_heads": 1, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000,
        "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 128, "hidden_dim": 64, "n_layers": 2,
        **_known(comfy.ldm.chroma.model.ChromaParams, txt_ids_dims=[], vec_in_dim=None), **changes,
    }  # fmt: skip


def _radiance() -> Settings:
    newer = _known(comfy.ldm.chroma_radiance.model.ChromaRadianceParams, use_x0=False, use_sequential_txt_ids=False)
    return _chroma(
        in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=16, nerf_mlp_ratio=4, nerf_depth=1,
        nerf_max_freqs=4, nerf_tile_size=512, nerf_final_head_type="conv", nerf_embedder_dtype=torch.float32, **newer,
    )  # fmt: skip


def _krea2() -> Settings:
    return {
        "features": 128, "tdim": 64, "txtdim": 32, "heads": 2, "kvheads": 1, "multiplier": 4, "layers": 2,
        "txtlayers": 2, "txtheads": 1, "txtkvheads": 1,
    }  # fmt: skip


def _ideogram() -> Settings:
    return {
        "in_channels": 128, "num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 128,
        "intermediate_size": 256, "adaln_dim": 64, "llm_features_dim": 64, "mrope_section": [24, 20, 20],
    }  # fmt: skip


def _cosmos() -> Settings:
    return {
        "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128, "concat_padding_mask": True,
        "crossattn_emb_channels": 64, "pos_emb_cls": "rope3d", "pos_emb_learnable": True,
        "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 32, "num_blocks": 2, "num_heads": 1,
        "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False,
    }  # fmt: skip


def _ernie() -> Settings:
    return {
        "hidden_size": 128, "num_attention_heads": 1, "num_layers": 2, "ffn_hidden_size": 256, "text_in_dim": 64,
        "rope_axes_dim": (32, 48, 48),
    }  # fmt: skip


def _aura() -> Settings:
    return {
        "dim": 128, "n_layers": 2, "n_double_layers": 1, "n_heads": 1, "global_conddim": 128, "cond_seq_dim": 64,
        "max_seq": 256,
    }  # fmt: skip


def _pixart() -> Settings:
    return {
        "hidden_size": 144, "depth": 1, "num_heads": 2, "caption_channels": 64, "micro_condition": True,
        "pred_sigma": True, "model_max_length": 120,
    }  # fmt: skip


def _hydit() -> Settings:
    return {
        "hidden_size": 176, "depth": 4, "num_heads": 2, "text_states_dim": 64, "text_states_dim_t5": 32, "text_len": 77,
        "text_len_t5": 256, "learn_sigma": True, "size_cond": True, "use_style_cond": True,
    }  # fmt: skip


def _hunyuan_image() -> Settings:
    return {
        "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "context_in_dim": 64, "hidden_size": 128,
        "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1, "axes_dim": [64, 64], "theta": 256,
        "patch_size": [1, 1], "qkv_bias": True, "guidance_embed": False, "byt5": False, "meanflow": False,
        **_known(
            comfy.ldm.hunyuan_video.model.HunyuanVideoParams, use_cond_type_embedding=False, vision_in_dim=None,
            meanflow_sum=False,
        ),
    }  # fmt: skip


def _hidream() -> Settings:
    return {
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 128, "num_attention_heads": 1, "caption_channels": [64, 64], "text_emb_dim": 32,
        "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": [64, 32, 32],
        "max_resolution": [128, 128], "llama_layers": [0, 1],
    }  # fmt: skip


def _omnigen2() -> Settings:
    return {
        "in_channels": 16, "hidden_size": 240, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2,
        "num_kv_heads": 1, "axes_dim_rope": (40, 40, 40), "axes_lens": (64, 64, 64), "text_feat_dim": 64,
        "timestep_scale": 1000.0,
    }  # fmt: skip


def _wan(**changes: Any) -> Settings:
    settings = {"dim": 128, "ffn_dim": 256, "freq_dim": 64, "text_dim": 64, "num_heads": 1, "num_layers": 2}
    return {**settings, **changes}


def _wan22() -> Settings:
    return _wan(in_dim=48, out_dim=48)


def _wan_from_image() -> Settings:
    return _wan(in_dim=36)


def _boogu() -> Settings:
    return {
        "hidden_size": 240, "num_layers": 1, "num_double_stream_layers": 1, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "axes_lens": (64, 64, 64), "instruction_feat_dim": 64,
    }  # fmt: skip


def _joy() -> Settings:
    return {"hidden_size": 128, "num_attention_heads": 1, "text_dim": 64, "num_layers": 2}


def _kandinsky() -> Settings:
    return {
        "in_text_dim": 64, "in_text_dim2": 32, "time_dim": 64, "model_dim": 128, "ff_dim": 256, "visual_embed_dim": 64,
        "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (16, 24, 24),
    }  # fmt: skip


def _mage() -> Settings:
    return {
        "num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 64,
    }  # fmt: skip


def _lens() -> Settings:
    return {
        "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "enc_hidden_dim": 16,
        "selected_layer_index": (0, 1, 2, 3), "out_channels": 32,
    }  # fmt: skip


def numbers(text: str, *shape: int) -> torch.Tensor:
    """Random numbers from a text, [1, ...]."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


Prompt = tuple[torch.Tensor, Settings]


def _words(text: str) -> Prompt:
    """One random row for each word, so that prompts of more words are longer."""
    return torch.cat([numbers(word, 64) for word in [*text.split(), "<end>"]])[None], {"pooled_output": None}


def _pooled(text: str) -> Prompt:
    return _words(text)[0], {"pooled_output": numbers(text, 32)}


def _masked(text: str) -> Prompt:
    states, options = _words(text)
    return states, {**options, "attention_mask": torch.ones(states.shape[:2], dtype=torch.long)}


def _pooled_and_masked(text: str) -> Prompt:
    return _masked(text)[0], {**_masked(text)[1], **_pooled(text)[1]}


def _with_t5_ids(text: str) -> Prompt:
    """Anima: hidden states of one tokenizer and the tokens of another, with weights, neither with a batch axis."""
    states, options = _words(text)
    ids = torch.tensor([1000 + len(word) for word in text.split()] + [1], dtype=torch.int)
    return states, {**options, "t5xxl_ids": ids, "t5xxl_weights": torch.ones(len(ids))}


def _with_llama(text: str) -> Prompt:
    """HiDream: hidden states of every layer of a second encoder, [1, layers, tokens, c]."""
    states, options = _pooled(text)
    return states, {**options, "conditioning_llama3": numbers(text, 2, states.shape[1] + 3, 64)}


def _with_mt5(text: str) -> Prompt:
    """HunyuanDiT: two encoders, each padded to its own length, with masks."""
    states, options = _words(text)
    count = states.shape[1]
    return numbers("hydit " + text, 77, 64), {
        **options,
        "attention_mask": (torch.arange(77) < count).long()[None],
        "conditioning_mt5xl": numbers("mt5 " + text, 256, 32),
        "attention_mask_mt5xl": (torch.arange(256) < count).long()[None],
    }


def _small_adapter(model: Any) -> None:
    """Anima's, between the hidden states of its text encoder and the model, of 100 million weights."""
    sizes = {"source_dim": 64, "target_dim": 64, "model_dim": 64, "num_layers": 1, "num_heads": 1}
    whole = model.diffusion_model
    operations = comfy.ops.pick_operations(whole.dtype, model.manual_cast_dtype)
    whole.llm_adapter = type(whole.llm_adapter)(**sizes, dtype=whole.dtype, operations=operations)
    whole.llm_adapter.requires_grad_(False)


class _NoBackward(torch.autograd.Function):
    """As a kernel that was written for sampling."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def _through(step: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """Lets the picture's latents go through a step behind the last block."""

    def change(model: Any) -> None:
        last = model.diffusion_model.final_layer
        own = type(last)
        last.__class__ = type(
            own.__name__, (own,), {"forward": lambda self, x, *more: own.forward(self, step(x), *more)}
        )

    return change


def _cut_off(model: Any) -> None:
    """The last block gets copies of what the others have made."""
    last = model.diffusion_model.joint_blocks[-1]
    own = type(last)

    def forward(self: Any, context: torch.Tensor, x: torch.Tensor, **more: Any) -> Any:
        return own.forward(self, context.detach(), x.detach(), **more)

    last.__class__ = type(own.__name__, (own,), {"forward": forward})


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family.

    Attributes:
        config: class of ``comfy.supported_models``.
        model: class of ``comfy.model_base``.
        settings: of its constructor, small.
        channels: of its latents.
        factor: image pixels per latent pixel, along a side.
        frames: whether its latents have a dimension for time.
        prompt: what its CLIP gives.
        shrink: makes small what the settings do not.
        named: the config's class, under another name.
        near_zero: how the names end of vectors that are near 0 rather than 1.
    """

    config: str
    model: str
    settings: Callable[[], Settings]
    channels: int = 16
    factor: int = 8
    frames: bool = False
    prompt: Callable[[str], Prompt] = _words
    shrink: Callable[[Any], None] = lambda model: None
    named: str = ""
    near_zero: tuple[str, ...] = ()


ALL_KINDS = {
    "SD 3.5": Kind("SD3", "SD3", _sd3, prompt=_pooled),
    "Flux.1": Kind("Flux", "Flux", _flux, prompt=_pooled),
    "Flux.2": Kind("Flux2", "Flux2", _flux2, channels=128, factor=16),
    "Z-Image": Kind("ZImage", "Lumina2", _z_image),
    "Qwen-Image": Kind("QwenImage", "QwenImage", _qwen, frames=True),
    "Chroma": Kind("Chroma", "Chroma", _chroma),
    "Krea 2": Kind("Krea2", "Krea2", _krea2, frames=True, near_zero=(".scale", ".lin")),
    "Ideogram 4": Kind("Ideogram4", "Ideogram4", _ideogram, channels=128, factor=16),
    "Anima": Kind("Anima", "Anima", _cosmos, frames=True, prompt=_with_t5_ids, shrink=_small_adapter),
    "Ernie-Image": Kind("ErnieImage", "ErnieImage", _ernie, channels=128, factor=16),
    "AuraFlow": Kind("AuraFlow", "AuraFlow", _aura, channels=4),
    "HunyuanImage 2.1": Kind("HunyuanImage21", "HunyuanImage21", _hunyuan_image, channels=64, factor=32),
    "HiDream": Kind("HiDream", "HiDream", _hidream, prompt=_with_llama),
    "OmniGen2": Kind("Omnigen2", "Omnigen2", _omnigen2, prompt=_masked),
    "Cosmos Predict2": Kind("CosmosT2IPredict2", "CosmosPredict2", _cosmos, frames=True),
    "Wan 2.1": Kind("WAN21_T2V", "WAN21", _wan, frames=True),
    "Lumina 2": Kind("Lumina2", "Lumina2", _lumina2, prompt=_masked),
    "PixArt": Kind("PixArtAlpha", "PixArt", _pixart, channels=4, factor=2),
    "HunyuanDiT": Kind("HunyuanDiT", "HunyuanDiT", _hydit, channels=4, prompt=_with_mt5),
    "Chroma Radiance": Kind("ChromaRadiance", "ChromaRadiance", _radiance, channels=3, factor=1),
    "Kandinsky 5": Kind("Kandinsky5Image", "Kandinsky5Image", _kandinsky, prompt=_pooled_and_masked),
    "LongCat-Image": Kind("LongCatImage", "LongCatImage", _longcat),
    "MageFlow": Kind("MageFlow", "MageFlow", _mage, channels=128, factor=16),
    "Lens": Kind("Lens", "Lens", _lens, channels=128, factor=16, prompt=_masked),
    "Wan 2.2 5B": Kind("WAN22_T2V", "WAN22", _wan22, channels=48, factor=16, frames=True),
    "Boogu": Kind("Boogu", "Boogu", _boogu, prompt=_masked),
    "JoyImage": Kind("JoyImage", "JoyImage", _joy, frames=True),
    "Wan 2.1 I2V": Kind("WAN21_I2V", "WAN21", _wan_from_image, frames=True),
    "of tomorrow": Kind("SD3", "SD3", _sd3, prompt=_pooled, named="Tomorrow1"),
    "no backward": Kind("SD3", "SD3", _sd3, prompt=_pooled, named="Tomorrow2", shrink=_through(_NoBackward.apply)),
    "not reached": Kind("SD3", "SD3", _sd3, prompt=_pooled, named="Tomorrow3", shrink=_cut_off),
    "not finite": Kind(
        "SD3", "SD3", _sd3, prompt=_pooled, named="Tomorrow4", shrink=_through(lambda x: x + (x - x.detach()).sqrt())
    ),
}
"""Every family, one that is rejected, and those that no table knows: one that trains, and three that cannot."""

KINDS = {
    name: kind
    for name, kind in ALL_KINDS.items()
    if hasattr(comfy.supported_models, kind.config) and hasattr(comfy.model_base, kind.model)
}
"""Those that this ComfyUI has."""
