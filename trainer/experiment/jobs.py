"""The runs of an experiment as a list: plain values with keys, which can be carried out in any order and place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig
from ..files.storage import canonical_json, sha256_of
from .spec import DEMO_BASES, Spec

ConfigOf = Callable[[Mapping[str, Any]], TrainConfig]
"""Checks the options of a run before anything runs; returns its settings."""


@dataclass(frozen=True)
class Point:
    """A place in the grid.

    Attributes:
        labels: the label of the value on each axis, in the order of the axes.
        steps: of its run.
        job: key of the job that trains it.
    """

    labels: tuple[str, ...]
    seed: int
    steps: int
    job: str


@dataclass(frozen=True)
class Job:
    """A run, or several that differ in their steps only and continue one another.

    Attributes:
        key: 16 hex digits: a hash of the options.
        name: for the progress and for messages.
        options: of the training by name, without ``steps``; JSON values.
        steps: what is measured, ascending.
    """

    key: str
    name: str
    options: Mapping[str, Any]
    steps: tuple[int, ...]


def lay_out(spec: Spec, defaults: Mapping[str, Any], config_of: ConfigOf) -> tuple[list[Point], list[Job]]:
    """All points of the grid, and the runs that they need, each once.

    Args:
        defaults: the options' default values.
        config_of: checks the options of each point.

    Raises:
        SubjectBoothError: the options of a point cannot be used.
    """
    points: list[Point] = []
    jobs: dict[str, Job] = {}
    # The seed varies slowest, so that a grid that is stopped early has all variants.
    for seed, *choice in itertools.product(spec.seeds, *(axis.variants.items() for axis in spec.axes)):
        labels = tuple(label for label, _ in choice)
        varied = {name: value for _, variant in choice for name, value in variant.items()}
        base = varied.get("base", spec.settings.get("base"))
        on_demo = spec.on_demo if base in DEMO_BASES else {}
        options = {**defaults, **spec.settings, **on_demo, **varied, "seed": seed}
        config = config_of(options)
        steps = options.pop("steps")
        # A run continues a shorter one unless something depends on where it ends.
        identity = options if "steps" not in config.key_fields() else {**options, "steps": steps}
        key = sha256_of(canonical_json(identity))[:16]
        known = jobs.get(key)
        all_steps = tuple(sorted({steps, *(known.steps if known else ())}))
        jobs[key] = Job(key, known.name if known else _name(spec, labels, seed), options, all_steps)
        points.append(Point(labels, seed, steps, key))
    return points, list(jobs.values())


def _name(spec: Spec, labels: tuple[str, ...], seed: int) -> str:
    named = [f"{axis.name} {label}" for axis, label in zip(spec.axes, labels, strict=True) if axis.options != {"steps"}]
    return ", ".join([*named, f"seed {seed}"])
