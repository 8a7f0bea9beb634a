"""The build's own command: a stage goes on where it was stopped, `wide` grows from `autoencoder`, and `encoder`
leaves the decoder alone.

With drawings of plain colours in place of the npm packages, and two processes as in the real thing. The stages of the
UNet take minutes to start (thousands of latents, a compilation), so only the autoencoder's are run here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subjectbooth.demo.making.autoencoder import decoder_widths, encoder_widths
from subjectbooth.demo.making.build import AUTOENCODER, DIFFUSION, WIDE, finished
from subjectbooth.demo.making.classes import CLASS_WORDS, STYLES
from subjectbooth.demo.making.narrow import load_narrow
from subjectbooth.demo.making.pack import unpack
from subjectbooth.demo.making.perceptual import Eye
from subjectbooth.demo.making.pictures import SIDE
from subjectbooth.demo.making.train_autoencoder import load_autoencoder

ROOT = Path(__file__).resolve().parents[2]


def write_drawings(path: Path, words: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((len(words), SIDE, SIDE, 4), 255, np.uint8)
    pixels[..., :3] = rng.integers(0, 256, (len(words), 1, 1, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, pixels=pixels, words=np.array(words), styles=np.array(["noto"] * len(words)))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder whose drawings are there already."""
    folder = tmp_path_factory.mktemp("work")
    write_drawings(folder / "npm" / f"library-{'-'.join(STYLES)}.npz", CLASS_WORDS)
    write_drawings(folder / "npm" / f"everything-{'-'.join(STYLES)}.npz", tuple(f"icon {i}" for i in range(20)))
    torch.save(Eye().state_dict(), folder / "eye.pt")
    return folder


def build(work: Path, stage: str, minutes: float) -> dict[str, Any]:
    """What a stage saves."""
    command = [sys.executable, "-m", "demo.making.build", stage, "--minutes", str(minutes), "--work", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(rf"{stage} finished: held out [\d.]+ dB", done.stderr), done.stderr[-2000:]
    saved: dict[str, Any] = torch.load(work / f"{stage}.pt", weights_only=True)
    return saved


@pytest.mark.skipif(
    not os.environ.get("SUBJECTBOOTH_SLOW"), reason="three stages of the base's training: set SUBJECTBOOTH_SLOW=1"
)
def test_a_stage_goes_on_where_it_was_stopped_and_the_next_grows_from_it(work: Path) -> None:
    first = build(work, "autoencoder", 0.03)
    assert first["step"] > 0 and first["spent"] >= 0.03 * 60
    assert finished(work, replace(AUTOENCODER, minutes=0.03)) and not finished(work, WIDE)
    assert not finished(work, AUTOENCODER), "a longer schedule goes on"
    again = build(work, "autoencoder", 0.03)
    assert again["step"] == first["step"], "its time is used up"
    assert all(torch.equal(again["nets"][name], value) for name, value in first["nets"].items())
    longer = build(work, "autoencoder", again["spent"] / 60 + 0.08)
    assert longer["step"] > first["step"] and longer["spent"] > first["spent"]
    moments = [state["exp_avg"] for state in longer["optimizers"][0]["state"].values()]
    assert moments and all(torch.isfinite(m).all() for m in moments)
    assert next(iter(longer["optimizers"][0]["state"].values()))["step"] == longer["step"]

    wide = build(work, "wide", 0.02)
    halves = {
        half: {k[8:]: v for k, v in wide["nets"].items() if k.startswith(half)} for half in ("encoder", "decoder")
    }
    assert tuple(encoder_widths(halves["encoder"])) == WIDE.encoder_widths
    assert tuple(decoder_widths(halves["decoder"])) == WIDE.decoder_widths
    # Few steps from the grown net: its first channels are still nearly those it grew from.
    narrow = longer["nets"]["encoder.3.conv.0.weight"]
    grown = wide["nets"]["encoder.3.conv.0.weight"][: AUTOENCODER.encoder_widths[1], : AUTOENCODER.encoder_widths[1]]
    assert float(torch.nn.functional.cosine_similarity(narrow.flatten(), grown.flatten(), dim=0)) > 0.8

    encoder = build(work, "encoder", 0.02)
    assert encoder["step"] > 0
    same = {name: torch.equal(value, wide["nets"][name]) for name, value in encoder["nets"].items()}
    assert all(kept == name.startswith("decoder") for name, kept in same.items())


def test_the_shipped_weights_come_back_as_training_states_once(tmp_path: Path) -> None:
    unpack(tmp_path, "diffusion", "wide", later=["rare"])
    shipped = load_narrow()
    encoder, decoder = load_autoencoder(tmp_path, "wide")
    for found, wanted in ((encoder, shipped.encoder), (decoder, shipped.decoder)):
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in wanted.state_dict().items())
    assert not finished(tmp_path, DIFFUSION) and not finished(tmp_path, WIDE), "they are there to be trained on"
    unet = torch.load(tmp_path / "diffusion.pt", weights_only=True)["ema"]
    assert all(torch.equal(value, unet[f"unet.{name}"]) for name, value in shipped.unet.state_dict().items())
    with pytest.raises(FileExistsError, match="diffusion.pt"):
        unpack(tmp_path, "diffusion", "wide", later=["rare"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rare.pt").touch()
    with pytest.raises(FileExistsError, match="rare.pt"):
        unpack(tmp_path / "other", "diffusion", "wide", later=["rare"])
    assert len(list((tmp_path / "other").iterdir())) == 1
