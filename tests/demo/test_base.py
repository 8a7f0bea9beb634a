"""The demo base that ships: its words, its file, its pictures."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from subjectbooth.demo import base
from subjectbooth.demo.making.classes import CLASS_WORDS, RARE_TOKENS, article, caption
from subjectbooth.demo.making.narrow import load_narrow
from subjectbooth.demo.making.schedule import sample
from subjectbooth.demo.making.words import token_ids, vocabulary
from subjectbooth.tests.comfy_server import find_comfyui

ROOT = Path(__file__).resolve().parents[2]


def test_the_word_table_is_the_real_tokenizer() -> None:
    from transformers import CLIPTokenizer

    comfyui = find_comfyui(ROOT)
    if comfyui is None:
        pytest.skip("no ComfyUI here, which brings CLIP's vocabulary")
    files = comfyui / "comfy" / "sd1_tokenizer"
    tokenizer = CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"))
    texts = [caption(word, "red", rare) for word in CLASS_WORDS for rare in (None, "ohwx")]
    expected = tokenizer(texts, padding="max_length", max_length=77)["input_ids"]
    assert token_ids(texts).tolist() == expected
    assert all(len(tokenizer(word)["input_ids"]) == 3 for word in RARE_TOKENS)


def test_the_weights_are_small_and_know_every_word() -> None:
    assert base.WEIGHTS.stat().st_size < 25e6
    kept = set(base.read_packed()["text.vocabulary"].tolist())
    assert kept == set(vocabulary())


def test_the_checkpoint_is_written_once_and_quickly(tmp_path: Path) -> None:
    # Processor time: what else the machine does meanwhile is not this test's business.
    started = time.process_time()
    path = base.ensure_checkpoint(tmp_path / "new")
    assert time.process_time() - started < 30
    assert base.sha256_of(path) == base.manifest()["checkpoint"]
    stamp = path.stat().st_mtime_ns
    assert base.ensure_checkpoint(tmp_path / "new") == path
    assert path.stat().st_mtime_ns == stamp
    assert [p.name for p in path.parent.iterdir()] == [base.NAME]


def test_a_damaged_checkpoint_is_written_again(tmp_path: Path) -> None:
    path = base.ensure_checkpoint(tmp_path)
    with path.open("r+b") as handle:
        handle.seek(1_000_000)
        handle.write(b"damaged")
    base.ensure_checkpoint(tmp_path)
    assert base.sha256_of(path) == base.manifest()["checkpoint"]
    path.write_bytes(path.read_bytes()[:1000])
    base.ensure_checkpoint(tmp_path)
    assert base.sha256_of(path) == base.manifest()["checkpoint"]


def test_damaged_weights_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "weights.safetensors"
    shutil.copyfile(base.WEIGHTS, copy)
    with copy.open("r+b") as handle:
        handle.seek(-100, 2)
        handle.write(b"x" * 100)
    monkeypatch.setattr(base, "WEIGHTS", copy)
    with pytest.raises(ValueError, match="damaged"):
        base.ensure_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def write() -> None:
        try:
            base.ensure_checkpoint(tmp_path)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [p.name for p in tmp_path.iterdir()] == [base.NAME]
    assert base.sha256_of(tmp_path / base.NAME) == base.manifest()["checkpoint"]


def test_captions_read_as_english() -> None:
    assert caption("dog", None) == "a photo of a dog"
    assert caption("octopus", "orange") == "a photo of an octopus on an orange background"
    assert caption("dog", "beach", "ohwx", with_article=False) == "a photo of ohwx dog on a beach"
    assert article("grapes") == ""


def test_the_background_asked_for_is_drawn() -> None:
    """Corner pixels of pictures over plain colours, far apart from each other: no judge needed to see it."""
    nets = load_narrow()
    colors = {"red": (216, 44, 44), "blue": (45, 105, 224), "green": (58, 166, 78), "white": (252, 252, 252)}
    captions = [caption(word, color) for word in ("dog", "rocket", "apple") for color in colors]
    latents = sample(nets.unet, nets.text, captions, list(range(len(captions))), steps=12)
    pictures = nets.decoder(latents).clamp(0, 1) * 255
    corners = torch.stack([pictures[:, :, y, x] for y in (2, 61) for x in (2, 61)]).median(0).values
    wanted = torch.tensor([colors[color] for _ in range(3) for color in colors]).float()
    distance = (corners[:, None] - torch.tensor(list(colors.values())).float()[None]).norm(dim=2)
    right = distance.argmin(1) == torch.arange(4).repeat(3)
    assert right.float().mean() >= 11 / 12
    assert (corners - wanted).norm(dim=1).median() < 60
