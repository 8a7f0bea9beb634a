"""The judge: it knows the subjects' photos, several nets speak with one voice, and finished nets are kept."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from subjectbooth.demo.making import judge
from subjectbooth.demo.making.classes import CLASS_WORDS
from subjectbooth.demo.making.gain import photos
from subjectbooth.demo.making.judge import ALL_STYLES, LoadedJudge, train_judge
from subjectbooth.demo.making.recolour import varied
from subjectbooth.demo.making.subjects import SUBJECTS
from subjectbooth.tests.demo.test_build import write_drawings


def test_it_knows_the_subjects_photos() -> None:
    shipped = LoadedJudge()
    for name in ("dog", "clock", "car", "penguin"):
        verdict = shipped.classify(photos(name, "heldout"))
        assert set(verdict.word) == {SUBJECTS[name].class_word}
        assert set(verdict.style) == {"fluent"}, "the set that supplies the subjects"


def test_several_nets_are_averaged(tmp_path: Path) -> None:
    shipped = LoadedJudge()
    metadata = {
        "words": "|".join(w for w, _ in shipped.names),
        "styles": "|".join(s for _, s in shipped.names),
    }
    first = shipped.nets[next(iter(shipped.nets))].state_dict()
    torch.manual_seed(0)
    second = {
        k: v + 0.3 * v.std() * torch.randn_like(v) if k.endswith("weight") else v.clone() for k, v in first.items()
    }
    pictures = photos("dog", "heldout")
    alone = []
    for i, state in enumerate((first, second)):
        save_file({f"0.{k}": v.contiguous() for k, v in state.items()}, tmp_path / f"{i}.safetensors", metadata)
        alone.append(LoadedJudge(tmp_path / f"{i}.safetensors").classify(pictures))
    both = {f"{i}.{k}": v.contiguous() for i, state in enumerate((first, second)) for k, v in state.items()}
    save_file(both, tmp_path / "both.safetensors", metadata)
    together = LoadedJudge(tmp_path / "both.safetensors").classify(pictures)
    cosines = [verdict.embedding @ verdict.embedding.T for verdict in alone]
    assert not torch.allclose(*cosines, atol=1e-3)
    torch.testing.assert_close(together.embedding @ together.embedding.T, torch.stack(cosines).mean(0))
    for name in ("drawing_probability", "word_probability"):
        torch.testing.assert_close(
            getattr(together, name), torch.stack([getattr(verdict, name) for verdict in alone]).mean(0)
        )


def test_the_four_ways_differ_in_drawings_and_in_wear() -> None:
    """Both wears take a chessboard of single pixels away in some pictures, and leave smooth ones as they are."""
    assert len(set(judge.WAYS)) == 4 and {change for change, _ in judge.WAYS} == {None, varied}
    place = torch.arange(64)
    chessboard = ((place[:, None] + place) % 2).float().expand(64, 3, 64, 64)
    smooth = torch.linspace(0.2, 0.8, 64).expand(64, 3, 64, 64)
    for wear in {wear for _, wear in judge.WAYS}:
        contrast = torch.cat([wear(chessboard, random.Random(seed)).std((1, 2, 3)) for seed in range(8)])
        assert contrast.min() < 0.1 and contrast.max() == pytest.approx(0.5, abs=1e-3)
        assert 0.2 < (contrast < 0.4).float().mean() < 0.9
        torch.testing.assert_close(wear(smooth, random.Random(1)), smooth, atol=0.03, rtol=0)


def test_finished_nets_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_drawings(tmp_path / "npm" / f"library-{'-'.join(ALL_STYLES)}.npz", CLASS_WORDS)
    monkeypatch.setattr(judge, "WEIGHTS", tmp_path / "judge.safetensors")
    monkeypatch.setattr(judge, "WAYS", judge.WAYS[1:3])
    trained: list[int] = []

    def one_step(pictures: object, way: int) -> dict[str, torch.Tensor]:
        trained.append(way)
        return real(pictures, way)

    real = partial(judge._trained, steps=1)
    monkeypatch.setattr(judge, "_trained", one_step)
    train_judge(tmp_path)
    written = load_file(tmp_path / "judge.safetensors")
    (tmp_path / "judge-1.pt").unlink()
    train_judge(tmp_path)
    assert trained == [0, 1, 1]
    again = load_file(tmp_path / "judge.safetensors")
    assert {key[0] for key in again} == {"0", "1"} and all(torch.equal(again[k], v) for k, v in written.items())
    assert not torch.equal(again["0.embed.weight"], again["1.embed.weight"])
