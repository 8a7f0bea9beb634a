"""Pictures of DreamBooth runs are kept: the same to the last bit, and judged anew without a run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.demo.making import measure_dreambooth as module
from subjectbooth.demo.making.gain import photos
from subjectbooth.demo.making.judge import LoadedJudge
from subjectbooth.demo.making.judge_embedder import OTHER_CAPTIONS
from subjectbooth.demo.making.kept_pictures import keep_pictures, kept_pictures
from subjectbooth.demo.making.measure_dreambooth import (
    DRIFT_BACKGROUNDS,
    NEW_SCENES,
    PICTURES_OF_A_SCENE,
    STEPS,
    WAYS,
    measure_dreambooth,
)


def test_kept_as_they_are_and_only_for_what_made_them(tmp_path: Path) -> None:
    every_byte = torch.arange(256).repeat(3 * 16).view(1, 3, 64, 64).float() / 255
    path = tmp_path / "run.pt"
    assert kept_pictures(path, {"rate": 2e-3}) is None
    keep_pictures(path, {"like": every_byte}, {"rate": 2e-3, "pictures": [16, 4]})
    again = kept_pictures(path, {"rate": 2e-3, "pictures": [16, 4]})
    assert again is not None and torch.equal(again["like"], every_byte)
    assert kept_pictures(path, {"rate": 1e-3, "pictures": [16, 4]}) is None
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_another_judge_needs_no_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_SUBJECTS", "dog")
    monkeypatch.setenv("DEMO_STEPS", str(STEPS))
    runs: list[dict[str, Any]] = []

    def pictures_of_run(client: object, name: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Stands for a run of six minutes: the subject comes out as in its held-out photos, the class as a clock."""
        runs.append(settings)
        assert name == "dog"
        dog, clock = photos("dog", "heldout"), photos("clock", "heldout")
        scenes = dog.repeat(len(NEW_SCENES) * PICTURES_OF_A_SCENE // len(dog), 1, 1, 1)
        after = dog if settings["preservation"] == "none" else clock
        pair = torch.stack([dog[0], clock[0]])  # of two seeds
        prompts = 1 + len(DRIFT_BACKGROUNDS) + len(OTHER_CAPTIONS) + 2
        drift = {"drift_before": pair.repeat(prompts, 1, 1, 1), "drift_after": pair.flip(0).repeat(prompts, 1, 1, 1)}
        drift["drift_after"][: 2 * (1 + len(DRIFT_BACKGROUNDS))] = pair.repeat(1 + len(DRIFT_BACKGROUNDS), 1, 1, 1)
        return {"before": clock, "like": dog, "after": after, "scenes": scenes, **drift}

    monkeypatch.setattr(module, "comfyui", nullcontext)
    monkeypatch.setattr(module, "pictures_of_run", pictures_of_run)
    kept: list[dict[str, Any]] = []
    judge = LoadedJudge()
    first = measure_dreambooth(judge, {}, kept.append, tmp_path)
    assert [run["preservation"] for run in runs] == list(WAYS) and len(kept) == 3
    assert [run["class_images"] for run in runs] == [0, 32, 0]
    _, with_images, without = first["rows"].values()
    assert with_images["gain"] == pytest.approx(1) and with_images["gain_in_new_scenes"] == pytest.approx(1)
    assert with_images["class_prompt_is_the_subject"] == 0 and with_images["class_prompt_is_the_class"] == 0
    assert without["class_prompt_is_the_subject"] == 1 and without["class_prompt_is_the_class"] == 1
    assert with_images["class_before"] == 0
    assert first["drift_class_mean"] == 0 and first["drift_others_mean"] == pytest.approx(1)

    assert measure_dreambooth(judge, first, kept.append, tmp_path) == first and len(kept) == 3
    other = measure_dreambooth(judge, {**first, "judge": "another"}, kept.append, tmp_path)
    assert len(runs) == 3 and len(kept) == 6, "the pictures are judged again, and no run is made"
    assert other == first
    monkeypatch.setitem(module.SETTINGS, "learning_rate", 1e-3)
    measure_dreambooth(judge, first, kept.append, tmp_path)
    assert len(runs) == 6, "other settings are another run"
