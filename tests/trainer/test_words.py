"""The trainer's messages name no front end's inputs: a graph and a shell each add where a thing is set."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import pytest

from subjectbooth.trainer import topics
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.shell.terms import TERMS, error_in_shell, note_in_shell
from subjectbooth.trainer.topics import Note, Term, Topic, note_in_terms

TRAINER = Path(topics.__file__).parent
GRAPH = re.compile(
    r"\b[Ww]ir(?:e|es|ed|ing)\b|\b(?:MODEL|CLASS_PRIORS|SUBJECT_LORA|MASK|IMAGE)\b|\b[Nn]odes?\b"
    r"|ModelSamplingDiscrete|Load ?Subject ?Images|Generate ?Class ?Priors|--output-directory|--fp32-"
)
"""Words of a graph. CLIP and VAE are also names of models."""
CLEANS_COMFYUI = TRAINER / "shell" / "clean.py"
"""The one command that works on ComfyUI's own folders."""


def _strings(source: str) -> list[str]:
    """All string literals but docstrings."""
    tree = ast.parse(source)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def test_every_literal_but_docstrings_is_read() -> None:
    assert sorted(_strings('"""wire"""\nx: int = 1\n"""MODEL"""\nraise E(f"wire {x}", "a" "b")')) == ["ab", "wire "]


def test_no_string_of_the_trainer_names_a_graphs_inputs() -> None:
    found = []
    for path in sorted(TRAINER.rglob("*.py")):
        for text in _strings(path.read_text("utf-8")):
            if GRAPH.search(text) or ("ComfyUI" in text and path != CLEANS_COMFYUI):
                found.append(f"{path.relative_to(TRAINER)}: {text}")
    assert not found


def test_every_node_translates_the_trainers_errors() -> None:
    nodes = 0
    for path in (TRAINER.parent / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "execute":
                nodes += 1
                assert "graph_messages()" in map(ast.unparse, node.decorator_list), path.name
    assert nodes == 7


def test_a_front_end_adds_its_place_and_its_advice() -> None:
    error = SubjectBoothError("the text encoder gives NaN", "numbers", "use another", about=Topic.TEXT_ENCODER)
    assert str(error) == "The text encoder gives NaN. Required: numbers. Use another."
    assert (error.where, error.about) == ("text encoder", Topic.TEXT_ENCODER)
    terms = {Topic.TEXT_ENCODER: Term("CLIP", "Connect another one")}
    assert str(error.in_terms(terms)) == (
        "The text encoder gives NaN. Required: numbers. Use another. Connect another one. Where: CLIP"
    )
    assert error.in_terms({}) is error
    placed = SubjectBoothError("no room", "some", "free some", "/a/b", Topic.OUTPUT_FOLDER)
    advised = placed.in_terms({Topic.OUTPUT_FOLDER: Term("elsewhere", "Use --out")})
    assert str(advised) == "No room. Required: some. Free some. Use --out. Where: /a/b"  # a path is not replaced


def test_a_warning_keeps_its_topic() -> None:
    terms = {Topic.MASK: Term(advice="Connect one")}
    for note in (Note("No mask", Topic.MASK), copy.deepcopy(Note("No mask", Topic.MASK))):
        assert note_in_terms(note, terms) == "No mask. Connect one."
        assert note_in_terms(note, {}) == "No mask"
    assert note_in_terms("No mask", terms) == "No mask"


@pytest.mark.parametrize("topic", Topic)
def test_a_shell_reads_no_word_of_a_graph(topic: Topic) -> None:
    said = error_in_shell(SubjectBoothError("x", "y", "z", about=topic))
    said += note_in_shell(Note("x", topic))
    assert not GRAPH.search(said) and "ComfyUI" not in said
    expected = TERMS.get(topic, Term())
    assert expected.where in said and expected.advice in said
