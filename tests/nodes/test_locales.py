"""The words in English are the nodes' own; every other language has a text for each of them, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.conftest import module_alone

ROOT = Path(__file__).resolve().parents[2]
# Lists of files or of ComfyUI's own names.
OTHERS = {"images", "folder", "sample", "lora_name", "sampler_name", "scheduler"}
LOCALES = ROOT / "locales"
NODE_IDS = sorted(path.name for path in (ROOT / "js" / "docs").iterdir())


def read(language: str, name: str) -> dict[str, Any]:
    words: dict[str, Any] = json.loads((LOCALES / language / name).read_text("utf-8"))
    return words


def places(words: Any, at: str = "") -> dict[str, str]:
    """Text by its place ("DreamBoothLoRATrain.inputs.steps.tooltip")."""
    if not isinstance(words, dict):
        return {at: words}
    return {path: text for key, value in words.items() for path, text in places(value, f"{at}.{key}").items()}


def own_words(comfy: ComfyClient) -> dict[str, str]:
    """The nodes' own strings by their places in nodeDefs.json."""
    words = {}
    for kind, info in comfy.object_info().items():
        if info["category"] != "SubjectBooth":
            continue
        words |= {f".{kind}.display_name": info["display_name"], f".{kind}.description": info["description"]}
        for group in ("required", "optional"):
            for name, (_, *about) in info["input"].get(group, {}).items():
                given = about[0] if about else {}
                words[f".{kind}.inputs.{name}.name"] = given.get("display_name") or name
                words[f".{kind}.inputs.{name}.tooltip"] = given.get("tooltip", "")
                if name not in OTHERS:
                    words |= {f".{kind}.inputs.{name}.options.{option}": option for option in given.get("options", [])}
        for index, name in enumerate(info["output_name"]):
            words[f".{kind}.outputs.{index}.name"] = name
            words[f".{kind}.outputs.{index}.tooltip"] = info["output_tooltips"][index]
    return words


def test_english_is_what_the_nodes_say(comfy: ComfyClient) -> None:
    assert places(read("en", "nodeDefs.json")) == own_words(comfy), "run scripts/make_locales.py"


@pytest.mark.parametrize("name", ["nodeDefs.json", "main.json", "settings.json"])
def test_every_text_is_there_in_russian(name: str) -> None:
    english, russian = places(read("en", name)), places(read("ru", name))
    assert set(russian) == set(english)
    assert all(text.strip() for text in [*english.values(), *russian.values()])
    sentences = {place: text for place, text in russian.items() if place.endswith(("tooltip", "description"))}
    same = [place for place, text in sentences.items() if not re.search("[а-яё]", text, re.IGNORECASE)]
    assert not same, "not translated"


def test_settings_in_english_are_what_the_scripts_say() -> None:
    script = (ROOT / "js" / "about.js").read_text("utf-8")
    found = re.findall(r'panel\("(\w+)", "([^"]+)", "([^"]+)"\)', script)
    words = {f"SubjectBooth_Panels_{name}": {"name": label, "tooltip": tip} for name, label, tip in found}
    assert len(words) == len(re.findall(r"\bpanel\(", script)) - 1 > 0
    assert words == read("en", "settings.json")


def test_comfyui_serves_them(comfy: ComfyClient) -> None:
    served = comfy.request("GET", "/i18n")
    for language in ("en", "ru"):
        assert (
            served[language]["nodeDefs"]["DreamBoothLoRATrain"]
            == read(language, "nodeDefs.json")["DreamBoothLoRATrain"]
        )
        assert served[language]["settings"] == read(language, "settings.json")
        assert served[language]["settingsCategories"]["SubjectBooth"] == "SubjectBooth"


@pytest.mark.parametrize("language", ["en", "ru"])
@pytest.mark.parametrize("node_id", NODE_IDS)
def test_a_help_page_has_a_picture_that_is_served(comfy: ComfyClient, node_id: str, language: str) -> None:
    """The front end (1.32.9) puts /extensions/<pack>/docs/ before a relative address, not the page's own folder."""
    page = (ROOT / "js" / "docs" / node_id / f"{language}.md").read_text("utf-8")
    served = comfy.request("GET", f"/extensions/SubjectBooth/docs/{node_id}/{language}.md")
    assert served.decode("utf-8") == page
    (address,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert address == f"{node_id}/node.jpg"
    picture = comfy.request("GET", f"/extensions/SubjectBooth/docs/{address}")
    assert picture.startswith(b"\xff\xd8\xff") and len(picture) <= 60_000


def test_help_pages_are_those_of_the_nodes(comfy: ComfyClient) -> None:
    assert NODE_IDS == sorted(k for k, v in comfy.object_info().items() if v["category"] == "SubjectBooth")


@pytest.mark.parametrize("language", ["en", "ru"])
def test_no_two_inputs_of_a_node_have_the_same_label(language: str) -> None:
    for kind, words in read(language, "nodeDefs.json").items():
        labels = [entry["name"] for entry in words.get("inputs", {}).values()]
        assert sorted(labels) == sorted(set(labels)), kind


@pytest.mark.parametrize("language", ["en", "ru"])
def test_the_trainers_help_shows_each_preset_with_its_values_and_source(language: str) -> None:
    presets = module_alone("presets").PRESETS
    page = (ROOT / "js" / "docs" / "DreamBoothLoRATrain" / f"{language}.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"][2:]
    shown = {
        name: {"steps": int(steps), "learning_rate": float(rate), "rank": int(rank), "network_alpha": float(rank)}
        for name, steps, rate, rank, source in rows
        if source
    }
    assert {name: {**values, "prior_loss_weight": 1.0} for name, values in shown.items()} == presets
    tooltip = read(language, "nodeDefs.json")["DreamBoothLoRATrain"]["inputs"]["preset"]["tooltip"]
    for name, values in presets.items():
        numbers = [f"{values[key]:g}" for key in ("steps", "learning_rate", "rank")]
        assert re.search(rf"{name}: {numbers[0]} \w+, {re.escape(numbers[1])}, \w+ {numbers[2]}\b", tooltip), name
