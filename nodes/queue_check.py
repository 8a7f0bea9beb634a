"""A graph whose training cannot start is rejected as a whole, so that "1 job completed" never means "nothing trained".

LoadSubjectImages and GenerateClassPriors are output nodes, so that each can be run alone. ComfyUI queues every output
node whose own inputs are valid: if the checkpoint is missing, it would run the photos alone and report success.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from typing import Any

import execution
from server import PromptServer

import nodes

PREPARING = ("LoadSubjectImages", "GenerateClassPriors")
"""Nodes that are run for the sake of a later node, if there is one."""

Prompt = Mapping[str, Mapping[str, Any]]


def register() -> None:
    """Check prompts as they are queued. Called once; does nothing without a server (when a tool imports the nodes)."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(without_idle_preparation)


def without_idle_preparation(request: dict[str, Any]) -> dict[str, Any]:
    """Leave out nodes that only prepare what a rejected node needs.

    ComfyUI then rejects the whole request if nothing else is left to run, with the errors of the rejected nodes.

    Args:
        request: the body of a POST to /prompt; returned with ``partial_execution_targets`` set, or as it is.
    """
    prompt = request.get("prompt")
    if not isinstance(prompt, dict) or request.get("partial_execution_targets") is not None:
        return request
    if not all(isinstance(node, dict) for node in prompt.values()):
        return request
    outputs = {key for key, node in prompt.items() if _is_output(node)}
    needed_by = {
        key: later
        for key in outputs
        if prompt[key]["class_type"] in PREPARING and (later := _after(prompt, key, outputs))
    }
    if not needed_by:
        return request
    accepted = _accepted(prompt, set().union(*needed_by.values()))
    if accepted is None:
        return request
    idle = {key for key, later in needed_by.items() if not later & accepted}
    return {**request, "partial_execution_targets": sorted(outputs - idle)} if idle else request


def _is_output(node: Mapping[str, Any]) -> bool:
    kind = nodes.NODE_CLASS_MAPPINGS.get(node.get("class_type"))
    return getattr(kind, "OUTPUT_NODE", False) is True


def _after(prompt: Prompt, start: str, outputs: Set[str]) -> set[str]:
    """The output nodes that depend on a node and are not such a preparation themselves."""
    reached, todo = {start}, [start]
    while todo:
        source = todo.pop()
        for key, node in prompt.items():
            links = [value for value in node.get("inputs", {}).values() if isinstance(value, list) and len(value) == 2]
            if key not in reached and any(str(link[0]) == source for link in links):
                reached.add(key)
                todo.append(key)
    return {key for key in reached & outputs if prompt[key]["class_type"] not in PREPARING}


def _accepted(prompt: Prompt, targets: set[str]) -> set[str] | None:
    """Which of these output nodes ComfyUI would run; None if that cannot be known now."""
    # A copy: ComfyUI replaces values as it checks them, and would take the list that it makes of several uploads for a
    # link the second time.
    checking = execution.validate_prompt("subjectbooth", copy.deepcopy(prompt), sorted(targets))
    try:
        checking.send(None)  # it only waits for nodes whose own check is asynchronous
    except StopIteration as done:
        return set(done.value[2])
    except Exception:  # ComfyUI meets the same error in a moment, and reports it
        return None
    checking.close()
    return None
