"""What the demo base's UNet is trained on: captions that fit their pictures, and the weights of the time steps.

An encoder that only averages stands in for the real one, so that colours can be read off the latents.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from subjectbooth.demo.making import train_diffusion
from subjectbooth.demo.making.classes import CLASS_WORDS, COLORS, place
from subjectbooth.demo.making.compose import Composer
from subjectbooth.demo.making.pictures import SIDE, Library
from subjectbooth.demo.making.schedule import alphas_cumprod
from subjectbooth.demo.making.train_diffusion import LatentPool, loss_weights


class Averages(nn.Module):
    """[n, 3, 64, 64] to [n, 4, 8, 8]: mean colours, and 0."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = nn.functional.avg_pool2d(images, 8)
        return torch.cat([means, torch.zeros_like(means[:, :1])], 1)


def plain_drawings(words: tuple[str, ...], grey: int) -> Composer:
    """One grey square for each word, in the middle; other colours leave it grey."""
    pixels = np.zeros((len(words), SIDE, SIDE, 4), np.uint8)
    pixels[:, SIDE // 8 : -SIDE // 8, SIDE // 8 : -SIDE // 8] = (grey, grey, grey, 255)
    return Composer(Library(pixels, words, ("noto",) * len(words)))


@pytest.fixture(scope="module")
def pool() -> Iterator[LatentPool]:
    """Class drawings are white; those of no class are dark. A dozen classes: all of them take half a minute."""
    few = CLASS_WORDS[:12]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_diffusion, "CLASS_WORDS", few)
        patch.setattr(train_diffusion, "OF_NO_CLASS", 16)
        things = plain_drawings(("thing",) * 9, 20)
        yield LatentPool(plain_drawings(few, 255), Averages(), random.Random(0), things)


def test_captions_without_a_class_go_with_drawings_of_none(pool: LatentPool) -> None:
    latents, texts = pool.draw(400, 2, rare_share=0.25, any_drawing=0.4)
    centres = latents[:, :3, 3:5, 3:5].mean((1, 2, 3)).view(400, 2)
    dark = (centres < 0.75).all(1)
    assert bool(((centres > 0.9).all(1) | dark).all()), "both pictures of a caption are of one kind"
    of_no_class = [text.startswith(("a photo on", "a photo at")) for text in texts]
    for text, is_dark, unclassed in zip(texts, dark.tolist(), of_no_class, strict=True):
        assert is_dark == unclassed or text == "", "a tenth of the classes' captions are empty, too"
    assert 0.33 < float(dark.float().mean()) < 0.47
    share = sum(of_no_class) / int(dark.sum())
    assert 0.38 < share < 0.62, "half of the captions without a class name the background"


def test_a_caption_without_a_class_names_the_background_that_is_there(pool: LatentPool) -> None:
    latents, texts = pool.draw(200, 2, rare_share=0.0, any_drawing=1.0)
    edge = torch.ones(8, 8, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    colours = latents[:, :3, edge].median(2).values.view(200, 2, 3)  # most of the edge is never covered
    checked = 0
    for text, seen in zip(texts, colours, strict=True):
        for name, rgb in COLORS.items():
            if text == f"a photo {place(name)}":
                checked += 1
                assert torch.allclose(seen, torch.tensor(rgb) / 255, atol=0.03), (text, seen)
    assert checked > 40


def test_without_a_share_for_them_only_classes_are_drawn(pool: LatentPool) -> None:
    latents, texts = pool.draw(100, 2, rare_share=0.0)
    assert all(text == "" or any(word in text for word in CLASS_WORDS) for text in texts)
    assert float(latents[:, :3, 3:5, 3:5].mean((1, 2, 3)).min()) > 0.9


def test_a_change_reaches_the_drawings_of_classes_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_diffusion, "CLASS_WORDS", CLASS_WORDS[:4])
    monkeypatch.setattr(train_diffusion, "OF_NO_CLASS", 4)
    few, things = plain_drawings(CLASS_WORDS[:4], 255), plain_drawings(("thing",), 20)

    def darker(drawings: torch.Tensor, rng: random.Random) -> torch.Tensor:
        return drawings * torch.tensor([0.5, 0.5, 0.5, 1]).view(4, 1, 1)

    plain = LatentPool(few, Averages(), random.Random(0), things)
    changed = LatentPool(few, Averages(), random.Random(0), things, darker)
    for (word, _), rows in changed.rows.items():
        if word is None:
            assert torch.equal(changed.latents[rows], plain.latents[rows])
        else:
            centres = changed.latents[rows][:, :3, 3:5, 3:5]
            assert torch.allclose(centres, torch.tensor(0.5), atol=0.02)


def test_clean_steps_are_capped_and_noisy_ones_weighted_as_v_prediction() -> None:
    alphas = alphas_cumprod().double()
    for cap in (5.0, 20.0):
        weights = loss_weights(cap).double()
        assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
        clean, middle, noisy = 0, 400, 999
        snr = alphas / (1 - alphas)
        assert float(snr[middle]) < 5 and float(alphas[noisy]) < 0.1
        by_hand = {clean: cap / float(snr[clean] * alphas[clean]), middle: 1 / float(alphas[middle]), noisy: 10.0}
        for step, value in by_hand.items():
            assert float(weights[step] / weights[middle]) == pytest.approx(value / by_hand[middle], rel=1e-4)
