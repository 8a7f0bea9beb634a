"""The judge as an embedder and namer for the trainer's measures (trainer/measure), and prompts in the demo's words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .classes import BACKGROUNDS, CLASS_WORDS, caption, place
from .judge import LoadedJudge
from .subjects import SUBJECTS

SIDE = 64
"""Pixels: the size of the demo base's images."""
SAMPLING = (15, 2.0)
"""Denoising steps and guidance for the demo base, as in `demo.making.gain`."""

_WORDS = [word for word in CLASS_WORDS if word not in {subject.class_word for subject in SUBJECTS.values()}][::4][:24]

OTHER_WORDS: tuple[str, ...] = tuple(_WORDS)
"""24 classes, none of which is that of a sample subject. A way to keep the class must not learn from these."""

OTHER_CAPTIONS: tuple[str, ...] = tuple(
    caption(word, BACKGROUNDS[i % len(BACKGROUNDS)] if i % 3 == 2 else None) for i, word in enumerate(OTHER_WORDS)
)
"""One for each of :data:`OTHER_WORDS`, every third on a background."""


class JudgeEmbedder:
    """The judge behind the trainer's protocols ``Embedder`` and ``Namer``."""

    name = "the demo base's judge"

    def __init__(self, judge: LoadedJudge) -> None:
        self._judge = judge

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors, float32 [n, 512], of images float32 [n, 3, h, w] in 0..1."""
        return self._judge.classify(_scaled(images)).embedding

    def names(self, images: torch.Tensor, choices: Sequence[str]) -> list[str]:
        """The caption of the class that is seen, if it is a choice, or else that of the background."""
        verdict = self._judge.classify(_scaled(images))
        named = []
        for word, background in zip(verdict.word, verdict.background, strict=True):
            plain = caption(word, None)
            in_scene = [choice for choice in choices if choice.endswith(f" {place(background)}")]
            named.append(plain if plain in choices else next(iter(in_scene), ""))
        return named


def _scaled(images: torch.Tensor) -> torch.Tensor:
    """The largest centred square, at the judge's size."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return F.interpolate(images[:, :, top : top + side, left : left + side], size=(SIDE, SIDE), mode="area")
