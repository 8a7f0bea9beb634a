"""The same trainer from a shell, held against the one in ComfyUI."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import SIZE, cat_photos, subject_node, train_node, upload_cat
from subjectbooth.trainer.__main__ import main
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.files.safetensors_file import read_metadata
from subjectbooth.trainer.shell.options import parser
from subjectbooth.trainer.shell.recipe import read_subject
from subjectbooth.trainer.subject.subject import Subject, caption_lines

ROOT = Path(__file__).resolve().parents[2]


def run_in_shell(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "trainer", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same command in this process, which has imported already what takes a new one ten seconds."""
    said, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(errors):
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), errors.getvalue())


def write_photos(folder: Path) -> Path:
    folder.mkdir()
    for number, content in enumerate(cat_photos()):
        (folder / f"кот {number}.png").write_bytes(content)
    return folder


def _arguments(checkpoint: Path, photos: Path, output: Path, *more: str) -> list[str]:
    return [
        "--base",
        str(checkpoint),
        "--photos",
        str(photos),
        "--class-word",
        "cat",
        "--output_dir",
        str(output),
        "--output_name",
        "cat",
        "--resolution",
        str(SIZE),
        "--steps",
        "4",
        "--rank",
        "4",
        "--network_alpha",
        "2",
        "--learning_rate",
        "0.01",
        "--cpu",
        *more,
    ]


@pytest.mark.oldest
def test_the_shell_trains_what_comfyui_trains(comfy: ComfyClient, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On a caption with round brackets too, which ComfyUI's prompts give another meaning."""
    photos = write_photos(tmp_path / "my photos")
    template = r"a photo of {token} {class} (toy) \(outdoors\), ((big:1.4"
    done = run_in_shell(
        *_arguments(tiny_checkpoint, photos, tmp_path / "out", "--seed", "9", "--prompt_template", template)
    )
    assert done.returncode == 0, done.stderr
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy), prompt_template=template),
        "11": train_node(steps=4, learning_rate=0.01, seed=9, output_name="as_in_shell", preservation="curvature"),
    }
    comfy.run(graph)
    shell = safetensors.torch.load_file(tmp_path / "out" / "cat.safetensors")
    graph_made = safetensors.torch.load_file(comfy.server.models_dir / "loras" / "as_in_shell.safetensors")
    assert shell.keys() == graph_made.keys()
    losses = losses_of(tmp_path / "out" / "runs"), losses_of(comfy.server.output_dir / "subjectbooth", seed=9)
    print(f"losses from the shell {losses[0]}, in ComfyUI {losses[1]}")
    # The graph trains on ComfyUI's own module, the shell on a diffusers UNet; Adam's first steps enlarge rounding.
    assert losses[0] == pytest.approx(losses[1], rel=5e-3) and losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    # Adam divides by the gradient's size, so single weights whose gradient is about 0 go either way.
    up = [name for name in shell if "lora_up" in name]
    apart = torch.cat([(shell[name] - graph_made[name]).flatten() for name in up]).norm()
    moved = torch.cat([shell[name].flatten() for name in up]).norm()
    print(f"adapters differ by {float(apart / moved):.2%} of what was learned")
    assert float(apart) < 0.05 * float(moved)


def losses_of(runs: Path, seed: int = 9, steps: int = 4) -> list[float]:
    """The losses of the latest run with this seed and so many steps."""
    logs = sorted(runs.glob("*/events.jsonl"), key=lambda log: log.stat().st_mtime, reverse=True)
    for log in logs:
        done = [json.loads(line) for line in log.read_text("utf-8").splitlines() if '"StepDone"' in line]
        settings = json.loads((log.parent / "run.json").read_text("utf-8"))["config"]
        if settings["seed"] == seed and settings["steps"] == steps:
            return [step["loss"] for step in done]
    raise AssertionError(f"no such run below {runs}")


def test_captions_of_the_shell(tmp_path: Path) -> None:
    """Those next to the photos are read unless the template is asked for, and what each photo gets is known."""
    folder = write_photos(tmp_path / "photos")
    for number, caption in enumerate(["{token} on a {class} bed", "ФОТО OHWX СОБАКА"]):
        (folder / f"кот {number}.txt").write_text(caption, encoding="cp1251")

    def subject(*more: str) -> Subject:
        arguments = _arguments(tmp_path / "no.safetensors", folder, tmp_path / "out", *more)
        return read_subject(parser().parse_args(arguments), SIZE)

    filled = "a photo of ohwx cat"
    assert [photo.caption for photo in subject().photos] == ["ohwx on a cat bed", "ФОТО OHWX СОБАКА", filled]
    assert "кот 2.png has no caption file: prompt_template is used." in subject().warnings
    assert caption_lines(subject())[1] == "кот 1.png: ФОТО OHWX СОБАКА"
    template = subject("--captions", "template")
    assert [photo.caption for photo in template.photos] == [filled] * 3
    assert any("кот 0.txt and кот 1.txt are ignored" in warning for warning in template.warnings)
    with pytest.raises(SubjectBoothError, match=r"Caption file кот 2\.txt not found"):
        subject("--captions", "files")


@pytest.mark.oldest
def test_class_images_and_a_second_call_from_the_shell(tiny_checkpoint: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    arguments = _arguments(
        tiny_checkpoint,
        photos,
        tmp_path / "out",
        "--num_class_images",
        "2",
        "--validation_prompts",
        "a photo of {subject}",
    )
    first = run_here(*arguments)
    assert first.returncode == 0, first.stderr
    assert "trained:" in first.stdout
    metadata = read_metadata(tmp_path / "out" / "cat.safetensors")
    assert metadata["ss_num_reg_images"] == "2"
    assert len(list((tmp_path / "out" / "runs").glob("*/validation/step_*.png"))) == 1
    (grid,) = (tmp_path / "out" / "runs").glob("*/validation/grid.png")
    assert f"validation images of all steps: {grid}" in first.stdout
    published = tmp_path / "out" / "cat.safetensors"
    published.write_bytes(published.read_bytes() + b"\0")  # somebody's edit
    second = run_here(*arguments)
    assert "already trained" in second.stdout
    assert "cat.safetensors was edited after it was published and is kept: this LoRA is saved as cat_2" in second.stderr
    assert published.read_bytes()[-1:] == b"\0"
    assert (tmp_path / "out" / "cat_2.safetensors").is_file()
    without_guidance = run_here(*arguments, "--class_guidance_scale", "1", "--output_name", "other")
    assert "trained:" in without_guidance.stdout, without_guidance.stderr
    recipes = (tmp_path / "out" / "class_images").glob("*/recipe.json")
    assert sorted(json.loads(path.read_text("utf-8"))["cfg"] for path in recipes) == [1.0, 7.0]


def test_stop_keep_and_continue_from_the_shell(tiny_checkpoint: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    arguments = _arguments(tiny_checkpoint, photos, tmp_path / "out", "--validation_interval", "2")
    kept = run_here(*arguments, "--use_step", "latest")
    assert "stopped and kept at step 1 of 4" in kept.stdout, kept.stderr
    assert read_metadata(tmp_path / "out" / "cat.safetensors")["subjectbooth.step"] == "1"
    assert "already trained (stopped and kept at step 1 of 4)" in run_here(*arguments).stdout
    assert "trained:" in run_here(*arguments, "--after_stop", "continue").stdout
    assert read_metadata(tmp_path / "out" / "cat.safetensors")["subjectbooth.step"] == "4"

    chosen = run_here(*arguments, "--use_step", "2")
    assert "already trained (using step 2, chosen by --use_step): " in chosen.stdout, chosen.stderr
    assert read_metadata(tmp_path / "out" / "cat.safetensors")["subjectbooth.step"] == "2"
    assert not (tmp_path / "out" / "cat_2.safetensors").exists()
    refused = run_here(*arguments, "--use_step", "3")
    assert (refused.returncode, "Use 2 or 4, the nearest" in refused.stderr) == (2, True), refused.stderr
    assert "already trained: " in run_here(*arguments).stdout
    assert read_metadata(tmp_path / "out" / "cat.safetensors")["subjectbooth.step"] == "4"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rank", "0"], "rank 0. Required: a whole number from 1 to 1024"),
        (["--learning_rate", "nan"], "learning_rate nan. Required: a number"),
        (["--class_guidance_scale", "0"], "class_guidance_scale 0. Required: a number from 1 to 100"),
        (["--resolution", "100"], "resolution 100. Required: a multiple of 8"),
        (["--output_name", "../x"], "leaves the LoRA folder"),
        (["--rank", "400"], "rank 400. Required: 320 or less"),
    ],
)
def test_a_mistake_is_one_sentence(tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = run_here(*_arguments(tiny_checkpoint, write_photos(tmp_path / "photos"), tmp_path / "out", *arguments))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistyped_checkpoint_is_refused_at_once(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path / "nothing.safetensors", write_photos(tmp_path / "photos"), tmp_path / "out")
    done = run_in_shell(*arguments, python=("-X", "importtime"))
    assert done.returncode == 2
    assert "The checkpoint was not found. Required: a file or folder" in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "torch" in imported
    assert not {"diffusers", "transformers", "peft", "accelerate"} & imported, "they take seconds"


def test_output_that_cannot_hold_every_letter_ends_no_run(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a file or a pipe Windows writes in the system's code page."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    arguments = _arguments(tiny_checkpoint, write_photos(tmp_path / "photos"), tmp_path / "выход")
    assert main(arguments) == 0
    sys.stdout.flush()
    assert "trained: " in written.getvalue().decode("cp1252")
