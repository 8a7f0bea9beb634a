"""DreamBoothOptions in the real ComfyUI: its settings reach the trainer, and bad ones are answered before the run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient, NodeFailed, PromptRejected
from subjectbooth.tests.nodes.fuzz_values import is_refused_as
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import subject_node, train_node, upload_cat


def _graph(client: ComfyClient, train: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(client)),
        "9": node("DreamBoothOptions", **{**client.defaults("DreamBoothOptions"), **options}),
        "11": train_node(options=["9", 0], **train),
    }


def test_options_reach_the_trainer_and_every_layer_loads(comfy: ComfyClient) -> None:
    result = comfy.run(
        _graph(
            comfy,
            {"output_name": "options", "steps": 2},
            lora_targets="all",
            use_rslora=True,
            snr_gamma=5.0,
            ema_decay=0.9,
            flip=True,
            optimizer="adamw8bit",
            timestep_sampling="logit_normal",
            timestep_shift=3.0,
        )
    )
    text = result.outputs["11"]["text"][0]
    matched, total = text.split("matched ")[1].split(",")[0].split("/")
    assert matched == total
    assert int(total) > 24  # more than the attention layers
    path = comfy.server.models_dir / "loras" / "options.safetensors"
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert metadata["ss_min_snr_gamma"] == "5"
    assert metadata["subjectbooth.timestep_sampling"] == "logit_normal"
    assert metadata["subjectbooth.timestep_shift"] == "3"
    assert float(metadata["ss_network_alpha"]) == 4.0  # 2 * sqrt(4)
    said = [str(event.data.get("text")) for event in result.of_type("progress_text")]
    assert any("this run uses adamw" in text for text in said)


@pytest.mark.parametrize(
    ("train", "options", "sentence"),
    [
        ({"rank": -1}, {}, "Value -1 smaller than min of 0"),
        ({}, {"lora_dropout": 2.0}, "bigger than max of 0.99"),
        ({"output_name": "../escape"}, {}, "leaves the LoRA folder"),
    ],
)
def test_bad_settings_are_answered_before_anything_runs(
    comfy: ComfyClient, train: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    graph = _graph(comfy, train, **options)
    with pytest.raises(PromptRejected, match=sentence) as rejected:
        comfy.run(graph, targets=["11"])
    assert [len(entry["errors"]) for entry in rejected.value.node_errors.values()] == [1]


@pytest.mark.parametrize(
    ("train", "options", "sentence"),
    [
        ({"learning_rate": float("nan")}, {}, "learning_rate nan. Required: a number from 1e-09 to 1"),
        ({"lr_scheduler": "sometimes"}, {}, "lr_scheduler 'sometimes'. Required: one of constant, cosine, linear"),
        ({"lr_warmup_steps": 50}, {}, "lr_warmup_steps 50 with 3 steps"),
        ({"lr_warmup_steps": 150, "preset": "fast test"}, {}, "lr_warmup_steps 150 with 100 steps"),
        ({"preset": "cat"}, {}, "preset 'cat'. Required: one of custom, fast test"),
        ({}, {"optimizer": "sgd"}, "optimizer 'sgd'"),
    ],
)
def test_what_comfyui_does_not_check_is_one_sentence(
    comfy: ComfyClient, train: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((NodeFailed, PromptRejected)) as failure:
        comfy.run(_graph(comfy, train, **options), targets=["11"])
    assert is_refused_as(failure.value, sentence), failure.value
