"""Convert workflow files of the graph editor to the API format of ComfyUI's /prompt.

The editor does this conversion in the browser; a test compares the two. Notes, reroutes, bypassed nodes and subgraphs,
which only exist in the editor, are resolved. Primitive nodes and values promoted to a subgraph's node are not
supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

EDITOR_ONLY = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
UPLOADS = ("image_upload", "video_upload", "audio_upload")
FROM_OUTSIDE, TO_OUTSIDE = -10, -20
"""Node ids that the editor uses in a subgraph's links for its inputs and outputs."""

Node = Mapping[str, Any]


@dataclass(frozen=True)
class _Graph:
    """A workflow, or a subgraph in the place of one node.

    Attributes:
        nodes: by id.
        links: source node and output by link id.
        ends: link id by output of a subgraph.
        subgraphs: the workflow's subgraphs by id, which is the type of the nodes that stand for them.
        place: the graph and the node that a subgraph is in; None for the workflow.
        path: prefix of the nodes' ids in the API format ("12:").
    """

    nodes: Mapping[int, Node]
    links: Mapping[int, tuple[int, int]]
    ends: Mapping[int, int]
    subgraphs: Mapping[str, Node]
    place: tuple[_Graph, Node] | None = None
    path: str = ""

    def inside(self, node: Node) -> _Graph:
        """The subgraph that a node stands for."""
        subgraph = self.subgraphs[node["type"]]
        return _Graph(
            {inner["id"]: inner for inner in subgraph["nodes"]},
            {link["id"]: (link["origin_id"], link["origin_slot"]) for link in subgraph["links"]},
            {link["target_slot"]: link["id"] for link in subgraph["links"] if link["target_id"] == TO_OUTSIDE},
            self.subgraphs,
            (self, node),
            f"{self.path}{node['id']}:",
        )


def to_api(workflow: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert a workflow saved by the editor (schema 0.4).

    Args:
        workflow: the parsed JSON.
        definitions: the response of /object_info.

    Raises:
        ValueError: a node is not installed or not supported by this converter.
    """
    subgraphs = {entry["id"]: entry for entry in workflow.get("definitions", {}).get("subgraphs", [])}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    whole = _Graph({node["id"]: node for node in workflow["nodes"]}, links, {}, subgraphs)
    prompt = {}
    for graph, node in _all_nodes(whole):
        kind = node["type"]
        if kind not in definitions:
            raise ValueError(f"Node {node['id']} is of type {kind!r}, which is not installed in this ComfyUI.")
        inputs = _widget_values(node, definitions[kind])
        for socket in node.get("inputs") or []:
            if socket.get("link") is None:
                continue
            source = _source(socket["link"], graph)
            if source is None:
                inputs.pop(socket["name"], None)
            else:
                inputs[socket["name"]] = source
        title = node.get("title") or definitions[kind].get("display_name") or kind
        prompt[f"{graph.path}{node['id']}"] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _all_nodes(graph: _Graph) -> Iterator[tuple[_Graph, Node]]:
    """The nodes that are executed, with the graph that each is in."""
    for node in sorted(graph.nodes.values(), key=lambda n: n.get("order", 0)):
        if node["type"] in EDITOR_ONLY or node["type"] == "Reroute" or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] in graph.subgraphs:
            yield from _all_nodes(graph.inside(node))
        else:
            yield graph, node


def _source(link: int, graph: _Graph) -> list[Any] | None:
    """The node and output that a link comes from, through reroutes, subgraphs and bypassed nodes; None if muted."""
    node_id, slot = graph.links[link]
    if node_id == FROM_OUTSIDE:
        assert graph.place is not None
        outside, place = graph.place
        name = graph.subgraphs[place["type"]]["inputs"][slot]["name"]
        outer = next((socket.get("link") for socket in place["inputs"] if socket["name"] == name), None)
        return None if outer is None else _source(outer, outside)
    node = graph.nodes[node_id]
    if node.get("mode", 0) == MUTED:
        return None
    if node["type"] == "Reroute":
        inner = node["inputs"][0].get("link")
        return None if inner is None else _source(inner, graph)
    if node.get("mode", 0) == BYPASSED:
        wanted = node["outputs"][slot]["type"]
        sockets = node.get("inputs") or []
        # Like the editor: the input with the same index, otherwise the first of the same type.
        for socket in [*sockets[slot : slot + 1], *sockets]:
            if socket["type"] == wanted and socket.get("link") is not None:
                return _source(socket["link"], graph)
        return None
    if node["type"] in graph.subgraphs:
        inside = graph.inside(node)
        return _source(inside.ends[slot], inside) if slot in inside.ends else None
    if node["type"] == "PrimitiveNode":
        raise ValueError(f"Node {node_id} is a PrimitiveNode; set its value in the node it is connected to.")
    return [f"{graph.path}{node_id}", slot]


def _widget_values(node: Mapping[str, Any], definition: Mapping[str, Any]) -> dict[str, Any]:
    values = node.get("widgets_values") or []
    if isinstance(values, Mapping):
        return dict(values)
    names = widget_names(definition)
    inputs = {}
    for name, value in zip(names, values, strict=False):
        if name is not None:
            # A plain list would be parsed as a link.
            inputs[name] = {"__value__": value} if isinstance(value, list) else value
    return inputs


def widget_names(definition: Mapping[str, Any]) -> list[str | None]:
    """The inputs that the values of `widgets_values` belong to, in order; None for a value used only by the editor."""
    names: list[str | None] = []
    uploads = False
    for group in ("required", "optional"):
        for name, spec in (definition["input"].get(group) or {}).items():
            kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
            if not (isinstance(kind, list) or kind in WIDGET_TYPES) or options.get("forceInput"):
                continue
            names.append(name)
            if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
                names.append(None)  # "fixed", "randomize", ...
            uploads = uploads or any(options.get(key) for key in UPLOADS)
    if uploads:
        names.append(None)  # the upload button
    return names
