"""Checkpoints that cannot be trained on are refused from their headers, by name; what a file says of itself counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subjectbooth.tests import layout_pair
from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.base.sd.layout import LdmLayout
from subjectbooth.trainer.base.sd.ldm_unet import diffusers_names
from subjectbooth.trainer.base.sd.schedule import prediction_target
from subjectbooth.trainer.base.sd.unsupported import refuse_quantised
from subjectbooth.trainer.base.stored.stored_base import load_base
from subjectbooth.trainer.errors import SubjectBoothError

StateDict = dict[str, torch.Tensor]
UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"


@pytest.fixture(autouse=True)
def _narrow_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StateDict]:
    return {
        name: safetensors.torch.load_file(write_pair(tmp_path_factory.mktemp("pair"), name)[0])
        for name in ("SD 1.x", "SDXL")
    }


def _inputs(channels: int) -> Callable[[StateDict], StateDict]:
    return lambda state: {**state, FIRST: torch.zeros(32, channels, 3, 3)}


def _as(dtype: torch.dtype) -> Callable[[StateDict], StateDict]:
    return lambda state: {name: tensor.to(dtype) if name.startswith(UNET) else tensor for name, tensor in state.items()}


def _without(prefix: str) -> Callable[[StateDict], StateDict]:
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def _only(**tensors: torch.Tensor) -> Callable[[StateDict], StateDict]:
    return lambda _: {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def _with(**tensors: torch.Tensor) -> Callable[[StateDict], StateDict]:
    return lambda state: {**state, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


def _other_vae(state: StateDict) -> StateDict:
    picture = layout_pair.vae(2, latents=16)
    return _without("first_stage_model.")(state) | {
        f"first_stage_model.{name}": tensor for name, tensor in picture.items()
    }


def _bare(state: StateDict) -> StateDict:
    return {name.removeprefix(UNET): tensor for name, tensor in state.items() if name.startswith(UNET)}


def _bare_of_diffusers(state: StateDict) -> StateDict:
    return {
        diffusers_names({name: tensor.shape for name, tensor in _bare(state).items()})[name]: tensor
        for name, tensor in _bare(state).items()
    }


def _save(state: StateDict, path: Path) -> None:
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)


ONE = torch.zeros(1)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_inputs(9), "9 input channels: it is an inpainting model. Required: a text-to-image model, which has 4"),
        (_inputs(8), "8 input channels: it is an edit model"),
        (_inputs(5), "5 input channels: it is a depth model"),
        (_inputs(7), "7 input channels: it is an upscaler"),
        (_as(torch.float8_e4m3fn), "quantised to F8_E4M3. Required: weights in fp32, fp16 or bf16"),
        (_as(torch.uint8), "quantised to U8"),
        (_with(**{f"{UNET.replace('.', '__')}out__2__scale_weight": ONE}), "quantised to fp8 with scales"),
        (_only(double_blocks__0__img_attn__qkv__weight=ONE), "(Flux or one of its relatives)"),
        (_only(model__diffusion_model__double_blocks__0__img_attn__qkv__weight=ONE), "(Flux or one of its relatives)"),
        (_only(model__diffusion_model__joint_blocks__0__x_block__attn__qkv__weight=ONE), "(SD 3)"),
        (_only(lora_unet_mid_block_attentions_0_proj_in__alpha=ONE), "(a LoRA, not a whole model)"),
        (_with(edm_mean=ONE, edm_std=ONE), "samples with EDM"),
        (_with(**{"edm_vpred__sigma_max": ONE}), "samples with EDM"),
        (_other_vae, "The VAE has 16 latent channels (it is of another family, such as SD 3 or Flux)"),
        (_without("first_stage_model."), "The checkpoint has no VAE"),
        (_without("cond_stage_model."), "The checkpoint has no text encoder"),
        (_bare, "The file has only a UNet, no text encoder and no VAE"),
        (_bare_of_diffusers, "The file has only a UNet, no text encoder and no VAE"),
        (
            lambda state: {f"{UNET}{name}": tensor for name, tensor in _bare(state).items()},
            "The file has only a UNet, no text encoder and no VAE",
        ),
        (_with(**{f"{UNET.replace('.', '__')}unknown__weight": ONE}), "The UNet weight 'unknown.weight'"),
    ],
)
def test_a_file_is_refused_in_one_sentence(
    checkpoints: dict[str, StateDict], tmp_path: Path, spoil: Callable[[StateDict], StateDict], sentence: str
) -> None:
    path = tmp_path / "base.safetensors"
    _save(spoil(checkpoints["SD 1.x"]), path)
    with pytest.raises(SubjectBoothError) as refused:
        load_base(path)
    assert sentence in str(refused.value)
    assert refused.value.where == ("unknown.weight" if "unknown" in sentence else str(path))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("base.gguf", b"GGUF", "quantised to GGUF"),
        ("base.ckpt", b"\x80\x02", "the format .ckpt. Required: a .safetensors file. Convert it; pickled"),
        ("base.safetensors", b"", "cannot be read"),
        ("base.safetensors", b"\xff" * 64, "cannot be read"),
        ("base.safetensors", b"\x02\0\0\0\0\0\0\0[]", "cannot be read"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SubjectBoothError) as refused:
        load_base(tmp_path / name)
    assert sentence in str(refused.value)


def test_a_file_cut_short_and_one_that_is_not_there(checkpoints: dict[str, StateDict], tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    safetensors.torch.save_file(checkpoints["SD 1.x"], path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(SubjectBoothError, match="cannot be read"):
        load_base(path)
    with pytest.raises(SubjectBoothError, match="was not found"):
        load_base(tmp_path / "other.safetensors")


def test_sdxls_refiner(checkpoints: dict[str, StateDict]) -> None:
    shapes = {
        name.removeprefix(UNET): tensor.shape for name, tensor in checkpoints["SDXL"].items() if name.startswith(UNET)
    }
    for name in shapes:
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            shapes[name] = torch.Size((shapes[name][0], 1280))
    shapes["label_emb.0.0.weight"] = torch.Size((256, 2560))
    with pytest.raises(SubjectBoothError, match="SDXL's refiner.*Train the SDXL base model"):
        LdmLayout.of(shapes, "MODEL")


def test_whole_numbers_beside_the_weights_are_not_quantised() -> None:
    refuse_quantised({"a": "float16", "b": "bfloat16", "position_ids": "int64"}, "MODEL")
    with pytest.raises(SubjectBoothError, match="quantised to float8_e5m2"):
        refuse_quantised({"a": "float16", "b": "float8_e5m2"}, "MODEL")
    with pytest.raises(SubjectBoothError, match="quantised to GGUF"):
        refuse_quantised({"a": "GGUF"}, "MODEL")


def test_sdxls_marks_for_v_prediction_and_zero_terminal_snr(checkpoints: dict[str, StateDict], tmp_path: Path) -> None:
    """As ComfyUI reads them; the schedule against diffusers' own rescaling."""
    from diffusers import DDPMScheduler

    plain = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    rescaled = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    empty, path = torch.zeros(0), tmp_path / "base.safetensors"
    for marks, kind, expected in (
        ({}, "epsilon", plain),
        ({"v_pred": empty}, "v_prediction", plain),
        ({"v_pred": empty, "ztsnr": empty}, "v_prediction", rescaled),
    ):
        _save({**checkpoints["SDXL"], **marks}, path)
        found = load_base(path).denoiser.noise_scheduler
        assert found.config["prediction_type"] == kind
        torch.testing.assert_close(found.alphas_cumprod, expected.alphas_cumprod, atol=2e-6, rtol=1e-5)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    steps = torch.tensor([999, 500])
    target = prediction_target(found, latents, noise, steps)
    torch.testing.assert_close(target, rescaled.get_velocity(latents, noise, steps), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(target[0], -latents[0], atol=1e-3, rtol=1e-3)  # pure noise: v is the picture's negative
