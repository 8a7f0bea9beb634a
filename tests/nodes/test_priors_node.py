"""GenerateClassPriors in a real ComfyUI: KSampler's own pictures, made once, kept through cancels and damage."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from subjectbooth.tests.comfy_server import (
    ComfyClient,
    ComfyServer,
    Interrupted,
    NodeFailed,
    PromptRejected,
    RunResult,
)
from subjectbooth.tests.nodes.fuzz_values import is_refused_as
from subjectbooth.tests.nodes.graphs import Graph, node
from subjectbooth.trainer.files.safetensors_file import read_checked

SIZE = 64
SCALE = 0.18215


def priors_graph(comfy: ComfyClient, *, class_word: str = "cat", **inputs: Any) -> Graph:
    """ "1" checkpoint, "10" subject, "20" GenerateClassPriors, "21" and "22" probes of its outputs."""
    buffer = io.BytesIO()
    Image.fromarray(data.chelsea()).save(buffer, "PNG")
    given = {
        "model": ["1", 0],
        "clip": ["1", 1],
        "vae": ["1", 2],
        "subject": ["10", 0],
        "class_prompt": "a photo of a {class}",
        "negative": "",
        "count": 4,
        "steps": 2,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "seed": 1000,
        "batch_size": 2,
        "exclude": "",
        **inputs,
    }
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": node(
            "LoadSubjectImages",
            images=comfy.upload_image(buffer.getvalue(), "priors_cat.png"),
            folder="",
            sample="none",
            class_word=class_word,
            token="ohwx",
            prompt_template="a photo of {token} {class}",
            captions="template",
            resolution=SIZE,
            crop="center",
        ),
        "20": node("GenerateClassPriors", **given),
        "21": node("ProbePriors", priors=["20", 0]),
        "22": node("ProbeImage", value=["20", 1]),
    }


def priors_of(result: RunResult) -> dict[str, Any]:
    return result.outputs["21"]["report"][0]


def sampler_steps(result: RunResult) -> int:
    """How many denoising steps the node reported while it ran."""
    return sum(1 for e in result.of_type("progress") if e.data["node"] == "20")


def ksampler_latents(comfy: ComfyClient, *, prompt: str, **settings: Any) -> torch.Tensor:
    """What ComfyUI's KSampler and SaveLatent give for one picture, in VAE units: float32 [1, 4, 8, 8]."""
    from safetensors.torch import load

    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "2": node("CLIPTextEncode", clip=["1", 1], text=prompt),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "5": node(
            "KSampler",
            model=["1", 0],
            positive=["2", 0],
            negative=["3", 0],
            latent_image=["4", 0],
            denoise=1.0,
            **{"steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", **settings},
        ),
        "6": node("SaveLatent", samples=["5", 0], filename_prefix="priors_expected"),
    }
    (record,) = comfy.run(graph).outputs["6"]["latents"]
    return load((comfy.server.output_dir / record["subfolder"] / record["filename"]).read_bytes())["latent_tensor"]


def store_of(comfy: ComfyClient, result: RunResult) -> Path:
    """The folder on the disk that holds this result's pictures."""
    return comfy.server.output_dir / result.images("20")[0]["subfolder"]


def stored_latents(folder: Path) -> dict[int, torch.Tensor]:
    pictures: dict[int, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors, state = read_checked(path)
        pictures |= dict(zip(state["indices"], tensors["latents"], strict=True))
    return pictures


def test_schema(comfy: ComfyClient) -> None:
    info = comfy.object_info("GenerateClassPriors")
    assert info["output"] == ["CLASS_PRIORS", "IMAGE"] and info["output_node"]
    inputs = info["input"]["required"]
    assert all(options[1]["tooltip"] for options in inputs.values()) and all(info["output_tooltips"])
    # Without an explicit no, the front end gives every "seed" a control that changes it after each run.
    assert inputs["seed"][1]["control_after_generate"] is False
    assert inputs["cfg"][1]["step"] == 0.1 and inputs["cfg"][1]["round"] == 0.01


def test_the_latents_are_ksamplers_times_the_scale(comfy: ComfyClient) -> None:
    result = comfy.run(priors_graph(comfy, class_word="owl", seed=1100, count=3, batch_size=1))
    assert priors_of(result)["prompt"] == "a photo of an owl"
    assert priors_of(result)["shape"] == [3, 4, 8, 8] and priors_of(result)["dtype"] == "torch.float32"
    assert priors_of(result)["inference"] is False
    pictures = stored_latents(store_of(comfy, result))
    for index in range(3):
        expected = ksampler_latents(comfy, prompt="a photo of an owl", seed=1100 + index)[0] * SCALE
        assert torch.equal(pictures[index], expected)
    hashes = [hashlib.sha256(pictures[index].numpy().tobytes()).hexdigest() for index in range(3)]
    assert priors_of(result)["latents"] == hashes


@pytest.mark.parametrize("sampler_name", ["euler_ancestral", "dpmpp_2m_sde", "lcm"])
def test_samplers_with_noise_of_their_own_are_ksamplers_one_at_a_time(comfy: ComfyClient, sampler_name: str) -> None:
    settings: dict[str, Any] = {"sampler_name": sampler_name, "scheduler": "karras", "steps": 3}
    result = comfy.run(priors_graph(comfy, seed=1200, count=2, batch_size=1, **settings))
    pictures = stored_latents(store_of(comfy, result))
    for index in range(2):
        expected = ksampler_latents(comfy, prompt="a photo of a cat", seed=1200 + index, **settings)[0] * SCALE
        assert torch.equal(pictures[index], expected)
    # In batches they are other pictures, kept apart.
    together = comfy.run(priors_graph(comfy, seed=1200, count=2, batch_size=2, **settings))
    assert store_of(comfy, together) != store_of(comfy, result)
    assert not torch.allclose(stored_latents(store_of(comfy, together))[1], pictures[1], atol=1e-3)


def test_batch_independent_samplers_give_ksamplers_picture_in_any_batch(comfy: ComfyClient) -> None:
    """The list in nodes/sampling.py is not taken on trust: the second picture of a batch of two, for each of them."""
    source = (Path(__file__).resolve().parents[2] / "nodes" / "sampling.py").read_text("utf-8")
    listed = source.split("BATCH_INDEPENDENT = frozenset(")[1].split("# fmt")[0]
    names = [part for part in listed.split('"')[1::2] if part]
    known = comfy.object_info("KSampler")["input"]["required"]["sampler_name"][0]
    assert len(names) >= 15 and set(names) <= set(known)
    for name in names:
        settings: dict[str, Any] = {"sampler_name": name, "scheduler": "karras", "steps": 3, "cfg": 1.0}
        result = comfy.run(priors_graph(comfy, seed=1300, count=2, **settings))
        expected = ksampler_latents(comfy, prompt="a photo of a cat", seed=1301, **settings)[0] * SCALE
        difference = (stored_latents(store_of(comfy, result))[1] - expected).abs().max()
        # A batch of two adds up in another order than one alone; a sampler that mixes pictures is off by a tenth.
        assert difference < 2e-4 * expected.abs().max(), (name, difference)


def test_more_pictures_reuse_those_that_are_there(comfy: ComfyClient) -> None:
    few = priors_of(comfy.run(priors_graph(comfy, seed=1400, count=2)))
    result = comfy.run(priors_graph(comfy, seed=1400, count=5, batch_size=3))
    assert result.outputs["20"]["text"] == ['5 class images ready (3 new), "a photo of a cat"']
    assert priors_of(result)["hashes"][:2] == few["hashes"] and sampler_steps(result) in (2, 3)
    fewer = comfy.run(priors_graph(comfy, seed=1400, count=2))
    assert priors_of(fewer) == few


def test_whatever_makes_a_picture_makes_new_ones(comfy: ComfyClient) -> None:
    base = priors_of(comfy.run(priors_graph(comfy, seed=1500, count=1)))
    changes: list[dict[str, Any]] = [
        {"class_prompt": "a drawing of a {class}"}, {"class_word": "dog"}, {"negative": "a dog"}, {"steps": 3},
        {"cfg": 3.0}, {"sampler_name": "heun"}, {"scheduler": "karras"}, {"seed": 1501}, {"model": ["30", 0]},
        {"clip": ["31", 0]},
    ]  # fmt: skip
    digests = {base["digest"]}
    for change in changes:
        graph = priors_graph(comfy, **{"seed": 1500, "count": 1, **change})
        style = {"lora_name": "tiny_style.safetensors", "strength_model": 1.0}
        graph["30"] = node("LoraLoaderModelOnly", model=["1", 0], **style)
        graph["31"] = node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-3)
        result = comfy.run(graph)
        assert "(1 new)" in result.outputs["20"]["text"][0], change
        digests.add(priors_of(result)["digest"])
    assert len(digests) == len(changes) + 1
    # And what does not make a picture does not: here the training photos and their token.
    graph = priors_graph(comfy, seed=1500, count=1)
    graph["10"]["inputs"] |= {"token": "hta", "crop": "pad"}
    again = comfy.run(graph)
    assert "(0 new)" in again.outputs["20"]["text"][0] and priors_of(again) == base


def test_excluded_pictures_are_left_out(comfy: ComfyClient) -> None:
    whole = comfy.run(priors_graph(comfy, seed=1600))
    hashes = whole.outputs["20"]["hashes"]
    assert hashes == priors_of(whole)["hashes"] and len(set(hashes)) == 4
    result = comfy.run(priors_graph(comfy, seed=1600, exclude=f"{hashes[1]},\n{hashes[2][:10]} {'0' * 64}"))
    kept = [hashes[0], hashes[3]]
    assert priors_of(result)["hashes"] == kept == result.outputs["20"]["hashes"]
    assert priors_of(result)["latents"] == [priors_of(whole)["latents"][i] for i in (0, 3)]
    assert priors_of(result)["digest"] != priors_of(whole)["digest"]
    assert result.outputs["22"]["report"][0]["shape"] == [2, SIZE, SIZE, 3]
    assert result.outputs["20"]["excluded_hashes"] == hashes[1:3]
    assert result.images("20") == [whole.images("20")[i] for i in (0, 3)]
    assert result.outputs["20"]["excluded_images"] == whole.images("20")[1:3]
    assert result.outputs["20"]["text"] == [
        '2 class images ready (0 new), "a photo of a cat", 2 excluded',
        "1 of 3 hashes in exclude do not match any of these images.",
    ]


def test_cancelled_it_keeps_what_is_finished_and_goes_on_with_the_same_bits(comfy: ComfyClient) -> None:
    settings: dict[str, Any] = {"seed": 1700, "count": 6, "steps": 12}
    whole = comfy.run(priors_graph(comfy, **settings))
    folder = store_of(comfy, whole)
    expected = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
    assert len(expected) == 3
    for path in folder.iterdir():
        path.unlink()
    graph = priors_graph(comfy, exclude="0" * 64, **settings)
    since = len(comfy.events)
    prompt = comfy.queue(graph)
    comfy.wait_event(
        lambda e: e.type == "progress" and e.data["node"] == "20" and e.data["value"] == 12 + 4, since=since
    )
    comfy.interrupt()
    with pytest.raises(Interrupted):
        comfy.wait(prompt)
    stopped = comfy.events_of(prompt)
    values = [e.data["value"] for e in stopped if e.type == "progress" and e.data["node"] == "20"]
    assert max(values) < 24, "it went on to the end of the batch"
    assert {p.name for p in folder.glob("*.safetensors")} == {"00000-00001.safetensors"}
    result = comfy.run(graph)
    assert result.outputs["20"]["text"][0] == '6 class images ready (4 new), "a photo of a cat"'
    assert {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} == expected
    assert priors_of(result) == priors_of(whole)


def test_killed_it_goes_on_with_the_same_bits_and_the_same_again_makes_nothing(
    comfy_factory: Callable[..., ComfyServer],
) -> None:
    """After the restart ComfyUI's own cache is empty: what is there comes from the disk, pictures included."""
    settings: dict[str, Any] = {"seed": 1710, "count": 6, "steps": 8}
    with comfy_factory() as server:
        with ComfyClient(server.url, server) as comfy:
            graph = priors_graph(comfy, **settings)
            whole = comfy.run(graph)
            assert whole.outputs["20"]["text"] == ['6 class images ready (6 new), "a photo of a cat"']
            folder = store_of(comfy, whole)
            files = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
            for path in folder.iterdir():
                path.unlink()
            # Another exclude is another node to ComfyUI's cache, and the same pictures.
            since = len(comfy.events)
            comfy.queue(priors_graph(comfy, exclude="0" * 64, **settings))
            comfy.wait_event(
                lambda e: e.type == "progress" and e.data["node"] == "20" and e.data["value"] == 8 + 4, since=since
            )
            server.kill()
        assert [p.name for p in folder.glob("*.safetensors")] == ["00000-00001.safetensors"]
        server.restart()
        with ComfyClient(server.url, server) as comfy:
            rest = comfy.run(priors_graph(comfy, exclude="0" * 64, **settings))
            assert "(4 new)" in rest.outputs["20"]["text"][0]
            assert {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} == files
            times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
            again = comfy.run(graph)
            assert "20" not in again.cached and sampler_steps(again) == 0
            assert again.outputs["20"]["text"] == ['6 class images ready (0 new), "a photo of a cat"']
            assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == times
            assert priors_of(again) == priors_of(whole) and again.outputs["22"] == whole.outputs["22"]
            assert again.images("20") == whole.images("20")
            pictures = [np.asarray(Image.open(io.BytesIO(comfy.view(**r)))) for r in again.images("20")]
            values = np.stack(pictures).astype(np.float32) / np.float32(255)
            assert again.outputs["22"]["report"][0]["sha256"] == hashlib.sha256(values.tobytes()).hexdigest()
            assert all(record["type"] == "output" for record in again.images("20"))


def test_a_damaged_file_is_said_and_made_again(comfy: ComfyClient) -> None:
    settings: dict[str, Any] = {"seed": 1800}
    whole = comfy.run(priors_graph(comfy, **settings))
    folder = store_of(comfy, whole)
    path = folder / "00002-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))
    picture = folder / whole.images("20")[0]["filename"]
    good = picture.read_bytes()
    picture.write_bytes(good[: len(good) // 2])
    result = comfy.run(priors_graph(comfy, exclude="0" * 64, **settings))
    assert result.outputs["20"]["text"][:2] == [
        '4 class images ready (2 new), "a photo of a cat"',
        "00002-00003.safetensors was damaged; its class images are generated again.",
    ]
    assert priors_of(result) == priors_of(whole) and result.outputs["22"] == whole.outputs["22"]
    assert picture.read_bytes() == good


def test_progress_eta_and_preview_are_shown(comfy: ComfyClient) -> None:
    result = comfy.run(priors_graph(comfy, seed=1900, count=4, steps=6))
    values = [e.data["value"] for e in result.of_type("progress") if e.data["node"] == "20"]
    assert values == sorted(values) and values[-1] == 12 and len(set(values)) == 12
    texts = [e.data["text"] for e in result.of_type("progress_text")]
    assert any("of 4, step" in text and text.endswith("left") for text in texts), texts
    assert '4 class images ready (4 new), "a photo of a cat"' in texts
    previews = result.of_type("preview")
    width, height = Image.open(io.BytesIO(previews[-1].data["image"])).size
    assert width == 2 * height  # the two pictures of the last batch


def test_nothing_of_the_process_is_changed(comfy: ComfyClient) -> None:
    """The wired model samples the same picture before and after, and the random state is not ours."""
    before = ksampler_latents(comfy, prompt="a photo of a cat", seed=1950)
    comfy.run(priors_graph(comfy, seed=1951))
    comfy.free()
    assert torch.equal(ksampler_latents(comfy, prompt="a photo of a cat", seed=1950), before)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"class_prompt": ""}, "class_prompt is empty"),
        ({"class_prompt": "a photo of {subject}"}, "class_prompt 'a photo of {subject}' contains the token"),
        ({"class_prompt": "a {clas}"}, "class_prompt has the placeholder {clas}"),
        ({"sampler_name": "best"}, "sampler_name 'best'. Required: one of ComfyUI's"),
        ({"scheduler": "best"}, "scheduler 'best'. Required: one of ComfyUI's"),
        ({"cfg": float("nan")}, "cfg nan. Required: a number from 0 to 100"),
        ({"exclude": "abc"}, "exclude contains 'abc'"),
        ({"model": ["40", 0]}, "The MODEL has patches that are not weights"),
    ],
)
def test_what_cannot_be_used_says_why(comfy: ComfyClient, inputs: dict[str, Any], says: str) -> None:
    graph = priors_graph(comfy, **{"seed": 1990, **inputs})
    graph["40"] = node("FreeU_V2", model=["1", 0], b1=1.3, b2=1.4, s1=0.9, s2=0.2)
    with pytest.raises((NodeFailed, PromptRejected)) as caught:
        comfy.run(graph, targets=["20"])
    assert is_refused_as(caught.value, says), caught.value
    if isinstance(caught.value, NodeFailed):
        message = caught.value.node_message
        assert caught.value.node_type == "GenerateClassPriors"
        assert "Traceback" not in message and "\n" not in message.strip()


def test_all_excluded(comfy: ComfyClient) -> None:
    hashes = comfy.run(priors_graph(comfy, seed=1991, count=1)).outputs["20"]["hashes"]
    with pytest.raises(NodeFailed, match="Every class image is excluded"):
        comfy.run(priors_graph(comfy, seed=1991, count=1, exclude=hashes[0]))


def test_guidance_patches_are_left_out_and_that_is_said(comfy: ComfyClient) -> None:
    plain = comfy.run(priors_graph(comfy, seed=1995, count=1))
    graph = priors_graph(comfy, seed=1996, count=1, model=["40", 0])
    graph["40"] = node("RescaleCFG", model=["1", 0], multiplier=0.7)
    result = comfy.run(graph)
    assert any("sampler_cfg_function" in line for line in result.outputs["20"]["text"])
    expected = ksampler_latents(comfy, prompt="a photo of a cat", seed=1996)[0] * SCALE
    assert torch.equal(stored_latents(store_of(comfy, result))[0], expected)
    assert priors_of(plain)["digest"] != priors_of(result)["digest"]


def test_the_recipe_lies_beside_the_pictures(comfy: ComfyClient) -> None:
    result = comfy.run(priors_graph(comfy, seed=1999, count=1))
    recipe = json.loads((store_of(comfy, result) / "recipe.json").read_text("utf-8"))
    assert recipe["prompt"] == "a photo of a cat" and recipe["seed"] == 1999 and recipe["grouping"] == 0
