"""Embedders from local folders: small random models, saved by transformers, against transformers' own preparation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from subjectbooth.trainer.base.sd.tokenizer import chunks
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.measure.embedding import Namer, from_folder

pytestmark = pytest.mark.oldest

VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=49407)


def clip(**options: Any) -> Any:
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config={**VISION, "patch_size": 14, **options}, projection_dim=8
    )
    return transformers.CLIPModel(config)


def clip_vision() -> Any:
    config = transformers.CLIPVisionConfig(**VISION, patch_size=14, projection_dim=8)
    return transformers.CLIPVisionModelWithProjection(config)


def dinov2() -> Any:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    return transformers.Dinov2Model(config)


def dino() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**VISION, patch_size=14), add_pooling_layer=False)


def saved(folder: Path, make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # large enough that every layer matters
        parameter.data = torch.randn(parameter.shape) * 0.3
    model.save_pretrained(folder)
    return model


def photo(width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def tokens_of(text: str) -> torch.Tensor:
    return chunks(text)  # padded to 77, as CLIP was trained


CLIP_PROCESSOR = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def clip_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=pixels, input_ids=tokens_of("a photo")).image_embeds


def vision_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=pixels).image_embeds


def class_token(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=pixels).last_hidden_state[:, 0]


@pytest.mark.parametrize(
    ("make", "processor", "features"),
    [
        (clip, CLIP_PROCESSOR, clip_features),
        (clip_vision, CLIP_PROCESSOR, vision_features),
        (dinov2, transformers.BitImageProcessor(size={"shortest_edge": 256}, **IMAGENET), class_token),
        (dino, transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size=28, **IMAGENET), class_token),
    ],
)
def test_a_saved_model_embeds_as_in_transformers(
    tmp_path: Path, make: Callable[[], Any], processor: Any, features: Callable[[Any, torch.Tensor], torch.Tensor]
) -> None:
    """Without a stored preparation too, since these are the standard ones."""
    model = saved(tmp_path, make)
    standard = from_folder(tmp_path)
    processor.save_pretrained(tmp_path)
    stored = from_folder(tmp_path)
    pixels = stored._preparation(tensor(photo()))
    assert torch.equal(standard._preparation(tensor(photo())), pixels)
    # Pillow rounds its weights and each of its two passes: up to two levels, divided by the smallest std.
    torch.testing.assert_close(
        pixels, processor(images=photo(), return_tensors="pt")["pixel_values"], rtol=0, atol=2 / 255 / 0.224
    )
    with torch.no_grad():
        expected = F.normalize(features(model, pixels), dim=1)
    torch.testing.assert_close(stored.embed(tensor(photo())), expected)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(1))


def test_an_older_preparation_is_read(tmp_path: Path) -> None:
    """Sizes as numbers, without a crop, bilinear, with other colours."""
    saved(tmp_path, dino)
    values = {"size": 28, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0], "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**values, "resample": 2}))
    prepared = from_folder(tmp_path)._preparation(tensor(photo(56, 56)))
    scaled = tensor(photo(56, 56).resize((28, 28), Image.Resampling.BILINEAR))
    expected = (scaled - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1 / 255)


@pytest.mark.parametrize(
    "values",
    [{"size": {"longest_edge": 28}}, {"crop_size": 0}, {"image_mean": [0.5]}, {"image_std": "1"}, {"resample": 99}],
)
def test_an_unusable_preparation_is_rejected(tmp_path: Path, values: dict[str, Any]) -> None:
    saved(tmp_path, dino)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(SubjectBoothError, match=r"preprocessor_config\.json that cannot be used"):
        from_folder(tmp_path)


def test_clip_names_what_an_image_shows(tmp_path: Path) -> None:
    """The image's embedding is made equal to that of one text, so that this one must be chosen."""
    model = saved(tmp_path, clip)
    embedder = from_folder(tmp_path)
    assert isinstance(embedder, Namer)
    choices = ["a photo of a dog", "a photo of a clock", "a photo of a rose"]
    image = tensor(photo())
    for choice in choices:
        with torch.no_grad():
            text = model.text_projection(model.text_model(input_ids=tokens_of(choice)).pooler_output)[0]
            pixels = embedder._preparation(image)
            pooled = model.vision_model(pixel_values=pixels).pooler_output[0]
            # The smallest change of the projection that maps this image to this text.
            loaded = embedder._model.visual_projection.weight
            loaded.copy_(torch.outer(text, pooled) / pooled.dot(pooled))
        assert embedder.names(image, choices) == [choice]


@pytest.mark.parametrize("make", [clip_vision, dinov2])
def test_a_model_without_text_names_nothing(tmp_path: Path, make: Callable[[], Any]) -> None:
    saved(tmp_path, make)
    assert not isinstance(from_folder(tmp_path), Namer)


def test_another_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(SubjectBoothError, match="does not exist"):
        from_folder(tmp_path / "missing")
    with pytest.raises(SubjectBoothError, match=r"has no config\.json"):
        from_folder(tmp_path)
    config = tmp_path / "config.json"
    for content, problem in {
        "{": "unreadable",
        "[]": "not an object",
        '{"model_type": "bert"}': "type 'bert'",
        '{"model_type": "clip"}': r"no \.safetensors",
    }.items():
        config.write_text(content)
        with pytest.raises(SubjectBoothError, match=problem) as raised:
            from_folder(tmp_path)
        assert raised.value.where == str(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SubjectBoothError, match="cannot be loaded"):
        from_folder(tmp_path)


def test_missing_weights_are_rejected(tmp_path: Path) -> None:
    """Transformers would draw them at random."""
    import safetensors.torch

    saved(tmp_path, dinov2)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load(file.read_bytes())
    weights.pop("encoder.layer.1.norm1.weight")
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(SubjectBoothError, match=r"lacks 1 weights, such as .*norm1"):
        from_folder(tmp_path)
