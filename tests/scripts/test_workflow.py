"""The converter from the editor's workflow files to the API format. (Against the real editor: tests/js.)"""

from __future__ import annotations

from typing import Any

import pytest

from subjectbooth.scripts.workflow import to_api, widget_names

DEFINITIONS: dict[str, Any] = {
    "Load": {"input": {"required": {"name": [["a", "b"], {}]}}, "display_name": "Load It"},
    "Upload": {
        "input": {
            "required": {"image": [["x.png"], {"image_upload": True}], "size": ["INT", {}]},
            "optional": {"edits": ["STRING", {}]},
        }
    },
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"default": 0}],
                "cfg": ["FLOAT", {}],
                "text": ["STRING", {"forceInput": True}],
            },
            "optional": {"note": ["STRING", {}]},
        }
    },
    "Steady": {"input": {"required": {"seed": ["INT", {"control_after_generate": False}], "n": ["INT", {}]}}},
    "Filter": {"input": {"required": {"model": ["MODEL"], "other": ["MODEL"]}}},
}


def graph(*nodes: dict[str, Any], links: list[list[Any]]) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links}


def make(id: int, type: str, values: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"id": id, "type": type, "widgets_values": values or [], "order": id, "mode": 0, **more}


def socket(name: str, link: int | None, type: str = "MODEL") -> dict[str, Any]:
    return {"name": name, "type": type, "link": link}


OUT = [{"name": "MODEL", "type": "MODEL"}]


def test_widget_order() -> None:
    assert widget_names(DEFINITIONS["Sample"]) == ["seed", None, "cfg", "note"]
    assert widget_names(DEFINITIONS["Steady"]) == ["seed", "n"]
    assert widget_names(DEFINITIONS["Upload"]) == ["image", "size", "edits", None], "the button comes last"


def test_values_links_and_titles() -> None:
    workflow = graph(
        make(1, "Load", ["b"]),
        make(2, "Sample", [5, "randomize", 1.5, "hi"], inputs=[socket("model", 7), socket("cfg", None, "FLOAT")]),
        make(3, "Note", ["for people"]),
        links=[[7, 1, 0, 2, 0, "MODEL"]],
    )
    prompt = to_api(workflow, DEFINITIONS)
    assert set(prompt) == {"1", "2"}
    assert prompt["1"]["_meta"] == {"title": "Load It"}
    assert prompt["2"]["inputs"] == {"model": ["1", 0], "seed": 5, "cfg": 1.5, "note": "hi"}


def test_a_list_of_uploads_is_not_read_as_a_link() -> None:
    prompt = to_api(graph(make(1, "Upload", [["a.png", "b.png"], 3, "{}", "image"]), links=[]), DEFINITIONS)
    assert prompt["1"]["inputs"] == {"image": {"__value__": ["a.png", "b.png"]}, "size": 3, "edits": "{}"}


def test_a_subgraph_used_twice() -> None:
    """Its nodes come once per place, with the place's id in front."""
    inner = [
        make(2, "Sample", [1, "fixed", 2.0, ""], inputs=[socket("model", 5)]),
        make(3, "Filter", inputs=[socket("model", 6), socket("other", None)], outputs=OUT),
    ]
    links = [(5, 3, 0, 2, 0), (6, -10, 0, 3, 0), (7, 3, 0, -20, 0)]
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    subgraph = {
        "id": "box",
        "inputs": [{"name": "model"}],
        "nodes": inner,
        "links": [dict(zip(names, link, strict=True)) for link in links],
    }
    nodes = [
        make(1, "Load", ["a"]),
        make(8, "box", inputs=[socket("model", 1)], outputs=OUT),
        make(9, "box", inputs=[socket("model", 2)], outputs=OUT),
        make(10, "Filter", inputs=[socket("model", 3), socket("other", None)], outputs=OUT),
    ]
    outer = [[1, 1, 0, 8, 0, "MODEL"], [2, 8, 0, 9, 0, "MODEL"], [3, 9, 0, 10, 0, "MODEL"]]
    prompt = to_api({**graph(*nodes, links=outer), "definitions": {"subgraphs": [subgraph]}}, DEFINITIONS)
    assert set(prompt) == {"1", "8:2", "8:3", "9:2", "9:3", "10"}
    assert prompt["8:2"]["inputs"]["model"] == ["8:3", 0] and prompt["8:3"]["inputs"]["model"] == ["1", 0]
    assert prompt["9:3"]["inputs"]["model"] == ["8:3", 0] and prompt["10"]["inputs"]["model"] == ["9:3", 0]


def test_bypassed_muted_and_rerouted_sources() -> None:
    links = [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"], [3, 3, 0, 4, 0, "MODEL"]]
    nodes = [
        make(1, "Load", ["a"]),
        make(2, "Filter", inputs=[socket("model", 1), socket("other", None)], outputs=OUT, mode=4),
        make(3, "Reroute", inputs=[socket("", 2, "*")], outputs=OUT),
        make(4, "Sample", [1, "fixed", 2.0, ""], inputs=[socket("model", 3)]),
    ]
    prompt = to_api(graph(*nodes, links=links), DEFINITIONS)
    assert set(prompt) == {"1", "4"}
    assert prompt["4"]["inputs"]["model"] == ["1", 0]
    nodes[0]["mode"] = 2
    prompt = to_api(graph(*nodes, links=links), DEFINITIONS)
    assert "model" not in prompt["4"]["inputs"]


def test_unknown_nodes_are_named() -> None:
    with pytest.raises(ValueError, match="Node 9 is of type 'Missing'"):
        to_api(graph(make(9, "Missing"), links=[]), DEFINITIONS)
