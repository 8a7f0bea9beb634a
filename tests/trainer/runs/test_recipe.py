"""One recipe, many runs: what a base encodes is encoded once, and the bits are those of runs by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.tests.small_base import HashedPrompts, PoolingCodec, small_base, small_class_images, small_subject
from subjectbooth.trainer.base.conditioning import Conditioning
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.base.stored.stored_base import load_base
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Finished
from subjectbooth.trainer.runs.encodings import EncodingCache
from subjectbooth.trainer.runs.preparation import SCENES
from subjectbooth.trainer.runs.recipe import Recipe
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=2, learning_rate=1e-3, rank=2, network_alpha=2.0, resolution=64, flip=True)


class CountedPrompts(HashedPrompts):
    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        self.asked += prompts
        return super().encode(prompts)


class CountedCodec(PoolingCodec):
    def __init__(self) -> None:
        self.asked: list[torch.Tensor] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.asked.append(images)
        return super().encode(images)


def _recipe() -> tuple[Recipe, CountedPrompts, CountedCodec]:
    prompts, codec = CountedPrompts(), CountedCodec()
    base = dataclasses.replace(small_base(), prompts=prompts, codec=codec)
    return Recipe(base, small_subject(), CONFIG, small_class_images()), prompts, codec


def _weights(run: Run) -> dict[str, bytes]:
    (*_, finished) = run.events()
    assert isinstance(finished, Finished)
    tensors = safetensors.torch.load_file(finished.path)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_runs_of_one_base_encode_once_and_end_with_the_bits_of_runs_by_themselves(tmp_path: Path) -> None:
    recipe, prompts, codec = _recipe()
    cache = EncodingCache()
    together = [_weights(recipe.vary(seed=seed).run(tmp_path / "together", CPU, encodings=cache)) for seed in (0, 1)]
    trained = ["", "a photo of a dog", "a photo of ohwx dog"]
    scored = [f"{prompt} {scene}" for prompt in trained[1:] for scene in SCENES]
    assert sorted(prompts.asked) == sorted([*trained, *scored])
    assert [len(images) for images in codec.asked] == [3, 3], "the photos and the mirrored ones"
    assert not torch.equal(*codec.asked)
    alone = [_weights(recipe.vary(seed=seed).run(tmp_path / "alone", CPU)) for seed in (0, 1)]
    assert together == alone and together[0] != together[1]
    assert len(codec.asked) == 6, "without a cache each run encodes for itself"
    # Another caption is another prompt; the photos are the same ones.
    photos = tuple(dataclasses.replace(photo, caption="ohwx dog on grass") for photo in recipe.subject.photos)
    other = dataclasses.replace(recipe, subject=dataclasses.replace(recipe.subject, photos=photos))
    del prompts.asked[:], codec.asked[:]
    other.run(tmp_path, CPU, encodings=cache).plan()
    assert prompts.asked == ["ohwx dog on grass"] and codec.asked == []


def test_nothing_is_taken_from_another_base_device_or_picture() -> None:
    recipe, prompts, codec = _recipe()
    cache, images = EncodingCache(), torch.rand(2, 3, 64, 64)
    other = dataclasses.replace(recipe.base, digest="another base")
    for base, device, pictures in (
        (recipe.base, "cpu", images),
        (other, "cpu", images),
        (recipe.base, "cuda", images),
        (recipe.base, "cpu", images[:1]),
        (recipe.base, "cpu", images.flip(-1)),
    ):
        for _ in range(2):
            assert torch.equal(cache.latents(base, pictures, device), PoolingCodec().encode(pictures))
            (found,) = cache.prompts(base, ["a dog"], device).values()
            assert torch.equal(found.hidden_states, HashedPrompts().encode(["a dog"])[0].hidden_states)
    assert len(codec.asked) == 5 and prompts.asked == ["a dog"] * 3


def test_the_cache_is_bounded_and_drops_what_was_used_least_recently() -> None:
    recipe, prompts, _ = _recipe()
    cache = EncodingCache(limit=2 * 77 * 16 * 4)
    for wanted in ("a", "b", "a", "c", "a", "b"):
        cache.prompts(recipe.base, [wanted], "cpu")
        assert cache.size <= 2 * 77 * 16 * 4
    assert prompts.asked == ["a", "b", "c", "b"]
    cache.latents(recipe.base, torch.rand(200, 3, 64, 64), "cpu")  # alone larger than the limit
    assert list(cache.prompts(recipe.base, ["a"], "cpu")) == ["a"] and prompts.asked == ["a", "b", "c", "b"]


def test_what_is_not_finite_is_reported_each_time_and_not_kept(tmp_path: Path) -> None:
    recipe, _, codec = _recipe()
    cache = EncodingCache()
    broken = dataclasses.replace(recipe, base=dataclasses.replace(recipe.base, codec=BrokenCodec()))
    for _ in range(2):
        with pytest.raises(SubjectBoothError, match="NaN or infinity"):
            list(broken.run(tmp_path, CPU, encodings=cache).events())
    list(recipe.run(tmp_path, CPU, encodings=cache).events())
    assert len(codec.asked) == 2


class BrokenCodec(PoolingCodec):
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images) * float("nan")


def test_a_real_text_encoder_gives_a_prompt_the_same_bits_in_any_company(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a prompt that another run has encoded would not be what this one would have made."""
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    base = load_base(write_pair(tmp_path, "SD 1.x")[0])
    prompts = ["a photo of ohwx dog", "", "a dog, " * 40]
    for prompt, together in zip(prompts, base.prompts.encode(prompts), strict=True):
        (alone,) = base.prompts.encode([prompt])
        assert torch.equal(alone.hidden_states, together.hidden_states)


def test_a_recipe_gives_the_run_of_its_parts(tmp_path: Path) -> None:
    recipe, _, _ = _recipe()
    run = Run(recipe.base, recipe.subject, recipe.preservation, CONFIG, tmp_path, CPU)
    assert recipe.run(tmp_path, CPU).folder.path == run.folder.path
    assert recipe.vary(seed=7).run(tmp_path, CPU).folder.path != run.folder.path
    assert Recipe(recipe.base, recipe.subject, CONFIG).run(tmp_path, CPU).folder.path != run.folder.path
    with pytest.raises(SubjectBoothError, match="rank 0"):
        recipe.vary(rank=0)
