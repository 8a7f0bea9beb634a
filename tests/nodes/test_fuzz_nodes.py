"""Random values on the nodes' inputs, and strangers' LoRA files: a result or a sentence, never a mess."""

from __future__ import annotations

import json
import random
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.comfy_server import ComfyClient, ComfyError, NodeFailed, PromptRejected
from subjectbooth.tests.conftest import ROOT
from subjectbooth.tests.fuzzing import cases, corrupt_safetensors, files_below, is_clean, report, seeded_random
from subjectbooth.tests.nodes.fuzz_values import is_refused_as, not_in_list, refusals_of, strange_value
from subjectbooth.tests.nodes.graphs import Graph, node
from subjectbooth.tests.nodes.test_evaluate_node import evaluate_graph
from subjectbooth.tests.nodes.test_priors_node import priors_graph
from subjectbooth.tests.nodes.test_subject_node import refused_files, subject_graph
from subjectbooth.tests.nodes.training_graphs import apply_node, subject_node, train_node, upload_cat


@pytest.fixture
def nothing_outside(comfy: ComfyClient) -> Iterator[None]:
    """Fails when files appear anywhere but in the folders that ComfyUI and the pack may write to."""
    base = comfy.server.input_dir.parent
    written = (comfy.server.output_dir, base / "temp", base / "user", comfy.server.models_dir / "loras")

    def others() -> set[Path]:
        found = {p for p in files_below(base) if not any(p.is_relative_to(folder) for folder in written)}
        made = files_below(ROOT / "nodes") | files_below(ROOT / "trainer")
        return {p for p in found | made if p.suffix not in (".log", ".db", ".py", ".pyc")}

    upload_cat(comfy)
    refused_files(comfy.server.input_dir)
    priors_graph(comfy)  # uploads its picture
    before = others()
    yield
    assert others() == before
    assert comfy.run({"1": node("ProbeState", nonce=random.randint(0, 2**31))}).outputs["1"]


def outcome_of(comfy: ComfyClient, graph: Graph, case: object, target: str) -> str:
    """Whether it ran, was refused by us (in proper sentences, or by the lists we give) or by ComfyUI's own bounds; the
    server goes on in any case."""
    try:
        comfy.run(graph, timeout=300, targets=(target,))  # ComfyUI runs on without a node that it refuses
        outcome = "ran"
    except (NodeFailed, PromptRejected) as error:
        sentences = refusals_of(error)
        for sentence in sentences:
            assert is_clean(sentence), (case, sentence)
        # Newer ComfyUIs check lists themselves, older ones leave it to us.
        outcome = "refused by us" if sentences or not_in_list(error) else "refused by ComfyUI"
    except ComfyError as error:  # ComfyUI itself does not answer some values with a proper report
        assert comfy.server.alive(), (case, error)
        outcome = "refused by ComfyUI"
    assert comfy.request("GET", "/queue") == {"queue_running": [], "queue_pending": []}, case
    return outcome


@pytest.mark.parametrize("kind", ["LoadSubjectImages", "GenerateClassPriors"])
def test_random_inputs(comfy: ComfyClient, nothing_outside: None, kind: str) -> None:
    choose, count = seeded_random(kind), cases(80)
    outcomes = {"ran": 0, "refused by us": 0, "refused by ComfyUI": 0}
    for number in range(count):
        if kind == "LoadSubjectImages":
            graph: Graph = subject_graph(images="ok.png")
            target = graph["1"]["inputs"]
            names = [name for name in target if name not in ("image", "mask")]
        else:
            graph = priors_graph(comfy, count=1, steps=1, seed=3000)
            target = graph["20"]["inputs"]
            # Huge but allowed counts and steps are honest work, not errors.
            names = [name for name in target if name not in ("model", "clip", "vae", "subject", "count", "steps")]
        changed = {name: strange_value(choose) for name in choose.sample(names, choose.choice((1, 1, 1, 2, 3)))}
        if kind == "GenerateClassPriors" and isinstance(changed.get("batch_size"), int | float):
            changed["batch_size"] = min(changed["batch_size"], 4)
        target.update(changed)
        outcomes[outcome_of(comfy, graph, (number, changed), "1" if kind == "LoadSubjectImages" else "20")] += 1
    report(f"inputs of {kind}", cases=count, outcomes=outcomes)
    assert outcomes["ran"] > count // 20
    assert outcomes["refused by us"] > count // 10


def test_random_settings_of_the_trainer(comfy: ComfyClient, nothing_outside: None) -> None:
    """Most are refused before anything is loaded; what is allowed is trained for a step or two."""
    choose, count, images = seeded_random("DreamBoothLoRATrain"), cases(60), upload_cat(comfy)
    options = {
        name: spec[1]["default"] if "default" in spec[1] else spec[1]["options"][0]
        for name, spec in comfy.object_info("DreamBoothOptions")["input"]["required"].items()
    }
    outcomes = {"ran": 0, "refused by us": 0, "refused by ComfyUI": 0}
    sizes = ("steps", "train_batch_size", "gradient_accumulation_steps", "resolution", "validation_steps")
    for number in range(count):
        graph: Graph = {
            "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
            "10": subject_node(images),
            "11": train_node(steps=1, options=["13", 0], seed=7),
            "13": node("DreamBoothOptions", **options),
        }
        target = choose.choice(("11", "11", "13"))
        names = [name for name, value in graph[target]["inputs"].items() if not isinstance(value, list)]
        changed = {name: strange_value(choose) for name in choose.sample(names, choose.choice((1, 1, 2)))}
        for name in sizes:  # huge but allowed sizes are honest work, not errors
            if isinstance(changed.get(name), int | float) and changed[name] == changed[name] and changed[name] > 2:
                changed[name] = choose.choice((2, 10**12))
        if "validation_prompts" in changed:
            changed["validation_steps"] = 1
        graph["13"]["inputs"]["validation_steps"] = 1
        graph[target]["inputs"].update({key: value for key, value in changed.items() if key in names})
        outcomes[outcome_of(comfy, graph, (number, changed), "11")] += 1
    report("inputs of DreamBoothLoRATrain and DreamBoothOptions", cases=count, outcomes=outcomes)
    assert outcomes["ran"] > count // 20
    assert outcomes["refused by us"] > count // 10


def test_random_settings_of_an_evaluation(comfy: ComfyClient, nothing_outside: None) -> None:
    choose, count = seeded_random("EvaluateSubjectLoRA"), cases(16)
    outcomes = {"ran": 0, "refused by us": 0, "refused by ComfyUI": 0}
    for number in range(count):
        graph = evaluate_graph(comfy, steps=1, resolution=64, prompts="a photo of a cat")
        wired = ("model", "clip", "vae", "subject", "clip_vision")
        names = [name for name in graph["30"]["inputs"] if name not in wired]
        changed = {name: strange_value(choose) for name in choose.sample(names, choose.choice((1, 1, 2)))}
        for name, most in {"seeds": 3, "steps": 3, "resolution": 65}.items():  # huge but allowed is honest work
            if isinstance(changed.get(name), int | float):
                changed[name] = min(changed[name], most)
        graph["30"]["inputs"].update(changed)
        outcomes[outcome_of(comfy, graph, (number, changed), "30")] += 1
    report("inputs of EvaluateSubjectLoRA", cases=count, outcomes=outcomes)
    assert outcomes["ran"] > count // 20
    assert outcomes["refused by us"] > count // 10


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "ComfyUI"), ({"steps": -1}, "ComfyUI"),
    ({"learning_rate": 1e-12}, "learning_rate 1e-12. Required: a number"),
    ({"learning_rate": -1e-4}, "ComfyUI"), ({"learning_rate": float("inf")}, "ComfyUI"), ({"rank": -1}, "ComfyUI"),
    ({"learning_rate": float("nan")}, "learning_rate nan. Required: a number"),
    ({"network_alpha": float("nan")}, "network_alpha nan. Required: a number"),
    ({"lr_scheduler": "magic"}, "lr_scheduler 'magic'. Required: one of constant"),
    ({"precision": "fp8"}, "precision 'fp8'. Required: one of auto"),
    ({"rank": 400}, "rank 400. Required: 320 or less"), ({"resolution": 100}, "a multiple of 8"),
    ({"output_name": "../x"}, "leaves the LoRA folder"), ({"output_name": "CON"}, "Windows does not allow"),
    ({"output_name": "🐶" * 100}, "longer than 200 bytes"), ({"output_name": ""}, "is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[f"{n}-{next(iter(c))}" for n, (c, _) in enumerate(WRONG)])
def test_what_cannot_be_trained_is_said(comfy: ComfyClient, changes: dict[str, Any], said: str) -> None:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "11": train_node(**changes),
    }
    with pytest.raises((NodeFailed, PromptRejected)) as failure:
        comfy.run(graph, targets=("11",))
    sentences = refusals_of(failure.value)
    if said == "ComfyUI":  # its own check of the bounds comes first
        assert isinstance(failure.value, PromptRejected)
        return
    assert is_refused_as(failure.value, said), failure.value
    for sentence in sentences:
        assert said in sentence
        assert is_clean(sentence)


def test_prompts_of_500_tokens_and_many_alphabets_train(comfy: ComfyClient, nothing_outside: None) -> None:
    long, mixed = "a photo of {token} {class} " + "red green blue " * 166, "{subject} " + "собака 犬 🐶 " * 60
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy), prompt_template=long),
        "11": train_node(steps=1, validation_prompts=mixed, output_name="рекс 🐶/длинный"),
        "13": node("ProbeValue", value=["11", 1]),
    }
    path = Path(comfy.run(graph).outputs["13"]["report"][0]["value"])
    assert path == comfy.server.models_dir / "loras" / "рекс 🐶" / "длинный.safetensors"
    assert path.is_file()


def test_lora_files_of_strangers(comfy: ComfyClient, nothing_outside: None, tmp_path: Path) -> None:
    choose, count, mark = seeded_random("ApplySubjectLoRA files"), cases(80), tmp_path / "mark"
    folder = comfy.server.models_dir / "loras"
    whole = (folder / "tiny_style.safetensors").read_bytes()
    stranger = folder / "stranger.safetensors"
    outcomes = {"ran": 0, "refused by us": 0, "refused by ComfyUI": 0}
    for number in range(count):
        kind, content = corrupt_safetensors(whole, choose, mark)
        stranger.write_bytes(content)
        values = {"strength_model": choose.choice((1.0, 0.0, -1.0, strange_value(choose))), "prompt": "a cat {subject}"}
        if choose.random() < 0.5:
            values["prompt"] = strange_value(choose)
        name = stranger.name if choose.random() < 0.9 else strange_value(choose)
        graph = {
            "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
            "12": apply_node(lora_name=name, **values),
            "13": node("ProbeValue", value=["12", 2]),
        }
        del graph["12"]["inputs"]["subject_lora"]
        outcomes[outcome_of(comfy, graph, (number, kind, name, values), "13")] += 1
    stranger.unlink()
    report("LoRA files and inputs of ApplySubjectLoRA", cases=count, outcomes=outcomes)
    assert not mark.exists()
    assert outcomes["refused by us"] > count // 4


def _changed_layer(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    layer = sorted(tensors)[0].split(".")[0]
    up, down, alpha = (f"{layer}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    new = dict(tensors)
    if change == "no down":
        del new[down]
    elif change == "other rank":
        new[down] = new[down][:2].contiguous()
    elif change == "no rank":
        new[down], new[up] = new[down][:0].contiguous(), new[up][:, :0].contiguous()
    elif change == "wrong base":  # SD 2.x's text encoder is 1024 wide where SD 1.x's is 768
        for name in [name for name in new if "attn2_to_k.lora_down" in name]:
            new[name] = torch.randn(new[name].shape[0], 1024)
    elif change == "flat":
        new[up] = new[up].flatten()
    elif change == "alpha list":
        new[alpha] = torch.ones(4)
    elif change == "alpha nan":
        new[alpha] = torch.tensor(float("nan"))
    elif change == "no layer of this model":
        new = {f"lora_unet_single_blocks_{name}": tensor for name, tensor in new.items()}
    return new


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no down", "an incomplete layer"),
        ("alpha list", "an incomplete layer"),
        ("other rank", "has the shapes"),
        ("no rank", "has the shapes"),
        ("wrong base", "has the shapes"),
        ("flat", "has the shapes"),
        ("alpha nan", "contains NaN or infinity"),
        ("no layer of this model", "layers fit this model"),
    ],
)
def test_a_lora_that_does_not_fit_is_said(comfy: ComfyClient, change: str, said: str) -> None:
    """ComfyUI itself samples on without such a layer, or fails in the sampler with torch's words."""
    folder = comfy.server.models_dir / "loras"
    tensors = _changed_layer(safetensors.torch.load_file(folder / "tiny_style.safetensors"), change)
    (folder / "misfit.safetensors").write_bytes(safetensors.torch.save(tensors))
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "12": apply_node(lora_name="misfit.safetensors", prompt="a cat"),
        "13": node("ProbeValue", value=["12", 2]),
    }
    del graph["12"]["inputs"]["subject_lora"]
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph)
    assert said in failure.value.node_message
    assert is_clean(failure.value.node_message)


def _routes() -> list[tuple[str, str]]:
    """Method and path of every route that the pack serves."""
    sources = "".join(path.read_text("utf-8") for path in sorted((ROOT / "nodes").glob("*.py")))
    found = re.findall(r'(?<!``)serve\("([^"]+)"((?:,\s*[A-Z]+=\w+)+)\)', sources)
    return [(method, path) for path, handlers in found for method in re.findall(r"([A-Z]+)=", handlers)]


PARTS = [
    "..", "%2e%2e", "..%2f..", "%2Fetc%2Fpasswd", "C:%5CWindows", "%00", "x", "🐶", "x" * 3000, "%ff%fe", "con", "~",
    "*", ".lock", "class_images", "%0d%0aX-Evil:1", " ", "subjectbooth", ".", "%5c%5chost%5cshare",
]  # fmt: skip
BODIES = [b"", b"{}", b"[]", b"null", b"{", b"[" * 30000, b"\xff\xfe", b"1e999", b'{"a":' * 9000, b"x" * 100_000]
NAMES = ["folder", "name", "since", "images", "resolution", "crop", "sample", "token", "class_word", "lora_name", "x"]


def test_random_requests_to_the_routes(comfy: ComfyClient, nothing_outside: None) -> None:
    choose, count, routes = seeded_random("routes"), cases(200), _routes()
    assert len(routes) >= 3, "the routes are found in the sources"
    statuses: dict[int, int] = {}
    for number in range(count):
        method, path = choose.choice(routes)
        if choose.random() < 0.15:
            method = choose.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
        path = re.sub(r"\{\w+\}", lambda _: choose.choice(PARTS), path)
        query = {choose.choice(NAMES): str(strange_value(choose)) for _ in range(choose.choice((0, 1, 1, 2)))}
        url = "/subjectbooth" + urllib.parse.quote(path, safe="/%*~:.")
        if query:
            url += "?" + urllib.parse.urlencode(query, errors="replace")
        body: bytes | None = None
        if method in ("POST", "PUT", "PATCH") or choose.random() < 0.1:
            body = choose.choice(BODIES)
            if choose.random() < 0.7:
                body = json.dumps({choose.choice(NAMES): strange_value(choose) for _ in range(4)}).encode()
        request = urllib.request.Request(
            comfy.url + url,
            data=body,
            method=method,
            headers={"Content-Type": choose.choice(["application/json", "text/plain"])},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        statuses[status] = statuses.get(status, 0) + 1
        case = (number, method, url, body)
        assert status < 500, (case, content)
        assert b"Traceback" not in content, case
        assert str(ROOT).encode() not in content, case
        assert comfy.request("GET", "/queue") == {"queue_running": [], "queue_pending": []}, case
    report("requests to the routes", cases=count, outcomes={str(key): n for key, n in sorted(statuses.items())})
    assert statuses.get(400, 0) > count // 10
