"""Aspect-ratio buckets: sizes, crops, which photos share a batch, and the loss of batches of two sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from subjectbooth.tests.small_base import (
    small_base,
    small_class_images,
    small_denoiser,
    small_priors,
    small_subject,
    small_unet,
)
from subjectbooth.trainer.base.conditioning import EncodedText
from subjectbooth.trainer.base.sd.unet import predict
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import Started, StepDone
from subjectbooth.trainer.learn.data import TrainingData, make_micro_step, photos_of
from subjectbooth.trainer.learn.loss import batch_losses
from subjectbooth.trainer.preserve.class_images import ClassImages
from subjectbooth.trainer.preserve.none import NoPreservation
from subjectbooth.trainer.runs.run import Run
from subjectbooth.trainer.subject.buckets import bucket_sizes, nearest_bucket
from subjectbooth.trainer.subject.photo import Photo
from subjectbooth.trainer.subject.subject import Subject

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    steps=5,
    learning_rate=1e-3,
    rank=4,
    network_alpha=4.0,
    resolution=64,
    train_batch_size=2,
    enable_bucket=True,
    flip=True,
    masked_loss=True,
)


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 64), (400, 64), (64, 8), (128, 8)])
def test_buckets_have_about_one_area(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    assert len(sizes) == len(set(sizes)) >= 7
    for width, height in sizes:
        assert (height, width) in sizes
        assert width * height <= resolution**2
        assert resolution / 2 <= min(width, height) <= max(width, height) <= 2 * resolution
        if width != height:
            assert width % step == 0 and height % step == 0
            # No smaller than one step of the shorter side leaves it.
            assert (width + step) * (height + step) > resolution**2


@pytest.mark.parametrize(
    ("photo", "resolution", "bucket"),
    [
        ((3000, 2000), 1024, (1216, 832)),
        ((2000, 3000), 1024, (832, 1216)),
        ((1920, 1080), 1024, (1344, 768)),
        ((800, 800), 512, (512, 512)),
        ((820, 800), 512, (512, 512)),
        ((4000, 3000), 512, (576, 448)),
        ((9000, 500), 512, (1024, 256)),
        ((100, 80), 64, (72, 56)),
    ],
)
def test_a_photo_goes_to_the_nearest_shape(photo: tuple[int, int], resolution: int, bucket: tuple[int, int]) -> None:
    assert nearest_bucket(*photo, resolution) == bucket


def _photo(width: int, height: int, number: int) -> Photo:
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.float32)
    mask[: height // 2, : width // 3] = 1.0
    return Photo(pixels, mask, f"photo {number} of ohwx dog", f"{number}.png")


def _subject(crop: str = "center") -> Subject:
    sizes = [(120, 72), (72, 120), (90, 90), (150, 90), (240, 144)]
    photos = tuple(_photo(*size, number) for number, size in enumerate(sizes))
    return dataclasses.replace(small_subject(), photos=photos, crop=crop)


def test_crops_have_the_buckets_shape() -> None:
    groups = _subject().prepare_buckets(64)
    assert [tuple(group.images.shape) for group in groups] == [(1, 3, 80, 48), (1, 3, 64, 64), (3, 3, 48, 80)]
    assert [group.order for group in groups[:2]] == [(1,), (2,)]
    assert sorted(groups[2].order) == [0, 3, 4]
    wide = groups[2]
    for place, index in enumerate(wide.order):  # 5:3 photos have exactly the bucket's shape: nothing is cut off
        photo = _subject().photos[index]
        expected = np.array(Image.fromarray(photo.pixels).resize((80, 48), Image.Resampling.LANCZOS))
        assert np.array_equal((wide.images[place] * 255).round().numpy().astype(np.uint8), expected.transpose(2, 0, 1))
        assert wide.captions[place] == photo.caption
        assert float(wide.masks[place, 0, :22, :24].min()) == 1.0  # 24 x 26.7, but for the blur of its edge
        assert float(wide.masks[place, 0, 26:].max()) == float(wide.masks[place, 0, :, 29:].max()) == 0.0
    # 4:3 is no bucket's shape: the nearest is 72x56, and something is cut off at the sides.
    odd = dataclasses.replace(_subject(), photos=(_photo(100, 75, 9),))
    (group,) = odd.prepare_buckets(64)
    assert tuple(group.images.shape) == (1, 3, 56, 72)
    box = Image.fromarray(odd.photos[0].pixels).crop((2, 0, 98, 75))  # 72 / 56 * 75 = 96 columns
    expected = np.array(box.resize((72, 56), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal((group.images[0] * 255).round().numpy().astype(np.uint8), expected)


def test_pad_and_subject_crops_in_buckets() -> None:
    subject = dataclasses.replace(_subject("pad"), photos=(_photo(100, 75, 9),))
    (padded,) = subject.prepare_buckets(64)
    # All 100 columns, and 78 rows of which 75 are the photo: bars above and below, outside the mask.
    assert tuple(padded.images.shape) == (1, 3, 56, 72)
    edges = subject.photos[0].pixels[[0, -1]].reshape(-1, 3).mean(axis=0) / 255
    torch.testing.assert_close(padded.images[0, :, 0, 0], torch.tensor(edges, dtype=torch.float32), atol=0.25, rtol=0)
    assert float(padded.masks[0, 0, 0, 5]) < 1.0
    mask = np.zeros((300, 450), np.float32)
    mask[40:140, 200:320] = 1.0
    pixels = np.random.default_rng(1).integers(0, 255, (300, 450, 3), dtype=np.uint8)
    closer = dataclasses.replace(subject, crop="subject", photos=(Photo(pixels, mask, "ohwx dog", "x"),))
    (near,) = closer.prepare_buckets(64)
    # 450x300 goes to 80x48. Of the mask's 120x100 the height decides: 100 / 48 * 1.2 = 2.5 photo pixels a pixel, so a
    # box of 200x120 around its middle, (260, 90).
    box = Image.fromarray(pixels).crop((160, 30, 360, 150)).resize((80, 48), Image.Resampling.LANCZOS)
    assert np.array_equal((near.images[0] * 255).round().numpy().astype(np.uint8), np.array(box).transpose(2, 0, 1))


def test_a_photo_that_moves_to_another_bucket_changes_the_key(tmp_path: Path) -> None:
    def key(subject: Subject, **changes: Any) -> str:
        config = dataclasses.replace(CONFIG, masked_loss=False, **changes)
        return Run(small_base(), subject, small_class_images(), config, tmp_path, CPU).folder.key

    subject = _subject()
    turned = dataclasses.replace(
        subject.photos[0],
        pixels=subject.photos[0].pixels.reshape(120, 72, 3),
        mask=subject.photos[0].mask.reshape(120, 72),
    )
    assert key(subject) != key(dataclasses.replace(subject, photos=(turned, *subject.photos[1:])))
    for index, photo in enumerate(subject.photos):  # whichever bucket it is in
        other = [*subject.photos[:index], dataclasses.replace(photo, caption="ohwx dog"), *subject.photos[index + 1 :]]
        assert key(subject) != key(dataclasses.replace(subject, photos=tuple(other)))
    assert key(subject) != key(subject, enable_bucket=False)
    assert key(subject) == key(dataclasses.replace(subject, photos=subject.photos[::-1]))
    assert "enable_bucket" not in dataclasses.replace(CONFIG, enable_bucket=False).key_fields()
    assert CONFIG.key_fields()["enable_bucket"] is True


SIZES = [(8, 8), (6, 10), (10, 6), (6, 10), (6, 10), (8, 8), (6, 10)]


def _data(sizes: list[tuple[int, int]], priors: bool = True, **changes: Any) -> TrainingData:
    random = torch.Generator().manual_seed(1)
    latents = tuple(torch.randn(4, *size, generator=random) for size in sizes)
    captions = tuple(f"photo {number}" for number in range(len(sizes)))
    encoded = {prompt: EncodedText(torch.randn(1, 77, 16, generator=random)) for prompt in (*captions, "", "class")}
    kept = ClassImages(dataclasses.replace(small_priors(), prompt="class")) if priors else NoPreservation()
    return TrainingData(latents, captions, encoded, kept, square=(4, 8, 8), **changes)


def test_batches_mix_photos_of_one_bucket_only_and_are_fair() -> None:
    data = _data(SIZES)
    seen: list[int] = []
    for step in range(len(SIZES) * 3):
        photos = photos_of(data, 2, step, 0)
        assert photos == photos_of(data, 2, step, 0)
        assert len({SIZES[photo] for photo in photos}) == 1
        seen += photos
    assert [seen.count(photo) for photo in range(len(SIZES))] == [6] * len(SIZES)


def test_one_bucket_is_the_same_as_none() -> None:
    alike = _data([(8, 8)] * 3)
    stacked = dataclasses.replace(alike, latents=torch.stack(list(alike.latents)))
    for step in range(4):
        (first,), (second,) = (
            make_micro_step(data, CONFIG, small_denoiser(), step, CPU).batches for data in (alike, stacked)
        )
        assert torch.equal(first.latents, second.latents) and torch.equal(first.noise, second.noise)
        assert torch.equal(first.times, second.times) and first.prompts == second.prompts


def test_two_sizes_are_two_forward_passes_of_one_loss() -> None:
    masks = tuple(torch.rand(1, *size) for size in SIZES)
    flipped = tuple(latents.flip(-1) for latents in _data(SIZES).latents)
    data = _data(SIZES, masks=masks, flipped_latents=flipped)
    denoiser, unet = small_denoiser(), small_unet()
    scheduler, config = denoiser.noise_scheduler, dataclasses.replace(CONFIG, prior_loss_weight=0.7)
    mirrored = set()
    for step in range(6):
        micro_step = make_micro_step(data, config, denoiser, step, CPU)
        parts = micro_step.batches
        photos = photos_of(data, 2, step, 0)
        if SIZES[photos[0]] == (8, 8):
            (whole,) = parts
            assert whole.latents.shape == (4, 4, 8, 8)
            continue
        own, classes = parts
        assert own.latents.shape == (2, 4, *SIZES[photos[0]]) and classes.latents.shape == (2, 4, 8, 8)
        assert [part.losses.count("instance_loss") for part in parts] == [2, 0] and classes.masks is None
        assert classes.labels[0].startswith("class image ")
        errors = []
        for index, photo in enumerate(photos):
            is_mirrored = torch.equal(own.latents[index], flipped[photo])
            mirrored.add(is_mirrored)
            assert is_mirrored or torch.equal(own.latents[index], data.latents[photo])
            mask = masks[photo].flip(-1) if is_mirrored else masks[photo]
            assert torch.equal(own.masks[index], mask)
            noisy = scheduler.add_noise(
                own.latents[index : index + 1], own.noise[index : index + 1], own.times[index : index + 1]
            )
            said = unet(noisy, own.times[index : index + 1], data.encode([f"photo {photo}"]).hidden_states).sample
            errors.append(float(((said - own.noise[index : index + 1]) ** 2 * mask).mean() / mask.mean()))
        noisy = scheduler.add_noise(classes.latents, classes.noise, classes.times)
        said = unet(noisy, classes.times, data.encode(["class"] * 2).hidden_states).sample
        prior = float((said - classes.noise).square().mean())
        losses = [batch_losses(denoiser, unet, part, micro_step.terms) for part in parts]
        assert float(losses[0].terms["instance_loss"]) == pytest.approx(sum(errors) / 2, rel=1e-4)
        assert float(losses[1].terms["prior_loss"]) == pytest.approx(prior, rel=1e-4)
        assert float(losses[0].total + losses[1].total) == pytest.approx(sum(errors) / 2 + 0.7 * prior, rel=1e-4)
    assert mirrored == {True, False}


def test_the_size_ids_are_the_buckets() -> None:
    seen = {}

    class Unet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, **keywords: Any) -> tuple[torch.Tensor]:
            seen.update(keywords["added_cond_kwargs"])
            return (latents,)

    predict(Unet(), torch.zeros(2, 4, 104, 152), torch.zeros(2), EncodedText(torch.zeros(2, 77, 8), torch.zeros(2, 8)))
    assert seen["time_ids"].tolist() == [[832, 1216, 0, 0, 832, 1216]] * 2


def _train(root: Path, stops: tuple[int, ...] = (), **changes: Any) -> tuple[dict[str, torch.Tensor], Run]:
    config = dataclasses.replace(CONFIG, **changes)
    for stop in (*stops, None):
        run = Run(small_base(), _subject(), small_class_images(), config, root, CPU)
        reading = run.events()
        for event in reading:
            if isinstance(event, StepDone) and event.step == stop:
                reading.close()
                break
    path = run.folder.finished_lora(5)
    assert path is not None
    return safetensors.torch.load_file(path), run


@pytest.mark.oldest
def test_a_cancelled_run_with_buckets_ends_bit_identical(tmp_path: Path) -> None:
    whole, run = _train(tmp_path / "whole")
    torch.manual_seed(7)
    cut, _ = _train(tmp_path / "cut", (1, 3))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    square, other = _train(tmp_path / "whole", enable_bucket=False)
    assert other.folder.key != run.folder.key
    assert any(not torch.equal(whole[name], square[name]) for name in whole)
    with safetensors.safe_open(run.folder.finished_lora(5), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_enable_bucket"] == "True"
    assert '"resolution": [80, 48], "count": 3' in metadata["ss_bucket_info"]


def test_one_picture_at_once_learns_the_same_from_buckets(tmp_path: Path) -> None:
    def losses(root: Path, **changes: Any) -> list[float]:
        config = dataclasses.replace(CONFIG, **changes)
        events = list(Run(small_base(), _subject(), small_class_images(), config, root, CPU).events())
        started = next(event for event in events if isinstance(event, Started))
        assert started.chosen["pictures_per_forward"] == str(changes.get("pictures_per_forward", 4))
        return [event.loss for event in events if isinstance(event, StepDone)]

    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b", pictures_per_forward=1), rel=1e-3)
