"""The measures on the narrow model, with few pictures of one denoising step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from subjectbooth.demo.making import narrow_measures
from subjectbooth.demo.making.classes import caption
from subjectbooth.demo.making.gain import CFG, photos
from subjectbooth.demo.making.judge import LoadedJudge
from subjectbooth.demo.making.judge_embedder import OTHER_CAPTIONS, OTHER_WORDS, JudgeEmbedder
from subjectbooth.demo.making.measure import draw
from subjectbooth.demo.making.narrow import Narrow, load_narrow
from subjectbooth.demo.making.narrow_measures import DRIFT_SEED, measures_of
from subjectbooth.demo.making.subjects import SUBJECTS
from subjectbooth.demo.making.words import token_ids
from subjectbooth.trainer.measure.embedding import Namer
from subjectbooth.trainer.measure.figures import drift

OTHERS = ("a photo of a rose", "a photo of a key on a red background")
PICTURES = 3


@pytest.fixture(scope="module")
def judge() -> LoadedJudge:
    return LoadedJudge()


@pytest.fixture(scope="module")
def nets() -> Narrow:
    return load_narrow()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Narrow, int]]]:
    """Few pictures; lists whose nets drew how many."""
    calls: list[tuple[Narrow, int]] = []

    def counted(nets: Narrow, captions: list[str], *arguments: object) -> torch.Tensor:
        calls.append((nets, len(captions)))
        return draw(nets, captions, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(narrow_measures, "draw", counted)
    monkeypatch.setattr(narrow_measures, "SAMPLE_STEPS", 1)
    monkeypatch.setattr(narrow_measures, "PICTURES", PICTURES)
    monkeypatch.setattr(narrow_measures, "OTHER_CAPTIONS", OTHERS)
    narrow_measures._before.cache_clear()
    narrow_measures._embedded_before.cache_clear()
    yield calls
    narrow_measures._before.cache_clear()
    narrow_measures._embedded_before.cache_clear()


def test_untrained_nets_have_not_drifted_and_changed_ones_have(
    judge: LoadedJudge, nets: Narrow, drawn: list[tuple[Narrow, int]]
) -> None:
    same = measures_of(nets, nets, judge, "dog", seeds=2)
    assert same["drift_class"] == pytest.approx(0, abs=1e-5) and same["drift_others"] == pytest.approx(0, abs=1e-5)
    assert same["class_prompt_is_the_class"] == same["class_before"]
    unet = copy.deepcopy(nets.unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter *= 1.02
    changed = replace(nets, unet=unet)
    drawn.clear()
    found = measures_of(nets, changed, judge, "dog", seeds=2)
    assert not [count for by, count in drawn if by is nets], "the pictures before are kept"

    def embedded(by: Narrow) -> torch.Tensor:
        rows = [draw(by, [text], [DRIFT_SEED + i], 1, CFG) for i, text in enumerate(t for t in OTHERS for _ in "12")]
        return judge.classify(torch.cat(rows)).embedding.view(2, 2, -1)

    assert found["drift_others"] == pytest.approx(float(drift(embedded(nets), embedded(changed)).mean()), abs=1e-3)
    assert found["drift_others"] > 0.01
    plain = judge.classify(draw(changed, ["a photo of a dog"] * PICTURES, [100, 101, 102], 1, CFG)).embedding
    expected = (plain @ judge.classify(photos("dog", "train")).embedding.T).mean()
    assert found["pres"] == pytest.approx(float(expected), abs=1e-3)
    assert set(found) == {
        "gain", "gain_in_new_scenes", "background_in_new_scenes", "drift_class", "drift_others", "pres", "div",
        "class_prompt_is_the_subject", "class_prompt_is_the_class", "class_before",
    }  # fmt: skip


def test_other_captions_are_of_no_subject_and_in_the_vocabulary() -> None:
    assert len(set(OTHER_CAPTIONS)) == len(set(OTHER_WORDS)) == 24
    assert not set(OTHER_WORDS) & {subject.class_word for subject in SUBJECTS.values()}
    assert sum("background" in text for text in OTHER_CAPTIONS) >= 4
    assert token_ids(OTHER_CAPTIONS).shape == (24, 77)


def test_the_judge_names_classes_and_scenes(judge: LoadedJudge) -> None:
    embedder = JudgeEmbedder(judge)
    assert isinstance(embedder, Namer)
    pictures = photos("clock", "heldout")  # on blue, pink, a beach and red
    classes = [caption(word, None) for word in ("dog", "clock")]
    scenes = [caption("dog", background) for background in ("blue", "pink", "beach", "night")]
    assert embedder.names(pictures, classes) == [classes[1]] * 4
    assert embedder.names(pictures, scenes) == [scenes[0], scenes[1], scenes[2], ""]


def test_the_judge_embeds_images_of_any_size(judge: LoadedJudge) -> None:
    embedder = JudgeEmbedder(judge)
    picture = photos("dog", "train")[:1]
    expected = judge.classify(picture).embedding
    assert torch.equal(embedder.embed(picture), expected)
    larger = picture.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(embedder.embed(larger), expected)
    with_bars = torch.nn.functional.pad(larger, (16, 16))
    torch.testing.assert_close(embedder.embed(with_bars), expected)
