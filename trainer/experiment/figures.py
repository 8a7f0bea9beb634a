"""The names of the figures that a grid can show, and what each needs."""

from __future__ import annotations

from ..learn.probe import CLASS_DRIFT, HELD_OUT_LOSS, PHOTO_LOSS, SCENE_KEPT

SCORES: dict[str, str] = {
    PHOTO_LOSS: "training loss on the photos",
    HELD_OUT_LOSS: "training loss on crops that are not trained on",
    CLASS_DRIFT: "change of the prediction for the class; 0 is none",
    SCENE_KEPT: "how far prompts with a scene still work; 1 is as before",
}
"""What every run scores itself by, see docs/best-step.md; they need no embedder."""

MEASURES: dict[str, str] = {
    "subject": "subject to photos; higher is better",
    "subject_in_scenes": "the same in new scenes; higher is better",
    "drift_class": "change of the class; 0 is none, 1 another random picture",
    "drift_others": "change of other things and scenes; 0 is none, 1 another random picture",
    "pres_before": "class to photos, without the LoRA",
    "pres": "class to photos; should stay",
    "class_is_subject": "share of the plain class that is nearer to the photos; lower is better",
    "div": "variety of the subject; higher is better",
    "class_before": "share of the class recognised, without the LoRA",
    "class_after": "share of the class recognised; should stay",
    "scenes_right": "share of new scenes recognised; higher is better",
}
"""What is measured on pictures, see docs/evaluating.md; they need an embedder, those of recognition one that names."""

MEANINGS = {**SCORES, **MEASURES}

DEFAULT = ("subject", "subject_in_scenes", "drift_class", "drift_others", "class_is_subject", SCENE_KEPT)
