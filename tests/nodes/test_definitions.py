"""The nodes as ComfyUI describes them to its editor and to API clients (/object_info)."""

from __future__ import annotations

from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient

MODULE = "custom_nodes.SubjectBooth"
IDS = {
    "LoadSubjectImages",
    "GenerateClassPriors",
    "DreamBoothLoRATrain",
    "ApplySubjectLoRA",
    "LoadDemoBase",
    "EvaluateSubjectLoRA",
}


@pytest.fixture(scope="module")
def definitions(_comfy_client: ComfyClient) -> dict[str, Any]:
    return {name: d for name, d in _comfy_client.object_info().items() if d["python_module"] == MODULE}


def inputs(definition: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    groups = (definition["input"].get(group) or {} for group in ("required", "optional"))
    return [(name, spec[0], spec[1] if len(spec) > 1 else {}) for group in groups for name, spec in group.items()]


def test_the_public_interface_is_there(definitions: dict[str, Any]) -> None:
    assert set(definitions) >= IDS
    for name, definition in definitions.items():
        assert definition["category"].startswith("SubjectBooth"), name
        assert definition["description"], name
        assert definition["display_name"], name


def test_every_input_and_output_has_a_tooltip(definitions: dict[str, Any]) -> None:
    silent = [f"{n}.{i}" for n, d in definitions.items() for i, _, options in inputs(d) if not options.get("tooltip")]
    silent += [
        f"{n} -> {output}"
        for n, d in definitions.items()
        for output, tooltip in zip(d["output_name"], d["output_tooltips"], strict=True)
        if not tooltip
    ]
    assert not silent


def test_numbers_can_be_set_as_finely_as_they_are_meant(definitions: dict[str, Any]) -> None:
    """Without step and round the editor shows a learning rate of 1e-4 as 0.0."""
    for name, definition in definitions.items():
        for number, kind, options in inputs(definition):
            if kind == "FLOAT":
                assert options.get("step") and options.get("round"), f"{name}.{number}"
                assert options["round"] <= options["step"], f"{name}.{number}"
                default = options["default"]
                assert abs(round(default / options["round"]) * options["round"] - default) < 1e-12, f"{name}.{number}"
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"], f"{name}.{number}"


def test_few_inputs_are_in_sight_and_labels_are_short(definitions: dict[str, Any]) -> None:
    """Nodes 2.0 folds `advanced` inputs away, and cuts labels off after about 13 letters."""
    widgets = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    for name, definition in definitions.items():
        mine = [(i, options) for i, kind, options in inputs(definition) if kind in widgets or isinstance(kind, list)]
        assert len([i for i, options in mine if not options.get("advanced")]) <= 8, name
        assert [i for i, options in mine if len(options.get("display_name") or i) > 13 and "prompts" not in i] == [], (
            name
        )
    shown = {i for i, _, options in inputs(definitions["DreamBoothLoRATrain"]) if not options.get("advanced")}
    sockets = {"model", "clip", "vae", "subject", "class_priors", "options"}
    assert shown - sockets == {
        "steps", "learning_rate", "rank", "preservation", "preset", "output_name", "validation_prompts",
    }  # fmt: skip


def test_the_nodes_are_found_by_what_people_type(definitions: dict[str, Any]) -> None:
    """By aliases, which js/search.js passes on where ComfyUI does not know them. tests/js types them."""
    for kind in ("LoadSubjectImages", "DreamBoothLoRATrain", "ApplySubjectLoRA"):
        definition = definitions[kind]
        assert "dreambooth" in definition["display_name"].lower()
        (_, _, options), *_ = inputs(definition)
        aliases = " ".join(definition.get("search_aliases") or options["search_aliases"])
        assert [w for w in ("dreambooth", "training", "photos", "fine-tune", "face") if w not in aliases] == [], kind


def test_no_seed_changes_by_itself(definitions: dict[str, Any]) -> None:
    """The editor would randomise an input called seed after each run, and every run would train again."""
    for name, definition in definitions.items():
        for seed, kind, options in inputs(definition):
            if kind == "INT" and seed in ("seed", "noise_seed"):
                assert options.get("control_after_generate") is False, f"{name}.{seed}"
