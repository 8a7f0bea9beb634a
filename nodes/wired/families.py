"""What is known about the families that are trained on as they are connected: the only place that names one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class WiredFamily:
    """Defaults of a family, each with its source in :data:`FAMILIES`.

    Attributes:
        name: as users know it.
        architecture: ModelSpec's name.
        resolution: side of the images it was trained on, in pixels.
        guidance_scale: usual for sampling with it; 1 for models that take guidance as an input or are distilled.
        logit_normal: whether a flow's times are logit-normal or uniform, before the shift.
        shift: of a flow's times in training, ``s t / (1 + (s - 1) t)``; None for the model's own, which is also
            taken where a ModelSampling node has set it.
        scheduler: of ComfyUI, for validation images.
        training_options: options of a prompt in training that differ from those of sampling.
        frozen: a pattern of the paths of layers that get no LoRA.
        is_tried: whether a small model of the family was trained in the tests.
        learning_rate, rank: usual for a LoRA, with alpha equal to the rank.
        undistilled: what to train on in place of a distilled model of the family; empty for its name.
        distilled: a pattern of the names of the family's distilled files, beside those that :mod:`.distilled` knows.
        distilled_setting: a setting of the model, and its value, that only a distilled one has.
    """

    name: str
    architecture: str
    resolution: int = 1024
    guidance_scale: float = 4.0
    logit_normal: bool = True
    shift: float | None = None
    scheduler: str = "simple"
    training_options: Mapping[str, Any] = field(default_factory=dict)
    frozen: str = ""
    is_tried: bool = True
    learning_rate: float = 1e-4
    rank: int = 32
    undistilled: str = ""
    distilled: str = ""
    distilled_setting: tuple[str, Any] | None = None

    @property
    def training_defaults(self) -> list[Any]:
        """What decides, beside the model and the user's settings, which LoRA comes out; part of a run's key."""
        return [self.logit_normal, self.shift, dict(self.training_options), self.frozen]


# Times: unless a line says otherwise, logit-normal as OneTrainer's presets (training_presets/) and diffusion-pipe
# (models/*.py, timestep_sample_method) have them, with the shift that ComfyUI samples the family with.
# Resolution: unless a line says otherwise, the 1024 pixels of these trainers' examples, not verified for each family.
# Learning rate and rank: of ai-toolkit, whose alpha is the rank, as here; rates of trainers with an alpha of 1, as
# sd-scripts' and musubi-tuner's examples have it, mean less. 1e-4 and 32 are those of its new jobs
# (ui/src/app/jobs/new/jobConfig.ts); a line names the example in config/examples/ that has others. Not verified for
# families that it lacks.
# Distilled: that klein is, and its base is not: musubi-tuner, docs/flux_2.md; Krea 2 Turbo and Raw: docs/krea2.md;
# Z-Image Turbo: docs/zimage.md; HiDream-I1 Dev and Fast: the model's own page.
# Architecture: sai_model_spec.py of sd-scripts and musubi-tuner, in lower case; where neither has the family, its name.
FAMILIES: dict[str, WiredFamily] = {
    # Logit-normal times and shift 3: arXiv 2403.03206, section 5.3.2. Rank: train_lora_sd35_large_24gb.yaml.
    "SD3": WiredFamily("SD 3.5", "stable-diffusion-3.5", rank=16, undistilled="SD 3.5 Large or Medium"),
    # Guidance 1: sd-scripts, docs/flux_train_network.md, whose shift of 3.1582 is that of ComfyUI.
    # Rank: train_lora_flux_24gb.yaml and train_lora_flux_schnell_24gb.yaml.
    "Flux": WiredFamily(
        "Flux.1",
        "flux-1-dev",
        guidance_scale=1.0,
        training_options={"guidance": 1.0},
        rank=16,
        undistilled="Flux.1 dev",
    ),
    "FluxSchnell": WiredFamily(
        "Flux.1 schnell",
        "flux-1-schnell",
        guidance_scale=1.0,
        rank=16,
        undistilled="Flux.1 dev",
        distilled_setting=("guidance_embed", False),
    ),
    # Guidance 1: musubi-tuner, flux_2_train_network.py; diffusion-pipe, models/flux2.py. klein does not take it.
    "Flux2": WiredFamily(
        "Flux.2",
        "flux-2",
        training_options={"guidance": 1.0},
        undistilled="Flux.2 klein base",
        distilled="^(?!.*base).*klein",
    ),
    "ZImage": WiredFamily("Z-Image", "z-image"),
    # Shift: musubi-tuner, docs/qwen_image.md, near that of inference at 1024 pixels.
    # Rank: train_lora_qwen_image_24gb.yaml.
    "QwenImage": WiredFamily("Qwen-Image", "qwen-image", shift=2.2, rank=16),
    # No shift: sd-scripts, docs/flux_train_network.md; OneTrainer's times are symmetric, too.
    # Rank: train_lora_chroma_24gb.yaml.
    "Chroma": WiredFamily("Chroma", "chroma", shift=1.0, rank=16, undistilled="Chroma1 HD or Base"),
    "ChromaRadiance": WiredFamily("Chroma Radiance", "chroma-radiance", shift=1.0, rank=16),
    # Shift and guidance: musubi-tuner, docs/krea2.md; ComfyUI's 3.16 is that of Turbo.
    "Krea2": WiredFamily("Krea 2", "krea-2", guidance_scale=5.5, shift=2.5, undistilled="Krea 2 Raw"),
    # Mean log(side / 512), which is a shift of 2 at 1024 pixels: musubi-tuner, training/timesteps.py (deviation 1.5).
    "Ideogram4": WiredFamily("Ideogram 4", "ideogram-4", shift=2.0),
    # No shift, and the adapter between text encoder and model stays as it is: sd-scripts, docs/anima_train_network.md.
    "Anima": WiredFamily("Anima", "anima", shift=1.0, frozen=r"^llm_adapter\."),
    "ErnieImage": WiredFamily("Ernie-Image", "ernie-image"),
    "AuraFlow": WiredFamily("AuraFlow", "auraflow"),
    # 32 pixels per latent pixel, 2048 pixels; guidance: sd-scripts, docs/hunyuan_image_train_network.md.
    "HunyuanImage21": WiredFamily(
        "HunyuanImage 2.1", "hunyuan-image-2.1", 2048, 3.5, distilled_setting=("meanflow", True)
    ),
    # Rate: train_lora_hidream_48.yaml.
    "HiDream": WiredFamily(
        "HiDream",
        "hidream-i1",
        learning_rate=2e-4,
        undistilled="HiDream-I1 Full",
        distilled=r"(^|[-_. ])(dev|fast)[-_. ]",
    ),
    # Only editing uses that part. Rank: train_lora_omnigen2_24gb.yaml.
    "Omnigen2": WiredFamily("OmniGen2", "omnigen2", frozen=r"^ref_image_refiner\.", rank=16),
    "CosmosT2IPredict2": WiredFamily("Cosmos Predict2", "cosmos-predict2"),
    # Shift and guidance: musubi-tuner, docs/wan.md. 832 x 480 pixels: its example for T2V.
    "WAN21_T2V": WiredFamily("Wan 2.1", "wan2.1", 640, 5.0, shift=3.0),
    # 1280 x 720 pixels, as musubi-tuner's docs/wan.md trains the larger Wan; shift and guidance as those of 2.1.
    "WAN22_T2V": WiredFamily("Wan 2.2 5B", "wan2.2", 960, 5.0, shift=3.0),
    # Shift 6, as ComfyUI: sd-scripts, docs/lumina_train_network.md. Rank: train_lora_lumina.yaml.
    "Lumina2": WiredFamily("Lumina 2", "lumina-2", rank=16),
    "PixArtAlpha": WiredFamily("PixArt alpha", "pixart-alpha", scheduler="normal"),
    "PixArtSigma": WiredFamily("PixArt sigma", "pixart-sigma", scheduler="normal"),
    "HunyuanDiT": WiredFamily("HunyuanDiT", "hunyuan-dit", scheduler="normal"),
    "HunyuanDiT1": WiredFamily("HunyuanDiT 1.1", "hunyuan-dit", scheduler="normal"),
    "Kandinsky5Image": WiredFamily("Kandinsky 5", "kandinsky-5"),
    "LongCatImage": WiredFamily("LongCat-Image", "longcat-image"),
    # Uniform times: ai-toolkit, ui/src/app/jobs/new/options.tsx.
    "MageFlow": WiredFamily("MageFlow", "mage-flow", logit_normal=False),
    "Lens": WiredFamily("Lens", "lens"),
    "Boogu": WiredFamily("Boogu", "boogu-image", frozen=r"^ref_image_refiner\."),
    "JoyImage": WiredFamily("JoyImage", "joyimage"),
    "SDXL": WiredFamily("SDXL", "stable-diffusion-xl-v1-base", guidance_scale=7.0, undistilled="SDXL base 1.0"),
    # Rank: sd-scripts, docs/train_network.md, and the node's own.
    "SD15": WiredFamily("SD 1.x", "stable-diffusion-v1", 512, 7.0, rank=16, undistilled="SD 1.5"),
    "SD20": WiredFamily("SD 2.x", "stable-diffusion-v2-768-v", 768, 7.0, rank=16, undistilled="SD 2.1"),
}
"""By the class of ComfyUI's config for a model (``comfy.supported_models``), which tells more than the model's own."""


def family_of(model: ModelPatcher) -> WiredFamily:
    """The family of a connected model; for one that is not in the table, ComfyUI's name for it and the defaults."""
    name = type(model.model.model_config).__name__
    return FAMILIES.get(name) or WiredFamily(name, name.lower(), is_tried=False)


def family_named(name: str) -> WiredFamily:
    """The family that :func:`family_of` gave a name."""
    known = {family.name: family for family in FAMILIES.values()}
    return known.get(name) or WiredFamily(name, name.lower(), is_tried=False)
