"""Small API-format workflows that several tests build on."""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node; a link is written ["node id", output index]."""
    return {"class_type": class_type, "inputs": inputs}


def text_to_image(
    *,
    checkpoint: str = "tiny15.safetensors",
    prompt: str = "a photo of a dog",
    seed: int = 1,
    steps: int = 2,
    cfg: float = 2.0,
    size: int = 64,
    model: list[Any] | None = None,
    clip: list[Any] | None = None,
    positive: list[Any] | None = None,
) -> Graph:
    """CheckpointLoaderSimple "1", CLIPTextEncode "2" and "3", EmptyLatentImage "4", KSampler "5", VAEDecode "6",
    SaveImage "7". `model`, `clip`, `positive` (a link to a STRING) stand in for the checkpoint's own."""
    clip = clip or ["1", 1]
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "2": node("CLIPTextEncode", clip=clip, text=positive or prompt),
        "3": node("CLIPTextEncode", clip=clip, text=""),
        "4": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "5": node(
            "KSampler",
            model=model or ["1", 0],
            positive=["2", 0],
            negative=["3", 0],
            latent_image=["4", 0],
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="test"),
    }
