"""Convert workflow files of the graph editor to the API format of ComfyUI's /prompt.

The editor does this conversion in the browser; a test compares the two. Notes, reroutes and bypassed nodes, which only
exist in the editor, are resolved. Subgraphs and primitive nodes are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EDITOR_ONLY = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
UPLOADS = ("image_upload", "video_upload", "audio_upload")


def to_api(workflow: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert a workflow saved by the editor (schema 0.4).

    Args:
        workflow: the parsed JSON.
        definitions: the response of /object_info.

    Raises:
        ValueError: a node is not installed or not supported by this converter.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt = {}
    for node in sorted(workflow["nodes"], key=lambda n: n.get("order", 0)):
        kind = node["type"]
        if kind in EDITOR_ONLY or kind == "Reroute" or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if kind not in definitions:
            raise ValueError(f"Node {node['id']} is of type {kind!r}, which is not installed in this ComfyUI.")
        inputs = _widget_values(node, definitions[kind])
        for socket in node.get("inputs") or []:
            if socket.get("link") is None:
                continue
            source = _source(socket["link"], nodes, links)
            if source is None:
                inputs.pop(socket["name"], None)
            else:
                inputs[socket["name"]] = source
        title = node.get("title") or definitions[kind].get("display_name") or kind
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _source(
    link: int, nodes: Mapping[int, Mapping[str, Any]], links: Mapping[int, tuple[int, int]]
) -> list[Any] | None:
    """The node and output that a link comes from, through reroutes and bypassed nodes; None for a muted node."""
    node_id, slot = links[link]
    node = nodes[node_id]
    if node.get("mode", 0) == MUTED:
        return None
    if node["type"] == "Reroute":
        inner = node["inputs"][0].get("link")
        return None if inner is None else _source(inner, nodes, links)
    if node.get("mode", 0) == BYPASSED:
        wanted = node["outputs"][slot]["type"]
        sockets = node.get("inputs") or []
        # Like the editor: the input with the same index, otherwise the first of the same type.
        for socket in [*sockets[slot : slot + 1], *sockets]:
            if socket["type"] == wanted and socket.get("link") is not None:
                return _source(socket["link"], nodes, links)
        return None
    if node["type"] == "PrimitiveNode":
        raise ValueError(f"Node {node_id} is a PrimitiveNode; set its value in the node it is connected to.")
    return [str(node_id), slot]


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
