"""Training on the connected model itself, of every family, small, in the real ComfyUI."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from subjectbooth.tests.comfy_server import ComfyClient, NodeFailed, RunResult
from subjectbooth.tests.nodes.graphs import Graph, node
from subjectbooth.tests.nodes.test_cancel import run_and_cancel
from subjectbooth.tests.nodes.test_harness import pixels
from subjectbooth.tests.nodes.training_graphs import apply_node, cat_photos, subject_node, train_node, upload_cat

KINDS = ("SD 3.5", "Flux.1", "Flux.2", "Z-Image", "Qwen-Image", "Chroma")
LAYERS = {
    "SD 3.5": (9, 15, 19), "Flux.1": (6, 10, 13), "Flux.2": (6, 10, 10), "Z-Image": (6, 15, 17),
    "Qwen-Image": (16, 24, 28), "Chroma": (6, 10, 10), "Krea 2": (30, 48, 48), "Ideogram 4": (4, 10, 12),
    "Anima": (16, 20, 32), "Ernie-Image": (8, 14, 14), "AuraFlow": (12, 21, 24),
    "HunyuanImage 2.1": (10, 18, 23), "HiDream": (12, 33, 35), "OmniGen2": (12, 21, 23),
    "Cosmos Predict2": (16, 20, 32), "Wan 2.1": (16, 20, 20), "Wan 2.2 5B": (16, 20, 20),
    "Lumina 2": (6, 15, 17), "PixArt": (5, 7, 7), "HunyuanDiT": (20, 28, 33), "Chroma Radiance": (6, 10, 10),
    "Kandinsky 5": (12, 16, 18), "LongCat-Image": (6, 10, 13), "MageFlow": (16, 24, 28), "Lens": (8, 20, 24),
    "Boogu": (25, 40, 47), "JoyImage": (8, 16, 16),
}  # fmt: skip
"""How many layers `lora_targets` names, in its order, as read from the models' code: no modulation among the first two,
no projection of a prompt or a time outside of the blocks at all."""
MORE_KINDS = tuple(kind for kind in LAYERS if kind not in KINDS)
"""Of which a ComfyUI has those that are not newer than itself."""
UNKNOWN = "of tomorrow"
MIDDLE = {
    "SD 3.5": 3 / 4, "Qwen-Image": 2.2 / 3.2, "Chroma": 1 / 2, "Krea 2": 2.5 / 3.5, "Anima": 1 / 2, "Wan 2.1": 3 / 4,
    "Cosmos Predict2": 1,
}  # fmt: skip
"""Sigma at the middle of the times: with the shift of training, and of Cosmos the ratio of noise to latents."""
STEPS = 4
STEP_COST = {"kernels": 40, "casts": 5, "syncs": 2}
"""What a step on the connected model asks of a device beside a bare loop on it; recorded, and to be lowered. On 0.33.0:
0.3.75 takes one kernel less."""


@pytest.fixture
def known_kind(kind: str, comfy: ComfyClient) -> str:
    """The test's family, if this ComfyUI has it."""
    if kind not in comfy.object_info("ProbeWiredBase")["input"]["required"]["kind"][0]:
        pytest.skip(f"this ComfyUI has no {kind}")
    return kind


def wired_graph(comfy: ComfyClient, kind: str, *, stored: str = "float32", seed: int = 3, **train: Any) -> Graph:
    """ "1" base, "10" subject, "11" trainer, "12" apply, "90" the comparison of both predictions."""
    settings = {"steps": STEPS, "output_name": f"wired {kind}", "seed": 5, "resolution": 128, **train}
    wired = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    return {
        "1": node("ProbeWiredBase", kind=kind, seed=seed, stored=stored),
        "10": subject_node(upload_cat(comfy)),
        "11": train_node(**settings),
        "12": apply_node(),
        "90": node("ProbeWired", **wired, applied=["12", 0], subject_lora=["11", 0], kind=kind, seed=seed),
    }


def test_a_step_costs_no_more_than_it_did(comfy: ComfyClient) -> None:
    """As tests/trainer/learn/test_step_cost.py, for the connected model."""
    wired = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "subject": ["10", 0]}
    graph = {
        "1": node("ProbeWiredBase", kind="SD 3.5", seed=3, stored="float32"),
        "10": subject_node(upload_cat(comfy)),
        "90": node("ProbeStepCost", **wired),
    }
    step, bare = (comfy.run(graph).outputs["90"]["report"][0][name] for name in ("trainer", "bare"))
    assert bare["kernels"] > 400 and bare["syncs"] == 0
    assert step["flop"] == bare["flop"]
    more = {name: step[name] - bare[name] for name in STEP_COST}
    assert all(more[name] <= STEP_COST[name] for name in more), more


def steps_of(comfy: ComfyClient, result: RunResult) -> list[dict[str, Any]]:
    run = result.outputs["11"]["subjectbooth"][0]["run"]
    log = comfy.server.output_dir / "subjectbooth" / run / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [line for line in lines if line["event"] == "StepDone"]


def losses_of(comfy: ComfyClient, result: RunResult) -> list[float]:
    return [step["loss"] for step in steps_of(comfy, result)]


def pictures_of(comfy: ComfyClient, result: RunResult) -> list[np.ndarray]:
    """The validation images, in order of steps."""
    return [pixels(comfy, picture) for picture in result.outputs["11"]["images"]]


def lora_path(comfy: ComfyClient, result: RunResult) -> Path:
    return comfy.server.models_dir / "loras" / result.outputs["11"]["subjectbooth"][0]["lora"]


def lora_of(comfy: ComfyClient, result: RunResult) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(lora_path(comfy, result))


def masked_photos() -> list[bytes]:
    """A wide and a square photo, whose left third is transparent."""
    files = []
    for photo, size in zip(cat_photos(), ((256, 128), (128, 128)), strict=False):
        image = Image.open(io.BytesIO(photo)).convert("RGBA").resize(size)
        image.putalpha(Image.fromarray(np.where(np.indices(size[::-1])[1] < size[0] // 3, 0, 255).astype(np.uint8)))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS, UNKNOWN])
def test_trains_and_the_file_does_in_comfyui_what_the_trainer_saw(comfy: ComfyClient, known_kind: str) -> None:
    result = comfy.run(wired_graph(comfy, known_kind))
    shown = result.outputs["11"]["subjectbooth"][0]
    assert ("was never tried" in str(result.outputs["11"]["text"])) == (known_kind == UNKNOWN)
    lora = lora_of(comfy, result)
    layers = {name.removesuffix(".lora_B.weight") for name in lora if name.endswith(".lora_B.weight")}
    assert shown["matched"] == shown["layers"] == len(layers) > 0
    (report,) = result.outputs["90"]["report"]
    assert report["untouched"]
    assert report["difference"] < 1e-5 * max(1, report["scale"]) and report["effect"] > 100 * report["difference"]


@pytest.mark.parametrize(
    ("kind", "stored", "checkpointing"),
    [
        *((kind, "float32", False) for kind in KINDS),
        *((kind, "float8_e4m3fn", True) for kind in (*KINDS, *MORE_KINDS)),
    ],
)
def test_gradients_are_those_of_a_plain_copy(
    comfy: ComfyClient, known_kind: str, stored: str, checkpointing: bool
) -> None:
    """Without a copy of any weight, from fp8 as from its dequantised copy, and with blocks computed again; and the
    memory of a step is what was planned."""
    wired = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph = {
        "1": node("ProbeWiredBase", kind=known_kind, seed=3, stored=stored),
        "91": node("ProbeWiredGradients", **wired, checkpointing=checkpointing, nonce=0),
    }
    (report,) = comfy.run(graph).outputs["91"]["report"]
    assert report["loss"] == pytest.approx(report["plain_loss"], rel=1e-5)
    assert report["difference"] < 1e-5, report
    # The last block's text stream ends there, so that nothing of it reaches the picture.
    assert report["with_gradient"] >= 0.6 * report["layers"]
    assert report["copies"] == 0 and report["left"] == []
    assert tuple(report["targets"]) == LAYERS[known_kind] and report["nested"] and report["same_target"]
    assert report["middle"] == pytest.approx(MIDDLE.get(known_kind, report["middle"]))
    if not checkpointing:  # attention on a CPU keeps less than on a GPU
        assert 0.95 < report["planned"] / report["real"] < 1.5, report


@pytest.mark.parametrize("kind", ["SD 3.5", "Wan 2.1"])
def test_half_precision_learns_what_float32_learns(comfy: ComfyClient, known_kind: str) -> None:
    """The model computes in bf16 as it does when it is sampled, without autocast."""
    found = []
    for precision in ("fp32", "bf16"):
        graph = wired_graph(comfy, known_kind, precision=precision, steps=2, validation_prompts="", learning_rate=1e-3)
        result = comfy.run(graph, targets=("11",))
        found.append(losses_of(comfy, result))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in lora_of(comfy, result).values())
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.03)


def test_a_model_with_continuous_noise_levels_trains(comfy: ComfyClient) -> None:
    """EDM, which no family here has by itself: log-normal sigmas (arXiv 2206.00364, table 1), and what the LoRA does in
    ComfyUI is what the trainer saw."""
    graph = wired_graph(comfy, "SD 3.5", output_name="edm")
    given = {"sampling": "edm", "sigma_max": 80.0, "sigma_min": 0.002}
    graph["2"] = node("ModelSamplingContinuousEDM", model=["1", 0], **given)
    for number in ("11", "12", "90"):
        graph[number]["inputs"]["model"] = ["2", 0]
    wired = {"model": ["2", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph["91"] = node("ProbeTimes", **wired, sampling="auto", shift=0.0)
    result = comfy.run(graph)
    # exp(-1.2 + 1.2 x) of the standard normal's quantiles x, -1.2816, 0 and 1.
    assert result.outputs["91"]["report"][0]["sigmas"] == pytest.approx((0.064706, 0.301194, 1.0), rel=1e-4)
    assert all(np.isfinite(losses_of(comfy, result)))
    (report,) = result.outputs["90"]["report"]
    assert report["difference"] < 1e-5 * max(1, report["scale"]) and report["effect"] > 100 * report["difference"]


@pytest.mark.parametrize(
    ("kind", "node_shift", "sampling", "shift", "sigmas"),
    [
        # 1 / (1 + exp(-x)) of the standard normal's quantiles, -1.2816, 0 and 1; then s t / (1 + (s - 1) t). Shift 3
        # is that of Wan's training, 5 that of the node, and 2 the given one, before both.
        ("Wan 2.1", 0, "auto", 0.0, (0.454392, 0.75, 0.890768)),
        ("Wan 2.1", 5, "auto", 0.0, (0.581245, 5 / 6, 0.931467)),
        ("Wan 2.1", 5, "auto", 2.0, (0.357001, 2 / 3, 0.844638)),
        ("Wan 2.1", 0, "uniform", 0.0, (0.25, 0.75, 0.94086)),
        ("Wan 2.1", 5, "uniform", 1.0, (0.1, 0.5, 0.841345)),
        ("SD 3.5", 0, "uniform", 0.0, (0.25, 0.75, 0.94086)),
    ],
)
def test_times_and_shift_of_training(
    comfy: ComfyClient, kind: str, node_shift: float, sampling: str, shift: float, sigmas: tuple[float, ...]
) -> None:
    """What the family is trained with, or a ModelSampling node says, or the settings."""
    graph = {"1": node("ProbeWiredBase", kind=kind, seed=3, stored="float32")}
    if node_shift:
        graph["2"] = node("ModelSamplingSD3", model=["1", 0], shift=float(node_shift))
    wired = {"model": ["2" if node_shift else "1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph["91"] = node("ProbeTimes", **wired, sampling=sampling, shift=shift)
    (report,) = comfy.run(graph).outputs["91"]["report"]
    assert report["sigmas"] == pytest.approx(sigmas, abs=2e-6)


@pytest.mark.parametrize(
    ("sampling", "shift", "timesteps"),
    [("auto", 0.0, [100, 500, 841]), ("logit_normal", 0.0, [217, 500, 731]), ("auto", 3.0, [250, 750, 940])],
)
def test_both_paths_of_stable_diffusion_train_at_the_same_times(
    comfy: ComfyClient, sampling: str, shift: float, timesteps: list[int]
) -> None:
    wired = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "91": node("ProbeTimes", **wired, sampling=sampling, shift=shift),
    }
    (report,) = comfy.run(graph).outputs["91"]["report"]
    assert report["copied"] == report["timesteps"] == timesteps


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no backward", "A layer of the model has no gradient on cpu: You must implement"),
        ("not reached", "Only 3 of 9 layers with a LoRA get a gradient"),
        ("not finite", "Gradients are not finite in the first step"),
    ],
)
def test_a_family_that_cannot_be_trained_is_told_so_at_its_first_step(comfy: ComfyClient, kind: str, said: str) -> None:
    """Though nobody has tried it before; nothing is left on the model."""
    graph = wired_graph(comfy, kind, output_name="untrainable", seed=990 + len(kind))
    with pytest.raises(NodeFailed, match=said) as failed:
        comfy.run(graph, targets=("11",))
    assert "Train on another model" in failed.value.node_message


def test_a_model_that_starts_from_a_picture_is_rejected(comfy: ComfyClient) -> None:
    """Though it says nothing of that in the names of what it takes."""
    graph = wired_graph(comfy, "Wan 2.1 I2V")
    with pytest.raises(NodeFailed, match="WAN21_I2V also takes a picture"):
        comfy.run(graph, targets=("11",))


def test_0_trains_as_usual_and_a_distilled_base_is_named(comfy: ComfyClient) -> None:
    """With what to train on instead. The same run as with the numbers themselves."""
    shown, loras = [], []
    for settings in ({"learning_rate": 0, "rank": 0, "network_alpha": 0}, {"learning_rate": 1e-4, "rank": 32}):
        graph = wired_graph(comfy, "Flux.2", **{"steps": 1, "network_alpha": 32.0, **settings})
        graph["1"]["inputs"]["file"] = "flux-2-klein-4b.safetensors"
        result = comfy.run(graph, targets=("11",))
        shown.append(result.outputs["11"])
        loras.append(lora_of(comfy, result))
        started = [str(event.data["text"]) for event in result.of_type("progress_text")]
        warned = [text for text in started if "flux-2-klein-4b.safetensors appears to be distilled" in text]
        assert warned and "Train on Flux.2 klein base instead" in warned[0]
    assert {tuple(tensor.shape)[0] for name, tensor in loras[0].items() if "lora_A" in name} == {32}
    assert "as usual for Flux.2: learning_rate 0.0001, rank 32, network_alpha 32" in shown[0]["text"]
    assert "as usual" not in str(shown[1]["text"]) and shown[1]["text"][0].startswith("reused")
    assert shown[0]["subjectbooth"][0]["run"] == shown[1]["subjectbooth"][0]["run"]


@pytest.mark.parametrize("kind", ["Qwen-Image"])
def test_a_cancelled_run_goes_on_to_the_same_bits(comfy: ComfyClient, kind: str) -> None:
    """With the base studied first and validation images in between, by ComfyUI's sampler on the same module."""
    settings = {"steps": 6, "validation_prompts": "a photo of {subject}\na cat", "validation_interval": 2}
    graph = wired_graph(comfy, kind, **settings, preservation="curvature", output_name=f"resumed {kind}")
    del graph["90"], graph["12"]
    whole = comfy.run(graph)
    expected, images = lora_of(comfy, whole), pictures_of(comfy, whole)
    assert len(images) == 6 and all(image.std() > 1 for image in images)
    assert any((one != other).any() for one, other in zip(images[:2], images[-2:], strict=True))

    shutil.rmtree(comfy.server.output_dir / "subjectbooth" / whole.outputs["11"]["subjectbooth"][0]["run"])
    comfy.free()  # or ComfyUI would answer with the first result
    count, _ = run_and_cancel(comfy, graph, "StepDone", 3)
    assert count == 3
    resumed = comfy.run(graph)
    assert len(losses_of(comfy, resumed)) == 6
    found = lora_of(comfy, resumed)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(np.array_equal(*pair) for pair in zip(pictures_of(comfy, resumed), images, strict=True))


def test_many_runs_leave_memory_level(comfy: ComfyClient) -> None:
    """No parameter stays behind, and no layer of the connected model runs through the trainer."""
    seen = []
    for seed in range(10):
        graph = wired_graph(comfy, "Z-Image", steps=1, seed=77)
        graph["11"]["inputs"]["seed"] = 900 + seed
        graph["92"] = node("ProbeState", nonce=seed)
        del graph["90"], graph["12"]
        seen.append(comfy.run(graph, targets=("11",)) and comfy.run({"92": node("ProbeState", nonce=9000 + seed)}))
    counts = [result.outputs["92"]["report"][0]["parameters"] for result in seen]
    assert counts[2:] == [counts[2]] * 8, counts


def test_stable_diffusion_is_the_same_through_diffusers(comfy: ComfyClient) -> None:
    """Losses, targets and gradients of both paths, and kohya's names of the same layers."""
    wired = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "91": node("ProbeBothPaths", **wired, nonce=0),
    }
    (report,) = comfy.run(graph).outputs["91"]["report"]
    assert report["wired_loss"] == pytest.approx(report["loss"], rel=1e-5), report
    assert report["target"] < 1e-5 and report["difference"] < 2e-4 and report["layers"] > 20, report


@pytest.mark.parametrize(("stored", "plain"), [("comfy_quant", "rounded"), ("packed", "packed, plain")])
def test_gradients_of_a_quantised_base_are_those_of_its_dequantised_copy(
    comfy: ComfyClient, stored: str, plain: str
) -> None:
    """In ComfyUI's own format, whose linear layers are such by what they do and not by class; and in a format that only
    another pack's layers can read."""
    wired = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    graph = {
        "1": node("ProbeWiredBase", kind="Flux.1", seed=3, stored=stored),
        "2": node("ProbeWiredBase", kind="Flux.1", seed=3, stored=plain),
        "91": node("ProbeWiredGradients", **wired, plain=["2", 0], checkpointing=True, nonce=0),
    }
    if stored not in comfy.object_info("ProbeWiredBase")["input"]["required"]["stored"][0]:
        pytest.skip("this ComfyUI reads no comfy_quant")
    (report,) = comfy.run(graph).outputs["91"]["report"]
    assert report["loss"] == pytest.approx(report["plain_loss"], rel=1e-5)
    assert report["difference"] < 1e-5 and report["with_gradient"] == report["layers"] > 10, report


def test_a_packed_base_trains_and_is_found_again(comfy: ComfyClient) -> None:
    """By a digest of its bytes."""
    runs = []
    for seed in (3, 4, 3):
        graph = wired_graph(comfy, "Z-Image", stored="packed", seed=seed, steps=1, output_name="packed")
        del graph["90"], graph["12"]
        comfy.free()
        shown = comfy.run(graph).outputs["11"]
        runs.append((shown["subjectbooth"][0]["run"], shown["text"][0].split(":")[0]))
    assert runs[0][0] == runs[2][0] != runs[1][0]
    assert [said for _, said in runs] == ["trained", "trained", "reused (trained before)"]


@pytest.mark.parametrize(
    ("kind", "way", "term"),
    [
        ("Z-Image", "class_images", "prior_loss"),
        ("Flux.1", "teacher", "teacher_loss"),
        ("SD 3.5", "curvature", "curvature_loss"),
    ],
)
def test_everything_that_stable_diffusion_has_works_with_it(comfy: ComfyClient, kind: str, way: str, term: str) -> None:
    """Class images from the model itself, buckets, masks, accumulation and a running average, in one run; what the
    LoRA does in ComfyUI is still what the trainer saw."""
    photos = [comfy.upload_image(photo, f"masked_{number}.png") for number, photo in enumerate(masked_photos())]
    graph = wired_graph(comfy, kind, preservation=way, train_batch_size=2, output_name=f"everything {kind}")
    given = {"masked_loss": True, "enable_bucket": True, "ema_decay": 0.5}
    graph["9"] = node("DreamBoothOptions", **{**comfy.defaults("DreamBoothOptions"), **given})
    graph["10"] = subject_node(photos, resolution=128)
    priors = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "subject": ["10", 0]}
    graph["20"] = node(
        "GenerateClassPriors", **{**comfy.defaults("GenerateClassPriors"), **priors, "count": 2, "steps": 2}
    )
    more = {"options": ["9", 0], "class_priors": ["20", 0], "gradient_accumulation_steps": 2}
    graph["11"]["inputs"] |= more
    result = comfy.run(graph)
    lora = lora_of(comfy, result)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in lora.values())
    assert all(
        {name for name in step if name.endswith("_loss")} == {"instance_loss", term} for step in steps_of(comfy, result)
    )
    with safetensors.safe_open(lora_path(comfy, result), "pt") as file:
        assert len(json.loads(file.metadata()["ss_bucket_info"])["buckets"]) == 2
    (report,) = result.outputs["90"]["report"]
    assert report["untouched"]
    assert report["difference"] < 1e-5 * max(1, report["scale"]) and report["effect"] > 100 * report["difference"]
