"""The rule by which a run chooses its best step from its scores (:mod:`trainer.learn.probe`).

It is validated against a judge on the demo base: see docs/best-step.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..learn.probe import CLASS_DRIFT, PHOTO_LOSS, SCENE_KEPT

Scores = Mapping[str, float]
"""The scores of a step by name."""


@dataclass(frozen=True)
class Choice:
    """The step that the rule chooses.

    Attributes:
        step: the step.
        reason: why, as a phrase: "photos learned 75 %, scenes kept 90 %, class kept 92 %".
    """

    step: int
    reason: str


def best_step(scores: Mapping[int, Scores], kept: Collection[int]) -> Choice | None:
    """The step with the highest product of what is learned of the photos and what is kept of scenes (:func:`shares`).
    Of equal steps, the later one.

    The first rises ever more slowly, and the second falls once the subject brings its photos' backgrounds with it. What
    is kept of the class is shown but does not count: within a run it varies more by chance than by the step.

    Args:
        scores: by step, with the base as step 0.
        kept: the steps whose adapters can be used.

    Returns:
        None if there are no scores of the base or of any kept step.
    """
    base = scores.get(0)
    if base is None:
        return None
    found = {step: part for step in sorted(kept) if (part := shares(scores.get(step, {}), base)) is not None}
    if not found:
        return None
    step = max(found, key=lambda step: (found[step][0] * found[step][1], step))
    learned, scene, of_class = found[step]
    return Choice(step, f"photos learned {learned:.0%}, scenes kept {scene:.0%}, class kept {of_class:.0%}")


def shares(scores: Scores, base: Scores) -> tuple[float, float, float] | None:
    """What is learned of the photos, and what is kept of scenes and class, each 0..1; None if a score is missing.

    Learned: the share of the base's loss on the photos that is gone. Scenes: ``scene_kept``. Class:
    ``1 / (1 + class_drift)``.
    """
    try:
        learned = 1 - scores[PHOTO_LOSS] / base[PHOTO_LOSS]
        scene, drift = scores[SCENE_KEPT], scores[CLASS_DRIFT]
    except (KeyError, ZeroDivisionError):
        return None
    return max(0.0, learned), min(1.0, max(0.0, scene)), 1 / (1 + max(0.0, drift))


def share_curves(scores: Mapping[int, Scores]) -> dict[str, list[list[float]]]:
    """The shares as curves for a chart: "subject", "scenes" and "class", each ``[[step, share], ...]``."""
    curves: dict[str, list[list[float]]] = {}
    for step in sorted(scores):
        if (found := shares(scores[step], scores.get(0, {}))) is not None:
            for name, share in zip(("subject", "scenes", "class"), found, strict=True):
                curves.setdefault(name, []).append([step, share])
    return curves
