"""What is usual for a family of models, and which of its models are distilled."""

from __future__ import annotations

from typing import Any

import pytest

from subjectbooth.tests.conftest import module_alone

FAMILIES = module_alone("wired.families").FAMILIES
distilled_note = module_alone("wired.distilled").distilled_note
USUAL = module_alone("usual")


@pytest.mark.parametrize(
    ("family", "files", "instead"),
    [
        ("ZImage", ["z_image_turbo_bf16.safetensors"], "Z-Image"),
        ("ZImage", ["Z-Image-Turbo-Q8_0.gguf"], "Z-Image"),
        ("Flux2", ["flux-2-klein-4b-fp8.safetensors"], "Flux.2 klein base"),
        ("Flux", ["flux1-dev.safetensors", "FLUX.1-Turbo-Alpha.safetensors"], "Flux.1 dev"),
        ("Flux", ["Hyper-FLUX.1-dev-8steps-lora.safetensors"], "Flux.1 dev"),
        ("FluxSchnell", ["flux1-schnell-fp8.safetensors"], "Flux.1 dev"),
        ("QwenImage", ["loras\\Qwen-Image-Lightning-4steps-V1.0.safetensors"], "Qwen-Image"),
        ("Krea2", ["krea2_turbo_fp8_scaled.safetensors"], "Krea 2 Raw"),
        ("SD3", ["sd3.5_large_turbo.safetensors"], "SD 3.5 Large or Medium"),
        ("SDXL", ["sd_xl_turbo_1.0_fp16.safetensors"], "SDXL base 1.0"),
        ("SDXL", ["DreamShaperXL_Lightning.safetensors"], "SDXL base 1.0"),
        ("SDXL", ["sd_xl_base_1.0.safetensors", "lcm-lora-sdxl.safetensors"], "SDXL base 1.0"),
        ("SD15", ["sd15_dmd2.ckpt"], "SD 1.5"),
        ("SD20", ["sd_turbo.safetensors"], "SD 2.1"),
        ("Chroma", ["Chroma1-HD-Flash.safetensors"], "Chroma1 HD or Base"),
        ("HiDream", ["hidream_i1_fast_fp8.safetensors"], "HiDream-I1 Full"),
        ("HiDream", ["hidream_i1_dev_bf16.safetensors"], "HiDream-I1 Full"),
        ("HunyuanImage21", ["hunyuanimage2.1_distilled_bf16.safetensors"], "HunyuanImage 2.1"),
        ("WAN21_T2V", ["lightx2v_T2V_14B_cfg_step.safetensors"], "Wan 2.1"),
    ],
)
def test_a_distilled_model_is_told_by_its_file(family: str, files: list[str], instead: str) -> None:
    note = distilled_note(FAMILIES[family], {}, files)
    assert f"Train on {instead} instead" in note
    assert note.startswith(f"{files[-1].split(chr(92))[-1]} appears to be distilled")


@pytest.mark.parametrize(
    ("family", "files"),
    [
        ("ZImage", ["z_image_bf16.safetensors"]),
        ("ZImage", ["z_image_de_turbo_v1_bf16.safetensors"]),
        ("ZImage", ["z_image_turbo_bf16.safetensors", "zimage_turbo_training_adapter_v2.safetensors"]),
        ("Flux2", ["flux-2-klein-base-4b.safetensors"]),
        ("Flux2", ["flux2_dev_fp8mixed.safetensors"]),
        ("Flux", ["flux1-dev-fp8.safetensors"]),
        ("Krea2", ["krea2_raw_bf16.safetensors"]),
        ("SD3", ["sd3.5_medium.safetensors"]),
        ("SDXL", ["sd_xl_base_1.0.safetensors", "hyperrealistic_flashback.safetensors"]),
        ("HiDream", ["hidream_i1_full_fp16.safetensors"]),
        ("HunyuanImage21", ["hunyuanimage2.1_undistilled.safetensors"]),
        ("SD15", []),
    ],
)
def test_another_model_is_not(family: str, files: list[str]) -> None:
    assert distilled_note(FAMILIES[family], {"guidance_embed": True, "meanflow": False}, files) == ""


@pytest.mark.parametrize(
    ("family", "settings", "name"),
    [
        ("FluxSchnell", {"guidance_embed": False}, "Flux.1 schnell"),
        ("HunyuanImage21", {"meanflow": True}, "HunyuanImage 2.1"),
    ],
)
def test_some_are_told_by_the_model_itself(family: str, settings: dict[str, Any], name: str) -> None:
    """Whatever the file is called."""
    assert distilled_note(FAMILIES[family], settings, ["mine.safetensors"]).startswith(f"{name} appears to be")


def test_0_is_what_is_usual_and_other_values_stay() -> None:
    given = {"learning_rate": 0.0, "rank": 0, "network_alpha": 0.0, "steps": 5}
    assert USUAL.with_usual(given, FAMILIES["HiDream"]) == {
        "learning_rate": 2e-4, "rank": 32, "network_alpha": 32.0, "steps": 5,
    }  # fmt: skip
    assert USUAL.with_usual(given, FAMILIES["Flux"])["rank"] == 16
    own = {"learning_rate": 3e-5, "rank": 4, "network_alpha": 2.0}
    assert USUAL.with_usual(own, FAMILIES["HiDream"]) == own
    assert USUAL.with_usual({**own, "network_alpha": 0}, FAMILIES["HiDream"])["network_alpha"] == 4.0
    nan = USUAL.with_usual({**own, "learning_rate": float("nan"), "rank": False}, FAMILIES["HiDream"])
    assert nan["learning_rate"] != nan["learning_rate"] and nan["rank"] is False
    assert USUAL.without_usual(given) == {"steps": 5}


def test_every_family_has_a_usual_rate_and_rank() -> None:
    for name, family in FAMILIES.items():
        assert 1e-5 <= family.learning_rate <= 1e-3 and family.rank in (8, 16, 32, 64), name
